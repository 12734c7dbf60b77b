"""The exception that this library raises for a user's mistake or a file that it cannot accept."""

from __future__ import annotations

MAX_LENGTH = 1000


class LoRunError(ValueError):
    """A mistake in how the library is used, or a file that it cannot accept.

    The message is one sentence on one line: what is wrong, where, and what to do about it.

    >>> LoRunError("two lines\\nbecome one")
    LoRunError('two lines become one')
    """

    def __init__(self, message: str) -> None:
        # Messages quote names from files, which may hold line breaks or control characters, or be very long.
        line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
        shortened = f"{line[: MAX_LENGTH // 2]} … {line[-MAX_LENGTH // 3 :]}"
        super().__init__(line if len(line) <= MAX_LENGTH else shortened)
