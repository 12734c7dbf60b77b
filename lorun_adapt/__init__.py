"""Collapse a trained deep unfolding network into one shared denoiser and a small adapter per stage.

``README.md`` beside this file says where things live and which way imports go.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .conversion import convert
    from .errors import LoRunError
    from .model.lorun_model import LoRunModel
    from .model.pretrained import from_pretrained
    from .network.converted import AdapterInfo, Card, Quality
    from .network.report import Report
    from .stages.find import find_stages
    from .stages.stage_map import StageMap
    from .task.crops import Crops, held_out_of
    from .task.evaluate import evaluate
    from .task.metrics import psnr, ssim
    from .task.task import Task, load_task
    from .terms.sparse import SparseConfig
    from .training.fit import fit

__all__ = [
    "AdapterInfo",
    "Card",
    "Crops",
    "LoRunError",
    "LoRunModel",
    "Quality",
    "Report",
    "SparseConfig",
    "StageMap",
    "Task",
    "__version__",
    "convert",
    "evaluate",
    "find_stages",
    "fit",
    "from_pretrained",
    "held_out_of",
    "load_task",
    "psnr",
    "ssim",
]

# Imported when asked for: torch and PEFT take seconds, which `lorun-adapt --help` need not wait for.
_MODULES = {
    "AdapterInfo": "network.converted",
    "Card": "network.converted",
    "Crops": "task.crops",
    "LoRunError": "errors",
    "LoRunModel": "model.lorun_model",
    "Quality": "network.converted",
    "Report": "network.report",
    "SparseConfig": "terms.sparse",
    "StageMap": "stages.stage_map",
    "Task": "task.task",
    "convert": "conversion",
    "evaluate": "task.evaluate",
    "find_stages": "stages.find",
    "fit": "training.fit",
    "from_pretrained": "model.pretrained",
    "held_out_of": "task.crops",
    "load_task": "task.task",
    "psnr": "task.metrics",
    "ssim": "task.metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
