"""."""

from __future__ import annotations

import re

from torch import nn

CONFIG_FILE, BASE_FILE, CARD_FILE, ADAPTERS_FOLDER = "lorun_config.json", "base.safetensors", "README.md", "adapters"


OUTSIDE_FILE, SET_CONFIG_FILE = "outside.safetensors", "set_config.json"  # of a set


TENSORS_FILE, PEFT_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # of a stage


# What a saved conversion can hold beside its description.
_TOP, _OF_SET, _OF_STAGE = (
    "|".join(map(re.escape, names))
    for names in ((BASE_FILE, CARD_FILE), (CARD_FILE, OUTSIDE_FILE, SET_CONFIG_FILE), (PEFT_CONFIG_FILE, TENSORS_FILE))
)


NAMES = re.compile(rf"{_TOP}|{ADAPTERS_FOLDER}/[\w-]+/({_OF_SET}|stage_\d+(/[\w-]+)?/({_OF_STAGE}))", re.ASCII)


def is_adapter_name(name: object) -> bool:
    """Whether it can name a set, or a group: names become folders and attributes."""
    return (
        isinstance(name, str)
        and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name) is not None
        and not hasattr(nn.ModuleDict(), name)
    )
