"""PEFT's LoRA: the names of a layer's factors in a file, and the layers that PEFT and this package adapt alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..network.adapted import original_class
from ..stages.stage_map import TensorSpec
from ..terms.term import LoraFactors

PREFIX = "base_model.model."  # precedes the denoiser's names in a PeftModel
WITHIN_PEFT = (  # the modules that PEFT's LoRA adds to a layer (PEFT 0.17 to 0.21)
    "base_layer",
    "lora_dropout",
    "lora_dropout.default",
    "lora_A",
    "lora_A.default",
    "lora_B",
    "lora_B.default",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def peft_layer(denoiser: nn.Module, name: str) -> nn.Module | None:
    """Return the layer with the weight ``name``, or None if PEFT's LoRA does not adapt it as this package does."""
    module = denoiser.get_submodule(name.rpartition(".")[0])
    return module if unsupported_reason(denoiser, name) is None else None


class FactorNames:
    """The names of a tensor's factors in a file: after its layer if PEFT can adapt the layer, else after the tensor.

    Attributes:
        layer: the layer with this weight, or None if PEFT cannot adapt it.
        key: the name of the layer, or of the tensor.
        a, b, bias: the names of the two factors and of the update of the layer's bias.
        a_shape, b_shape: the shapes of the factors, with None for the rank.
    """

    def __init__(self, denoiser: nn.Module, spec: TensorSpec) -> None:
        path, _, self.attribute = spec.name.rpartition(".")
        self.owner = denoiser.get_submodule(path)
        self.layer = peft_layer(denoiser, spec.name)
        self.key = spec.name if self.layer is None else path
        self.a, self.b, self.bias = f"{PREFIX}{self.key}.lora_A.weight", factor_name(self.key), bias_name(self.key)
        rows, columns = spec.matrix
        self.a_shape: tuple[int | None, ...] = (None, columns)
        self.b_shape: tuple[int | None, ...] = (rows, None)
        if isinstance(self.layer, CONVOLUTIONS):
            self.a_shape, self.b_shape = (None, *spec.shape[1:]), (rows, None, *(1 for _ in spec.shape[2:]))


def factor_name(key: str) -> str:
    """Return the name of the factor B of a layer or tensor in a file."""
    return f"{PREFIX}{key}.lora_B.weight"


def bias_name(key: str) -> str:
    """Return the name of the update of a layer's bias in a file."""
    return f"{PREFIX}{key}.lora_B.bias"


def bias_of(base: Tensor, difference: Tensor, scaling: float) -> Tensor:
    """Return a stage's bias, computed from the base's and the update in a file."""
    return base + difference.to(base) * scaling


def unsupported_reason(denoiser: nn.Module, name: str) -> str | None:
    """Return the reason why PEFT's LoRA cannot adapt a tensor as this package does; None if it can."""
    path, _, attribute = name.rpartition(".")
    module = denoiser.get_submodule(path)
    kind = original_class(module)
    if not path and attribute == "weight" and isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return "PEFT cannot replace a denoiser that is a single layer"
    if attribute != "weight" or kind not in (nn.Linear, *CONVOLUTIONS):
        return f"PEFT's LoRA cannot adapt the {attribute} of {kind.__name__} in the same way"
    assert isinstance(module, (nn.Linear, *CONVOLUTIONS))
    if not module.weight.is_floating_point():
        return "PEFT's LoRA supports only real numbers"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "PEFT's LoRA would run the hook or custom forward of its layer before adding the update"
    if not {*module._parameters, *module._buffers} <= {"weight", "bias"}:
        return "its layer has more tensors than a weight and a bias"
    if isinstance(module, nn.Linear):
        return None
    if module.groups != 1:
        return f"PEFT stores factors of another shape for a convolution with {module.groups} groups"
    if module.padding_mode != "zeros":
        return f"PEFT's LoRA of a convolution ignores padding_mode={module.padding_mode!r}"
    if any(step != 1 for step in module.dilation):
        return f"PEFT's LoRA of a convolution ignores dilation={module.dilation}"
    return None


@torch.no_grad()
def fill_layer(layer: nn.Module, factors: LoraFactors, adapter_name: str = "default") -> None:
    """Write a term's factors into a layer that PEFT has put in place; the scaling goes into B."""
    for place, value in (("lora_A", factors.a), ("lora_B", factors.b * factors.scaling)):
        weight = getattr(layer, place)[adapter_name].weight
        weight.copy_(value.view(weight.shape))
