from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two processes of tests on two cores; those that tests start have it as well

import numpy as np
import pytest
import torch
import transformer_zoo  # noqa: F401 - adds to ZOO
from conversions import train_a_bit
from dun_zoo import ZOO, Case
from hub_server import HubServer
from PIL import Image
from tasks import COLOUR_TASK

import lorun_adapt
from lorun_adapt.task.task import load_task
from lorun_adapt.training import speed

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _same_on_every_machine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "_multiplies_in_bfloat16", lambda: False)
        yield


@pytest.fixture(autouse=True)
def _same_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub on loopback, for this process, with the accounts alice and bob."""
    with HubServer() as server:
        server.tokens.update({"alice-token": "alice", "bob-token": "bob"})
        server.redirect_client(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture(params=ZOO)
def case(request: pytest.FixtureRequest) -> Case:
    return ZOO[request.param]()


@pytest.fixture
def blocks() -> Case:
    return ZOO["list_of_blocks"]()


@pytest.fixture
def lorun(blocks: Case) -> lorun_adapt.LoRunModel:
    """``blocks``, converted and trained away from where it started."""
    lorun = lorun_adapt.convert(blocks.net, rank=2)
    train_a_bit(lorun, blocks.inputs)
    return lorun


@pytest.fixture
def saved(lorun: lorun_adapt.LoRunModel, tmp_path: Path) -> Path:
    lorun.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    (tmp_path / "my_task.py").write_text(COLOUR_TASK)
    return tmp_path / "my_task.py"


@pytest.fixture
def weights(task_file: Path, tmp_path: Path) -> Path:
    state = load_task(str(task_file)).build().state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "net.pth")
    return tmp_path / "net.pth"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("b.png", (20, 31)), ("a.JPG", (17, 16))):
        smooth = generator.random((4, 4, 3)) * 255
        Image.fromarray(smooth.astype(np.uint8)).resize(size[::-1]).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder
