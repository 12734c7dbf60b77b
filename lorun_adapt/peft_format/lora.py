"""PEFT's LoRA: its names for a layer's factors, and the layers that it adapts as this package does."""

from __future__ import annotations

from torch import Tensor, nn

from ..network.adapted import original_class
from ..stages.stage_map import TensorSpec

PREFIX = "base_model.model."  # of the denoiser's names in a PeftModel
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
    """The layer whose weight the tensor ``name`` is, if PEFT's LoRA adapts it as this package does."""
    module = denoiser.get_submodule(name.rpartition(".")[0])
    return module if why_unsupported(denoiser, name) is None else None


class Names:
    """How a file names a tensor's factors: by the layer where PEFT has a LoRA for it, and else by the tensor.

    Attributes:
        layer: the layer whose weight the tensor is, where PEFT adapts it; else None.
        key: the layer's name, or the tensor's.
        a, b, bias: the names of the factors, and of what is added to the layer's bias.
        a_shape, b_shape: the factors' shapes, with None for the rank.
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
    """The name in a file of the factor B of a layer or tensor."""
    return f"{PREFIX}{key}.lora_B.weight"


def bias_name(key: str) -> str:
    """The name in a file of what is added to a layer's bias."""
    return f"{PREFIX}{key}.lora_B.bias"


def bias_of(base: Tensor, difference: Tensor, scaling: float) -> Tensor:
    """A stage's bias, from the base's and what a file says is added to it."""
    return base + difference.to(base) * scaling


def why_unsupported(denoiser: nn.Module, name: str) -> str | None:
    """Why PEFT's LoRA can't adapt a tensor as this package does; None if it can."""
    path, _, attribute = name.rpartition(".")
    module = denoiser.get_submodule(path)
    kind = original_class(module)
    if not path and attribute == "weight" and isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return "the denoiser is that one layer, which PEFT can't replace"
    if attribute != "weight" or kind not in (nn.Linear, *CONVOLUTIONS):
        return f"PEFT's LoRA has no layer that is right for the {attribute} of {kind.__name__}"
    assert isinstance(module, (nn.Linear, *CONVOLUTIONS))
    if not module.weight.is_floating_point():
        return "PEFT's LoRA is for real numbers"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return "its layer has a hook or a forward of its own, which PEFT's LoRA runs before it adds its part"
    if not {*module._parameters, *module._buffers} <= {"weight", "bias"}:
        return "its layer holds more tensors than a weight and a bias"
    if isinstance(module, nn.Linear):
        return None
    if module.groups != 1:
        return f"its convolution has {module.groups} groups, for which PEFT's factors have another shape"
    if module.padding_mode != "zeros":
        return f"PEFT's LoRA of a convolution loses padding_mode={module.padding_mode!r}"
    if any(step != 1 for step in module.dilation):
        return f"PEFT's LoRA of a convolution loses dilation={module.dilation}"
    return None
