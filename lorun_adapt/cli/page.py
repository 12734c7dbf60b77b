"""A self-contained HTML page about a converted network: its quality by stage, its parameters, and pictures."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor, nn

from ..disk.folder import write_file
from ..model.lorun_model import LoRunModel
from ..network.observe import Observer
from ..network.report import Report
from ..task.evaluate import check_size
from ..task.metrics import psnr, ssim
from ..task.task import Task
from ..util.nested import device_of, replaced, to_device
from ..util.progress import progress
from .unrecovered import unrecovered

NUM_PICTURED = 3  # images that are shown
SIDE = 320  # pixels of the shown centre of an image; the page has room for as many without scaling
MAX_PSNR = 100.0  # dB, for an exact image
ERROR_GAIN = 8  # brightness of the error maps, relative to the errors

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #63686f; --rule: #d9dce0; --paper: #ffffff;
  --first: #2563a8; --second: #c2570c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #a2a8b0; --rule: #3c4148; --paper: #16181b; --first: #74b0f0; --second: #f59a55; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 0.4rem; }
p { margin: 0.3rem 0; color: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.9rem 0.25rem 0; text-align: right; border-bottom: 1px solid var(--rule); font-weight: 400; }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--soft); }
.wide { overflow-x: auto; }
.map th { text-align: center; overflow-wrap: anywhere; }
.map td { min-width: 3.4rem; padding: 0.25rem 0.4rem; text-align: center; border: 1px solid var(--paper); }
.pictures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 0.6rem; margin: 0.6rem 0 1.4rem; }
figure { margin: 0; } figure img { width: 100%; display: block; background: #000; }
figcaption { font-size: 0.85rem; color: var(--soft); }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
.first { stroke: var(--first); fill: none; } .second { stroke: var(--second); fill: none; }
.dot1 { fill: var(--first); } .dot2 { fill: var(--second); } .rule { stroke: var(--rule); }
.key1 { color: var(--first); } .key2 { color: var(--second); }
"""


@dataclass(frozen=True)
class Alternative:
    """A network to compare with: its size, and its mean PSNR (dB) and SSIM over the images."""

    name: str
    num_parameters: int
    psnr: float
    ssim: float


def write_page(path: Path, task: Task, original: nn.Module, lorun: LoRunModel, files: Sequence[Path]) -> None:
    """Restore images with the original and the converted network, and write a page that compares them.

    Args:
        path: the page to write.
        files: the images.

    Raises:
        LoRunError: an image can't be read, a function of the task fails, or the page can't be written.
    """
    inputs = to_device(task.example_inputs(), device_of(original))
    observer = Observer(original, lorun.stage_map, inputs)
    networks: dict[str, tuple[nn.Module, int]] = {
        "original": (original, sum(p.numel() for p in original.parameters())),
        "this conversion": (lorun, lorun.report().network_after.num_parameters),
    }
    if lorun.stage_map.shared:
        before = unrecovered(lorun, original, inputs)
        networks["the same ranks, not recovered"] = before, before.num_parameters()
    scores: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
    scores_of_base: list[tuple[float, float]] = []
    curves: dict[str, list[list[float]]] = {"original": [], "this conversion": []}
    pictures = []
    for place, file in enumerate(progress(files, "restoring", "image", delay=2, leave=False)):
        truth = task.read(file)[None]
        check_size(truth, task.border, file)
        arguments = task.measure(truth)
        restored = {}
        for name, (network, _) in networks.items():
            restored[name] = task.run(network, to_device(arguments, device_of(network)), truth)
            scores[name].append(_score(restored[name], truth, task))
        if lorun.stage_map.shared:
            with lorun.disable_adapter():
                image = task.run(lorun, to_device(arguments, device_of(lorun)), truth)
            scores_of_base.append(_score(image, truth, task))
        for name in curves:
            running = lorun.network if name == "this conversion" else original
            curves[name].append(stage_psnr(task, running, observer, arguments, truth))
        if place < NUM_PICTURED:
            pictures.append(_pictures(file.name, truth, restored["original"], restored["this conversion"], task))
    rows = [Alternative(name, networks[name][1], *_means(scores[name])) for name in networks]
    if scores_of_base:
        sets = sum(p.numel() for held in (lorun.adapters, lorun.outside) for p in held.parameters())
        base = lorun.num_parameters() - sets
        rows.append(Alternative("its base in every stage, no adapters", base, *_means(scores_of_base)))
    page = "\n".join(_page(lorun, rows, curves, pictures, len(files)))
    write_file(path, lambda out: out.write(page.encode()))


def stage_psnr(
    task: Task, network: nn.Module, observer: Observer, arguments: tuple[object, ...], truth: Tensor
) -> list[float]:
    """PSNR in dB of the image after each stage; empty where the stages do not pass images on.

    A stage's output counts as an image if it has as many values as the final output. The task's ``restore`` then
    gets it in place of the final output.
    """
    with torch.no_grad():
        outputs = observer.run(network, arguments, 0)
    images = [tensor for tensor in outputs.stages if outputs.final and tensor.numel() == outputs.final[0].numel()]
    values = []
    for tensor in images:
        final = outputs.final[0]
        restored = task.restored(replaced(outputs.whole, final, tensor.reshape(final.shape)), truth)
        values.append(min(psnr(restored[0].float().cpu(), truth[0], task.border), MAX_PSNR))
    return values


def _score(image: Tensor, truth: Tensor, task: Task) -> tuple[float, float]:
    return min(psnr(image[0], truth[0], task.border), MAX_PSNR), ssim(image[0], truth[0], task.border)


def _means(scores: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return fmean(score[0] for score in scores), fmean(score[1] for score in scores)


# --- the parts of the page -----------------------------------------------------------------------


def _page(
    lorun: LoRunModel,
    rows: Sequence[Alternative],
    curves: dict[str, list[list[float]]],
    pictures: Sequence[str],
    count: int,
) -> Iterator[str]:
    report, name = lorun.report(), html.escape(lorun.stage_map.network)
    times = rows[0].num_parameters / rows[1].num_parameters
    drop = rows[0].psnr - rows[1].psnr
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}, converted</title>'
    yield f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    shared = lorun.stage_map.shared
    yield f"<h1>{name}: {f'{times:.2f} times fewer parameters' if shared else 'adapters on the original'}</h1>"
    change = f"{drop:.2f} dB below the original" if drop >= 0 else f"{-drop:.2f} dB above the original"
    yield f"<p>{len(lorun.stage_map)} stages, {change} on the mean of {count} images.</p>"
    yield "<h2>Size and quality</h2>" + _table(rows)
    means = {key: [fmean(column) for column in zip(*values)] for key, values in curves.items()}
    yield "<h2>PSNR after each stage</h2>"
    if all(means.values()):
        yield '<p><span class="key1">original</span>, <span class="key2">converted</span>; '
        yield "mean over the images, in dB, by stage</p>"
        yield _chart(means["original"], means["this conversion"])
    else:
        yield "<p>The stages of this network do not pass images on.</p>"
    yield "<h2>Where the parameters went</h2>" + _sizes(report)
    if shared:
        yield "<h2>Rank and error of each tensor</h2>"
        yield "<p>Each cell shows the rank, and the share of the weights' norm that was lost when they were factorised:"
        yield " the stronger the colour, the more. Tensors that are not shown are private to each stage.</p>"
        yield _heat_map(lorun)
    yield f"<h2>Images</h2><p>Errors are shown {ERROR_GAIN} times brighter than they are.</p>"
    yield from pictures
    yield "</html>"


def _table(rows: Sequence[Alternative]) -> str:
    head = "<thead><tr><th></th><th>parameters</th><th>PSNR (dB)</th><th>SSIM</th></tr></thead>"
    body = "".join(
        f"<tr><td>{html.escape(row.name)}</td><td>{row.num_parameters:,}</td><td>{row.psnr:.2f}</td>"
        f"<td>{row.ssim:.4f}</td></tr>"
        for row in rows
    )
    return f'<div class="wide"><table>{head}{body}</table></div>'


def _sizes(report: Report) -> str:
    head = "<thead><tr><th>stage</th><th>before</th><th>after</th></tr></thead>"
    rows = [(str(item.stage), item.before.num_parameters, item.after.num_parameters) for item in report.stages]
    outside = report.network_after.num_parameters - report.denoisers_after.num_parameters
    rows += [(report.base_title, 0, report.base.num_parameters), ("outside the stages", outside, outside)]
    rows.append(("whole network", report.network_before.num_parameters, report.network_after.num_parameters))
    body = "".join(f"<tr><td>{name}</td><td>{before:,}</td><td>{after:,}</td></tr>" for name, before, after in rows)
    return f'<div class="wide"><table>{head}{body}</table></div>'


def _heat_map(lorun: LoRunModel) -> str:
    parts = []
    for group in lorun.stage_map.groups:
        ranks = lorun.stage_map.adapted(group)
        residuals = lorun.residuals.get(group.name, {})
        names = [name for name in ranks if name in residuals]
        without_base = {spec.name for spec in group.tensors if spec.without_base}
        head = "".join(
            f"<th>{html.escape(name).replace('.', '.<wbr>')}{'<br>no base' if name in without_base else ''}</th>"
            for name in names
        )
        rows = []
        for place, site in enumerate(group.sites):
            cells = []
            for name in names:
                lost, norm = residuals[name][place]
                share = min(1.0, lost / max(norm, 1e-30))
                cells.append(
                    f'<td style="background: color-mix(in srgb, var(--second) {round(70 * share)}%, var(--paper))" '
                    f'title="{html.escape(str(site))}: {html.escape(name)}">{ranks[name]}<br>{share:.2f}</td>'
                )
            rows.append(f"<tr><td>{site.stage}</td>{''.join(cells)}</tr>")
        title = f"<p>{html.escape(group.name)}</p>" if len(lorun.stage_map.groups) > 1 else ""
        parts.append(
            f'{title}<div class="wide"><table class="map"><thead><tr><th>stage</th>{head}</tr></thead>'
            f"{''.join(rows)}</table></div>"
        )
    return "".join(parts)


def _chart(first: Sequence[float], second: Sequence[float]) -> str:
    width, height, left, right, top, bottom = 900, 300, 46, 12, 12, 34
    low, high = math.floor(min(*first, *second)), math.ceil(max(*first, *second))
    high = max(high, low + 1)

    def x(place: int) -> float:
        return left + (width - left - right) * (place / max(1, len(first) - 1))

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - value) / (high - low)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="PSNR after each stage">']
    step = max(1, (high - low) // 5)
    for value in range(low, high + 1, step):
        parts.append(
            f'<line class="rule" x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value}</text>'
        )
    for place in range(len(first)):
        parts.append(f'<text x="{x(place):.1f}" y="{height - 12}" text-anchor="middle">{place}</text>')
    for values, line, dot in ((first, "first", "dot1"), (second, "second", "dot2")):
        points = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in enumerate(values))
        parts.append(f'<polyline class="{line}" stroke-width="2" points="{points}"/>')
        parts += [
            f'<circle class="{dot}" r="3.5" cx="{x(place):.1f}" cy="{y(value):.1f}">'
            f"<title>stage {place}: {value:.2f} dB</title></circle>"
            for place, value in enumerate(values)
        ]
    return "".join(parts) + "</svg>"


def _pictures(name: str, truth: Tensor, original: Tensor, converted: Tensor, task: Task) -> str:
    def figure(image: Tensor, caption: str) -> str:
        text = html.escape(caption)
        url = _data_url(task.picture(image))
        return f'<figure><img alt="{text}" src="{url}"><figcaption>{text}</figcaption></figure>'

    cut = max(truth.shape[-2:]) > SIDE
    parts = [
        figure(truth, f"{name}, its centre" if cut else name),
        figure(original, f"original network, {psnr(original[0], truth[0], task.border):.2f} dB"),
        figure(converted, f"converted, {psnr(converted[0], truth[0], task.border):.2f} dB"),
        figure((converted - original).abs() * ERROR_GAIN, "difference of converted and original"),
        figure((original - truth).abs() * ERROR_GAIN, "error of the original"),
        figure((converted - truth).abs() * ERROR_GAIN, "error of the converted"),
    ]
    return f'<div class="pictures">{"".join(parts)}</div>'


def _data_url(image: Tensor) -> str:
    """The centre of an image (1, C, H, W) of 1 or 3 channels in [0, 1] as a ``data:`` URL."""
    height, width = image.shape[-2:]
    top, left = max(0, height - SIDE) // 2, max(0, width - SIDE) // 2
    pixels = image[0, :, top : top + SIDE, left : left + SIDE]
    array = (pixels * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
