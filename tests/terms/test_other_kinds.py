"""Terms of a kind that PEFT cannot represent, in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dun_zoo import Case
from peft import LoraConfig

import lorun_adapt
from lorun_adapt.terms.lowrank import LowRank
from lorun_adapt.terms.registry import TERMS


class OwnLowRank(LowRank):
    def as_lora(self) -> None:  # type: ignore[override]
        return None


class OwnConfig(LoraConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "OWN"


def test_a_file_in_another_dtype(monkeypatch: pytest.MonkeyPatch, blocks: Case, tmp_path: Path) -> None:
    monkeypatch.setitem(TERMS, "OWN", OwnLowRank)
    lorun = lorun_adapt.convert(blocks.net, OwnConfig(r=2, lora_alpha=2))
    lorun.save_pretrained(tmp_path / "half", torch.float16)
    loaded = lorun_adapt.from_pretrained(tmp_path / "half", blocks.net)
    assert {type(m) for m in loaded.adapters.modules() if isinstance(m, LowRank)} == {OwnLowRank}
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
