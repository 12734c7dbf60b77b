"""Collapse a trained deep unfolding network into one shared denoiser and a small adapter per stage."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .conversion import convert
    from .errors import LoRunError
    from .model.lorun_model import LoRunModel
    from .model.pretrained import from_pretrained
    from .network.converted import Card, Quality
    from .network.report import Report
    from .stages.find import find_stages
    from .stages.stage_map import StageMap
    from .task.task import load_task

__all__ = [
    "Card",
    "LoRunError",
    "LoRunModel",
    "Quality",
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
    "Card": "network.converted",
    "LoRunError": "errors",
    "LoRunModel": "model.lorun_model",
    "Quality": "network.converted",
    "Report": "network.report",
    "StageMap": "stages.stage_map",
    "convert": "conversion",
    "find_stages": "stages.find",
    "from_pretrained": "model.pretrained",
    "load_task": "task.task",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
