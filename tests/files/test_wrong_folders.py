"""Folders from anyone: what is wrong with them is said in one sentence, and nothing changes."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dun_zoo import ZOO, Block, Denoiser, HeadBodyTail, ListOfBlocks
from PIL import Image
from safetensors.torch import load, save_file

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel
from lorun_adapt.cli import main as cli
from lorun_adapt.disk import locks
from lorun_adapt.disk.folder import sha256
from lorun_adapt.files.description import as_text

STAGE = "adapters/default/stage_02"
TENSORS, CONFIG = f"{STAGE}/adapter_model.safetensors", f"{STAGE}/adapter_config.json"
BODY = "base_model.model.denoiser.body.lora_A.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "saved"
    lorun_adapt.convert(ZOO["list_of_blocks"]().net, rank=2).save_pretrained(folder)
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "saved"))


@pytest.fixture(scope="module")
def lorun(original: Path) -> LoRunModel:
    return lorun_adapt.from_pretrained(original, ZOO["list_of_blocks"]().net)


def rehash(folder: Path) -> None:
    """Make every hash right again, so that what comes after the hashes is met."""
    description = json.loads((folder / "lorun_config.json").read_text())
    description.pop("sha256", None)
    for name in description.get("files", {}):
        if (folder / name).is_file():
            description["files"][name] = sha256(folder / name)
    (folder / "lorun_config.json").write_text(as_text(description))


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    held = json.loads(file.read_text())
    change(held)
    file.write_text(json.dumps(held))


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    held = load(file.read_bytes())
    change(held)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, file)


def header(file: Path, change: Callable[[bytes], bytes], length: int | None = None) -> None:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    new = change(content[8 : 8 + size])
    file.write_bytes(struct.pack("<Q", len(new) if length is None else length) + new + content[8 + size :])


def description(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "lorun_config.json", change)


def config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / CONFIG, change)


def tensors(change: Callable[[dict[str, torch.Tensor]], object], name: str = TENSORS) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder / name, change)


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))  # type: ignore[return-value]


def link_out(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)


def pipe(folder: Path) -> None:
    (folder / TENSORS).unlink()
    os.mkfifo(folder / TENSORS)


def torch_file(folder: Path, name: str) -> None:
    torch.save(load((folder / name).read_bytes()), folder / name)


def only_a_pickle(folder: Path) -> None:
    torch.save(load((folder / TENSORS).read_bytes()), folder / STAGE / "adapter_model.bin")
    (folder / TENSORS).unlink()


def many_entries(content: bytes) -> bytes:
    held = json.loads(content)
    held.update({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)})
    return json.dumps(held).encode()


def claims(shape: list[int]) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        held = json.loads(content)
        held[BODY]["shape"] = shape
        return json.dumps(held).encode()

    return change


def set_site(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda held: held["groups"][0]["sites"][1].update({key: value})


# What is done to a folder; whether its hashes are made right again; what the sentence says.
HURT: dict[str, tuple[Callable[[Path], object], bool, str]] = {
    "truncated": (rewrite(TENSORS, lambda c: c[:-9]), True, "safetensors file, found damage"),
    "flipped": (rewrite(TENSORS, lambda c: c[:-9] + bytes([c[-9] ^ 4]) + c[-8:]), False, "has the wrong hash"),
    "flipped_header": (rewrite(TENSORS, lambda c: c[:9] + bytes([c[9] ^ 1]) + c[10:]), True, "JSON"),
    "empty": (rewrite(TENSORS, lambda c: b""), True, "found 0 bytes"),
    "few_bytes": (rewrite(TENSORS, lambda c: c[:7]), True, "found 7 bytes"),
    "overlong_header": (lambda f: header(f / TENSORS, lambda h: h, 2**60), True, "header of at most"),
    "overlong_header_padded": (lambda f: header(f / TENSORS, lambda h: h + b" " * 200_000), True, "header|bytes"),
    "header_no_json": (lambda f: header(f / TENSORS, lambda h: b"{" + h), True, "not valid JSON"),
    "header_a_list": (lambda f: header(f / TENSORS, lambda h: b"[]"), True, "safetensors header, found list"),
    "duplicate_key": (
        lambda f: header(f / TENSORS, lambda h: h.rstrip()[:-1] + b"," + h.strip()[1:]),
        True,
        "appears twice",
    ),
    "hundreds_of_thousands": (lambda f: header(f / TENSORS, many_entries), True, "bytes|header"),
    "claims_too_much": (lambda f: header(f / TENSORS, claims([2**40, 8, 3, 3])), True, r"\(rank, 8, 3, 3\)"),
    "claims_other_sides": (lambda f: header(f / TENSORS, claims([2, 8, 9])), True, r"\(rank, 8, 3, 3\)"),
    "claims_negative": (lambda f: header(f / TENSORS, claims([-2, 8, 3, 3])), True, r"\(rank, 8, 3, 3\)"),
    "claims_floats": (lambda f: header(f / TENSORS, claims([2.0, 8, 3, 3])), True, "a shape and a dtype"),  # type: ignore[list-item]
    "huge_file": (lambda f: os.truncate(f / TENSORS, 2**33), False, "expected at most"),
    "a_folder": (lambda f: ((f / TENSORS).unlink(), (f / TENSORS).mkdir()), False, "(Is a dir|not a regular)"),
    "a_pipe": (pipe, False, "not a regular file"),
    "missing_file": (lambda f: (f / TENSORS).unlink(), False, "adapter_model.safetensors: No such file"),
    "missing_tensor": (tensors(lambda t: t.pop(BODY)), True, "both factors of 'denoiser.body.weight', found one"),
    "missing_pair": (
        tensors(lambda t: (t.pop(BODY), t.pop(BODY.replace("A", "B")))),
        True,
        "the factors of 'denoiser.body.weight'|the tensor",
    ),
    "missing_private": (tensors(lambda t: t.pop("base_model.model.step")), True, "the tensor 'step', found none"),
    "extra_tensor": (tensors(lambda t: t.update(extra=torch.zeros(2))), True, "only the network's tensors.*'extra'"),
    "wrong_shape": (tensors(lambda t: t.update({BODY: t[BODY].flatten(1)})), True, r"\(rank, 8, 3, 3\)"),
    "wrong_dtype": (tensors(lambda t: t.update({BODY: t[BODY].to(torch.int8)})), True, "torch.float32, found .*int8"),
    "wrong_private_dtype": (
        tensors(lambda t: t.update({"base_model.model.step": torch.tensor(True)})),
        True,
        "torch.float32, found .*bool",
    ),
    "rank_of_tensors": (tensors(lambda t: t.update({BODY: t[BODY][:1]})), True, "factors of rank 2 .*ranks"),
    "rank_too_high": (
        tensors(
            lambda t: t.update({BODY: torch.zeros(300, 8, 3, 3), BODY.replace("A", "B"): torch.zeros(8, 300, 1, 1)})
        ),
        True,
        r"\(rank, 8, 3, 3\)",
    ),
    "nan": (tensors(lambda t: t[BODY].view(-1)[3].fill_(float("nan"))), True, "has NaN or Inf"),
    "inf_private": (tensors(lambda t: t["base_model.model.step"].fill_(float("inf"))), True, "has NaN or Inf"),
    "no_config": (lambda f: (f / CONFIG).unlink(), False, "adapter_config.json: No such file"),
    "config_no_json": (rewrite(CONFIG, lambda c: b"\x80\x04K\x01."), True, "not valid JSON"),
    "config_nested": (rewrite(CONFIG, lambda c: b'{"r":' * 9000 + b"1" + b"}" * 9000), True, "not valid JSON"),
    "config_huge": (rewrite(CONFIG, lambda c: c + b" " * 2**20), True, "expected at most"),
    "config_twice": (rewrite(CONFIG, lambda c: b'{"r": 1, "r": 2}'), True, "appears twice"),
    "another_method": (config(lambda c: c.update(peft_type="ADALORA")), True, "peft_type 'LORA'.*ADALORA"),
    "rank_zero": (config(lambda c: c.update(r=0)), True, "rank of 1 or more"),
    "rank_negative": (config(lambda c: c.update(r=-2)), True, "rank of 1 or more"),
    "alpha_out_of_range": (rewrite(CONFIG, lambda c: c.replace(b'alpha": 2', b'alpha": 1e999')), True, "out of range"),
    "alpha_nan": (rewrite(CONFIG, lambda c: c.replace(b'alpha": 2', b'alpha": NaN')), True, "out of range"),
    "many_digits": (rewrite(CONFIG, lambda c: c.replace(b'"r": 2', b'"r": ' + b"9" * 5000)), True, "JSON|rank"),
    "unknown_option": (config(lambda c: c.update(use_qalora=True)), True, "no use_qalora"),
    "missing_stage": (lambda f: shutil.rmtree(f / STAGE), False, "No such file"),
    "extra_stage": (
        lambda f: shutil.copytree(f / STAGE, f / "adapters/default/stage_07"),
        True,
        "4 stages, found .*_07",
    ),
    "pickle": (rewrite(TENSORS, lambda c: pickle.dumps({"a": 1})), True, "found a pickle"),
    "torch_file": (lambda f: torch_file(f, TENSORS), True, "found a pickle"),
    "only_a_pickle": (only_a_pickle, False, "found a pickle at .*adapter_model.bin"),
    "link_out": (lambda f: link_out(f, TENSORS), True, "leads out of"),
    "config_link_out": (lambda f: link_out(f, CONFIG), True, "leads out of"),
    "stage_link_out": (lambda f: link_out(f, STAGE), True, "leads out of"),
    "description_link_out": (lambda f: link_out(f, "lorun_config.json"), False, "leads out of"),
    "no_description": (
        lambda f: (f / "lorun_config.json").unlink(),
        False,
        "no lorun_config.json|no adapters for the 4 stages",
    ),
    "description_no_json": (rewrite("lorun_config.json", lambda c: c[:-9]), False, "not valid JSON"),
    "description_a_list": (rewrite("lorun_config.json", lambda c: b"[1]"), False, "invalid 'format'"),
    "description_huge": (rewrite("lorun_config.json", lambda c: c + b" " * 2**24), False, "expected at most"),
    "edited_by_hand": (description(lambda d: d.update(network="Other")), False, "invalid 'sha256'"),
    "newer": (
        description(lambda d: d.update(format=3)),
        False,
        "has format 3, but this version reads formats up to 2",
    ),
    "format_true": (description(lambda d: d.update(format=True)), True, "invalid 'format'"),
    "another_class": (description(lambda d: d.update(network="Other")), True, "the class Other, found ListOfBlocks"),
    "set_elsewhere": (description(lambda d: d.update(adapters=["../../evil"])), True, "invalid 'adapters'"),
    "set_absolute": (description(lambda d: d.update(adapters=["/etc"])), True, "invalid 'adapters'"),
    "no_set": (description(lambda d: d.update(adapters=[])), True, "invalid 'adapters'"),
    "group_elsewhere": (description(lambda d: d["groups"][0].update(name="../x")), True, "invalid 'groups'"),
    "no_groups": (description(lambda d: d.update(groups=[])), True, "invalid 'groups'"),
    "no_such_module": (description(set_site("module", "blocks.9")), True, "blocks"),
    "module_twice": (description(set_site("module", "blocks.0")), True, "one appears twice"),
    "module_within": (
        description(set_site("module", "blocks.0.denoiser")),
        True,
        "one appears twice or inside|equal shape",
    ),
    "module_root": (description(set_site("module", "")), True, "invalid 'groups'"),
    "stage_gap": (description(set_site("stage", 10**12)), True, "invalid 'groups'"),
    "stage_twice": (description(set_site("stage", 0)), True, "invalid 'groups'"),
    "call_out_of_nowhere": (description(set_site("call", 7)), True, "one appears twice"),
    "active_unknown": (description(lambda d: d["active"].append("x")), True, "invalid 'active'"),
    "active_too_many": (description(lambda d: d["active"].append("default")), True, "invalid 'active'"),
    "errors_of_no_group": (description(lambda d: d["errors"].update(x=5)), True, "invalid 'errors'"),
    "errors_of_no_tensor": (description(lambda d: d["errors"]["denoiser"].update(x=[])), True, "invalid 'errors'"),
    "errors_too_large": (
        description(lambda d: [rows.append([1e200, 1]) or rows.pop(0) for rows in d["errors"]["denoiser"].values()]),
        True,
        "invalid 'errors'",
    ),
    "set_named_as_an_attribute": (description(lambda d: d.update(adapters=["training"])), True, "invalid 'adapters'"),
    "group_named_as_an_attribute": (
        description(lambda d: d["groups"][0].update(name="_modules")),
        True,
        "invalid 'groups'",
    ),
    "many_sets": (description(lambda d: d.update(adapters=[f"s{i}" for i in range(1000)])), True, "invalid 'adapters'"),
    "active_not_held": (
        description(lambda d: [d["files"].pop(name) for name in list(d["files"]) if "stage_03" in name]),
        True,
        "invalid 'active'",
    ),
    "two_lines": (description(lambda d: d.update(network="a\nb")), True, "the class a b, found"),
    "a_long_name": (
        description(lambda d: d["groups"][0]["tensors"].update({"x" * 900_000: [1]})),
        True,
        "bytes|of shape",
    ),
    "an_option_of_two_lines": (config(lambda c: c.update({"a\nb": 1})), True, "no a b, or its default"),
    "errors_text": (description(lambda d: d["errors"]["denoiser"].update(x=["y"])), True, "invalid 'errors'"),
    "no_hash": (description(lambda d: d["files"].pop(TENSORS)), True, "has no hash of"),
    "other_hash_kind": (description(lambda d: d["files"].update({"more": "md5"})), True, "invalid 'files'"),
}
# What is only read together with the base.
HURT_BASE: dict[str, tuple[Callable[[Path], object], bool, str]] = {
    "base_truncated": (rewrite("base.safetensors", lambda c: c[:-1]), True, "found damage"),
    "base_flipped": (
        rewrite("base.safetensors", lambda c: c[:-9] + bytes([c[-9] ^ 4]) + c[-8:]),
        False,
        "has the wrong hash",
    ),
    "base_missing": (lambda f: (f / "base.safetensors").unlink(), False, "No such file"),
    "base_tensor_missing": (
        tensors(lambda t: t.pop("blocks.0.denoiser.tail.bias"), "base.safetensors"),
        True,
        "has no tensor 'blocks.0.denoiser.tail.bias'",
    ),
    "base_extra": (tensors(lambda t: t.update(x=torch.zeros(1)), "base.safetensors"), True, "only the network's"),
    "base_shape": (
        tensors(lambda t: t.update({"blocks.0.step": torch.zeros(3)}), "base.safetensors"),
        True,
        r"'blocks.0.step' of shape \(\)",
    ),
    "base_nan": (
        tensors(lambda t: t["blocks.0.step"].fill_(float("nan")), "base.safetensors"),
        True,
        "has NaN or Inf",
    ),
    "base_pickle": (lambda f: torch_file(f, "base.safetensors"), True, "found a pickle"),
    "base_link_out": (lambda f: link_out(f, "base.safetensors"), True, "leads out of"),
}


def is_a_sentence(text: str) -> bool:
    return re.match(r".{10,}[:;] [a-z].{4,}$", text) is not None and "\n" not in text and len(text) < 1000


def hurt(folder: Path, name: str) -> str:
    change, again, message = {**HURT, **HURT_BASE}[name]
    change(folder)
    if again:
        rehash(folder)
    return message


@pytest.mark.parametrize("name", [*HURT, *HURT_BASE])
def test_a_folder_that_is_wrong_is_refused(name: str, saved: Path) -> None:
    case = ZOO["list_of_blocks"]()
    before = {key: tensor.clone() for key, tensor in case.net.state_dict().items()}
    output = case.net(*case.inputs)
    message = hurt(saved, name)
    with pytest.raises(LoRunError, match=message) as caught:
        lorun_adapt.from_pretrained(saved, case.net)
    assert is_a_sentence(str(caught.value)) and str(saved) in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in case.net.state_dict().items())
    assert torch.equal(case.net(*case.inputs), output)


@pytest.mark.parametrize("name", HURT)
def test_an_adapter_that_is_wrong_changes_nothing(name: str, saved: Path, lorun: LoRunModel) -> None:
    inputs = ZOO["list_of_blocks"]().inputs
    output = lorun(*inputs)
    names, network = lorun.adapter_names, lorun.network
    message = hurt(saved, name)
    for target in ("other", "default"):  # a new set, and the one that runs
        if name == "no_description" and target == "default":
            continue
        with pytest.raises(LoRunError, match=message) as caught:
            lorun.load_adapter(saved, target)
        assert is_a_sentence(str(caught.value))
    assert lorun.adapter_names == names and lorun.network is network
    assert torch.equal(lorun(*inputs), output)


TASK = """
from dun_zoo import ZOO
channels, patch = 1, 8
def build(): return ZOO["list_of_blocks"]().net
def measure(images, sigma=0.0): return images, images * 0 + 1
def restore(output, images): return output
"""


@pytest.mark.parametrize("name", [*HURT, *HURT_BASE])
def test_the_command_line_ends_with_2(name: str, saved: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "wrong_task.py").write_text(TASK)
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8), 99).save(tmp_path / "images/a.png")
    message = hurt(saved, name)
    command = ["eval", str(tmp_path / "wrong_task.py"), "--images", str(tmp_path / "images"), "--converted", str(saved)]
    monkeypatch.setattr(sys, "argv", ["lorun-adapt", *command])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and re.search(message, last)


def test_the_weights_of_the_network_that_is_given_do_not_matter(saved: Path, lorun: LoRunModel) -> None:
    case = ZOO["list_of_blocks"]()
    for parameter in case.net.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    assert torch.equal(lorun_adapt.from_pretrained(saved, case.net)(*case.inputs), lorun(*case.inputs))


def test_untouched_it_loads(saved: Path, lorun: LoRunModel) -> None:
    case = ZOO["list_of_blocks"]()
    rehash(saved)
    assert torch.equal(lorun_adapt.from_pretrained(saved, case.net)(*case.inputs), lorun(*case.inputs))
    lorun.load_adapter(saved, "same")
    lorun.delete_adapter("same")


# --- networks and bases --------------------------------------------------------------------------


def test_no_repeated_stage() -> None:
    with pytest.raises(LoRunError, match="no repeated stage in Denoiser") as caught:
        lorun_adapt.convert(Denoiser())
    assert is_a_sentence(str(caught.value))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (HeadBodyTail, "the class ListOfBlocks, found HeadBodyTail"),
        (lambda: ListOfBlocks([Block(Denoiser()) for _ in range(3)]), "stages"),
        (lambda: ListOfBlocks([Block(Denoiser()) for _ in range(5)]), "'blocks.4.step'"),
        (lambda: ListOfBlocks([Block(Denoiser(6)) for _ in range(4)]), "denoiser.head.weight"),
        (
            lambda: ListOfBlocks([Block(Denoiser()) for _ in range(4)]).double().half().to(torch.complex64),
            "dtype|float",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_another_network(other: Callable[[], torch.nn.Module], message: str, saved: Path) -> None:
    net = other()
    before = [tensor.clone() for tensor in net.state_dict().values()]
    with pytest.raises(LoRunError, match=message) as caught:
        lorun_adapt.from_pretrained(saved, net)
    assert is_a_sentence(str(caught.value))
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values()))


def test_a_network_with_weight_norm(saved: Path) -> None:
    net = ZOO["list_of_blocks"]().net
    torch.nn.utils.parametrizations.weight_norm(net.blocks[1].denoiser.body)
    with pytest.raises(LoRunError, match="ordinary weights in blocks.1.denoiser.body.*remove it first"):
        lorun_adapt.from_pretrained(saved, net)


def test_a_single_stage_knows_its_base(saved: Path, tmp_path: Path, lorun: LoRunModel) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(saved / STAGE, alone)
    lorun.load_adapter(alone, "alone", stage=1)
    lorun.delete_adapter("alone")
    torch.manual_seed(7)
    other = lorun_adapt.convert(ListOfBlocks([Block(Denoiser()) for _ in range(4)]), rank=2)
    for source, stage in ((alone, 1), (saved, None), (saved / STAGE, 1)):
        with pytest.raises(LoRunError, match="an adapter for the base .*found one for") as caught:
            other.load_adapter(source, "alone", stage=stage)
        assert is_a_sentence(str(caught.value))
    assert other.adapter_names == ["default"]


def test_a_set_put_beside_the_others(saved: Path, lorun: LoRunModel) -> None:
    """A set that a friend sent has no hash in the folder that it is put into, and is not lost by a save."""
    shutil.copytree(saved / "adapters/default", saved / "adapters/friend")
    lorun.load_adapter(saved / "adapters/friend", "friend")
    lorun.delete_adapter("friend")
    lorun.save_pretrained(saved)
    lorun.load_adapter(saved / "adapters/friend", "friend")
    lorun.save_pretrained(saved)
    assert set(json.loads((saved / "lorun_config.json").read_text())["adapters"]) == {"default", "friend"}
    lorun.delete_adapter("friend")
    lorun.save_pretrained(saved)
    assert not (saved / "adapters/friend").exists()


def test_a_stage_without_one_of_its_denoisers(tmp_path: Path) -> None:
    case = ZOO["pair_blocks"]()
    lorun = lorun_adapt.convert(case.net, rank=2)
    lorun.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved/adapters/default/stage_01/blocks_decoder")
    edit_json(
        tmp_path / "saved/lorun_config.json",
        lambda d: [d["files"].pop(name) for name in list(d["files"]) if "stage_01/blocks_decoder" in name],
    )
    rehash(tmp_path / "saved")
    for attempt in (lambda f: lorun_adapt.from_pretrained(f, case.net), lambda f: lorun.load_adapter(f, "other")):
        with pytest.raises(LoRunError, match="has no hash of .*blocks_decoder"):
            attempt(tmp_path / "saved")
    assert lorun.adapter_names == ["default"]


def sites(*places: tuple[str, int | None]) -> list[dict[str, Any]]:
    return [{"stage": k, "module": module, "call": call} for k, (module, call) in enumerate(places)]


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("list_of_blocks", [sites(("blocks.0", None), ("blocks.1", None))] * 2),
        ("looped", [sites(*(("p", k) for k in range(4)))] * 2),
        ("one_block_many_times", [sites(*((f"blocks.{k}", None) for k in pair)) for pair in ((0, 1), (2, 3))]),
        ("one_block_many_times", [sites(("blocks.0", None), ("blocks.2", 0), ("blocks.2", 1))]),
        ("many_parents", [sites(("blocks.0.denoiser", 0), ("blocks.0.denoiser", 1), ("blocks.1.denoiser", 0))]),
        ("list_of_blocks", [sites(("blocks", 0), ("blocks", 1))]),
        ("list_of_blocks", [sites(("blocks.0", 0), ("blocks.0", 2))]),
    ],
)
def test_stages_that_are_one_module(name: str, groups: list[list[dict[str, Any]]], tmp_path: Path) -> None:
    case = ZOO[name]()
    lorun_adapt.convert(case.net, rank=2, **case.find()).save_pretrained(tmp_path / "saved")

    def forge(held: dict[str, Any]) -> None:
        held["groups"] = [{**held["groups"][0], "name": f"g{k}", "sites": group} for k, group in enumerate(groups)]
        held["errors"] = {group["name"]: {} for group in held["groups"]}
        held["active"] = ["default"] * len(groups[0])
        for k in range(len(groups[0])):
            held["files"][f"adapters/default/stage_{k:02d}/adapter_config.json"] = "0" * 64

    edit_json(tmp_path / "saved/lorun_config.json", forge)
    rehash(tmp_path / "saved")
    with pytest.raises(LoRunError, match="one appears twice or inside another"):
        lorun_adapt.from_pretrained(tmp_path / "saved", case.net)


def test_no_property_of_the_network_is_run(saved: Path) -> None:
    class Trap(ListOfBlocks):
        @property
        def boom(self) -> torch.nn.Module:
            raise AssertionError("run")

    Trap.__name__ = "ListOfBlocks"
    edit_json(saved / "lorun_config.json", set_site("module", "boom"))
    rehash(saved)
    with pytest.raises(LoRunError, match="has no 'boom'"):
        lorun_adapt.from_pretrained(saved, Trap([Block(Denoiser()) for _ in range(4)]))


@pytest.mark.parametrize("path", ["a\0b", "a\ud800", "a" * 300, "a/" * 3000, b"a", None, 3])
def test_paths_that_cannot_be(path: object, lorun: LoRunModel, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    net = ZOO["list_of_blocks"]().net
    for use in (
        lambda: lorun_adapt.from_pretrained(path, net),
        lambda: lorun.load_adapter(path, "x"),
        lambda: lorun.save_pretrained(path),
    ):
        with pytest.raises(LoRunError) as caught:
            use()
        assert is_a_sentence(str(caught.value))
    assert list(tmp_path.iterdir()) == []


def test_other_arguments_that_cannot_be(saved: Path, lorun: LoRunModel) -> None:
    for stage in ("1", 1.0, True, False, [1], -1, 4, 2**70):
        with pytest.raises(LoRunError, match="expected a stage in 0..3"):
            lorun.load_adapter(saved, "x", stage=stage)
    for name in ("training", None, 3, "x" * 200):
        with pytest.raises(LoRunError, match="cannot be called"):
            lorun.load_adapter(saved, name)
    with pytest.raises(LoRunError, match="floating-point dtype"):
        lorun.save_pretrained(saved, dtype="float16")
    with pytest.raises(LoRunError, match="and a network, found PosixPath and NoneType"):
        lorun_adapt.from_pretrained(saved, None)
    with pytest.raises(LoRunError, match="no values"):
        lorun_adapt.from_pretrained(saved, ZOO["list_of_blocks"]().net.to("meta"))


def test_a_set_of_some_stages_does_not_replace_the_one_that_runs(
    saved: Path, tmp_path: Path, lorun: LoRunModel
) -> None:
    inputs = ZOO["list_of_blocks"]().inputs
    output = lorun(*inputs)
    shutil.copytree(saved / STAGE, tmp_path / "some/stage_02")
    with pytest.raises(LoRunError, match=r"'default' has no adapter for stage 0, only for \[2\]"):
        lorun.load_adapter(tmp_path / "some", "default")
    lorun.set_adapter("default")
    assert torch.equal(lorun(*inputs), output)


def test_partial_sets_alone_load(lorun: LoRunModel, saved: Path, tmp_path: Path) -> None:
    mixed = lorun_adapt.from_pretrained(saved, ZOO["list_of_blocks"]().net)
    for stage in range(4):
        mixed.load_adapter(saved, "even" if stage % 2 == 0 else "odd", stage=stage)
    mixed.set_adapter({0: "even", 1: "odd", 2: "even", 3: "odd"})
    mixed.delete_adapter("default")
    mixed.save_pretrained(tmp_path / "mixed")
    loaded = lorun_adapt.from_pretrained(tmp_path / "mixed", ZOO["list_of_blocks"]().net)
    inputs = ZOO["list_of_blocks"]().inputs
    assert loaded.adapter_names == ["even", "odd"] and torch.equal(loaded(*inputs), lorun(*inputs))


def test_links_within_a_cache_of_the_hub_are_followed(saved: Path, tmp_path: Path) -> None:
    """``snapshot_download`` gives a folder of links into ``blobs``."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    for file in [p for p in saved.rglob("*") if p.is_file()]:
        link = snapshot / file.relative_to(saved)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / sha256(file))
        link.symlink_to(os.path.relpath(blobs / sha256(file), link.parent))
    case = ZOO["list_of_blocks"]()
    lorun_adapt.from_pretrained(snapshot, case.net)
    (snapshot / TENSORS).unlink()
    (snapshot / TENSORS).symlink_to(saved / TENSORS)
    with pytest.raises(LoRunError, match="leads out of"):
        lorun_adapt.from_pretrained(snapshot, case.net)


# --- saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_could_not_be_loaded_is_not_saved(saved: Path, value: float) -> None:
    lorun = lorun_adapt.from_pretrained(saved, ZOO["list_of_blocks"]().net)
    before = {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()}
    with torch.no_grad():
        next(p for name, p in lorun.adapters.named_parameters() if name.endswith("lora_A")).view(-1)[0] = value
    with pytest.raises(LoRunError, match="NaN or Inf|too large for torch.float16") as caught:
        lorun.save_pretrained(saved, dtype=torch.float16)
    assert is_a_sentence(str(caught.value))
    assert {p: p.read_bytes() for p in saved.rglob("*") if p.is_file()} == before


class WithBuffer(ListOfBlocks):
    def __init__(self, name: str, buffer: torch.Tensor) -> None:
        super().__init__([Block(Denoiser()) for _ in range(3)])
        self.register_buffer(name, buffer)


def _tied_bias() -> torch.nn.Module:
    net = ListOfBlocks([Block(Denoiser()) for _ in range(3)])
    for block in net.blocks[1:]:
        block.denoiser.body.bias = net.blocks[0].denoiser.body.bias
    return net


def _growing_dilation() -> torch.nn.Module:
    """Stages of equal tensors, the first of which PEFT could represent."""
    net = ListOfBlocks([Block(Denoiser()) for _ in range(3)])
    for k, block in enumerate(net.blocks):
        block.denoiser.body.dilation = block.denoiser.body.padding = (k + 1, k + 1)
    return net


@pytest.mark.parametrize(
    "make",
    [
        _growing_dilation,
        _tied_bias,
        lambda: WithBuffer("m", torch.zeros(1).expand(5)),
        lambda: WithBuffer("i", torch.arange(3)[None]),
    ],
)
def test_odd_networks_are_saved_and_loaded(make: Callable[[], torch.nn.Module], tmp_path: Path) -> None:
    net, inputs = make(), ZOO["list_of_blocks"]().inputs
    lorun = lorun_adapt.convert(net, rank=2)
    lorun.save_pretrained(tmp_path / "saved")
    assert torch.equal(lorun_adapt.from_pretrained(tmp_path / "saved", make())(*inputs), lorun(*inputs))


def _named(name: str) -> torch.nn.Module:
    denoisers = [Denoiser() for _ in range(3)]
    for denoiser in denoisers:
        denoiser.body.add_module(name, torch.nn.Conv2d(1, 1, 1))
    return ListOfBlocks([Block(denoiser) for denoiser in denoisers])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WithBuffer("m", torch.eye(3).to_sparse()), "a dense tensor"),
        (lambda: _named("lora_A"), "blocks.0.denoiser.body holds the parts of an adapter.*merge_and_unload"),
        (lambda: _named("lorun_frozen"), "the parts of an adapter"),
        (lambda: _named("a/b"), "names without a slash"),
    ],
)
def test_networks_that_could_not_be_saved_are_not_converted(make: Callable[[], torch.nn.Module], message: str) -> None:
    with pytest.raises(LoRunError, match=message) as caught:
        lorun_adapt.convert(make())
    assert is_a_sentence(str(caught.value))


def test_somebody_else_s_lock_is_not_waited_for_for_ever(saved: Path, lorun: LoRunModel, monkeypatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    handle = os.open(saved.parent, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    (saved / "base.safetensors").unlink()
    lorun.save_pretrained(saved)
    os.close(handle)
    case = ZOO["list_of_blocks"]()
    assert torch.equal(lorun_adapt.from_pretrained(saved, case.net)(*case.inputs), lorun(*case.inputs))
