"""Bring the hidden channels of separately trained stages into one order.

The channels between a convolution, an elementwise activation and the next convolution can be permuted without
changing what the stage computes. Stages with a common order lose less when they are collapsed (Git Re-Basin,
arXiv:2209.04836, section 3.2).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, fx, nn

from ..stages.stage_map import Group
from ..terms.term import Setting, Term
from ..util.copying import copy_network

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Hardswish,
    nn.Identity,
    nn.Dropout,
)
ACTIVATION_FUNCTIONS = {
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.selu,
    F.celu,
    F.gelu,
    F.silu,
    F.mish,
    F.softplus,
    F.hardswish,
    torch.relu,
    torch.sigmoid,
    torch.tanh,
    F.sigmoid,
    F.tanh,
}
CONVOLUTION_FUNCTIONS = {F.conv1d, F.conv2d, F.conv3d}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class HiddenChannels:
    """The tensors to permute together when the channels between two layers are permuted.

    Attributes:
        rows: names of tensors whose first dimension is the channels: the first layer's weight and bias, a batch norm.
        columns: name of the tensor whose second dimension is the channels: the next layer's weight.
    """

    rows: tuple[str, ...]
    columns: str


def hidden_channels(denoiser: nn.Module) -> list[HiddenChannels]:
    """The places where a denoiser's structure allows a permutation; none if ``torch.fx`` can't trace its forward.

    The denoiser must be traced as a whole: a part of it does not show how the rest uses its channels.
    """
    places: list[HiddenChannels] | None = None
    for training in (False, True):  # features may leave the stage in training alone
        try:
            copied = copy_network(denoiser, share_tensors=True).train(training)
            graph = fx.Tracer().trace(copied)
        except Exception:  # a forward that depends on its data; torch.fx raises many kinds
            return []
        found = _Reader(copied, graph).pairs()
        places = found if places is None else [place for place in places if place in found]
    return places or []


class _Reader:
    """Finds pairs of layers with hidden channels between them in a traced denoiser."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self.nodes = list(graph.nodes)
        self.uses: dict[str, list[fx.Node]] = {}  # weight -> the nodes that convolve with it
        self.layers: dict[fx.Node, tuple[str, str | None]] = {}  # node -> weight, bias
        used_otherwise: set[str] = set()  # tensors that something other than a layer reads
        for node in self.nodes:
            layer = self._layer(node)
            if layer is not None:
                self.layers[node] = layer
                self.uses.setdefault(layer[0], []).append(node)
            elif node.op == "get_attr" and not all(self._layer(user) for user in node.users):
                used_otherwise.add(str(node.target))
        self.used_otherwise = used_otherwise

    def _layer(self, node: fx.Node) -> tuple[str, str | None] | None:
        """The names of a layer's weight and bias; None if the node is no convolution or linear layer."""
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            ungrouped = isinstance(module, CONVOLUTIONS) and module.groups == 1
            if ungrouped or isinstance(module, nn.Linear):
                return f"{node.target}.weight", f"{node.target}.bias" if module.bias is not None else None
        if node.op == "call_function" and node.target in CONVOLUTION_FUNCTIONS:
            weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
            bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
            weight_name, bias_name = _tensor_name(weight), _tensor_name(bias)
            if weight_name is not None and groups == 1 and (bias is None or bias_name is not None):
                return weight_name, bias_name
        return None

    def _norm(self, node: fx.Node) -> str | None:
        if node.op == "call_module" and isinstance(self.root.get_submodule(str(node.target)), NORMS):
            return str(node.target)
        return None

    def _elementwise(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            return isinstance(module, ACTIVATIONS) or isinstance(module, nn.PReLU) and module.num_parameters == 1
        if node.op == "call_function":
            return node.target in ACTIVATION_FUNCTIONS
        return node.op == "call_method" and node.target in {"relu", "relu_", "sigmoid", "tanh"}

    def _ends(self, node: fx.Node, norms: set[str], between: set[fx.Node]) -> set[fx.Node | None]:
        """The layers that the output of ``node`` reaches through activations; None stands for anything else.

        Adds the norms and the nodes on the way to ``norms`` and ``between``.
        """
        ends: set[fx.Node | None] = set()
        for user in node.users:
            if user in self.layers:
                ends.add(user if user.args and user.args[0] is node else None)
            elif self._elementwise(user) or self._norm(user):
                if (name := self._norm(user)) is not None:
                    norms.add(name)
                between.add(user)
                ends |= self._ends(user, norms, between)
            else:
                ends.add(None)
        return ends

    def pairs(self) -> list[HiddenChannels]:
        """The tensors around each place whose channels can be permuted."""
        result = []
        for weight, nodes in self.uses.items():
            norms: set[str] = set()
            between: set[fx.Node] = set()
            ends = {end for node in nodes for end in self._ends(node, norms, between)}
            targets = {self.layers[end][0] for end in ends if end is not None}
            if None in ends or len(targets) != 1:
                continue
            (target,) = targets
            same_use = set(self.uses[target]) == ends
            shared_norm = any(self._norm(node) in norms for node in self.nodes if node not in between)
            if target == weight or not same_use or shared_norm or {weight, target} & self.used_otherwise:
                continue
            if self._is_linear(nodes[0]) != self._is_linear(self.uses[target][0]):
                continue
            rows = [weight, *{bias for node in nodes if (bias := self.layers[node][1]) is not None}]
            for norm in sorted(norms):
                module = self.root.get_submodule(norm)
                rows += [f"{norm}.{name}" for name, t in module.state_dict().items() if t.ndim == 1]
            result.append(HiddenChannels(tuple(rows), target))
        return result

    def _is_linear(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(self.root.get_submodule(str(node.target)), nn.Linear)


def _tensor_name(argument: object) -> str | None:
    """The name of the module's tensor that an argument of a function reads; None if it is something else."""
    return str(argument.target) if isinstance(argument, fx.Node) and argument.op == "get_attr" else None


def align(
    group: Group,
    denoisers: Sequence[nn.Module],
    stacks: dict[str, Tensor],
    settings: Mapping[str, Setting],
    kind: type[Term],
    kept: Collection[str] = (),
) -> dict[str, Tensor]:
    """Permute the hidden channels of the stages where that lowers the error of the factorisation.

    Each place is judged by itself, by the error of the two weights that it changes.

    Args:
        denoisers: those of the stages.
        stacks: by name, the tensors of all stages, (N, *shape).
        settings: by name, how a tensor with a base and a term will be fitted; all others are private to each stage and
            lose nothing.
        kind: the kind of these terms.
        kept: names of tensors to leave as they are.

    Returns:
        The stacks, with permuted ones in the place of the given ones.
    """
    canonical = {alias: spec.name for spec in group.tensors if not spec.common for alias in spec.aliases}
    specs = {spec.name: spec for spec in group.tensors}

    def error(name: str, stack: Tensor) -> float:
        return float(kind.lost(stack, specs[name], settings[name]).sum()) if name in settings else 0.0

    errors: dict[str, float] = {}
    places = hidden_channels(denoisers[0])
    for denoiser in denoisers[1:] if places else ():  # a flag may make stages of one class differ
        others = hidden_channels(denoiser)
        places = [place for place in places if place in others]
    for place in places:
        names = (*place.rows, place.columns)
        if not all(name in canonical for name in names):
            continue
        rows, columns = [canonical[name] for name in place.rows], canonical[place.columns]
        if {*rows, columns} & set(kept) or not {rows[0], columns} & set(settings) or len({*rows, columns}) < len(names):
            continue
        for name in (rows[0], columns):
            if name not in errors:
                errors[name] = error(name, stacks[name])
        moved = _permuted(stacks, rows, columns)
        after = {name: error(name, moved[name]) for name in (rows[0], columns)}
        if sum(after.values()) < sum(errors[name] for name in after) * (1 - 1e-6):
            stacks = {**stacks, **moved}
            errors.update(after)
    return stacks


def _permuted(stacks: Mapping[str, Tensor], rows: list[str], columns: str) -> dict[str, Tensor]:
    """The stacks with every stage's channels in the order that correlates best with the mean of all stages."""
    features = torch.cat(
        [
            *(
                stacks[name].double().flatten(2) if stacks[name].ndim > 2 else stacks[name].double()[..., None]
                for name in rows
                if stacks[name].dtype.is_floating_point
            ),
            stacks[columns].double().transpose(1, 2).flatten(2),
        ],
        dim=2,
    )
    orders = [torch.arange(features.shape[1])] * len(features)
    reference = features[0]
    for _ in range(3):
        for stage, own in enumerate(features):
            _, order = linear_sum_assignment((reference @ own.T).numpy(force=True), maximize=True)
            orders[stage] = torch.from_numpy(order)
        reference = torch.stack([own[order] for own, order in zip(features, orders)]).mean(0)
    moved = {name: torch.stack([w[order] for w, order in zip(stacks[name], orders)]) for name in rows}
    moved[columns] = torch.stack([w[:, order] for w, order in zip(stacks[columns], orders)])
    return moved
