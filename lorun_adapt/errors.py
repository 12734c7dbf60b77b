"""The one exception that this library raises for a user's mistake or a file it can't accept."""

from __future__ import annotations


class LoRunError(ValueError):
    """What was expected, what was found, where, and what to do: one sentence."""
