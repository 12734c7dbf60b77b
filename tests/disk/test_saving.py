"""Saving where others save and load too, where the disk is full, and where nothing may be written.

Each test runs this file as a process of its own, which forks: pytest's own process has threads.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from dun_zoo import ZOO

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel
from lorun_adapt.disk import folder
from lorun_adapt.files import save as checkpoint


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def models() -> list[LoRunModel]:
    return [lorun_adapt.convert(ZOO["list_of_blocks"]().net, rank=rank) for rank in (1, 2)]


def in_child(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def save_often(lorun: LoRunModel, target: Path) -> None:
    for _ in range(20):
        lorun.save_pretrained(target)


def refused(lorun: LoRunModel, target: Path, reason: str) -> None:
    try:
        lorun.save_pretrained(target)
    except LoRunError as error:
        text = str(error)
        assert text.startswith(("cannot ", "expected ")) and "; " in text and "\n" not in text, text
        assert reason in text, text
    else:
        raise AssertionError(f"saved to {target}")


# --- run in a process of its own -----------------------------------------------------------------


def two_savers(place: Path) -> None:
    """Two processes save to one folder, which is not there at first, while a third loads it."""
    pair, case = models(), ZOO["list_of_blocks"]()
    expected = [lorun(*case.inputs) for lorun in pair]
    for exchange in (True, False):
        if not exchange:
            folder._exchange = lambda *_: False
        target = place / f"saved_{exchange}"
        children = [in_child(partial(save_often, lorun, target)) for lorun in pair]
        seen, status = set(), [None, None]
        while None in status:
            if exchange and target.exists():  # else there is a moment without a folder
                output = lorun_adapt.from_pretrained(target, case.net)(*case.inputs)
                matches = [i for i in (0, 1) if torch.equal(output, expected[i])]
                assert matches
                seen.add(matches[0])
            for i, child in enumerate(children):
                if status[i] is None and os.waitpid(child, os.WNOHANG)[0]:
                    status[i] = 0
        output = lorun_adapt.from_pretrained(target, case.net)(*case.inputs)
        assert any(torch.equal(output, item) for item in expected)
        assert not exchange or seen == {0, 1}, seen
    assert sorted(os.listdir(place)) == ["saved_False", "saved_True"], os.listdir(place)


def abandoned(place: Path) -> None:
    """What a killed save leaves is removed by the next one; what a running one holds is not."""
    lorun, target = models()[0], place / "saved"
    lorun.save_pretrained(target)
    (place / ".saved.mine.txt").write_text("not of a save")
    os.mkdir(place / ".saved.deadbeef.partial")
    running = in_child(
        lambda: folder.replace_folder(target, lambda _: [], "lorun_config.json", lambda _: time.sleep(60))
    )
    while len(list(place.glob(".saved.*.partial"))) < 1 or (place / ".saved.deadbeef.partial").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    (held,) = place.glob(".saved.*.partial")
    lorun.save_pretrained(target)
    assert list(place.glob(".saved.*.partial")) == [held]
    os.kill(running, 9)
    os.waitpid(running, 0)
    lorun.save_pretrained(target)
    assert sorted(os.listdir(place)) == [".saved.mine.txt", "saved"]


def full_disk(place: Path) -> None:
    small, large = models()
    target = place / "saved"
    small.save_pretrained(target)
    before = contents(place)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    refused(large, target, "File too large; what was there is unchanged")
    refused(large, place / "other", "File too large")
    assert contents(place) == before


def full_tmpfs(place: Path) -> None:
    small, large = models()
    target = place / "saved"
    small.save_pretrained(target)
    (place / "film").write_bytes(b"0" * 1_000_000)
    space = os.statvfs(place)
    for extra in (0, 4096, 20_000, 40_000):
        with (place / "film2").open("wb", buffering=0) as film:
            try:
                film.write(b"0" * max(0, space.f_bavail * space.f_frsize - extra))
            except OSError:
                pass
        before = contents(place)
        refused(large, target, "No space left on device")
        refused(large, place / "other", "No space left on device")
        assert contents(place) == before
    (place / "film2").unlink()
    large.save_pretrained(target)
    refused(large, place, "something is mounted there; save to a folder within it")


def read_only_mount(place: Path) -> None:
    lorun = models()[0]
    lorun.save_pretrained(place / "saved")
    before = contents(place)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    refused(lorun, place / "saved", "it is read-only")
    refused(lorun, place / "other", "Read-only file system")
    assert contents(place) == before
    case = ZOO["list_of_blocks"]()
    assert torch.equal(lorun_adapt.from_pretrained(place / "saved", case.net)(*case.inputs), lorun(*case.inputs))


def read_only_folders(place: Path) -> None:
    lorun = models()[0]
    lorun.save_pretrained(place / "around/saved")
    (place / "around/open").mkdir()
    before = contents(place)
    if os.geteuid() == 0:
        for path in [*place.rglob("*"), place]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        (place / "around/open").chmod(0o777)
        os.setuid(65534)
    else:
        (place / "around/saved").chmod(0o555)
        (place / "around").chmod(0o555)
    refused(lorun, place / "around/saved", "read-only")
    refused(lorun, place / "around/other", "Permission denied")
    for name in ("around/other", "around/open"):
        with pytest.raises(LoRunError, match="around is not writable; choose another folder"):
            folder.check_place(place / name, "lorun_config.json")
    assert contents(place) == before


def beside_a_longer_name(place: Path) -> None:
    """A process was killed between moving the folder of ``net.2`` away and putting the new one in its place."""
    small, large = models()
    left = place / ".net.2.abcd1234.old"
    small.save_pretrained(left)
    before = contents(left)
    with pytest.raises(LoRunError, match="no lorun_config.json in "):
        lorun_adapt.from_pretrained(place / "net", ZOO["list_of_blocks"]().net)
    for _ in range(2):
        large.save_pretrained(place / "net")
    assert contents(left) == before
    lorun_adapt.from_pretrained(place / "net.2", ZOO["list_of_blocks"]().net)
    assert contents(place / "net.2") == before and not left.exists()


def as_the_system_makes_them(place: Path) -> None:
    """Permissions of new files and folders, and the longest names."""
    os.umask(0o027)
    models()[0].save_pretrained(place / "saved")
    for path in [place / "saved", *(place / "saved").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path
    for name in ("n" * 240, "n" * 240 + "2"):
        folder.write_file(place / name, lambda file, name=name: file.write(name.encode()))
        assert (place / name).read_text() == name and (place / name).stat().st_mode & 0o777 == 0o640
    assert len(os.listdir(place)) == 3


def interrupted(place: Path) -> None:
    """Ctrl-C within a save."""
    small, large = models()
    target = place / "saved"
    small.save_pretrained(target)
    before = contents(place)

    def interrupt(*_: object) -> bytes:
        raise KeyboardInterrupt

    save, checkpoint.to_safetensors = checkpoint.to_safetensors, interrupt
    try:
        large.save_pretrained(target)
    except KeyboardInterrupt:
        checkpoint.to_safetensors = save
    assert contents(place) == before and os.listdir(place) == ["saved"]


# --- the tests -----------------------------------------------------------------------------------

MOUNTS = shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


def run(place: Path, *names: str, mount: bool = False) -> None:
    command = [sys.executable, __file__, str(place), *names]
    if mount:  # in a name space of its own, which ends with the process
        inner = 'mount -t tmpfs -o size=2m none "$1" && shift && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", inner, "sh", str(place), *command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that any user can reach."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    yield place
    for path in [place, *place.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(place)


def test_saving_beside_others(tmp_path: Path) -> None:
    run(tmp_path, "two_savers")


def test_saving_that_ends_early(tmp_path: Path) -> None:
    run(tmp_path, "abandoned", "interrupted", "beside_a_longer_name", "as_the_system_makes_them", "full_disk")


def test_saving_to_a_read_only_folder(open_place: Path) -> None:
    run(open_place, "read_only_folders")


@pytest.mark.parametrize("name", ["full_tmpfs", "read_only_mount"])
def test_saving_to_a_mount(name: str, tmp_path: Path, open_place: Path) -> None:
    if MOUNTS:
        run(tmp_path, name, mount=True)
    else:  # where only the administrator mounts, what comes closest
        run(open_place, "full_disk" if name == "full_tmpfs" else "read_only_folders")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        inside = Path(sys.argv[1]) / case if len(sys.argv) > 3 else Path(sys.argv[1])
        inside.mkdir(exist_ok=True)
        globals()[case](inside)
