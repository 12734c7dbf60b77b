"""Ways to make a network small, at equal bytes and in equal time, as a Markdown table.

    python examples/compare_methods.py examples/ista_net_plus.py IMAGES --judge OTHERS --budgets 0.4 0.25 --minutes 5

All ways train on the same crops of IMAGES, for the same minutes on the clock, with the same optimiser
and schedule, and are judged on OTHERS. Bytes are those of the files: float32 values, and for pruning
one bit for each weight, which says whether it is there. The first way's bytes at each budget are what
the others may use; of ranks they get the largest that fits.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

import lorun_adapt
from lorun_adapt.conversion import collapse
from lorun_adapt.disk.folder import tensor_bytes
from lorun_adapt.network.batches import Batches
from lorun_adapt.network.observe import Observer
from lorun_adapt.stages.stage_map import StageMap, TensorSpec
from lorun_adapt.task.crops import Crops
from lorun_adapt.task.evaluate import evaluate
from lorun_adapt.task.task import Task, load_task
from lorun_adapt.terms import factors as factorise
from lorun_adapt.training.distill import Distillation
from lorun_adapt.training.duration import Duration
from lorun_adapt.training.speed import channels_last
from lorun_adapt.training.trained import FACTORS, PRIVATE, TrainedTensor, trainable
from lorun_adapt.training.trainer import Trainer, interruptible
from lorun_adapt.util.modules import copy_network, distinct_tensors
from lorun_adapt.util.seeds import seeded

DENSE = 0.02  # learning rate of dense weights, relative to their size
PRUNED_BY = 0.6  # of the time, in which pruning comes to its end; the rest is fine-tuning


Made = tuple[str, nn.Module, int]  # what to call it, the network, bytes of its file


class Built(nn.Module):
    """A network whose tensors are computed from others before each forward.

    ``stage_map`` and ``network`` are where a LoRunModel has them, so that stage outputs are found.
    """

    def __init__(self, network: nn.Module, stage_map: StageMap, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network, self.stage_map = network.requires_grad_(False), stage_map
        parameters, self.buffers_outside = outside(network, stage_map)
        held = {**tensors, **parameters}
        self.held = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(t.clone()) for name, t in held.items()})

    def built(self) -> dict[str, Tensor]:
        """The network's tensors by name, from those that are held."""
        return {name.replace("/", "."): tensor for name, tensor in self.held.items()}

    def forward(self, *args: Any) -> Any:
        return functional_call(self.network, self.built(), args)

    def bytes(self) -> int:
        return file_bytes({**self.buffers_outside, **self.held})


class Tied(Built):
    """One denoiser for all stages."""

    def __init__(self, network: nn.Module, stage_map: StageMap) -> None:
        self.places = [names for _, names in places(stage_map)]
        means = {names[0]: torch.stack([network.get_parameter(n) for n in names]).mean(0) for names in self.places}
        super().__init__(network, stage_map, means)

    def built(self) -> dict[str, Tensor]:
        held = super().built()
        for names in self.places:
            held.update(dict.fromkeys(names, held[names[0]]))
        return held


class Alone(Built):
    """Each stage's tensors as a product of two factors, nothing shared."""

    def __init__(self, network: nn.Module, stage_map: StageMap, rank: int) -> None:
        tensors: dict[str, Tensor] = {}
        for spec, names in places(stage_map):
            for name in names:
                value = network.get_parameter(name).detach()
                if spec.smaller(rank):
                    u, s, v = torch.linalg.svd(value.reshape(spec.matrix).double(), full_matrices=False)
                    root = s[:rank].sqrt()
                    tensors[f"{name}:b"] = (u[:, :rank] * root).float()
                    tensors[f"{name}:a"] = (root[:, None] * v[:rank]).float()
                else:
                    tensors[name] = value
        super().__init__(network, stage_map, tensors)

    def built(self) -> dict[str, Tensor]:
        held = super().built()
        result = {}
        for name, tensor in held.items():
            if name.endswith(":a"):
                own = name[:-2]
                like = self.network.get_parameter(own)
                order = torch.contiguous_format if like.is_contiguous() else torch.channels_last
                result[own] = (held[f"{own}:b"] @ tensor).view(like.shape).contiguous(memory_format=order)
            elif not name.endswith(":b"):
                result[name] = tensor
        return result


class Pruned(Built):
    """Global magnitude pruning, gradually (Zhu and Gupta, arXiv:1710.01878, equation 1), with fine-tuning.

    What has less than two dimensions (thresholds, step sizes, biases) is kept whole.
    """

    def __init__(self, network: nn.Module, stage_map: StageMap, limit: int, seconds: float) -> None:
        tensors = {n: network.get_parameter(n).detach() for _, names in places(stage_map) for n in names}
        super().__init__(network, stage_map, tensors)
        matrices = [name.replace(".", "/") for name, tensor in tensors.items() if tensor.ndim > 1]
        self.masks = {name: torch.ones_like(self.held[name]) for name in matrices}
        self.total = sum(self.held[name].numel() for name in matrices)
        whole = self._file(torch.zeros(0))
        self.keep = min(1.0, (limit - file_bytes(whole)) / 4 / self.total)
        if self.keep <= 0:
            raise SystemExit(f"expected room for the mask, found {limit:,} bytes: raise the budget")
        self.started, self.seconds, self.final = time.monotonic(), seconds, False

    def built(self) -> dict[str, Tensor]:
        if not torch.is_grad_enabled():
            masks = self.at(self.keep)  # it is judged as small as it will be
        else:
            done = min(1.0, (time.monotonic() - self.started) / (PRUNED_BY * self.seconds))
            masks = self.masks = self.at(self.keep + (1 - self.keep) * (1 - done) ** 3)
            self.final = done == 1
        return {
            name.replace("/", "."): tensor * masks[name] if name in masks else tensor
            for name, tensor in self.held.items()
        }

    def at(self, kept: float) -> dict[str, Tensor]:
        """Masks of the part ``kept`` of all weights, the largest of those not pruned yet."""
        if self.final:
            return self.masks
        sizes = {name: (self.held[name].detach() * mask).abs() for name, mask in self.masks.items()}
        dropped = self.total - int(kept * self.total)
        if dropped <= 0:
            return self.masks
        least = torch.cat([size.flatten() for size in sizes.values()]).kthvalue(dropped)[0]
        return {name: size.gt(least).float() for name, size in sizes.items()}

    def bytes(self) -> int:
        masks = self.at(self.keep)
        return file_bytes(self._file(torch.cat([self.held[name].detach()[mask > 0] for name, mask in masks.items()])))

    def _file(self, values: Tensor) -> dict[str, Tensor]:
        whole = {name: tensor for name, tensor in self.held.items() if name not in self.masks}
        mask = torch.zeros(math.ceil(self.total / 8), dtype=torch.uint8)
        return {**self.buffers_outside, **whole, "values": values, "mask": mask}


class Peft(nn.Module):
    """PEFT's own layers around one averaged, frozen denoiser; stages keep what is not adapted."""

    def __init__(self, network: nn.Module, stage_map: StageMap, rank: int) -> None:
        super().__init__()
        self.stage_map = stage_map
        _, self.buffers_outside = outside(network, stage_map)
        targets, self.shared = [], {}
        for spec, names in places(stage_map):
            if spec.smaller(rank):
                self.shared[names[0]] = torch.stack([network.get_parameter(n).detach() for n in names]).mean(0)
                for name in names:
                    network.get_parameter(name).data.copy_(self.shared[names[0]])
                    targets.append(name.removesuffix(".weight"))
        self.model = get_peft_model(network, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        self.network = self.model.base_model.model
        for name, parameter in self.network.named_parameters():
            adapted = name.endswith("base_layer.weight")
            parameter.requires_grad_(not adapted)

    def forward(self, *args: Any) -> Any:
        return self.network(*args)

    def bytes(self) -> int:
        own = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        return file_bytes({**self.buffers_outside, **own, **self.shared})


def places(stage_map: StageMap) -> Iterator[tuple[TensorSpec, list[str]]]:
    """Each tensor of the denoisers, and its name at each stage."""
    for group in stage_map.groups:
        for spec in group.tensors:
            if not spec.buffer and not spec.common:
                yield spec, [f"{site.module}.{spec.name}" for site in group.sites]


def outside(network: nn.Module, stage_map: StageMap) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a file of the network holds besides the denoisers' tensors: parameters, and buffers."""
    inside = {id(network.get_parameter(name)) for _, names in places(stage_map) for name in names}
    rest = {name: tensor for name, tensor in distinct_tensors(network).items() if id(tensor) not in inside}
    parameters = {name: tensor for name, tensor in rest.items() if isinstance(tensor, nn.Parameter)}
    return parameters, {name: tensor for name, tensor in rest.items() if name not in parameters}


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
        return path.stat().st_size


def saved_bytes(lorun: lorun_adapt.LoRunModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        lorun.save_pretrained(folder)
        return tensor_bytes(Path(folder))


def train(student: nn.Module, teacher: nn.Module, rates: list[TrainedTensor], crops: Crops, minutes: float) -> None:
    """As recovery does it, without its start."""
    student.eval()
    teacher.eval()
    with seeded(0), interruptible() as stop:
        batches = Batches(crops)
        distillation = Distillation(student, teacher, Observer(teacher, student.stage_map, batches.first))
        with channels_last(distillation, batches.first, 0):
            trainer = Trainer(distillation, rates, batches, Duration(minutes), seed=0, resume_from=None, run_id="")
            if not trainer.train(stop):
                raise KeyboardInterrupt


def rates_of(student: Built) -> list[TrainedTensor]:
    rates = {":a": FACTORS, ":b": FACTORS}
    return [
        TrainedTensor(p, rates.get(name[-2:], DENSE if p.ndim > 1 and p.numel() > 1000 else PRIVATE))
        for name, p in student.held.items()
    ]


class Comparison:
    """The ways, each as a function of the bytes it may have that gives what to call it, its network and its bytes."""

    def __init__(self, task: Task, net: nn.Module, crops: Crops, minutes: float) -> None:
        self.task, self.net, self.crops, self.minutes = task, net, crops, minutes
        self.stage_map = lorun_adapt.find_stages(net)

    def ours(self, budget: float) -> Made:
        started = time.monotonic()
        lorun = collapse(self.net, budget=budget, calibration=Batches(self.crops))
        spent = (time.monotonic() - started) / 60
        if not lorun.recover(self.net, self.crops, minutes=max(self.minutes - spent, 0.01)):
            raise KeyboardInterrupt
        return "ranks, and bases where they pay, by sensitivity, recovered", lorun, saved_bytes(lorun)

    def pruned(self, limit: int) -> Made:
        student = Pruned(copy_network(self.net), self.stage_map, limit, 60 * self.minutes)
        return self._built(f"magnitude pruning to {100 * student.keep:.0f} % of the weights, fine-tuned", student)

    def alone(self, limit: int) -> Made:
        _, student = largest(lambda rank: Alone(copy_network(self.net), self.stage_map, rank), Alone.bytes, limit)
        return self._built("each stage factorised alone, fine-tuned", student)

    def tied(self, limit: int) -> Made:
        return self._built("one denoiser for all stages, fine-tuned", Tied(copy_network(self.net), self.stage_map))

    def _built(self, name: str, student: Built) -> Made:
        train(student, self.net, rates_of(student), self.crops, self.minutes)
        return name, student, student.bytes()

    def peft(self, limit: int) -> Made:
        rank, student = largest(lambda rank: Peft(copy_network(self.net), self.stage_map, rank), Peft.bytes, limit)
        rates = [
            TrainedTensor(p, FACTORS if "lora_" in name else PRIVATE)
            for name, p in student.network.named_parameters()
            if p.requires_grad
        ]
        train(student, self.net, rates, self.crops, self.minutes)
        return f"PEFT's layers of rank {rank} on the average", student, student.bytes()

    def relaxed(self, limit: int) -> Made:
        """Mean, then SVD of what that lost (arXiv:2410.20672, section 2.3), then training."""
        turns, factorise.TURNS = factorise.TURNS, 0
        try:
            rank, lorun = largest(lambda rank: lorun_adapt.convert(self.net, rank=rank), saved_bytes, limit)
        finally:
            factorise.TURNS = turns
        with trainable(lorun) as rates:
            train(lorun.eval(), self.net, rates, self.crops, self.minutes)
        return f"mean, rank {rank} from the SVD of what that lost, fine-tuned", lorun, saved_bytes(lorun)


def largest(build: Callable[[int], Any], size: Callable[[Any], int], limit: int) -> tuple[int, Any]:
    """The largest rank whose network has no more than ``limit`` bytes (a little over counts as none), or rank 1."""
    best = 1, build(1)
    for rank in range(2, 1000):
        network = build(rank)
        if size(network) > 1.01 * limit or size(network) <= size(best[1]):
            break
        best = rank, network
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="task file")
    parser.add_argument("images", type=Path, help="folder of images to train on")
    parser.add_argument("--judge", type=Path, required=True, help="folder of images to judge on")
    parser.add_argument("--weights", type=Path, help="checkpoint, where the task names none")
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.4, 0.25], help="parameters of the first way, as shares"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="for each way and budget")
    args = parser.parse_args()

    task = load_task(args.task)
    net = task.build()
    task.load_weights(net, args.weights)
    judged = task.images(args.judge)
    compared = Comparison(task, net, Crops(task, task.images(args.images)), args.minutes)
    ways = [compared.pruned, compared.without_base, compared.relaxed, compared.tied]
    if all(
        isinstance(net.get_submodule(name.rpartition(".")[0]), (nn.Linear, nn.modules.conv._ConvNd))
        for spec, names in places(compared.stage_map)
        for name in names
        if spec.smaller(1)
    ):
        ways.append(compared.peft)
    else:
        print("The network's kernels stand in no layers that PEFT knows.")
    original = evaluate(task, judged, net, None).mean()["psnr"]
    print(f"Original: {original:.2f} dB, {file_bytes(distinct_tensors(net)):,} bytes.\n")
    print("| way | bytes | PSNR (dB) | below the original |\n| --- | ---: | ---: | ---: |", flush=True)
    for budget in args.budgets:
        limit = 0
        for way in (compared.ours, *ways):
            name, network, size = way(limit or budget)
            limit = limit or size
            psnr = evaluate(task, judged, None, network.eval()).mean()["psnr_converted"]
            print(f"| {name} | {size:,} | {psnr:.2f} | {original - psnr:.2f} |", flush=True)


if __name__ == "__main__":
    main()
