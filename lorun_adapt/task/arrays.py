"""Read named arrays from the files of NumPy, MATLAB and HDF5."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import scipy.io
import scipy.sparse

from ..disk.kind import reading
from ..errors import LoRunError

ARRAY_SUFFIXES = {".npy", ".npz", ".mat", ".h5", ".hdf5"}
HDF5 = b"\x89HDF\r\n\x1a\n"  # how such files begin, or continue after a header of MATLAB
MATLAB_HEADER = 512  # bytes
OF_MATLAB = {"double": np.float64, "single": np.float32, "logical": np.bool_}  # which stores whole numbers as integers


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of numbers in a ``.npy``, ``.npz``, ``.mat`` (also of version 7.3) or HDF5 file, by name.

    The array of a ``.npy`` file has the file's name without its suffix. Nothing in the file is executed.

    Raises:
        LoRunError: the file is damaged or something else, or h5py is missing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as here:
    ...     np.savez(Path(here) / "y.npz", y=np.ones(2), phi=np.zeros((2, 3)))
    ...     sorted(read_arrays(Path(here) / "y.npz"))
    ['phi', 'y']
    """
    with reading("arrays from", path, "download it again"):
        found = _read(path)
    found = {name: _native(array) for name, array in found.items()}
    return {name: array for name, array in found.items() if array.dtype.kind in "biufc" and array.size}


def _native(array: np.ndarray) -> np.ndarray:
    """The array in the byte order of this machine; MATLAB's pairs of real and imaginary parts as complex numbers."""
    if array.dtype.names == ("real", "imag"):
        array = array["real"] + 1j * array["imag"]
    return array.astype(array.dtype.newbyteorder("="))


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix.lower() in (".npy", ".npz"):
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {path.stem: loaded}
            return dict(_without_objects(loaded))
    with path.open("rb") as file:
        head = file.read(MATLAB_HEADER + len(HDF5))
    if head.startswith(HDF5) or head[MATLAB_HEADER:] == HDF5:
        return _read_hdf5(path, of_matlab=head[MATLAB_HEADER:] == HDF5)
    kinds = {name: kind for name, _, kind in scipy.io.whosmat(path)}
    dense = {
        name: item.toarray() if scipy.sparse.issparse(item) else item for name, item in scipy.io.loadmat(path).items()
    }
    return {name: _of_matlab(item, kinds.get(name)) for name, item in dense.items() if isinstance(item, np.ndarray)}


def _of_matlab(array: np.ndarray, kind: str | None) -> np.ndarray:
    """The array with MATLAB's type: loadmat's ``mat_dtype`` would do this, but it drops imaginary parts."""
    return array.astype(OF_MATLAB[kind]) if kind in OF_MATLAB and array.dtype.kind in "biuf" else array


def _without_objects(loaded: Any) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a ``.npz`` file, but for those of objects, which are pickled."""
    for name in loaded.files:
        try:
            yield name, loaded[name]
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise


def _read_hdf5(path: Path, of_matlab: bool) -> dict[str, np.ndarray]:
    h5py, found = _h5py(path), dict[str, np.ndarray]()

    def visit(name: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset) or name.startswith("#") or item.shape is None:
            return
        is_text = item.attrs.get("MATLAB_class") == b"char"
        if item.dtype.kind in "biufcV" and not is_text and "MATLAB_empty" not in item.attrs:
            # MATLAB writes its arrays column by column, so that HDF5 has their axes in reverse.
            found[name] = np.asarray(item).T if of_matlab else np.asarray(item)

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


def _h5py(path: Path) -> ModuleType:
    try:
        import h5py
    except ImportError as error:
        raise LoRunError(f"{path} is an HDF5 file: install h5py, or lorun-adapt[hdf5], to read it") from error
    return h5py
