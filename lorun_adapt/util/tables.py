"""Tables for people: the same rows in a terminal and, without colour or borders, in a pipe."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A rich table; columns whose header ends in ``>`` are right-aligned."""
    result = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        result.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        result.add_row(*(str(cell) for cell in row))
    return result


def plain_text(*tables: Table) -> str:
    """The tables as text without control characters, for ``__str__``."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=max(100, shutil.get_terminal_size().columns), no_color=True)
    for item in tables:
        console.print(item)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def kilobytes(size: int) -> str:
    return f"{size / 1000:,.1f} kB"
