"""Adapters whose files are alike: after the first, they are read quickly."""

from __future__ import annotations

import pytest
import torch
from dun_zoo import ZOO

import lorun_adapt
from lorun_adapt.peft_format.reader import Reader
from lorun_adapt.terms.term import Term


@pytest.fixture
def read_in_full(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read in full."""
    seen: list[str] = []
    adapter = Reader.adapter
    monkeypatch.setattr(Reader, "adapter", lambda self, *args: seen.append(args[-1]) or adapter(self, *args))
    return seen


@pytest.mark.parametrize("name", ["list_of_blocks", "list_of_raw_kernels", "attention"])
def test_the_second_set_is_read_quickly_and_is_the_same(name: str, read_in_full: list[str], tmp_path) -> None:
    """Layers with a bias too, whose files have it in two forms."""
    case = ZOO[name]()
    lorun = lorun_adapt.convert(case.net, rank=1)
    lorun.copy_adapter("default", "other")
    with torch.no_grad():
        for term in lorun.adapters["other"].modules():  # other biases may be stored in other forms
            for parameter in term.parameters() if isinstance(term, Term) else ():
                parameter.mul_(1.5)
    lorun.save_pretrained(tmp_path)
    fresh = lorun_adapt.from_pretrained(tmp_path, case.net)
    fresh.load_adapter(tmp_path / "adapters/default", "first")
    read_in_full.clear()
    fresh.load_adapter(tmp_path / "adapters/other", "second")
    assert not read_in_full
    for which, original in (("first", "default"), ("second", "other")):
        found, expected = (net.adapters[key].state_dict() for net, key in ((fresh, which), (lorun, original)))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
