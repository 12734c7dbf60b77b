"""."""

from __future__ import annotations

SHORT = 200  # characters of a name


def is_short(text: object) -> bool:
    """Whether it can stand in a card: some printable words."""
    return isinstance(text, str) and len(text) <= SHORT and text.isprintable()


def shortened(text: str) -> str:
    """Words that can stand in a card."""
    return "".join(c if c.isprintable() else " " for c in text)[:SHORT]
