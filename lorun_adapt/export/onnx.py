"""ONNX files in which the base is stored once: each stage's weights are computed from it as the file runs."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..disk.folder import write_file
from ..errors import LoRunError
from ..util.energy import relative_error
from ..util.nested import tensors_in
from ..util.text import shortened
from .program import Exported
from .sets import SetInputs

CLOSE = 1e-4  # relative difference of outputs from those of PyTorch


class Saved(NamedTuple):
    """What is known of a file that was written.

    Attributes:
        difference: the largest relative difference of an output from PyTorch's, with each of the sets.
        inputs: the names of the tensors of a set that the file takes.
    """

    difference: float
    inputs: frozenset[str]


def save_onnx(exported: Exported, path: Path, sets: Mapping[str, SetInputs] | None = None) -> Saved:
    """Write a program to an ONNX file, and run the file in onnxruntime.

    Args:
        exported: the program, and arguments to compare the outputs on.
        path: the file; it appears whole or not at all.
        sets: adapter sets of the network. Their tensors become optional inputs of the file, under the same names; for
            an input that is not given, the file uses the network's tensor.

    Raises:
        LoRunError: a library is missing; ONNX has no form of an operation; the outputs differ, with one of the sets.
    """
    try:
        import onnx_ir.passes.common as passes
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise LoRunError(f'{error.name} is missing: pip install "lorun-adapt[onnx]"') from error
    program, arguments = exported.program, exported.arguments
    try:
        with _quiet(), torch.no_grad():
            # Optimised, the file would have the weights of each stage, computed beforehand.
            made = torch.onnx.export(program, arguments, dynamo=True, verbose=False, optimize=False)
        assert made is not None
        passes.ClearMetadataAndDocStringPass()(made.model)  # stack traces: more bytes than the weights
        for name in next(iter(sets.values())).tensors if sets else ():
            _make_input(made.model.graph, exported.prefix + name, name)
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
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many types
        raise LoRunError(f"onnxruntime cannot run this network ({shortened(str(error))}): save it as .pt2") from error
    inputs = frozenset(item.name for item in session.get_overridable_initializers())
    given = dict(zip([item.name for item in session.get_inputs()], [v for v in arguments if isinstance(v, Tensor)]))
    if not sets:
        with torch.no_grad():
            sets = {"": SetInputs({}, tensors_in(program.module()(*arguments)))}
    differences: list[float] = []
    for tensors, expected in sets.values():
        feed = given | {name: tensor for name, tensor in tensors.items() if name in inputs}
        found = session.run(None, {name: value.detach().cpu().numpy() for name, value in feed.items()})
        differences += [float(relative_error(torch.as_tensor(a), b.cpu())) ** 0.5 for a, b in zip(found, expected)]
    if not differences or not all(difference < CLOSE for difference in differences):
        worst = max(differences, key=lambda difference: (math.isnan(difference), difference), default=math.nan)
        raise LoRunError(
            f"the ONNX file computes something else than PyTorch, a difference of {worst:.1%}: save it as .pt2"
        )
    write_file(path, lambda out: out.write(content))
    return Saved(max(differences), inputs)


def _make_input(graph: Any, name: str, new_name: str) -> None:
    """Let a tensor of an ``onnx_ir.Graph`` be given as the file runs; nothing if the graph does not use it."""
    tensor = graph.initializers.pop(name, None)
    if tensor is not None:
        tensor.name = new_name
        graph.register_initializer(tensor)
        graph.inputs.append(tensor)


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
