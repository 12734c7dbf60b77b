"""Tables to read: the same rows in a terminal and, without colour or borders, in a pipe."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a rich table of plain text; a column whose header ends in ``>`` is aligned to the right.

    >>> text = plain_text(table("sizes", ("stage", "parameters>"), [("blocks.0", "1,234"), ("blocks.1", 56)]))
    >>> [line.split() for line in text.splitlines() if line.startswith(" blocks")]
    [['blocks.0', '1,234'], ['blocks.1', '56']]
    """
    result = Table(
        title=escape(title) or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in columns:
        result.add_column(
            escape(column.rstrip(">")), justify="right" if column.endswith(">") else "left", overflow="fold"
        )
    for row in rows:
        result.add_row(*(escape(str(cell)) for cell in row))
    return result


def plain_text(*tables: Table) -> str:
    """Return the tables as text without control characters, for ``__str__``; see :func:`table`."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=max(100, shutil.get_terminal_size().columns), no_color=True)
    for item in tables:
        console.print(item)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def kilobytes(num_bytes: int) -> str:
    """Return a size in kB, of 1000 bytes each.

    >>> kilobytes(1234567)
    '1,234.6 kB'
    """
    return f"{num_bytes / 1000:,.1f} kB"
