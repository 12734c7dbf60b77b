"""ONNX files in which the base is stored once: each stage's weights are computed from it as the file runs."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..disk.folder import write_file
from ..errors import LoRunError
from ..util.energy import relative_error
from ..util.nested import tensors_in
from ..util.text import shortened
from .program import Exported

CLOSE = 1e-4  # relative difference of outputs from those of PyTorch


def save_onnx(exported: Exported, path: Path) -> float:
    """Write a program to an ONNX file, and run the file in onnxruntime.

    Args:
        exported: the program, and arguments to compare the outputs on.
        path: the file; it appears whole or not at all.

    Returns:
        The largest relative difference of an output from PyTorch's.

    Raises:
        LoRunError: a library is missing; ONNX has no form of an operation; the outputs differ.
    """
    try:
        import onnx_ir.passes.common as passes
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise LoRunError(f'{error.name} is missing: pip install "lorun-adapt[onnx]"') from error
    program, arguments = exported
    try:
        with _quiet(), torch.no_grad():
            # Optimised, the file would have the weights of each stage, computed beforehand.
            made = torch.onnx.export(program, arguments, dynamo=True, verbose=False, optimize=False)
        assert made is not None
        passes.ClearMetadataAndDocStringPass()(made.model)  # stack traces: more bytes than the weights
    except Exception as error:  # torch.onnx raises many types
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise LoRunError(f"ONNX cannot hold this network ({shortened(str(cause))}): save it as .pt2") from error
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "network.onnx")
        with _quiet():
            made.save(str(file))
        content = file.read_bytes()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    given = [value for value in arguments if isinstance(value, Tensor)]
    feed = {item.name: value.detach().cpu().numpy() for item, value in zip(session.get_inputs(), given)}
    found = [torch.as_tensor(value) for value in session.run(None, feed)]
    with torch.no_grad():
        expected = tensors_in(program.module()(*arguments))
    difference = max(float(relative_error(a, b.cpu())) ** 0.5 for a, b in zip(found, expected, strict=False))
    if not difference < CLOSE:
        raise LoRunError(
            f"the ONNX file computes something else than PyTorch, a difference of {difference:.1%}: save it as .pt2"
        )
    write_file(path, lambda out: out.write(content))
    return difference


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx prints and logs of its progress."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
