"""The model cards: the README.md of a saved conversion, and of each of its sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from ..disk.folder import tensor_bytes
from ..network.adapter import terms_of
from ..network.converted import AdapterSet, Converted, Quality
from ..network.noise import Noise
from ..network.report import make_report
from .layout import ADAPTERS_FOLDER, BASE_FILE

TAGS = ["lorun", "deep-unfolding", "lora", "image-restoration"]
KIND = "image-to-image"  # of the tasks that the Hub knows


def model_card(converted: Converted, problems: Mapping[str, str], folder: Path) -> str:
    """What ``folder`` holds and how to load it; ``problems``: why PEFT can't read some stages."""
    report, network = make_report(converted), converted.stage_map.network
    adapters_only = not (folder / BASE_FILE).exists()
    before, after = report.network_before, report.network_after
    measured = [(name, row) for name in converted.sets for row in converted.sets[name].info.quality]
    lines = [
        *_head(converted, measured),
        f"# {network}, one base and an adapter per stage",
        "",
        *([_plain(converted.card.task), ""] if converted.card.task else []),
        f"The {len(converted.stage_map)} denoisers of a trained deep unfolding network, collapsed into one base that "
        "they share and a low-rank adapter for each, with "
        "[LoRun](https://arxiv.org/abs/2602.18697)'s form and PEFT's files.",
        "",
    ]
    if adapters_only:
        lines += [f"The base is elsewhere: that of the fingerprint `{converted.fingerprint}`.", ""]
    else:
        lines += [
            "| | original | here, with one set |",
            "| --- | ---: | ---: |",
            f"| parameters | {before.num_parameters:,} | {after.num_parameters:,} |",
            f"| bytes in memory | {before.num_bytes:,} | {after.num_bytes:,} |",
            "",
        ]
    lines += [
        "| adapter set | noise, sigma of 255 | stages | ranks | bytes on disk |",
        "| --- | --- | ---: | --- | ---: |",
    ]
    for name, held in converted.sets.items():
        noise = _noise(held.info.noise)
        size = tensor_bytes(folder / ADAPTERS_FOLDER / name)
        lines.append(f"| `{name}` | {noise} | {len(held.adapters)} | {_ranks(held)} | {size:,} |")
    lines.append("")
    lines += [*_table(measured), *_loading(converted, adapters_only)]
    if problems:
        lines.append("`PeftModel.from_pretrained` refuses these adapters, because:")
        lines += [f"- {problem} (first in `{where}`)" for problem, where in problems.items()]
    else:
        lines += _peft(converted)
    return "\n".join(lines) + "\n"


def set_card(converted: Converted, name: str, folder: Path) -> str:
    """What a set's folder holds and how to load it."""
    held, network = converted.sets[name], converted.stage_map.network
    measured = [(name, row) for row in held.info.quality]
    adapters = [adapter for stage in held.adapters.values() for adapter in stage.values()]
    parameters = sum(parameter.numel() for adapter in adapters for parameter in adapter.parameters())
    lines = [
        *_head(converted, measured),
        f"# {name}: adapters for {network}",
        "",
        *([_plain(converted.card.task), ""] if converted.card.task else []),
        f"{len(held.adapters)} stages, ranks {_ranks(held)}, {parameters:,} parameters, "
        f"{tensor_bytes(folder):,} bytes, for the base of the fingerprint `{converted.fingerprint[:12]}`.",
    ]
    if held.info.noise is not None:
        lines.append(f"Noise on the measurements, on a scale of 0 to 255: {_noise(held.info.noise)}.")
    if held.outside:
        lines.append(
            f"It brings its own {', '.join(f'`{key}`' for key in held.outside)}, which stand outside the stages."
        )
    lines += [
        "",
        *_table(measured),
        "```python",
        "# lorun: the conversion that it is for, from lorun_adapt.from_pretrained(...)",
        f'lorun.load_adapter("path or user/name of the conversion", "{name}")',
        f'lorun.set_adapter("{name}")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _head(converted: Converted, measured: Iterable[tuple[str, Quality]]) -> list[str]:
    """What the Hub reads."""
    results = [
        EvalResult(
            task_type=KIND,
            dataset_type=row.images,
            dataset_name=f"{row.images}, sigma {row.sigma:g}",
            metric_type=kind,
            metric_name=f"{title}, adapter set {name}",
            metric_value=round(value, 4),
        )
        for name, row in measured
        for kind, title, value in (("psnr", "PSNR (dB)", row.psnr), ("ssim", "SSIM", row.ssim))
    ]
    data = ModelCardData(
        library_name="lorun-adapt",
        license=converted.card.license,
        base_model=converted.card.base_model,
        pipeline_tag=KIND,
        tags=TAGS,
        **({"model_name": converted.stage_map.network, "eval_results": results} if results else {}),
    )
    return ["---", data.to_yaml(), "---", ""]


def _table(measured: list[tuple[str, Quality]]) -> list[str]:
    if not measured:
        return []
    lines = [
        "| adapter set | images | sigma | PSNR (dB) | SSIM | original |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in measured:
        images = f"{_plain(row.images)}, {row.count}"
        original = "" if row.psnr_original is None else f"{row.psnr_original:.2f} dB"
        lines.append(f"| `{name}` | {images} | {row.sigma:g} | {row.psnr:.2f} | {row.ssim:.4f} | {original} |")
    return [*lines, ""]


def _loading(converted: Converted, adapters_only: bool) -> list[str]:
    network, name = converted.stage_map.network, list(converted.sets)[-1]
    if adapters_only:
        load = ['lorun = lorun_adapt.from_pretrained("path or user/name of the base", net)']
        load.append(f'lorun.load_adapter("path or user/name of this", "{name}")')
    else:
        load = ['lorun = lorun_adapt.from_pretrained("path or user/name of this", net)']
    return [
        "```python",
        "import lorun_adapt",
        f"net = ...  # your {network}, with any weights",
        *load,
        f'lorun.set_adapter("{name}")',
        "```",
        "",
    ]


def _peft(converted: Converted) -> list[str]:
    first, group = next(iter(converted.sets)), converted.stage_map.groups[0].name
    several = len(converted.stage_map.groups) > 1
    return [
        "A stage in PEFT:",
        "",
        "```python",
        f"denoiser = lorun.base_denoiser({group!r})" if several else "denoiser = lorun.base_denoiser()",
        f'PeftModel.from_pretrained(denoiser, "adapters/{first}/stage_00{"/" + group if several else ""}")',
        "```",
    ]


def _ranks(held: AdapterSet) -> str:
    adapters = [adapter for stage in held.adapters.values() for adapter in stage.values()]
    found = {term.rank for adapter in adapters for term in terms_of(adapter).values() if term.rank}
    return ", ".join(map(str, sorted(found))) or "none"


def _noise(noise: Noise | None) -> str:
    if noise is None:
        return "not said"
    return f"{noise:g}" if isinstance(noise, float) else ", ".join(f"{sigma:g}" for sigma in noise)


def _plain(text: str) -> str:
    """Words that came with a file, as one line without markup."""
    line = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in line)
