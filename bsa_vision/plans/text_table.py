"""Format rows of text as a table with aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return one line per row, with a rule below the first row, which holds the titles."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    titles, *others = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return [titles, "  ".join("-" * width for width in widths), *others]
