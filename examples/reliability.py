"""Show that damaged and hostile folders, and killed processes, do no harm to a converted network.

    python examples/reliability.py [--mutations 10000] [--kills 200] [--seed 0]

The script mutates saved folders and loads each, then kills saves and loads at random moments, and prints the tables of
examples/README.md. Its exit code is 1 if a mutated folder did anything but load or raise a ``LoRunError``, or if a
killed save or load left anything but a whole folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from lorun_adapt import LoRunError, LoRunModel, convert, from_pretrained, load_task

CONFIG_FILE = "lorun_config.json"  # holds the hash of every file, and one of itself
MEMORY = 128 * 2**20  # bytes that no folder may make a process grow by
SENTENCE = re.compile(r"[^\n]+[:;] [^\n]+")  # one line: what is wrong and where, then what to do
Files = dict[str, "bytes | None"]  # None: no such file


# --- the networks --------------------------------------------------------------------------------


class Norms(nn.Module):
    """A stage of convolutions, norms and a linear layer, with most kinds of tensor that a folder can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()
        )
        self.last = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.layers(x).movedim(1, -1)).mean(-1)[:, None]


class Unfolded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.denoisers = nn.ModuleList(Norms() for _ in range(3))
        self.step = nn.Parameter(torch.tensor(0.5))

    def forward(self, y: Tensor) -> Tensor:
        x = y
        for denoiser in self.denoisers:
            x = denoiser(x - self.step * (x - y))
        return x


def reference() -> tuple[nn.Module, tuple[Any, ...]]:
    """The first three stages of the reference network."""
    task = load_task(str(Path(__file__).with_name("compressive_sensing.py")))
    whole = task.build()
    task.load_weights(whole, None)
    net = task.module.UnfoldedISTA(stages=3)
    net.load_state_dict({name: t for name, t in whole.state_dict().items() if name in net.state_dict()})
    return net.eval(), task.measure(torch.rand(1, 1, 33, 33, generator=torch.Generator().manual_seed(0)))


def norms() -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    return Unfolded().eval(), (torch.rand(1, 1, 6, 6),)


NETWORKS = {"reference": (reference, LoraConfig(r=2)), "norms": (norms, LoraConfig(r=2, rank_pattern={"last": 1}))}


# --- mutations -----------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e308),
    *("", "x", "LORA", "default", "../..", "/etc/passwd", "..\\..", "a\0b", "\ud800", "x" * 3000, "(a+)+$", ".*" * 30),
    *([], {}, [[]], [0], [2, 3], [None], {"": 0}, {"a": {"a": {}}}, ["default"] * 50, [[1] * 9] * 9),
]


def _part(value: Any, rng: random.Random) -> tuple[Any, Any]:
    """A random place within a JSON value: (its container, its key)."""
    holder, key = [value], 0
    while True:
        held = holder[key]
        if not isinstance(held, (dict, list)) or not held or (holder != [value] and rng.random() < 0.25):
            return holder, key
        holder, key = held, rng.choice(list(held)) if isinstance(held, dict) else rng.randrange(len(held))


def _hostile_json(value: Any, rng: random.Random) -> Any:
    root = [value]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holder, key = _part(root[0], rng)
        if holder == [root[0]] and rng.random() < 0.9 and isinstance(root[0], dict) and root[0]:
            holder, key = root[0], rng.choice(list(root[0]))
        what = rng.random()
        if what < 0.6:
            holder[key] = rng.choice(HOSTILE)
        elif what < 0.75:
            del holder[key]
        elif what < 0.9 and isinstance(holder, dict):
            holder[rng.choice([x for x in HOSTILE if isinstance(x, str)] + list(holder))] = holder.pop(key)
        elif isinstance(holder, list):
            holder.insert(rng.randrange(len(holder) + 1), holder[key])
        if not root:
            root = [None]
    return root[0]


def _text(value: Any, rng: random.Random) -> bytes:
    text = json.dumps(value).encode()
    what = rng.random()
    if what < 0.06:  # nested more deeply than a parser can follow
        depth = rng.choice((500, 5_000, 100_000))
        return text.replace(b":", b":" + b"[" * depth, 1) if what < 0.03 else b"[" * depth + text + b"]" * depth
    if what < 0.1:  # a key twice, NaN, a number out of range
        start = text.find(b"{") + 1
        return (
            text[:start]
            + rng.choice((b'"r":1,"r":1,', b'"x":NaN,', b'"x":-1e999,', b'"x":' + b"1" * 5000 + b","))
            + text[start:]
        )
    return text


def _split(content: bytes) -> tuple[Any, bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _join(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def flip(files: Files, rng: random.Random) -> None:
    name = rng.choice(sorted(files))
    content = bytearray(files[name] or b"")
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        place = rng.randrange(len(content))
        content[place if rng.random() < 0.5 else place % min(600, len(content))] ^= 1 << rng.randrange(8)
    files[name] = bytes(content)


def cut(files: Files, rng: random.Random) -> None:
    name = rng.choice(sorted(files))
    content = files[name] or b""
    end = rng.choice((0, 1, 7, 8, 9, len(content) - 1, rng.randrange(len(content))))
    files[name] = content[:end] if rng.random() < 0.7 else content + rng.randbytes(rng.choice((1, 8, 4096)))


def shapes(files: Files, rng: random.Random) -> None:
    name = rng.choice([name for name in sorted(files) if name.endswith(".safetensors")])
    header, data = _split(files[name] or b"")
    for tensor in rng.sample([key for key in header if key != "__metadata__"], rng.choice((1, 2))):
        entry = header[tensor]
        shape = entry["shape"]
        what = rng.randrange(6)
        if what == 0:
            rng.shuffle(shape)
        elif what == 1 and shape:
            shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 3, 2**20, 2**40, 2**63, -1))
        elif what == 2:
            shape.insert(rng.randrange(len(shape) + 1), 1)
        elif what == 3 and len(shape) > 1:
            shape[:2] = [shape[0] * shape[1]]
        elif what == 4:
            entry["dtype"] = rng.choice(
                ("F16", "F64", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X", 5, None)
            )
        else:
            entry["data_offsets"] = [rng.choice((0, 4, 8, 2**40, -4, *entry["data_offsets"])) for _ in range(2)]
    files[name] = _join(json.dumps(header).encode(), data)


def names(files: Files, rng: random.Random) -> None:
    name, other = rng.sample([name for name in sorted(files) if name.endswith(".safetensors")], 2)
    if rng.random() < 0.3:  # one file in the place of another
        files[name], files[other] = files[other], files[name] if rng.random() < 0.5 else files[other]
        return
    header, data = _split(files[name] or b"")
    tensors = [key for key in header if key != "__metadata__"]
    a, b = rng.sample(tensors, 2)
    what = rng.randrange(4)
    if what == 0:
        header[a], header[b] = header[b], header[a]
    elif what == 1:
        header[rng.choice((b.upper(), a + ".x", "", "../x", "__metadata__", a[:-1]))] = header.pop(a)
    elif what == 2:
        header.update(
            {
                f"{a}.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                for i in range(rng.choice((1, 9, 9, 9, 9, 20_000)))
            }
        )
    else:
        del header[a]
    files[name] = _join(json.dumps(header).encode(), data)


def hostile_json(files: Files, rng: random.Random) -> None:
    name = rng.choice([name for name in sorted(files) if name.endswith((".json", ".safetensors"))])
    if name.endswith(".json"):
        files[name] = _text(_hostile_json(json.loads(files[name] or b""), rng), rng)
    else:
        header, data = _split(files[name] or b"")
        files[name] = _join(_text(_hostile_json(header, rng), rng), data)


def numbers(files: Files, rng: random.Random) -> None:
    name = rng.choice([name for name in sorted(files) if name.endswith(".safetensors")])
    header, data = _split(files[name] or b"")
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 50))):
        place = 4 * rng.randrange(len(changed) // 4)
        value = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, 1.0))
        changed[place : place + 4] = struct.pack("<f", value)
    files[name] = _join(json.dumps(header).encode(), bytes(changed))


def splice(files: Files, rng: random.Random) -> None:
    name, other = rng.choice(sorted(files)), rng.choice(sorted(files))
    content, source = bytearray(files[name] or b""), files[other] or b""
    size = rng.choice((4, 16, 200))
    place, start = rng.randrange(len(content)), rng.randrange(len(source))
    content[place : place + size] = source[start : start + size] if rng.random() < 0.8 else rng.randbytes(size)
    files[name] = bytes(content)


def entries(files: Files, rng: random.Random) -> None:
    """Files removed, doubled or under another name."""
    name = rng.choice([name for name in sorted(files) if name != "README.md"])
    content, what = files[name], rng.randrange(3)
    if what != 1:
        files[name] = None
    if what != 0:
        folder, _, last = name.rpartition("/")
        stage = folder.replace("stage_00", "stage_09").replace("stage_01", "stage_1").replace("stage_02", "stage_002")
        files[rng.choice((f"{folder}/adapter_model.bin", f"{stage}/{last}", f"{name}.bak")).lstrip("/")] = content


MUTATIONS: dict[str, Callable[[Files, random.Random], None]] = {
    "bits flipped": flip,
    "cut short or made longer": cut,
    "shapes, dtypes and offsets": shapes,
    "tensors and files renamed or swapped": names,
    "hostile JSON": hostile_json,
    "numbers replaced": numbers,
    "bytes spliced": splice,
    "files removed or added": entries,
}


def _mutated(original: Files, rng: random.Random) -> tuple[str, Files]:
    """A random kind of mutation, and the mutated files."""
    kind, files = rng.choice(sorted(MUTATIONS)), dict(original)
    while files == original:
        for _ in range(rng.choice((1, 1, 1, 2))):
            try:
                MUTATIONS[kind](files, rng)
            except Exception:
                pass  # the first mutation may leave nothing that a second one can parse
            files = {name: content for name, content in files.items() if content is not None}
    return kind, files


def digest(description: dict[str, Any]) -> str:
    """The hash of a description without its own."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def rehash(files: Files, original: Files) -> None:
    """Correct the hashes, as an attacker would, so that loading gets past them to the checks behind."""
    try:
        description = json.loads(files[CONFIG_FILE] or b"")
        description.pop("sha256", None)
        for name, content in files.items():
            if content is not None and content is not original.get(name) and name in description["files"]:
                description["files"][name] = hashlib.sha256(content).hexdigest()
        description["sha256"] = digest(description)
        files[CONFIG_FILE] = json.dumps(description, indent=2).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # the description cannot be parsed


# --- loading -------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def check_loaded(folder: Path, loaded: LoRunModel, shapes: dict[str, torch.Size], whole: bool) -> str | None:
    """Say what is wrong with a conversion that loaded, or None."""
    description = json.loads((folder / CONFIG_FILE).read_text())
    for name, expected in description["files"].items():
        needed = name.endswith((".safetensors", ".json")) and (whole or name != "base.safetensors")
        if needed and hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            return f"{name} has another hash"
    if description.pop("sha256") != digest(description):
        return "the description has another hash"
    merged = loaded.merge_and_unload() if whole else loaded.merge_and_unload(adapter_names=["other"])
    found = {name: tensor.shape for name, tensor in merged.state_dict().items()}
    return None if found == shapes else f"tensors of other shapes: {set(found.items()) ^ set(shapes.items())}"


def peak_memory() -> int:
    """The peak memory of this process so far, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):  # no Linux; there, this would count the parent process too
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mutate_and_load(network: str, count: int, seed: int) -> tuple[Counter[tuple[str, str]], list[str], int]:
    """Outcomes by kind of mutation, what went wrong, and by how many bytes the process grew."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng = random.Random(f"{network} {seed}")
    make, config = NETWORKS[network]
    net, inputs = make()
    outcomes: Counter[tuple[str, str]] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        folder = Path(scratch) / "saved"
        lorun = convert(net, config).eval()
        lorun.save_pretrained(folder)
        original: Files = dict(contents(folder))
        with torch.no_grad():
            output = lorun(*inputs)
        weights = [(tensor, tensor.clone()) for tensor in net.state_dict().values()]
        shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
        before = 0
        for index in range(count):
            if index == min(20, count - 1):  # by then everything that a load needs is in memory
                before = peak_memory()
            kind, files = _mutated(original, rng)
            if rng.random() < 0.75:
                rehash(files, original)
            changed = [name for name in {**original, **files} if files.get(name) is not original.get(name)]
            for name in changed:
                _put(folder / name, files.get(name))
            whole = rng.random() < 0.4
            try:
                if whole:
                    loaded = from_pretrained(folder, net)
                else:
                    lorun.load_adapter(folder, "other")
                    loaded = lorun
                if (problem := check_loaded(folder, loaded, shapes, whole)) is not None:
                    wrong.append(f"seed {seed}, {index}, {kind}: loaded with {problem}")
                outcomes[kind, "loaded"] += 1
                if not whole:
                    lorun.delete_adapter("other")
            except LoRunError as error:
                outcomes[kind, "refused"] += 1
                if not SENTENCE.fullmatch(str(error)):
                    wrong.append(f"seed {seed}, {index}, {kind}: no sentence: {error}")
            except BaseException as error:
                outcomes[kind, "crashed"] += 1
                wrong.append(f"seed {seed}, {index}, {kind}: {type(error).__name__}: {error}")
            with torch.no_grad():
                same = whole or (torch.equal(lorun(*inputs), output) and lorun.adapter_names == ["default"])
            if not same or not all(torch.equal(now, then) for now, then in weights):
                wrong.append(f"seed {seed}, {index}, {kind}: the network changed")
            for name in changed:
                _put(folder / name, original.get(name))
    return outcomes, wrong, peak_memory() - before


def _put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
        while not any(path.parent.iterdir()):  # a folder that only the mutation had made
            path = path.parent
            path.rmdir()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# --- killing -------------------------------------------------------------------------------------


def _seconds(work: Callable[[], object]) -> float:
    """The median time that ``work`` takes in another process, as in :func:`_killed`."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        os.waitpid(child, 0)
        times.append(time.perf_counter() - start)
    return sorted(times)[2]


def _killed(work: Callable[[], object], seconds: float, rng: random.Random) -> bool:
    """Do ``work`` in another process, kill it at a random moment, and return whether that was before it ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(rng.uniform(0, 1.3 * seconds))
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) < 0


def kill(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Kill ``count`` saves over an existing folder, and as many loads of it; return counts, and what went wrong."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rng = random.Random(seed)
    net, inputs = norms()
    found: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "saved"
        versions = []
        for rank in (2, 1):
            lorun = convert(net, LoraConfig(r=rank)).eval()
            lorun.save_pretrained(folder)
            versions.append((lorun, contents(folder)))
        on_disk = 1
        save_time = _seconds(partial(lorun.save_pretrained, folder))
        load_time = _seconds(partial(from_pretrained, folder, net))
        while min(found["saves killed"], found["loads killed"]) < count and not wrong:
            if found["saves killed"] < count:
                found["saves killed"] += _killed(
                    partial(versions[1 - on_disk][0].save_pretrained, folder), save_time, rng
                )
                held = contents(folder) if folder.is_dir() else {}
                matches = [i for i in (0, 1) if held == versions[i][1]]
                if not matches:
                    return found, [f"after {found}: neither the old folder nor the new one is there"]
                found["old folder whole" if matches[0] == on_disk else "new folder whole"] += 1
                on_disk = matches[0]
                with torch.no_grad():
                    if not torch.equal(from_pretrained(folder, net)(*inputs), versions[on_disk][0](*inputs)):
                        wrong.append(f"after {found}: what loads is not what was saved")
            if found["loads killed"] < count:
                found["loads killed"] += _killed(partial(from_pretrained, folder, net), load_time, rng)
                if contents(folder) != versions[on_disk][1]:
                    wrong.append(f"after {found}: a load has changed the folder")
        versions[0][0].save_pretrained(folder)
        if os.listdir(scratch) != ["saved"]:
            wrong.append(f"left behind: {os.listdir(scratch)}")
    return found, wrong


# --- the table -----------------------------------------------------------------------------------


def measure(mutations: int, kills: int, seed: int) -> tuple[Counter[tuple[str, str]], int, Counter[str], list[str]]:
    """Outcomes by kind of mutation, bytes that a process grew by, results of the kills, and what went wrong."""
    tenth = -(-mutations // 10)
    jobs = [("reference", tenth, seed), ("norms", 4 * tenth, seed), ("norms", 5 * tenth, seed + 1)]
    outcomes: Counter[tuple[str, str]] = Counter()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(mutate_and_load, *job) for job in jobs]
        killed, wrong = pool.submit(kill, kills, seed).result()
        results = [job.result() for job in running]
    for found, problems, _ in results:
        outcomes += found
        wrong += problems
    grown = max(bytes_ for _, _, bytes_ in results)
    if grown > MEMORY:
        wrong.append(f"a process grew by {grown:,} bytes")
    return outcomes, grown, killed, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes, grown, killed, wrong = measure(options.mutations, options.kills, options.seed)

    print("| mutation | tried | refused | loaded | crashed |\n| --- | ---: | ---: | ---: | ---: |")
    for kind in [*MUTATIONS, "all"]:
        row = [
            sum(n for (of, found), n in outcomes.items() if found == outcome and kind in (of, "all"))
            for outcome in ("refused", "loaded", "crashed")
        ]
        print(f"| {kind} | " + " | ".join(f"{number:,}" for number in (sum(row), *row)) + " |")
    print(f"\nmemory: at most {grown / 2**20:.0f} MiB more than loading the original takes")
    print("\n| killed | times | a whole folder afterwards |\n| --- | ---: | ---: |")
    lost = sum("folder" in problem for problem in wrong)
    for what in ("saves", "loads"):
        print(f"| {what} | {killed[f'{what} killed']:,} | {killed[f'{what} killed'] - lost:,} |")
    print(f"\nafter saves: the old folder {killed['old folder whole']:,} times, the new {killed['new folder whole']:,}")
    for problem in wrong:
        print(problem)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
