"""."""

from __future__ import annotations


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
