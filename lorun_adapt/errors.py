"""The one exception that this library raises for a user's mistake or a file it can't accept."""

from __future__ import annotations

LONGEST = 1000


class LoRunError(ValueError):
    """What was expected, what was found, where, and what to do: one sentence, on one line."""

    def __init__(self, message: str) -> None:
        # Names from files are in it, and may be anything.
        line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 3 :]}")
