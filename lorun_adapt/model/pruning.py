"""Recover with iterative magnitude pruning: train, drop the smallest entries, rewind, and train again.

The way of Frankle et al. (arXiv:1912.05671): entries are chosen by their size after training, and then train again from
the values that they had early on.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from ..errors import LoRunError
from ..network.adapter import StageAdapter, make_adapter, private_tensors, terms_of
from ..network.converted import AdapterSet
from ..stages.stage_map import StageMap
from ..terms.term import Term
from ..training.duration import Duration
from ..util.modules import write_back
from ..util.numbers import is_whole_number
from .short_runs import remove, say, state_files, without_advice

KEPT = 2 / 3  # of the entries in a round, about
EARLY = 0.2  # the part of the first round after which the values are those that training rewinds to

Run = Callable[[Duration, Path | None], bool]


def ranks_of_rounds(held: AdapterSet, rank: int) -> list[int]:
    """The highest ranks of the rounds of pruning, down to ``rank``.

    Raises:
        LoRunError: ``rank`` is no rank below that of a term, or a term has no entries to drop.
    """
    terms = [t for groups in held.adapters.values() for adapter in groups.values() for t in terms_of(adapter).values()]
    if not terms or any(type(term).pruned is Term.pruned for term in terms):
        raise LoRunError("only sparse terms can be pruned: convert with SparseConfig, or leave prune out")
    highest = max(term.rank for term in terms)
    if highest == 1:
        raise LoRunError("the terms have rank 1 already, which is the lowest: leave prune out")
    if not (is_whole_number(rank) and 1 <= rank < highest):
        raise LoRunError(f"expected a rank from 1 to {highest - 1} for prune, found {rank!r}: choose one of these")
    rounds = max(1, math.ceil(math.log(highest / rank) / -math.log(KEPT)))
    ranks = [max(rank, round(highest * (rank / highest) ** (number / rounds))) for number in range(1, rounds + 1)]
    return list(dict.fromkeys(ranks))


def recover_in_rounds(
    run: Run,
    get: Callable[[], AdapterSet],
    put: Callable[[AdapterSet], None],
    base: nn.Module,
    stage_map: StageMap,
    duration: Duration,
    rank: int,
    path: Path | None = None,
) -> bool:
    """Train in rounds of equal length; after each but the last, prune and rewind.

    Args:
        run: trains for a duration, with a state file; it returns False if it was stopped.
        get: returns the set that is trained.
        put: replaces it.
        base: the base that is trained as well.
        stage_map: the positions of the stages.
        duration: of all rounds together.
        rank: of the terms after the last round; terms of lower ranks are not pruned.
        path: the state file of the last round; the earlier ones have files of their own beside it until then.

    Returns:
        False if it was stopped; the set then has the rank of the round that was stopped.

    Raises:
        LoRunError: as :func:`ranks_of_rounds`; no more steps than parts of rounds.
    """
    started = time.monotonic()
    ranks = ranks_of_rounds(get(), rank)
    part = duration.part(1 / (len(ranks) + 1))
    lengths = [part.part(EARLY), part.part(1 - EARLY), *[part] * (len(ranks) - 1)]
    paths = state_files(path, "round", len(lengths))
    if duration.steps and duration.steps <= len(lengths):
        raise LoRunError(
            f"expected more than {len(lengths)} steps to prune in rounds, found {duration.steps}: train longer"
        )
    over = path is not None and path.exists() and not all(file is not None and file.exists() for file in paths)
    before = get()
    if over:
        put(_pruned(before, before, stage_map, rank))  # the file knows which entries they are
    else:
        early: tuple[AdapterSet, list[Tensor]] | None = None
        for number, (length, file) in enumerate(zip(lengths, paths)):
            with without_advice():
                if not run(length, file):
                    return False
            if early is None:
                early = copy.deepcopy(get()), [tensor.detach().clone() for tensor in _tensors(base)]
                continue
            held, values = early
            early = _pruned(held, get(), stage_map, ranks[number - 1]), values
            put(copy.deepcopy(early[0]))
            write_back(_tensors(base), values)
            say(f"round {number} of {len(ranks)}: pruned to rank {ranks[number - 1]}")
    if duration.steps:
        rest = Duration(steps=max(1, duration.steps - sum(length.steps or 0 for length in lengths)))
    else:
        elapsed = 60 * sum(length.minutes or 0 for length in lengths)
        rest = duration.after(max(elapsed, time.monotonic() - started))
    try:
        finished = run(rest, path)
    except BaseException:
        if over:  # the file may belong to another run
            put(before)
        raise
    if finished:
        remove(paths)
    return finished


def _pruned(start: AdapterSet, trained: AdapterSet, stage_map: StageMap, rank: int) -> AdapterSet:
    """The set ``start``, with the entries that are largest in ``trained``."""
    groups = {group.name: group for group in stage_map.groups}
    adapters: dict[int, dict[str, StageAdapter]] = {}
    for stage, found in trained.adapters.items():
        for name, adapter in found.items():
            first = start.adapters[stage][name]
            terms: dict[str, Term] = {}
            for key, term in terms_of(adapter).items():
                less = term.pruned(min(rank, term.rank), terms_of(first)[key])
                assert less is not None
                terms[key] = less
            adapters.setdefault(stage, {})[name] = make_adapter(groups[name], terms, private_tensors(first))
    config = copy.copy(start.config)
    config.r = config.lora_alpha = min(rank, config.r)
    config.rank_pattern = {key: min(rank, value) for key, value in (config.rank_pattern or {}).items()}
    config.alpha_pattern = dict(config.rank_pattern)
    return AdapterSet(adapters, config, start.outside, start.info)


def _tensors(base: nn.Module) -> list[Tensor]:
    return [*base.parameters(), *base.buffers()]
