"""."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..disk.folder import restore_interrupted_save, retry_if_replaced
from ..errors import LoRunError
from ..files.layout import CARD_FILE, CONFIG_FILE
from ..files.load import _check_base, _load
from ..hub.source import local

if TYPE_CHECKING:
    from .lorun_model import LoRunModel


def from_pretrained(
    source: str | os.PathLike[str],
    dun: nn.Module,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> LoRunModel:
    """Load a saved conversion.

    Nothing in the folder is trusted: every file is within the bounds of what ``dun`` can have and
    has the hash noted for it, every tensor has the network's shape and finite values, and nothing
    is executed. A load that a save of the same folder overtakes begins again.

    Args:
        source: a folder that ``save_pretrained`` wrote, or a repository of the Hub, as ``user/name``.
        dun: a network of the same class, with any weights. It gives the code, the device and the
            dtype, and is left untouched.
        revision, subfolder, token, cache_dir, local_files_only: of the repository, as
            ``huggingface_hub.hf_hub_download`` takes them.

    Raises:
        LoRunError: files that are missing, damaged, or for another network.
    """
    folder = local(
        source,
        _all_files,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if not isinstance(dun, nn.Module):
        raise LoRunError(f"expected a network, found {type(dun).__name__}: build one of the class that was converted")
    with contextlib.suppress(OSError):  # what can't be put back is reported as missing
        restore_interrupted_save(Path(os.path.realpath(folder)))
    return retry_if_replaced(folder, lambda: _load(folder, dun))


def _all_files(description: Mapping[str, Any] | None, key: str) -> list[str]:
    """What of a repository is needed to load all of it."""
    if description is None or key:
        raise LoRunError(
            f"expected a conversion, found {'one of its adapters' if key else f'no {CONFIG_FILE}'} in the repository: "
            "load its base first, and this with load_adapter"
        )
    _check_base(description, "the repository")
    return [name for name in description["files"] if os.path.basename(name) != CARD_FILE]
