"""Factorise the tensors of one group's stages into a base and an adapter for each stage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..network.adapter import StageAdapter, make_adapter
from ..stages.stage_map import Group
from ..stages.tensors import stage_stack, stage_values
from ..terms.term import Term
from ..util.memory import release_freed_memory
from ..util.numbers import double_of, is_numeric
from .plan import Plan

WORTH_RELEASING = 2**20  # bytes of a tensor's stack


class FactorisedGroup(NamedTuple):
    """The base and the adapters of a group.

    Attributes:
        base: the tensors of the shared denoiser, by name.
        adapters: one for each site, in the order of the sites.
        residuals: for each adapted tensor, a pair for each site: the norm of the difference between the original
            tensor and its replacement, and the norm of the original tensor.
    """

    base: dict[str, Tensor]
    adapters: list[StageAdapter]
    residuals: dict[str, list[tuple[float, float]]]


def factorise_group(dun: nn.Module, group: Group, planned: Plan, kind: type[Term]) -> FactorisedGroup:
    """Factorise the tensors of the stages.

    Args:
        dun: the network to convert; it is not changed.
        group: one of its groups.
        planned: the tensors that get a term; the others become private to each stage.
        kind: the class of the terms.
    """
    device = stage_values(dun, group, group.tensors[0])[0].device
    base: dict[str, Tensor] = {}
    residuals: dict[str, list[tuple[float, float]]] = {}
    terms: list[dict[str, Term]] = [{} for _ in group.sites]
    private: list[dict[str, Tensor]] = [{} for _ in group.sites]
    generator = torch.Generator().manual_seed(0)
    for spec in group.tensors:
        if spec.common:
            continue
        stack = stage_stack(dun, group, spec)
        if spec.name not in planned.settings:
            base[spec.name] = _mean(stack)
            for own, value in zip(private, stack):
                own[spec.name] = value.clone()
            continue
        norms = [float(torch.linalg.vector_norm(value, dtype=double_of(stack))) for value in stack]
        fitted = kind.fit(stack, spec, planned.settings[spec.name], generator=generator)
        base[spec.name] = fitted.base
        residuals[spec.name] = list(zip(fitted.lost.sqrt().tolist(), norms))
        for own_terms, term in zip(terms, fitted.terms):
            own_terms[spec.name] = term
        if stack.nbytes > WORTH_RELEASING:
            release_freed_memory()
    adapters = [make_adapter(group, *parts).to(device) for parts in zip(terms, private)]
    return FactorisedGroup(base, adapters, residuals)


def _mean(stack: Tensor) -> Tensor:
    if not is_numeric(stack):
        return stack[0].clone()
    return stack.to(double_of(stack)).mean(0).to(stack.dtype)
