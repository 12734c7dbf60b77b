"""Collapse a trained deep unfolding network into one shared denoiser and a small adapter per stage."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .card import Card
    from .checkpoint import from_pretrained
    from .conversion import convert
    from .errors import LoRunError
    from .find import find_stages
    from .model import LoRunModel
    from .report import Report
    from .set_config import Measured
    from .stages import StageMap
    from .task import load_task

__all__ = [
    "Card",
    "LoRunError",
    "LoRunModel",
    "Measured",
    "Report",
    "StageMap",
    "__version__",
    "convert",
    "find_stages",
    "from_pretrained",
    "load_task",
]

# Imported when asked for: torch and PEFT take seconds, which `lorun-adapt --help` need not wait for.
_HOMES = {
    "Card": "card",
    "LoRunError": "errors",
    "LoRunModel": "model",
    "Measured": "set_config",
    "Report": "report",
    "StageMap": "stages",
    "convert": "conversion",
    "find_stages": "find",
    "from_pretrained": "checkpoint",
    "load_task": "task",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
