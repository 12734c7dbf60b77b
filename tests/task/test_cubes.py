"""Cubes and arrays as they are published."""

from __future__ import annotations

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse
import tifffile
import torch

from lorun_adapt import LoRunError
from lorun_adapt.task.arrays import read_arrays
from lorun_adapt.task.cubes import read_cube
from lorun_adapt.task.task import load_task

CUBE = np.random.default_rng(0).random((6, 8, 5)).astype(np.float32)  # height, width, channels
EXPECTED = torch.from_numpy(np.moveaxis(CUBE, -1, 0).copy())


def matlab_7_3(path: Path, **arrays: np.ndarray) -> None:
    """A file as MATLAB writes it: a header of 512 bytes, then HDF5 with the axes in reverse."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            file[name] = array.T
        file["#refs#/a"] = np.zeros(3)
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM")


def hdf5(path: Path, **arrays: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[f"group/{name}"] = array


WRITE = {
    "cube.npy": lambda path: np.save(path, CUBE),
    "first.npy": lambda path: np.save(path, np.moveaxis(CUBE, -1, 0)),
    "cube.npz": lambda path: np.savez(path, cube=CUBE, wavelengths=np.arange(5)),
    "cube.mat": lambda path: scipy.io.savemat(path, {"img": CUBE, "note": "text"}),
    "new.mat": lambda path: matlab_7_3(path, img=CUBE),
    "cube.h5": lambda path: hdf5(path, cube=CUBE),
    "pages.tif": lambda path: tifffile.imwrite(path, np.moveaxis(CUBE, -1, 0), photometric="minisblack"),
}


@pytest.mark.parametrize("name", WRITE)
def test_cubes_of_every_kind(tmp_path: Path, name: str) -> None:
    WRITE[name](tmp_path / name)
    assert torch.equal(read_cube(tmp_path / name, 5), EXPECTED)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float64])
def test_numbers_of_every_kind(tmp_path: Path, dtype) -> None:
    largest = 1 if dtype is np.float64 else np.iinfo(dtype).max
    np.save(tmp_path / "a.npy", (CUBE * largest).astype(dtype))
    assert (read_cube(tmp_path / "a.npy", 5) - EXPECTED).abs().max() < 1.01 / (255 if dtype is np.uint8 else 65535)


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: np.save(path, 2 * CUBE), "values from 0 to 1 in .*a.npy, found"),
        (lambda path: np.save(path, CUBE.astype(np.int64)), "int64 values"),
        (lambda path: np.save(path, CUBE[..., :4]), r"one array with 5 channels in .*a.npy, found a \(6, 8, 4\)"),
        (lambda path: np.save(path, np.array([{}]), allow_pickle=True), "cannot read arrays from .*a.npy: ValueError"),
        (lambda path: path.write_bytes(b""), r"a.npy is empty \(0 bytes\)"),
        (lambda path: path.write_bytes(b"\x93NUMPY\1\0"), "cannot read arrays from .*a.npy"),
    ],
)
def test_what_is_no_cube(tmp_path: Path, write, message) -> None:
    write(tmp_path / "a.npy")
    with pytest.raises(LoRunError, match=message):
        read_cube(tmp_path / "a.npy", 5)


def test_arrays_of_every_kind(tmp_path: Path) -> None:
    values = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "big.npy", values.astype(">f4"))
    big = read_arrays(tmp_path / "big.npy")["big"]
    assert torch.equal(torch.from_numpy(big), torch.from_numpy(values).float())
    np.savez(tmp_path / "a.npz", good=values, objects=np.array([{}]))
    assert list(read_arrays(tmp_path / "a.npz")) == ["good"]
    scipy.io.savemat(tmp_path / "a.mat", {"ones": np.ones((2, 2)), "phi": scipy.sparse.eye(3), "cell": np.array([{}])})
    found = read_arrays(tmp_path / "a.mat")
    assert found["ones"].dtype == np.float64 and np.array_equal(found["phi"], np.eye(3)) and "cell" not in found
    pair = np.zeros((2, 3), [("real", "f8"), ("imag", "f8")])
    pair["real"], pair["imag"] = values, 1
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["c"] = pair
        file["text"] = np.frombuffer(b"s\0c\0", np.uint16)
        file["text"].attrs["MATLAB_class"] = np.bytes_("char")
        file["nothing"] = np.zeros(2, np.uint64)
        file["nothing"].attrs["MATLAB_empty"] = 1
        file["null"] = h5py.Empty("f4")
    found = read_arrays(tmp_path / "c.h5")
    assert list(found) == ["c"] and np.array_equal(found["c"], values + 1j)


@pytest.mark.parametrize("dtype", [bool, np.uint16, np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize("version", ["5", "4"])
def test_arrays_of_matlab_keep_their_type_and_imaginary_parts(tmp_path: Path, dtype: type, version: str) -> None:
    whole = np.array([[0, 1, 2], [3, 4, 5]])
    given = (whole + 1j * whole[::-1]).astype(dtype) if np.dtype(dtype).kind == "c" else whole.astype(dtype)
    scipy.io.savemat(tmp_path / "a.mat", {"y": given}, format=version)
    found = read_arrays(tmp_path / "a.mat")["y"]
    assert np.array_equal(found, given) and (found.dtype == dtype or version == "4")


def test_two_cubes_in_one_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=CUBE, b=CUBE)
    with pytest.raises(LoRunError, match=r"found a \(6, 8, 5\), b \(6, 8, 5\): keep one such array"):
        read_cube(tmp_path / "a.npz", 5)


def test_without_h5py(tmp_path: Path, monkeypatch) -> None:
    WRITE["cube.h5"](tmp_path / "cube.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(LoRunError, match=r"cube.h5 is an HDF5 file: install h5py, or lorun-adapt\[hdf5\]"):
        read_arrays(tmp_path / "cube.h5")


@pytest.mark.parametrize("name", ["cube.mat", "new.mat", "cube.h5", "cube.npz", "pages.tif"])
def test_damaged_files_end_with_a_sentence(tmp_path: Path, name: str) -> None:
    WRITE[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for length in (1, 20, 200, len(content) // 2):
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(LoRunError, match=name):
            read_cube(tmp_path / name, 5)


def test_a_task_reads_them(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("channels = 5\nbuild = measure = restore = lambda *_, **__: None\n")
    folder = tmp_path / "cubes"
    folder.mkdir()
    for name, write in WRITE.items():
        write(folder / name)
    (folder / "notes.txt").write_text("none")
    task = load_task(tmp_path / "task.py")
    files = task.images(folder)
    assert {path.name for path in files} == set(WRITE)
    assert all(torch.equal(task.read(path), EXPECTED) for path in files)
