"""Where a stage's denoiser is in a network: the path of a module, and which of its calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence

# The path of a module, and the index of one of its calls in a forward; None where the module is one stage.
Location = tuple[str, int | None]


def paths_of(locations: Sequence[Location]) -> tuple[str, ...]:
    """Return the distinct module paths, in order.

    >>> paths_of([("p", 0), ("p", 1), ("q", None)])
    ('p', 'q')
    """
    return tuple(dict.fromkeys(path for path, _ in locations))


def any_inside(locations: Sequence[Location], others: Sequence[Location]) -> bool:
    """Whether a module of ``locations`` is inside one of ``others``.

    >>> any_inside([("blocks.0.denoiser", None)], [("blocks.0", None)])
    True
    """
    outer = {path for path, _ in others}
    return any(is_within(path.rpartition(".")[0], outer) for path, _ in locations)


def is_within(path: str, outer: Collection[str]) -> bool:
    """Whether ``path`` is one of ``outer`` or inside one of them.

    >>> is_within("blocks.0.step", {"blocks.0"}), is_within("blocks.01", {"blocks.0"})
    (True, False)
    """
    return path in outer or any(path[:end] in outer for end in range(len(path)) if path[end] == ".")
