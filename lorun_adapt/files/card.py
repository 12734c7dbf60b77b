"""Model cards: the README.md of a saved conversion and of each of its sets."""

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
PIPELINE_TAG = "image-to-image"  # the Hub has a fixed list; this is the closest


def model_card(converted: Converted, problems: Mapping[str, str], folder: Path) -> str:
    """Return the card of a saved conversion: its contents, sizes and quality, and how to load it.

    Args:
        converted: the saved network.
        problems: reasons why PEFT cannot load some adapters, and the first folder that each applies to.
        folder: the folder with the files that the card describes.
    """
    report, network, shared = make_report(converted), converted.stage_map.network, converted.stage_map.shared
    adapters_only = not (folder / BASE_FILE).exists()
    before, after = report.network_before, report.network_after
    measured = [(name, row) for name in converted.sets for row in converted.sets[name].info.quality]
    lines = [
        *_metadata(converted, measured),
        f"# {network}: {'a shared base and ' if shared else ''}an adapter per stage",
        "",
        *([_escaped(converted.card.task), ""] if converted.card.task else []),
        f"A trained deep unfolding network with {len(converted.stage_map)} stages. "
        + (
            "Its stages share one denoiser, the base, and each stage has a low-rank adapter, as in "
            "[LoRun](https://arxiv.org/abs/2602.18697)."
            if shared
            else "Its stages keep their own weights, and each has a low-rank adapter."
        )
        + " The adapters are stored in PEFT's file format.",
        "",
    ]
    if adapters_only:
        lines += [
            f"This folder has no base. Load the adapters on the base with the fingerprint `{converted.fingerprint}`.",
            "",
        ]
    else:
        lines += [
            "| | original | converted, with one set |",
            "| --- | ---: | ---: |",
            f"| parameters | {before.num_parameters:,} | {after.num_parameters:,} |",
            f"| bytes in memory | {before.num_bytes:,} | {after.num_bytes:,} |",
            "",
        ]
    lines += [
        "| adapter set | noise sigma (0 to 255) | stages | ranks | bytes on disk |",
        "| --- | --- | ---: | --- | ---: |",
    ]
    for name, held in converted.sets.items():
        noise = _noise_text(held.info.noise)
        size = tensor_bytes(folder / ADAPTERS_FOLDER / name)
        lines.append(f"| `{name}` | {noise} | {len(held.adapters)} | {_ranks_text(held)} | {size:,} |")
    lines.append("")
    lines += [*_quality_table(measured), *_loading_example(converted, adapters_only)]
    if problems:
        lines.append("`PeftModel.from_pretrained` refuses to load some adapters of this conversion, because:")
        lines += [f"- {problem} (first in `{where}`)" for problem, where in problems.items()]
    else:
        lines += _peft_example(converted)
    return "\n".join(lines) + "\n"


def set_card(converted: Converted, name: str, folder: Path) -> str:
    """Return the card of a set: its contents, size and quality, and how to load it.

    Args:
        converted: the saved network.
        name: the set.
        folder: the folder of the set.
    """
    held, network = converted.sets[name], converted.stage_map.network
    measured = [(name, row) for row in held.info.quality]
    adapters = [adapter for stage in held.adapters.values() for adapter in stage.values()]
    parameters = sum(parameter.numel() for adapter in adapters for parameter in adapter.parameters())
    lines = [
        *_metadata(converted, measured),
        f"# {name}: adapters for {network}",
        "",
        *([_escaped(converted.card.task), ""] if converted.card.task else []),
        f"{len(held.adapters)} stages, ranks {_ranks_text(held)}, {parameters:,} parameters, "
        f"{tensor_bytes(folder):,} bytes, for the base with the fingerprint `{converted.fingerprint[:12]}`"
        f"{'' if converted.stage_map.shared else ': the untouched original network'}.",
    ]
    if held.info.noise is not None:
        lines.append(f"Sigma of the noise on the measurements, on a scale of 0 to 255: {_noise_text(held.info.noise)}.")
    if held.outside:
        lines.append(
            f"It replaces these parameters outside the stages: {', '.join(f'`{key}`' for key in held.outside)}."
        )
    lines += [
        "",
        *_quality_table(measured),
        "```python",
        "# lorun: a conversion with this base"
        + (", from lorun_adapt.from_pretrained(...)" if converted.stage_map.shared else ""),
        f'lorun.load_adapter("path or user/name of the folder with this set", "{name}")',
        f'lorun.set_adapter("{name}")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _metadata(converted: Converted, measured: Iterable[tuple[str, Quality]]) -> list[str]:
    """Return the YAML header that the Hub reads."""
    results = [
        EvalResult(
            task_type=PIPELINE_TAG,
            dataset_type=row.images,
            dataset_name=f"{row.images}, sigma {row.sigma:g}",
            metric_type=kind,
            metric_name=f"{title}, adapter set {name}",
            metric_value=round(value, 4),
        )
        for name, row in measured
        for kind, title, value in (
            ("psnr", "PSNR (dB)", row.psnr),
            ("ssim", "SSIM", row.ssim),
            *((kind, kind, value) for kind, value in row.further.items()),
        )
    ]
    data = ModelCardData(
        library_name="lorun-adapt",
        license=converted.card.license,
        base_model=converted.card.base_model,
        pipeline_tag=PIPELINE_TAG,
        tags=TAGS,
        model_name=converted.stage_map.network if results else None,
        eval_results=results or None,
    )
    return ["---", data.to_yaml(), "---", ""]


def _quality_table(measured: list[tuple[str, Quality]]) -> list[str]:
    if not measured:
        return []
    further = list(dict.fromkeys(kind for _, row in measured for kind in row.further))
    columns = ["adapter set", "images", "sigma", "PSNR (dB)", "SSIM", "PSNR of the original (dB)"]
    columns += [name for kind in further for name in (kind, f"{kind} of the original")]
    lines = [f"| {' | '.join(columns)} |", f"| --- | --- |{' ---: |' * (len(columns) - 2)}"]
    for name, row in measured:
        cells = [f"`{name}`", f"{_escaped(row.images)} ({row.count})", f"{row.sigma:g}", f"{row.psnr:.2f}"]
        cells += [f"{row.ssim:.4f}", "" if row.psnr_original is None else f"{row.psnr_original:.2f}"]
        cells += [_figure(figures.get(kind)) for kind in further for figures in (row.further, row.further_original)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _loading_example(converted: Converted, adapters_only: bool) -> list[str]:
    network, name = converted.stage_map.network, list(converted.sets)[-1]
    on_original = adapters_only and not converted.stage_map.shared
    weights = "the original" if on_original else "any"
    if on_original:
        found = ", ".join(f"{name}={value!r}" for name, value in converted.stage_map.as_arguments().items())
        load = [f"lorun = lorun_adapt.convert(net, share=False, {found})"]
        load.append(f'lorun.load_adapter("path or user/name of this folder", "{name}")')
    elif adapters_only:
        load = ['lorun = lorun_adapt.from_pretrained("path or user/name of the base", net)']
        load.append(f'lorun.load_adapter("path or user/name of this folder", "{name}")')
    else:
        load = ['lorun = lorun_adapt.from_pretrained("path or user/name of this folder", net)']
    return [
        "```python",
        "import lorun_adapt",
        "",
        f"net = ...  # your {network}, with {weights} weights",
        *load,
        f'lorun.set_adapter("{name}")',
        "```",
        "",
    ]


def _peft_example(converted: Converted) -> list[str]:
    first, group = next(iter(converted.sets)), converted.stage_map.groups[0].name
    several = len(converted.stage_map.groups) > 1
    arguments = [f'"{group}"'] if several else []
    arguments += [] if converted.stage_map.shared else ["stage=0"]
    return [
        "To load one stage with PEFT:",
        "",
        "```python",
        f"denoiser = lorun.base_denoiser({', '.join(arguments)})",
        f'PeftModel.from_pretrained(denoiser, "adapters/{first}/stage_00{"/" + group if several else ""}")',
        "```",
    ]


def _ranks_text(held: AdapterSet) -> str:
    adapters = [adapter for stage in held.adapters.values() for adapter in stage.values()]
    found = {term.rank for adapter in adapters for term in terms_of(adapter).values() if term.rank}
    return ", ".join(map(str, sorted(found))) or "none"


def _noise_text(noise: Noise | None) -> str:
    if noise is None:
        return "unknown"
    return f"{noise:g}" if isinstance(noise, float) else ", ".join(f"{sigma:g}" for sigma in noise)


def _escaped(text: str) -> str:
    """Text from a user or a file as one line, with Markdown characters escaped."""
    line = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in line)
