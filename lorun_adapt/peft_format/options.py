"""The options of PEFT's ``LoraConfig``: which ones a conversion reads, and which it refuses."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from peft import LoraConfig

from ..errors import LoRunError
from ..terms.registry import TERMS
from ..util.numbers import is_number, is_whole_number

READ = {
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "modules_to_save",
    "lora_bias",
}
LABELS = {"peft_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping"}
KEPT_OF_FILES = READ - {"target_parameters"}
READ_IN_FILES = KEPT_OF_FILES | {"inference_mode", "lora_dropout", "init_lora_weights"}  # set_adapter has its own mode
REFUSED = ".*"  # a rank of 0 for this key of rank_pattern makes PEFT refuse a stage that it would load wrongly

# Ways to initialise the factors that leave the base as it is; PiSSA, OLoRA and others change it.
HARMLESS_STARTS = {"gaussian", "eva", "orthogonal"}
HIGHEST_RANK = 65_536
ALPHAS = (1e-6, 1e9)  # outside this range, a scaled difference of biases leaves the range of float32
MAX_STEPS = 10_000_000  # of matching, over all patterns of a file


def check_config(config: LoraConfig) -> None:
    """Refuse a config with options that a conversion would ignore.

    >>> check_config(LoraConfig(r=4, lora_alpha=8, target_modules=["conv1"]))
    >>> check_config(LoraConfig(lora_dropout=0.1))
    Traceback (most recent call last):
    lorun_adapt.errors.LoRunError: convert and add_adapter do not support lora_dropout=0.1: leave it out

    Raises:
        LoRunError: another kind of config, an option that is not supported, a rank or alpha out of range, or a pattern
            that is no regular expression.
    """
    other_kind = isinstance(config, LoraConfig) and config.peft_type in TERMS
    if type(config) is not LoraConfig and not other_kind:
        raise LoRunError(
            f"expected a peft.LoraConfig, found {type(config).__name__}: pass LoraConfig(r=8, lora_alpha=8)"
        )
    default = LoraConfig()
    for option in dataclasses.fields(LoraConfig):
        value = getattr(config, option.name)
        if option.name not in READ | LABELS and value != getattr(default, option.name):
            raise LoRunError(f"convert and add_adapter do not support {option.name}={value!r}: leave it out")
    for where, rank in (("r", config.r), *(config.rank_pattern or {}).items()):
        if not _is_rank(rank):
            raise LoRunError(f"expected a rank of 1 or more for {where}, found {rank!r}: choose a positive integer")
    for where, alpha in (("lora_alpha", config.lora_alpha), *(config.alpha_pattern or {}).items()):
        if not _is_alpha(alpha) or alpha <= 0:
            raise LoRunError(
                f"expected a number from 1e-6 to 1e9 for {where}, found {alpha!r}: choose how to scale the adapter"
            )
    names = [name for name in (config.target_modules, config.exclude_modules) if isinstance(name, str)]
    for pattern in (*names, *(config.rank_pattern or ()), *(config.alpha_pattern or ())):
        try:
            re.compile(pattern)
        except re.error as error:
            raise LoRunError(
                f"{pattern!r} is not a regular expression ({error}): escape it with re.escape, or give a list of names"
            ) from error


def config_from_json(options: object, where: str, num_tensors: int) -> LoraConfig:
    """Make a ``LoraConfig`` of the content of an ``adapter_config.json``, which need not be trusted.

    Args:
        options: the parsed file.
        where: the file's name, for error messages.
        num_tensors: of the denoiser; limits the length of the patterns.

    Raises:
        LoRunError: another PEFT method, an option that is not supported, a value of the wrong type or out of range,
            or a pattern that could take long to match.
    """

    def refuse(expected: str, found: object) -> LoRunError:
        shown = repr(found)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return LoRunError(f"expected {expected}, found {shown} in {where}: save the adapter again with PEFT's LoRA")

    if not isinstance(options, dict) or options.get("peft_type") != "LORA":
        raise refuse(
            "the config of a LoRA adapter (peft_type 'LORA')",
            options.get("peft_type") if isinstance(options, dict) else options,
        )
    default = LoraConfig()
    for name, value in options.items():
        unset = value is None or value is False or value == [] or value == {}
        if name in READ_IN_FILES:
            accepts, expected = _KINDS[name]
            if not accepts(value):
                raise refuse(f"{expected} for {name}", value)
        elif name in LABELS or name == "task_type":
            if not isinstance(value, (str, dict, type(None))):
                raise refuse(f"a name for {name}", value)
        elif not unset and not (hasattr(default, name) and value == getattr(default, name)):
            raise refuse(f"no {name[:100]}, or its default, as its effect is not supported", value)
    patterns = [*(options.get("rank_pattern") or ()), *(options.get("alpha_pattern") or ())]
    patterns += [options[key] for key in ("target_modules", "exclude_modules") if isinstance(options.get(key), str)]
    patterns += options.get("modules_to_save") or []
    steps, length = sum(map(_steps, patterns)), sum(map(len, patterns))
    if steps > MAX_STEPS or length > 20_000 + 500 * num_tensors or len(patterns) > 128 + 2 * num_tensors:
        raise refuse("patterns that are quick to match", patterns)
    if options.get("lora_dropout"):
        warnings.warn(f"lora_dropout in {where} is for training with PEFT and is not applied", stacklevel=2)
    return LoraConfig(**{name: options[name] for name in KEPT_OF_FILES if options.get(name) is not None})


def _is_rank(value: object) -> TypeGuard[int]:
    return is_whole_number(value, least=1)


def _is_alpha(value: object) -> bool:
    return is_number(value) and ALPHAS[0] <= abs(value) <= ALPHAS[1]


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000


def _is_pattern(value: object) -> bool:
    """Whether a value is a regular expression that is quick to match; others can take exponential time."""
    if not isinstance(value, str) or not value or _steps(value) > MAX_STEPS:
        return False
    try:  # by itself, and as PEFT embeds it for rank_pattern and for modules_to_save
        for pattern in (value, rf"(.*\.)?({value})$", rf"(^|.*\.){value}($|\..*)"):
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _steps(pattern: str) -> float:
    """An upper bound of the steps that it takes to match a name of 64 letters."""
    unescaped = re.sub(r"\\[^0-9]", "_", f"({pattern})")
    # Back-references, extensions, repeated repetitions:
    slow = "\\" in unescaped or "(?" in unescaped or re.search(r"[)*+?}][*+{]", unescaped)
    if slow or ("[" in unescaped and not pattern.isascii()):
        return math.inf
    repetitions, groups = len(re.findall(r"[*+?{]", unescaped)), unescaped.count("(") - 1
    return math.inf if repetitions + groups > 20 else (unescaped.count("|") + 1) ** max(1, groups) * 64.0**repetitions


def _are_patterns(value: object, is_valid: Callable[[object], bool]) -> bool:
    return isinstance(value, Mapping) and all(_is_pattern(key) and is_valid(item) for key, item in value.items())


def _are_targets(value: object) -> bool:
    return value is None or _is_pattern(value) or (isinstance(value, list) and all(map(_is_name, value)))


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda v: _is_rank(v) and v <= HIGHEST_RANK, "a rank of 1 or more"),
    "lora_alpha": (_is_alpha, "a number other than 0, of 1e-6 to 1e9,"),
    "use_rslora": (_is_bool, "true or false"),
    "lora_bias": (_is_bool, "true or false"),
    "inference_mode": (_is_bool, "true or false"),
    "lora_dropout": (lambda v: is_number(v) and 0 <= v < 1, "a number from 0 to 1"),
    "init_lora_weights": (
        lambda v: _is_bool(v) or (isinstance(v, str) and v in HARMLESS_STARTS),
        "an initialisation that leaves the base as it is",
    ),
    "rank_pattern": (
        lambda v: _are_patterns(
            {k: r for k, r in v.items() if (k, r) != (REFUSED, 0)} if isinstance(v, dict) else v,
            lambda r: _is_rank(r) and r <= HIGHEST_RANK,
        ),
        "ranks of 1 or more by simple patterns",
    ),
    "alpha_pattern": (
        lambda v: _are_patterns(v, _is_alpha),
        "numbers other than 0, of 1e-6 to 1e9, by simple patterns",
    ),
    "target_modules": (_are_targets, "names or a simple pattern"),
    "exclude_modules": (_are_targets, "names or a simple pattern"),
    "modules_to_save": (
        lambda v: v is None or (isinstance(v, list) and all(_is_name(n) and _is_pattern(n) for n in v)),
        "names",
    ),
}


def config_of_ranks(ranks: Mapping[str, int]) -> LoraConfig:
    """A config that gives each tensor its own rank, and a scaling of 1.

    >>> config = config_of_ranks({"head.weight": 2, "scale": 1})
    >>> config.rank_pattern
    {'^head\\\\.weight': 2, '^scale': 1, '^head': 2}
    >>> config.alpha_pattern == config.rank_pattern
    True

    Args:
        ranks: by the tensor's name in the denoiser.
    """
    pattern = {"^" + re.escape(name): rank for name, rank in ranks.items()}
    pattern.update({"^" + re.escape(name.removesuffix(".weight")): rank for name, rank in ranks.items()})
    return LoraConfig(rank_pattern=pattern, alpha_pattern=dict(pattern))
