"""Does a shared base pay? Compare six ways to make a network smaller, at equal bytes and after equal training.

    python examples/does_the_base_pay.py run TASK IMAGES --judge OTHERS --results base.jsonl --shares 0.4 --steps 3000
    python examples/does_the_base_pay.py show base.jsonl --plot base.png

``run`` adds a line to the file for each way, share of the parameters and number of steps, and skips those that it has.
A run that was stopped goes on where it was, if its folder is still there (the first part of ``gradual`` begins again).
``show`` prints tables and draws curves.

The ways, for kernels W_k of the stages k, folded to matrices:

    none            W_k = B_k A_k
    base            W_k = W_0 + B_k A_k
    scales          W_k = diag(a_k) W_0 diag(b_k) + B_k A_k, where the scales take the place of one rank
    several bases   as base, with one W_0 for the early and one for the late stages (three where there is room)
    tie first       as base, but for a fifth of the steps one denoiser learns to be all stages; then the terms start
    gradual         as base, but for a fifth of the steps the original's kernels train while they are pulled together

Ranks are chosen in each way to keep the most energy, weighted by its effect on the output. All train as recovery does,
apart from the first part of ``gradual``; only the first four begin with its closed form.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comparing import rows_of, scores
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from lorun_adapt import Crops, LoRunError, LoRunModel, StageMap, find_stages, load_task
from lorun_adapt.conversion import conversions
from lorun_adapt.factorise.allocate import Allocation, allocate
from lorun_adapt.factorise.ranks import adaptable, matrices_of
from lorun_adapt.factorise.weigh import measure_sensitivity
from lorun_adapt.network.adapter import terms_of
from lorun_adapt.network.batches import Batches
from lorun_adapt.network.observe import Observer
from lorun_adapt.peft_format.options import config_of_ranks
from lorun_adapt.stages.stage_map import TensorSpec
from lorun_adapt.stages.tensors import stage_parameters
from lorun_adapt.terms.factors import factorise
from lorun_adapt.terms.lowrank import LowRank
from lorun_adapt.terms.registry import TERMS
from lorun_adapt.terms.term import Fitted, Setting, Term, Weighting
from lorun_adapt.training.distill import Distillation
from lorun_adapt.training.duration import Duration, learning_rate_schedule
from lorun_adapt.training.optimised import Optimised
from lorun_adapt.training.processes import make_accelerator
from lorun_adapt.training.recovery import recover
from lorun_adapt.training.trained import TrainedTensor
from lorun_adapt.util.seeds import seeded

FIRST = 0.2  # the fraction of the steps of the first part, in the ways that have two
ACROSS = 4  # panels of the picture, side by side
EVERY = 2  # steps between two pulls
RATE = 0.02  # learning rate while the kernels are pulled together, relative to the size of a tensor's values

# --- scales: a kind of term ----------------------------------------------------------------------


class Scaled(Term):
    """W_k = diag(a_k) W_0 diag(b_k) + B_k A_k: a rank more than that of the product, for the scales.

    It has no form in files, as the study saves none.
    """

    def __init__(self, rows: Tensor, columns: Tensor, lora_A: Tensor | None, lora_B: Tensor | None) -> None:
        super().__init__()
        self.rows, self.columns = nn.Parameter(rows), nn.Parameter(columns)
        self.lora_A = None if lora_A is None else nn.Parameter(lora_A)
        self.lora_B = None if lora_B is None else nn.Parameter(lora_B)

    @property
    def rank(self) -> int:  # type: ignore[override]
        return 1 if self.lora_A is None else 1 + len(self.lora_A)

    def forward(self, base: Tensor) -> Tensor:
        scaled = self.rows[:, None] * base.reshape(len(self.rows), len(self.columns)) * self.columns
        if self.lora_A is not None and self.lora_B is not None:
            scaled = torch.addmm(scaled, self.lora_B, self.lora_A)
        return scaled.view(base.shape)

    @classmethod
    def fit(
        cls,
        stages: Tensor,
        spec: TensorSpec,
        setting: Setting,
        *,
        weighting: Weighting | None = None,
        generator: torch.Generator | None = None,
    ) -> Fitted:
        """Fit the product; the scales start at 1."""
        ones = [torch.ones(side, dtype=stages.dtype) for side in spec.matrix]
        product = Setting(max(1, setting.rank - 1))
        fitted = LowRank.fit(stages, spec, product, weighting=weighting, generator=generator)
        pairs = [(None, None) if setting.rank == 1 else (term.lora_A, term.lora_B) for term in fitted.terms]
        return fitted._replace(terms=[cls(ones[0].clone(), ones[1].clone(), a, b) for a, b in pairs])

    @classmethod
    def size(cls, spec: TensorSpec, rank: int) -> int:
        return LowRank.size(spec, rank)


class ScaledConfig(LoraConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "SCALED"


TERMS["SCALED"] = Scaled


# --- the ways ------------------------------------------------------------------------------------


class NoRoom(LoRunError):
    """The budget, or the number of stages, is too small for two bases."""


@dataclass
class Study:
    """A network to make smaller to a share of its parameters in so many steps, with a folder for unfinished work."""

    net: nn.Module
    crops: Crops
    share: float
    steps: int
    folder: Path

    def none(self) -> LoRunModel:
        return self._recovered(self._collapsed(self.net, base=False))

    def base(self) -> LoRunModel:
        return self._recovered(self._collapsed(self.net))

    def scales(self) -> LoRunModel:
        return self._recovered(self._collapsed(self.net, scaled=True))

    def several_bases(self) -> LoRunModel:
        paths = [site.module for site in find_stages(self.net).sites]
        for count in (3, 2):
            size = math.ceil(len(paths) / count)
            try:
                lorun = self._collapsed(self.net, [paths[i : i + size] for i in range(0, len(paths), size)])
            except LoRunError as error:
                reason = error
            else:
                return self._recovered(lorun)
        raise NoRoom(str(reason)) from reason

    def tie_first(self) -> LoRunModel:
        return self._continued(self._first("tied", self._tie))

    def gradual(self) -> LoRunModel:
        return self._continued(self._first("pulled", self._pull))

    def _collapsed(
        self, net: nn.Module, stages: list[list[str]] | None = None, *, base: bool = True, scaled: bool = False
    ) -> LoRunModel:
        """Factorise ``net``, with ranks for the budget that depend on the original."""
        allocation = self._allocated(stages, base)
        config = config_of_ranks(allocation.ranks)
        if scaled:
            config = ScaledConfig(
                r=config.r,
                lora_alpha=config.lora_alpha,
                rank_pattern=config.rank_pattern,
                alpha_pattern=config.alpha_pattern,
            )
        (converted,) = conversions(net, config, stages=stages, without_base=allocation.without_base)
        return LoRunModel(converted)

    def _allocated(self, stages: list[list[str]] | None = None, base: bool = True) -> Allocation:
        stage_map = find_stages(self.net, stages=stages)
        known = measure_sensitivity(self.net, stage_map, self._batches(), 0)
        try:
            return allocate(self.net, stage_map, self.share, known, base)
        except LoRunError as error:  # the ways with a base need more parameters than the one without
            raise NoRoom(str(error)) from error

    def _batches(self) -> Batches:
        with seeded(0):
            return Batches(self.crops)

    def _recovered(
        self, lorun: LoRunModel, steps: int | None = None, closed_form: bool = True, state: str = "recovery.state"
    ) -> LoRunModel:
        """Recover as ``LoRunModel.recover`` does, from the weights as they are if not in closed form."""
        if not recover(
            lorun.converted(),
            lorun.network,
            self.net,
            self._batches(),
            Duration(steps=steps or self.steps),
            resume_from=self.folder / state,
            closed_form=closed_form,
        ):
            raise KeyboardInterrupt
        return lorun

    def _continued(self, net: nn.Module) -> LoRunModel:
        return self._recovered(self._collapsed(net), self.steps - round(FIRST * self.steps), closed_form=False)

    def _first(self, name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """The network that the first part makes, from its file if there is one."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            state = {key: value.contiguous() for key, value in make().state_dict().items()}
            save_file(state, path)
        net = copy.deepcopy(self.net)
        net.load_state_dict(load_file(path))
        return net

    def _tie(self) -> nn.Module:
        """One denoiser that is all stages, apart from their private tensors."""
        lorun = self._collapsed(with_mean_kernels(self.net))
        for adapter in [adapter for stage in lorun.converted().choice.values() for adapter in stage.values()]:
            for term in terms_of(adapter).values():
                term.requires_grad_(False)
        steps = round(FIRST * self.steps)
        return self._recovered(lorun, steps, closed_form=False, state="tying.state").merge_and_unload()

    def _pull(self) -> nn.Module:
        """The original, trained while the part of its kernels that a base and the terms cannot hold shrinks to zero."""
        net, stage_map = copy.deepcopy(self.net).eval(), find_stages(self.net)
        ranks, steps = self._allocated().ranks, round(FIRST * self.steps)
        batches = self._batches()
        objective = Distillation(net, self.net.eval(), Observer(self.net, stage_map, batches.first))
        net.requires_grad_(False)
        inside = [p for site in stage_map.sites for p in net.get_submodule(site.module).parameters()]
        optimised = Optimised([TrainedTensor(p.requires_grad_(), RATE) for p in inside], make_accelerator())
        for step, batch in zip(tqdm(range(steps), "pulling together", leave=False), batches):
            example = objective.example(batch, step)
            objective(lambda example=example: example)[0].backward()
            optimised.step(learning_rate_schedule(step / steps))
            left = steps - step - 1
            if left % EVERY == 0:
                shrink(net, stage_map, ranks, left / (left + EVERY))
        return net


@torch.no_grad()
def shrink(net: nn.Module, stage_map: StageMap, ranks: Mapping[str, int], factor: float) -> None:
    """Multiply by ``factor`` what a base and terms of these ranks lose of the kernels."""
    for group, spec in adaptable(stage_map):
        stack = matrices_of(net, group, spec)
        fitted = factorise(stack, ranks[spec.name])
        near = (fitted.base + fitted.b @ fitted.a).to(stack)
        for kernel, value in zip(stage_parameters(net, group, spec), near + factor * (stack - near)):
            kernel.copy_(value.view(kernel.shape))


@torch.no_grad()
def with_mean_kernels(net: nn.Module) -> nn.Module:
    """A copy in which all stages have the mean of the kernels that are to be adapted; it shares no tensor."""
    net = copy.deepcopy(net)
    for group, spec in adaptable(find_stages(net)):
        mean = matrices_of(net, group, spec).mean(0)
        for kernel in stage_parameters(net, group, spec):
            kernel.copy_(mean.view(kernel.shape))
    return net


WAYS: dict[str, Callable[[Study], LoRunModel]] = {
    "none": Study.none,
    "base": Study.base,
    "scales": Study.scales,
    "several bases": Study.several_bases,
    "tie first": Study.tie_first,
    "gradual": Study.gradual,
}


# --- the command ---------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    task = load_task(args.task)
    net = task.build()
    task.load_weights(net, args.weights)
    judged, crops = task.images(args.judge), Crops(task, task.images(args.images))
    network, original = type(net).__name__ if args.name is None else args.name, None
    for steps in args.steps:
        for share in args.shares:
            for way in args.ways:
                key = {"network": network, "way": way, "share": share, "steps": steps}
                if any(key.items() <= row.items() for row in rows_of(args.results)):
                    continue
                folder = args.results.with_suffix("") / "-".join(map(str, key.values())).replace(" ", "_")
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    lorun = WAYS[way](Study(net, crops, share, steps, folder))
                except NoRoom as error:
                    shutil.rmtree(folder)
                    print(f"{key}: {error}", flush=True)
                    continue
                original = original or scores(task, judged, net)["psnr"]
                row = {
                    **key,
                    "parameters": lorun.report().network_after.num_parameters,
                    "psnr": scores(task, judged, lorun)["psnr"],
                    "original": original,
                }
                with args.results.open("a") as file:
                    print(json.dumps(row), file=file)
                shutil.rmtree(folder)
                print(row, flush=True)


def show(args: argparse.Namespace) -> None:
    """Print a table for each network and share: how far below the original, in dB, by steps."""
    rows = rows_of(args.results)
    for network, share in sorted({(row["network"], row["share"]) for row in rows}, key=str):
        part = [row for row in rows if (row["network"], row["share"]) == (network, share)]
        lengths = sorted({row["steps"] for row in part})
        original = part[0]["original"]
        print(f"\n{network}, {1 / share:.1f} times fewer parameters, original {original:.2f} dB\n")
        print(f"| way | parameters | {' | '.join(f'{steps:,} steps' for steps in lengths)} |")
        print(f"| --- | ---: |{' ---: |' * len(lengths)}")
        for way in WAYS:
            found = {row["steps"]: row for row in part if row["way"] == way}
            if found:
                drops = [f"{original - found[n]['psnr']:.2f}" if n in found else "" for n in lengths]
                print(f"| {way} | {max(row['parameters'] for row in found.values()):,} | {' | '.join(drops)} |")
    if args.plot:
        plot(rows, args.plot, args.pace)


def plot(rows: list[dict[str, Any]], path: Path, pace: float | None) -> None:
    """Draw PSNR against steps, or minutes of ``pace`` steps; a line for each way, a panel for each network and share.

    Each point is a run of its own, whose learning rate fell to zero.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = sorted({(row["network"], -row["share"]) for row in rows})
    grid = math.ceil(len(panels) / ACROSS), min(ACROSS, len(panels))
    figure, axes = pyplot.subplots(*grid, figsize=(4.2 * grid[1], 3.6 * grid[0]), squeeze=False, layout="tight")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (network, share) in zip(axes.flat, panels):
        part = [row for row in rows if (row["network"], -row["share"]) == (network, share)]
        for number, way in enumerate(WAYS):
            points = sorted((row["steps"] / (pace or 1), row["psnr"]) for row in part if row["way"] == way)
            if points:
                axis.plot(*zip(*points), "osD^vP"[number] + "-", color=f"C{number}", label=way)
        axis.axhline(part[0]["original"], color="black", linewidth=0.8, linestyle="--", label="original")
        axis.set(title=f"{network}, {-1 / share:.1f} times smaller", xscale="log", ylabel="PSNR (dB)")
        lengths = sorted({row["steps"] / (pace or 1) for row in part})
        lengths = [a for a, b in zip(lengths, [*lengths[1:], math.inf]) if b > 1.5 * a]  # others would overlap
        axis.set_xticks(lengths, [f"{length:,.0f}" for length in lengths])
        axis.set_xticks([], minor=True)
        axis.set_xlabel(f"minutes, at {pace:g} steps each" if pace else "steps")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run", help="add to a file of results")
    running.set_defaults(command=run)
    running.add_argument("task", help="task file")
    running.add_argument("images", type=Path, help="folder of images to train on")
    running.add_argument("--judge", type=Path, required=True, help="folder of images to judge on")
    running.add_argument("--weights", type=Path, help="checkpoint, where the task names none")
    running.add_argument("--results", type=Path, required=True, help="file to add to")
    running.add_argument("--name", help="of the network; its class by default")
    running.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    running.add_argument("--shares", type=float, nargs="+", default=[0.4, 0.2632, 0.1667], help="of the parameters")
    running.add_argument("--steps", type=int, nargs="+", default=[3000, 9000, 18000])
    showing = commands.add_parser("show", help="print tables of a file of results")
    showing.set_defaults(command=show)
    showing.add_argument("results", type=Path)
    showing.add_argument("--plot", type=Path, help="picture to draw")
    showing.add_argument("--pace", type=float, help="steps in a minute, to draw minutes instead of steps")
    args = parser.parse_args()
    if args.command is show and args.pace and not args.plot:
        parser.error("--pace is for the axis of --plot: give both")
    args.command(args)


if __name__ == "__main__":
    main()
