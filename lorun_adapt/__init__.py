"""Collapse a trained deep unfolding network into one shared denoiser and a small adapter per stage."""

from ._version import __version__
from .checkpoint import from_pretrained
from .convert import convert
from .errors import LoRunError
from .find import find_stages
from .model import LoRunModel
from .report import Report
from .stages import StageMap

__all__ = ["LoRunError", "LoRunModel", "Report", "StageMap", "__version__", "convert", "find_stages", "from_pretrained"]
