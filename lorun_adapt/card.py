"""The README.md of a saved conversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import LoRunModel


def model_card(lorun: LoRunModel, problems: Mapping[str, str]) -> str:
    """What the folder holds and how to load it; ``problems``: why PEFT can't read some stages."""
    report = lorun.report()
    before, after = report.network_before, report.network_after
    ranks = sorted({rank for tensors in lorun.stage_map.ranks.values() for rank in tensors.values()})
    lines = [
        "---",
        "library_name: lorun-adapt",
        "tags: [lorun, deep-unfolding, lora]",
        "---",
        "",
        f"# {lorun.stage_map.network}, one base and an adapter per stage",
        "",
        f"{len(lorun.stage_map)} stages share one denoiser; ranks {', '.join(map(str, ranks)) or 'none'}; "
        f"adapter sets: {', '.join(lorun.adapter_names)}.",
        "",
        "| | original | here |",
        "| --- | --- | --- |",
        f"| parameters | {before.parameters:,} | {after.parameters:,} |",
        f"| bytes in memory | {before.bytes:,} | {after.bytes:,} |",
        "",
        "```python",
        "import lorun_adapt",
        "",
        f"net = ...  # your {lorun.stage_map.network}, with any weights",
        'lorun = lorun_adapt.from_pretrained("path/of/this/folder", net)',
        "```",
        "",
    ]
    if problems:
        lines.append("`PeftModel.from_pretrained` refuses these adapters, because:")
        lines += [f"- {problem} (first in `{where}`)" for problem, where in problems.items()]
    else:
        first, group = lorun.adapter_names[0], lorun.stage_map.groups[0].name
        several = len(lorun.stage_map.groups) > 1
        lines += [
            "A stage in PEFT:",
            "",
            "```python",
            f"denoiser = lorun.base_denoiser({group!r})" if several else "denoiser = lorun.base_denoiser()",
            f'PeftModel.from_pretrained(denoiser, "adapters/{first}/stage_00{"/" + group if several else ""}")',
            "```",
        ]
    return "\n".join(lines) + "\n"
