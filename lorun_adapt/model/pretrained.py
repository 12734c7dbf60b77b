"""Load a saved conversion."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from torch import nn

from ..disk.folder import restore_interrupted_save, retry_if_replaced
from ..errors import LoRunError
from ..files.load import load
from ..hub.source import files_of_conversion, resolve_source
from ..util.torch_modes import in_own_modes
from .lorun_model import LoRunModel


@in_own_modes
def from_pretrained(
    source: str | os.PathLike[str] | nn.Module,
    dun: nn.Module | str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> LoRunModel:
    """Load a saved conversion.

    Loading trusts nothing in the folder: it checks the size and the hash of every file and the shape and values of
    every tensor, and it executes no code from the folder. If a save replaces the folder at the same time, loading
    starts again.

    Args:
        source: a folder that ``save_pretrained`` wrote, or a repository of the Hub, as ``user/name``.
        dun: a network of the converted class, with any weights. It provides the code, the device and the dtype, and is
            not changed. PEFT's order, ``from_pretrained(dun, source)``, works too.
        revision, subfolder, token, cache_dir, local_files_only: options of the repository, as in
            ``huggingface_hub.hf_hub_download``.

    Returns:
        The network with all its sets; the sets that were active when it was saved are active again.

    Raises:
        LoRunError: files that are missing, damaged, or for another network; no access to the repository.

    >>> import lorun_adapt, tempfile, torch
    >>> from lorun_adapt.util.toy import ToyUnfoldingNet
    >>> lorun, y = lorun_adapt.convert(ToyUnfoldingNet(), rank=1), torch.rand(1, 1, 8, 8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lorun.save_pretrained(folder + "/saved")
    ...     again = lorun_adapt.from_pretrained(folder + "/saved", ToyUnfoldingNet())
    >>> torch.equal(again(y), lorun(y))
    True
    """
    if isinstance(source, nn.Module):
        source, dun = dun, source
    if not isinstance(dun, nn.Module) or isinstance(source, nn.Module):
        raise LoRunError(
            f"expected a folder or repository and a network, found {type(source).__name__} and {type(dun).__name__}: "
            "pass a network of the converted class"
        )
    folder = resolve_source(
        source,
        files_of_conversion,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    with contextlib.suppress(OSError):  # load() reports what cannot be restored as missing
        restore_interrupted_save(Path(os.path.realpath(folder)))
    network = dun
    return LoRunModel(retry_if_replaced(folder, lambda: load(folder, network)))
