"""Tables and numbers as the commands print them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def result_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the lines of the table for what ``evaluate_run`` found; what is None is left out."""
    rows: list[tuple[str, ...]] = []
    for key, value in result.items():
        if isinstance(value, Mapping):
            rows += [(f"{key} {name}", format_number(part)) for name, part in value.items() if part is not None]
        elif isinstance(value, list | tuple):
            rows += [(f"{key} {index}", format_number(part)) for index, part in enumerate(value) if part is not None]
        elif value is not None:
            rows.append((key, format_number(value)))
    return rows


def format_number(value: object) -> str:
    """Return floats with two decimals, anything else as it is."""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def format_table(rows: Iterable[Sequence[str]]) -> str:
    """Return ``rows`` as lines with aligned columns."""
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
