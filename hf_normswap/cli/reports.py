"""Reports of a verb, to look at or to read."""

import json
import math
import sys


def print_json(content: dict) -> None:
    """Print `content` as JSON, `null` for what is not finite."""
    print(json.dumps(_finite(content), indent=2))


def print_table(rows: list[tuple]) -> None:
    """Print rows of cells, the first one the heading: through rich in a terminal, as plain text elsewhere."""
    from hf_normswap.core.norm_sites import format_table

    if sys.stdout.isatty():  # rich would fold the columns of a pipe into 80 characters
        try:
            import rich
            from rich.table import Column, Table
        except ImportError:
            pass
        else:
            heading, *rows = rows
            table = Table(*(Column(name, overflow="fold") for name in heading))
            for row in rows:
                table.add_row(*("-" if cell is None else str(cell) for cell in row))
            return rich.print(table)
    print(format_table(rows))


def to_markdown(rows: list[tuple]) -> str:
    """Rows of cells as a table of Markdown, the first one the heading."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value
