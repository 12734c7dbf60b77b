"""The names of all files in a saved folder.

    lorun_config.json                                stages, fingerprint of the base, hashes of files, text of the card
    base.safetensors                                 the whole network, each shared tensor once
    adapters/<set>/stage_00/adapter_config.json      a PEFT LoraConfig
    adapters/<set>/stage_00/adapter_model.safetensors
    adapters/<set>/outside.safetensors               the set's own parameters outside the stages, if it has any
    adapters/<set>/set_config.json                   its noise level and measured quality, if known
    adapters/<set>/README.md                         the set's card
    README.md                                        the model card

If a stage has several denoisers, each has a subfolder.
"""

from __future__ import annotations

import re

from torch import nn

CONFIG_FILE, BASE_FILE, CARD_FILE, ADAPTERS_FOLDER = "lorun_config.json", "base.safetensors", "README.md", "adapters"
OUTSIDE_FILE, SET_CONFIG_FILE = "outside.safetensors", "set_config.json"  # of a set
TENSORS_FILE, PEFT_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # of a stage

TOP_LEVEL = (CONFIG_FILE, BASE_FILE, CARD_FILE, ADAPTERS_FOLDER)

INTERPOLATED = "interpolated"  # the set that select_adapter makes between two others; it is never saved


def _any_of(*names: str) -> str:
    return "|".join(map(re.escape, names))


# Every file of a saved conversion except its description.
NAMES = re.compile(
    rf"{_any_of(BASE_FILE, CARD_FILE)}|{ADAPTERS_FOLDER}/[\w-]+/"
    rf"({_any_of(CARD_FILE, OUTSIDE_FILE, SET_CONFIG_FILE)}"
    rf"|stage_\d+(/[\w-]+)?/({_any_of(PEFT_CONFIG_FILE, TENSORS_FILE)}))",
    re.ASCII,
)


def is_adapter_name(name: object) -> bool:
    """Whether ``name`` can name a set or a group. Names become folders and attributes.

    >>> from lorun_adapt.files.layout import is_adapter_name
    >>> is_adapter_name("sigma25"), is_adapter_name("../sigma25")
    (True, False)
    """
    return (
        isinstance(name, str)
        and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name) is not None
        and not hasattr(nn.ModuleDict(), name)
    )
