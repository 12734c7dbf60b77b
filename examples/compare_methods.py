"""Compare ways to make a network small, at equal bytes and in equal time, as a Markdown table.

    python examples/compare_methods.py examples/ista_net_plus.py IMAGES --judge OTHERS --budgets 0.4 0.25 --minutes 5

The first way is a conversion to a budget, recovered for the given minutes. Its bytes are what the others may use (of
ranks they get the largest that fits), and the time that it took, conversion included, is what the others train for.
All train on the same crops of IMAGES, with the same optimiser, and are judged on OTHERS. The conversions have the
phases of recovery; the others train end to end, with ``lorun_adapt.fit``. Bytes are those of the files: float32 values,
and where weights are pruned one bit for each, which says whether it is there.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from comparing import bytes_in, file_bytes, parser_of, scores, stored
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from lorun_adapt import Crops, LoRunModel, SparseConfig, StageMap, convert, find_stages, fit, load_task

# Learning rates, relative to the size of a tensor's values.
FACTOR, BASE, KERNEL, SMALL = 0.05, 0.03, 0.02, 0.01
PRUNED_BY = 0.6  # the share of the time after which pruning ends; the rest is fine-tuning
DENSER = 2  # the rank that sparse terms start with, relative to the one that they end with

Result = tuple[str, nn.Module, int]  # the name of the row, the network, the bytes of its file


# --- networks whose denoisers are stored in another way ------------------------------------------


class LowRank(nn.Module):
    """A tensor as the product of two factors, which start as its truncated SVD; with a base, as their sum."""

    def __init__(self, matrix: tuple[int, int], rank: int, shape: torch.Size, base: Tensor | None) -> None:
        super().__init__()
        self.matrix, self.rank, self.shape = matrix, rank, shape
        self.bases = [] if base is None else [base]

    def forward(self, b: Tensor, a: Tensor, *base: Tensor) -> Tensor:
        product = (b @ a).view(self.shape)
        if len(self.shape) == 4:  # the layout in which a CPU convolves fastest
            product = product.contiguous(memory_format=torch.channels_last)
        return base[0] + product if base else product

    def right_inverse(self, value: Tensor) -> tuple[Tensor, ...]:
        rest = value - self.bases[0] if self.bases else value
        u, s, v = torch.linalg.svd(rest.reshape(self.matrix).double(), full_matrices=False)
        root = s[: self.rank].sqrt()
        return (u[:, : self.rank] * root).float(), (root[:, None] * v[: self.rank]).float(), *self.bases


def low_rank(net: nn.Module, stage_map: StageMap, rank: int, *, with_base: bool) -> nn.Module:
    """Each stage's tensors as low-rank products; with a base, added to the mean of all stages, which they share.

    The base is as in Relaxed Recursive Transformers (arXiv:2410.20672, section 2.3).
    """
    net = copy.deepcopy(net)
    for spec, names in places(stage_map, rank):
        base = mean_of(net, names) if with_base else None
        for name in names:
            module, attribute = owner_of(net, name)
            register_parametrization(module, attribute, LowRank(spec.matrix, rank, torch.Size(spec.shape), base))
            if base is not None:
                module.parametrizations[attribute].original2 = base
    return net


def tied(net: nn.Module, stage_map: StageMap, rank: int | None = None) -> nn.Module:
    """One denoiser for all stages, the mean of theirs; with a rank, tie only what factors of it would make smaller."""
    net = copy.deepcopy(net)
    for _, names in places(stage_map, rank):
        mean = mean_of(net, names)
        for name in names:
            module, attribute = owner_of(net, name)
            setattr(module, attribute, mean)
    return net


def peft_layers(net: nn.Module, stage_map: StageMap, rank: int) -> nn.Module:
    """PEFT's own layers around one averaged, frozen denoiser; what is not adapted stays each stage's own."""
    targets = [name.removesuffix(".weight") for _, names in places(stage_map, rank) for name in names]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    net = get_peft_model(tied(net, stage_map, rank), config).base_model.model
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.endswith("base_layer.weight"))
    return net


class Masked(nn.Module):
    """A tensor times a mask, which is not stored with the network."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(like), persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        return value * self.mask


class Pruning:
    """Global magnitude pruning, gradually (Zhu and Gupta, arXiv:1710.01878, equation 1), with fine-tuning.

    Tensors with less than two dimensions (thresholds, step sizes, biases) are not pruned.
    """

    def __init__(self, net: nn.Module, stage_map: StageMap, limit: int, seconds: float) -> None:
        self.net = copy.deepcopy(net)
        self.values: list[Tensor] = []
        self.masked: list[Masked] = []
        for name in [name for _, names in places(stage_map) for name in names]:
            module, attribute = owner_of(self.net, name)
            value = getattr(module, attribute)
            if value.ndim > 1:
                self.values.append(value)
                self.masked.append(Masked(value.detach()))
                register_parametrization(module, attribute, self.masked[-1])
        self.masks = [masked.mask for masked in self.masked]
        self.total = sum(value.numel() for value in self.values)
        self.keep = min(1.0, (limit - file_bytes(self._file(torch.zeros(0)))) / 4 / self.total)
        if self.keep <= 0:
            raise SystemExit(f"the mask alone takes more than the {limit:,} bytes of the budget: raise the budget")
        self.started, self.seconds, self.final = time.monotonic(), seconds, False
        self.net.register_forward_pre_hook(self._prune)

    def bytes(self) -> int:
        kept = [value.detach()[mask > 0] for value, mask in zip(self.values, self._at(self.keep))]
        return file_bytes(self._file(torch.cat(kept)))

    def _prune(self, *_: Any) -> None:
        """Before each forward, mask as many weights as the schedule says; without gradients, as many as in the end."""
        if torch.is_grad_enabled():
            done = min(1.0, (time.monotonic() - self.started) / (PRUNED_BY * self.seconds))
            masks = self.masks = self._at(self.keep + (1 - self.keep) * (1 - done) ** 3)
            self.final = done == 1
        else:
            masks = self._at(self.keep)
        for masked, mask in zip(self.masked, masks):
            masked.mask = mask

    def _at(self, kept: float) -> list[Tensor]:
        """Masks of the part ``kept`` of all weights, the largest of those not pruned yet."""
        sizes = [(value.detach() * mask).abs() for value, mask in zip(self.values, self.masks)]
        dropped = self.total - int(kept * self.total)
        if self.final or dropped <= 0:
            return self.masks
        least = torch.cat([size.flatten() for size in sizes]).kthvalue(dropped)[0]
        return [size.gt(least).float() for size in sizes]

    def _file(self, values: Tensor) -> dict[str, Tensor]:
        pruned = {id(value) for value in self.values}
        whole = {name: tensor for name, tensor in stored(self.net).items() if id(tensor) not in pruned}
        return {**whole, "values": values, "mask": torch.zeros(math.ceil(self.total / 8), dtype=torch.uint8)}


# --- tensors and their bytes ---------------------------------------------------------------------


def places(stage_map: StageMap, rank: int | None = None) -> list[tuple[Any, list[str]]]:
    """Each tensor of the denoisers and its names in the stages; with a rank, only those that factors make smaller."""
    return [
        (spec, [f"{site.module}.{spec.name}" for site in group.sites])
        for group in stage_map.groups
        for spec in group.tensors
        if not spec.buffer and not spec.common and (rank is None or spec.smaller(rank))
    ]


def saved_bytes(lorun: LoRunModel) -> int:
    """The size of a conversion's safetensors files."""
    with tempfile.TemporaryDirectory() as folder:
        lorun.save_pretrained(folder)
        return bytes_in(folder)


def owner_of(net: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor, and the name of its attribute there."""
    path, _, attribute = name.rpartition(".")
    return net.get_submodule(path), attribute


def mean_of(net: nn.Module, names: list[str]) -> nn.Parameter:
    return nn.Parameter(torch.stack([net.get_parameter(name).detach() for name in names]).mean(0))


def rates_of(net: nn.Module) -> list[tuple[nn.Parameter, float]]:
    """The parameters to train, and their learning rates."""
    rates = []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            rate = KERNEL if parameter.ndim > 1 and parameter.numel() > 1000 else SMALL
            if name.endswith(("original0", "original1")) or "lora_" in name:
                rate = FACTOR
            rates.append((parameter, BASE if name.endswith("original2") else rate))
    return rates


# --- the ways ------------------------------------------------------------------------------------


class Comparison:
    """The ways to make ``net`` small. Call ``convert`` first: it sets the bytes and the time of the others."""

    def __init__(self, net: nn.Module, crops: Crops, stage_map: StageMap, example_inputs: tuple[Any, ...]) -> None:
        self.net, self.crops, self.stage_map, self.example_inputs = net, crops, stage_map, example_inputs
        self.limit, self.seconds = 0, 0.0

    def convert(self, budget: float, minutes: float) -> Result:
        started = time.monotonic()
        lorun = convert(self.net, budget=budget, calibration=self.crops, minutes=minutes)
        self.seconds = time.monotonic() - started
        self.limit = saved_bytes(lorun)
        return "ranks, and bases where they pay, by sensitivity, recovered", lorun, self.limit

    def sparse(self) -> Result:
        """A base and sparse terms, pruned in rounds as they are recovered."""
        return self._pruned_in_rounds("a base and the entries that differ most from it", low_rank=False)

    def sparse_and_low_rank(self) -> Result:
        return self._pruned_in_rounds("a base, low-rank terms, and the entries that these miss most", low_rank=True)

    def _pruned_in_rounds(self, name: str, low_rank: bool) -> Result:
        started, rank, prune = time.monotonic(), 1, None
        while (lorun := self._sparse(rank + 1, low_rank)) and saved_bytes(lorun) <= 1.01 * self.limit:
            rank += 1
        lorun = self._sparse(rank, low_rank)
        for denser in range(DENSER * rank, rank, -1):
            start = self._sparse(denser, low_rank)
            if all(start.stage_map.ranks[group].keys() == own.keys() for group, own in lorun.stage_map.ranks.items()):
                lorun, prune = start, rank  # the highest rank at which the same tensors have terms
                break
        minutes = max(1.0, self.seconds - (time.monotonic() - started)) / 60
        if not lorun.recover(self.net, self.crops, prune=prune, minutes=minutes):
            raise KeyboardInterrupt
        return f"{name}, at rank {rank}, pruned in rounds", lorun, saved_bytes(lorun)

    def _sparse(self, rank: int, low_rank: bool) -> LoRunModel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it may diverge, or grow, before it is recovered
            return convert(self.net, SparseConfig(rank, low_rank), example_inputs=self.example_inputs)

    def pruned(self) -> Result:
        pruning = Pruning(self.net, self.stage_map, self.limit, self.seconds)
        self._train(pruning.net)
        name = f"magnitude pruning to {100 * pruning.keep:.0f} % of the weights, fine-tuned"
        return name, pruning.net, pruning.bytes()

    def factorised(self) -> Result:
        _, net = self._largest(lambda rank: low_rank(self.net, self.stage_map, rank, with_base=False))
        return self._trained("each stage factorised alone, fine-tuned", net)

    def relaxed(self) -> Result:
        rank, net = self._largest(lambda rank: low_rank(self.net, self.stage_map, rank, with_base=True))
        return self._trained(f"mean, rank {rank} from the SVD of what that lost, fine-tuned", net)

    def tied(self) -> Result:
        return self._trained("one denoiser for all stages, fine-tuned", tied(self.net, self.stage_map))

    def peft(self) -> Result:
        rank, net = self._largest(lambda rank: peft_layers(self.net, self.stage_map, rank))
        return self._trained(f"PEFT's layers of rank {rank} on the average", net)

    def peft_supports_it(self) -> bool:
        """Whether PEFT has layers for all modules whose kernels would be adapted."""
        modules = [owner_of(self.net, name)[0] for _, names in places(self.stage_map, 1) for name in names]
        return all(isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) for module in modules)

    def _largest(self, build: Callable[[int], nn.Module]) -> tuple[int, nn.Module]:
        """The largest rank whose network has no more bytes than allowed, or at most 1 % more; at least rank 1."""
        best, size = (1, build(1)), 0
        for rank in range(2, 1000):
            net = build(rank)
            before, size = file_bytes(stored(best[1])), file_bytes(stored(net))
            if size > 1.01 * self.limit or size <= before:
                break
            best = rank, net
        return best

    def _trained(self, name: str, net: nn.Module) -> Result:
        self._train(net)
        return name, net, file_bytes(stored(net))

    def _train(self, net: nn.Module) -> None:
        """Distil the original network, as recovery does, from where ``net`` is."""
        minutes = self.seconds / 60
        if not fit(net, self.crops, rates_of(net), teacher=self.net, stage_map=self.stage_map, minutes=minutes):
            raise KeyboardInterrupt


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--budgets", type=float, nargs="+", default=[0.4, 0.25], help="parameters of the first way, as shares"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="to recover, for each budget")
    args = parser.parse_args()

    task = load_task(args.task)
    net = task.build()
    task.load_weights(net, args.weights)
    judged = task.images(args.judge)
    example_inputs = task.example_inputs()
    stage_map = find_stages(net, example_inputs=example_inputs)
    compared = Comparison(net, Crops(task, task.images(args.images)), stage_map, example_inputs)
    ways = [compared.pruned, compared.sparse, compared.sparse_and_low_rank]
    ways += [compared.factorised, compared.relaxed, compared.tied]
    if compared.peft_supports_it():
        ways.append(compared.peft)
    else:
        print("PEFT's layers are left out: the network's kernels are not in layers that PEFT supports.")
    original = scores(task, judged, net)["psnr"]
    print(f"Original: {original:.2f} dB, {file_bytes(stored(net)):,} bytes.\n")
    print("| way | bytes | PSNR (dB) | below the original |\n| --- | ---: | ---: | ---: |", flush=True)
    for budget in args.budgets:
        for way in (lambda budget=budget: compared.convert(budget, args.minutes), *ways):
            name, network, size = way()
            psnr = scores(task, judged, network)["psnr"]
            print(f"| {name} | {size:,} | {psnr:.2f} | {original - psnr:.2f} |", flush=True)


if __name__ == "__main__":
    main()
