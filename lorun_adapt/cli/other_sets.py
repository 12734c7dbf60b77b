"""Adapter sets that a folder has and the network to be saved there lacks: saving must not delete them unasked."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LoRunError

if TYPE_CHECKING:
    from ..model.lorun_model import LoRunModel


def check_none_is_lost(out: Path, names: Collection[str], fingerprint: str | None = None) -> list[str]:
    """Check before long work that saving a network to ``out`` would delete no set.

    Args:
        out: the folder.
        names: the sets that will be saved.
        fingerprint: of the base, where sets of the same base can be kept, see :func:`load_others`.

    Returns:
        The names of the other sets in the folder, which are for this base.

    Raises:
        LoRunError: the folder has other sets, and they are for another base.
    """
    from ..files.description import read_description
    from ..files.layout import CONFIG_FILE

    if not (out / CONFIG_FILE).is_file():
        return []
    try:
        description = read_description(out)
    except LoRunError:  # it is damaged; saving leaves the files of its sets where they are
        return []
    others = [name for name in description["adapters"] if name not in names]
    if others and description["fingerprint"] != fingerprint:
        raise LoRunError(
            f"{out} has the adapter sets {', '.join(others)}, which do not fit the network to be saved there: choose "
            "another folder, or delete that one first"
        )
    return others


def load_others(lorun: LoRunModel, out: Path) -> None:
    """Load the sets of the same base that ``out`` has and ``lorun`` lacks, so that saving there keeps them.

    Raises:
        LoRunError: they are damaged, or have come to be for another base.
    """
    for name in check_none_is_lost(out, lorun.adapter_names, lorun.fingerprint):
        lorun.load_adapter(out, name)
