"""."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from ..terms.lowrank import LowRank


class StageAdapter(nn.Module):
    """What one stage adds to the base: low-rank terms, and the stage's own private tensors.

    Names are those of the tensors in the denoiser, with ``/`` for the dots. ``lorun_frozen`` are
    those that the network's authors don't train.
    """

    def __init__(
        self, lowrank: Mapping[str, LowRank], private: Mapping[str, Tensor], frozen: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.lorun_frozen = frozenset(name.replace(".", "/") for name in frozen)
        for name, term in lowrank.items():
            self.add_module(name.replace(".", "/"), term)
        for name, tensor in private.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name.replace(".", "/"), tensor)
            else:
                self.register_buffer(name.replace(".", "/"), tensor)

    def train_only_if(self, trains: bool) -> None:
        """Let its tensors train, as far as the network's authors train them, or none of them."""
        # Past nn.Module.named_parameters, and in as few steps as can be: this runs for every stage at each swap.
        for name, term in self._modules.items():
            wanted = trains and name not in self.lorun_frozen
            for parameter in term._parameters.values():
                if parameter.requires_grad is not wanted:
                    parameter.requires_grad_(wanted)
        for name, parameter in self._parameters.items():
            wanted = trains and name not in self.lorun_frozen
            wanted = wanted and (parameter.is_floating_point() or parameter.is_complex())
            if parameter.requires_grad is not wanted:
                parameter.requires_grad_(wanted)


def lowrank_terms(adapter: StageAdapter) -> dict[str, LowRank]:
    return {name.replace("/", "."): term for name, term in adapter._modules.items()}


def private_tensors(adapter: StageAdapter) -> dict[str, Tensor]:
    own = {**adapter._parameters, **adapter._buffers}
    return {name.replace("/", "."): tensor for name, tensor in own.items()}
