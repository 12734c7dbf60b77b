"""The commands that train: convert, recover and finetune."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    ALSO,
    BATCH,
    BUDGET,
    CONVERTED,
    DEVICE,
    DTYPE,
    ENERGY,
    FASTER,
    FILE,
    MINUTES,
    NO_SHARE,
    OUT,
    RANK,
    RECOMPUTE,
    RESUME_FROM,
    SEED,
    STAGES,
    STEPS,
    TASK,
    Command,
    calibration_options,
    example_inputs,
    show,
    sigma_option,
    trained_network,
    weights_options,
    working,
)
from .other_sets import check_none_is_lost, load_others

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..model.lorun_model import LoRunModel
    from ..task.crops import Crops
    from ..task.task import Task
    from ..training.duration import Duration


@click.command("convert", cls=Command)
@TASK
@weights_options
@RANK
@ENERGY
@BUDGET
@FASTER
@NO_SHARE
@STAGES
@OUT
@DTYPE
@calibration_options(required=False)
@DEVICE
@SEED
def convert_(
    task: str,
    weights: Path | None,
    weights_key: str | None,
    rank: int | None,
    energy: float | None,
    budget: int | float | None,
    faster: float | None,
    no_share: bool,
    stages: tuple[str, ...],
    out: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    seed: int,
    calibration: Path | None,
    **training: Any,
) -> None:
    """Collapse the stages and save the base and the adapters; with --calibration, recover the quality.

    Recovery distils the original network into the conversion on crops of the images, for --minutes or
    --steps. Ctrl-C saves the best weights so far. `accelerate launch -m lorun_adapt convert …` runs it
    on several processes and GPUs.
    """
    from ..conversion import conversions
    from ..model.lorun_model import DEFAULT_SET, LoRunModel
    from ..network.batches import Batches
    from ..network.divergence import warn_if_it_diverges
    from ..training.duration import Duration

    started = time.monotonic()

    if no_share and calibration is not None:
        raise click.UsageError("--no-share leaves nothing to recover: leave --calibration out, and use finetune")
    if calibration is None and (given := [f"--{name.replace('_', '-')}" for name, value in training.items() if value]):
        raise click.UsageError(f"{' and '.join(given)} need --calibration: give a folder of images")
    check_none_is_lost(out, [DEFAULT_SET])
    spec, net = trained_network(task, weights, weights_key, seed)
    crops = None if calibration is None else _crops(spec, calibration, seed, training)
    weighed = None if crops is None or (budget is None and faster is None) else Batches(crops)
    inputs = example_inputs(spec, device)
    with working("converting") if weighed is None else contextlib.nullcontext():  # weighing shows its own progress bar
        found = conversions(
            net.to(device),
            rank=rank,
            energy=energy,
            budget=budget,
            faster=faster,
            stages=stages or None,
            example_inputs=inputs,
            share=not no_share,
            calibration=weighed,
            duration=None if crops is None else Duration(training["minutes"], training["steps"]),
            repeatable=training["resume_from"] is not None,
            seed=seed,
            align_channels=crops is None,
        )
    candidates = [LoRunModel(converted) for converted in found]
    lorun, finished = candidates[0], True
    if crops is None:
        warn_if_it_diverges(lorun.network, net, lorun.stage_map, inputs, "recover it with --calibration")
    else:
        left = Duration(training["minutes"], training["steps"]).after(time.monotonic() - started)
        lorun, finished = _recover(candidates, spec, net, crops, seed, left, training)
    _save(lorun, spec, out, dtype, finished, training["resume_from"])


@click.command()
@TASK
@weights_options
@CONVERTED
@OUT
@DTYPE
@calibration_options(required=True)
@DEVICE
@SEED
def recover(
    task: str,
    weights: Path | None,
    weights_key: str | None,
    converted: Path,
    out: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    seed: int,
    calibration: Path,
    **training: Any,
) -> None:
    """Recover the quality of a conversion; a recovered one can be trained further.

    Recovery distils the original network into the conversion on crops of the images, for --minutes or
    --steps. Ctrl-C saves the best weights so far.
    """
    from ..files.load import stored_dtype
    from ..model.pretrained import from_pretrained
    from ..training.duration import Duration

    spec, net = trained_network(task, weights, weights_key, seed)
    lorun = from_pretrained(converted, net.to(device))
    check_none_is_lost(out, lorun.adapter_names)
    if training["sigma"] is None:
        training["sigma"] = lorun.adapter_info[lorun.adapter_names[0]].sigma
    crops = _crops(spec, calibration, seed, training)
    stored = stored_dtype(lorun.converted(), converted)
    duration = Duration(training["minutes"], training["steps"])
    _, finished = _recover([lorun], spec, net, crops, seed, duration, training)
    _save(lorun, spec, out, dtype or stored, finished, training["resume_from"])


@click.command()
@TASK
@CONVERTED
@sigma_option(note="  [default: 0, and no noise level selects the set]")
@click.option("--adapter-name", required=True, metavar="NAME", help="Name of the new set.")
@click.option(
    "--start-from",
    multiple=True,
    metavar="NAME",
    help="The set to start from; with several, their interpolation.  [default: default]",
)
@ALSO
@click.option(
    "--images", type=FILE, required=True, help="Folder of images to train on; a fifth, at most 20, is held out."
)
@MINUTES
@STEPS
@BATCH
@RECOMPUTE
@RESUME_FROM
@OUT
@DTYPE
@DEVICE
@SEED
def finetune(
    task: str,
    converted: Path,
    sigma: float | None,
    adapter_name: str,
    start_from: tuple[str, ...],
    also: tuple[str, ...],
    images: Path,
    minutes: float | None,
    steps: int | None,
    batch: int | None,
    recompute: bool,
    resume_from: Path | None,
    out: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    seed: int,
) -> None:
    """Train a new adapter set for another noise level and add it to a conversion.

    For another mask, scanner or camera, let the task measure with it, and leave --sigma out. The base,
    the other sets and the active set do not change; sets of the same base in --out are kept. A fifth of
    the images, at most 20, is held out: the weights that do best on these images are kept, and the PSNR
    on them is shown. Ctrl-C saves the best weights so far.
    """
    from ..files.load import stored_dtype
    from ..files.save import update_cards
    from ..model.lorun_model import DEFAULT_SET
    from ..model.pretrained import from_pretrained
    from ..task.crops import Crops, held_out_of
    from ..task.task import load_task
    from ..training.duration import Duration
    from ..util.seeds import set_seed

    Duration(minutes, steps)
    set_seed(seed)
    spec = load_task(task)
    kept, files = held_out_of(spec.images(images))
    crops, judged = (Crops(spec, part, sigma=sigma or 0.0, seed=seed, size=batch, dimmed=0) for part in (files, kept))
    lorun = from_pretrained(converted, spec.build().to(device))
    check_none_is_lost(out, [*lorun.adapter_names, adapter_name], lorun.fingerprint)
    stored = stored_dtype(lorun.converted(), converted)
    lorun.task = spec
    before = lorun.active_adapters
    finished = lorun.finetune(
        crops,
        adapter_name,
        start_from or DEFAULT_SET,
        sigma=sigma,
        also=also,
        minutes=minutes,
        steps=steps,
        loss=crops.loss,
        held_out=judged.some(),
        recompute=recompute,
        resume_from=resume_from,
        seed=seed,
    )
    lorun.set_adapter(before)
    load_others(lorun, out)
    _save(lorun, spec, out, dtype or stored, finished, resume_from, report=False)
    if _is_main_process():
        other = (start_from or (DEFAULT_SET,))[0]
        _compare_sets(lorun, spec, kept, adapter_name, other, sigma or 0.0, images, seed)
        lorun.set_adapter(before)
        update_cards(lorun.converted(), out)


def _compare_sets(
    lorun: LoRunModel, spec: Task, files: list[Path], name: str, other: str, sigma: float, images: Path, seed: int
) -> None:
    """Compare the new set with the one it started from on the held-out images, and record the result."""
    from ..task.evaluate import evaluate
    from ..util.seeds import seeded
    from ..util.tables import table

    rows = []
    for which in (other, name):
        lorun.set_adapter(which)
        with seeded(seed), lorun.assume_noise(sigma):
            result = evaluate(spec, files, None, lorun.eval(), sigma=sigma, description=f"restoring with {which}")
        mean = result.mean()
        rows.append((which, f"{mean['psnr_converted']:.2f}", f"{mean['ssim_converted']:.4f}"))
    lorun.note_quality(result.quality(f"{images.resolve().name}, held out", sigma))
    show([table(f"{len(files)} images held out, sigma {sigma:g}", ("adapter set", "PSNR (dB)>", "SSIM>"), rows)])


def _crops(spec: Task, folder: Path, seed: int, training: dict[str, Any]) -> Crops:
    from ..task.crops import Crops
    from ..training.duration import Duration

    Duration(training["minutes"], training["steps"])
    return Crops(
        spec,
        spec.images(folder),
        sigma=training["sigma"] or 0.0,
        seed=seed,
        size=training["batch"],
        dimmed=0 if training["truth"] else None,
    )


def _recover(
    candidates: list[LoRunModel],
    spec: Task,
    net: nn.Module,
    crops: Crops,
    seed: int,
    duration: Duration,
    training: dict[str, Any],
) -> tuple[LoRunModel, bool]:
    """Recover the best; first set the noise schedule in all networks if the task has one and the noise is known."""
    from ..model.trials import recover_best
    from ..network.noise import at_stage

    for lorun in candidates:
        lorun.task = spec
        if training["sigma"] is not None or spec.schedule is None:
            for name in lorun.adapter_names:
                lorun.set_noise(name, sigma=training["sigma"] or 0.0)
    lorun = candidates[0]
    noise = lorun.adapter_info[lorun.adapter_names[0]].noise
    if spec.schedule is not None and noise is not None:
        spec.schedule(net, [at_stage(noise, stage) for stage in range(len(lorun.stage_map))])
    return recover_best(
        candidates,
        net,
        crops,
        duration,
        loss=crops.loss if training["truth"] else None,
        also=training["also"],
        recompute=training["recompute"],
        resume_from=training["resume_from"],
        seed=seed,
    )


def _save(
    lorun: LoRunModel,
    spec: Task,
    out: Path,
    dtype: torch.dtype | None,
    finished: bool,
    state: Path | None,
    *,
    report: bool = True,
) -> None:
    """Save, remove the state file of a finished run, and print a summary.

    If Ctrl-C stopped the training, exit with code 130, as shells expect.
    """
    from ..disk.folder import tensor_bytes
    from ..util.text import shortened

    if _is_main_process():
        lorun.card = dataclasses.replace(
            lorun.card,
            task=shortened(spec.title),
            license=spec.license or lorun.card.license,
            base_model=spec.base_model or lorun.card.base_model,
        )
        lorun.save_pretrained(out, dtype=dtype)
        if finished and state is not None:
            state.unlink(missing_ok=True)
        if report:
            show(lorun.report().tables())
        click.echo(f"saved to {out}: {tensor_bytes(out):,} bytes of safetensors")
    if not finished:
        sys.exit(130)


def _is_main_process() -> bool:
    from ..training.processes import launched, process_state

    return not launched() or process_state().is_main_process
