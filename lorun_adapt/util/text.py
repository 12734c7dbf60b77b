"""Short texts that may stand in a model card."""

from __future__ import annotations

SHORT = 200  # characters of a name


def is_short(text: object) -> bool:
    """Whether ``text`` may stand in a card: at most 200 printable characters.

    >>> is_short("BSD68"), is_short("two\\nlines"), is_short(None)
    (True, False, False)
    """
    return isinstance(text, str) and len(text) <= SHORT and text.isprintable()


def shortened(text: str) -> str:
    """Return ``text`` cut to 200 characters, with spaces for those that cannot be printed.

    >>> shortened("two\\nlines")
    'two lines'
    """
    return "".join(c if c.isprintable() else " " for c in text)[:SHORT]
