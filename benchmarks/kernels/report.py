"""How a measurement of the kernels is shown: Markdown."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from benchmarks.kernels.contenders import OPERATIONS
from benchmarks.tables import NOTHING

PHASES = ("forward", "backward", "both")


def report(result: dict[str, Any]) -> str:
    """Return the whole measurement."""
    where = result["environment"]
    device = where["device"] if result["device"] != "cpu" else where["processor"]
    lines = [
        f"    {result['command']}",
        "",
        f"{device}, torch {where['torch']}, triton {where['triton']}, commit {where['commit'] or 'unknown'}; medians of "
        f"{result['rounds']} rounds in turn.",
    ]
    if "tiles" in result:
        return "\n".join([*lines, "", *tiles(result["tiles"]), "", *epilogues(result["epilogue"])])
    if result["device"] == "cpu":
        lines += [
            "",
            "**On the CPU: these are the torch twins; Triton's kernels run on a GPU only.** Microseconds are wall time.",
        ]
    else:
        lines += ["", "Microseconds are those of the kernels alone, caches flushed; in brackets the wall time of a call."]
    lines.append(f"A copy moves {result['copy_bandwidth'] / 1e9:,.0f} GB/s. Share: of that, by the bytes that must move.")
    for operation, dtype in dict.fromkeys((row["operation"], row["dtype"]) for row in result["rows"]):
        mine = [row for row in result["rows"] if (row["operation"], row["dtype"]) == (operation, dtype)]
        lines += ["", f"## {operation}, {dtype}", "", *table(mine, operation)]
    lines += ["", *left_out(result["rows"]), *slower(result["rows"])]
    if result["not_begun"]:
        lines.append(f"No time was left for: {'; '.join(result['not_begun'])}.")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]], operation: str) -> Iterator[str]:
    """Yield a row for each size and contender."""
    yield "| B × C | contender | forward µs | backward µs | both µs | share of copy (both) | times compiled |"
    yield "|---|---|---|---|---|---|---|"
    for (batch, classes), at_size in groupby(rows, lambda row: (row["batch"], row["classes"])):
        found = {(row["contender"], row["phase"]): row for row in at_size if "phase" in row}
        for name, contender in OPERATIONS[operation].contenders.items():
            both = found.get((name, "both"))
            if both is None:
                continue
            times = [_time(found.get((name, phase))) for phase in PHASES]
            rival = found.get(("compiled", "both"))
            ratio = NOTHING if rival is None or contender.plain else f"{micros(both) / micros(rival):.2f}"
            yield f"| {batch} × {classes} | {contender.label} | {' | '.join(times)} | {both['share_of_copy']:.2f} | {ratio} |"


def micros(row: dict[str, Any]) -> float:
    """Return the kernels' time, on the CPU the wall time."""
    return row["kernel_us"] or row["wall_us"]


def _time(row: dict[str, Any] | None) -> str:
    if row is None:
        return NOTHING
    return f"{row['wall_us']:.0f}" if row["kernel_us"] is None else f"{row['kernel_us']:.1f} ({row['wall_us']:.0f})"


def left_out(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield why a contender is missing, once for each reason."""
    reasons = {(row["contender"], row["left_out"]) for row in rows if "left_out" in row}
    for name, reason in sorted(reasons):
        yield f"{name}: {reason}."


def slower(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield where ours is slower than the compiled reference: the goal is nowhere."""
    times = {
        (row["operation"], row["dtype"], row["batch"], row["classes"], row["phase"], row["contender"]): micros(row)
        for row in rows
        if row.get("kernel_us") is not None
    }
    for (*size, name), time in times.items():
        rival = times.get((*size, "compiled"))
        if name == "ours" and rival is not None and time > rival:
            operation, dtype, batch, classes, phase = size
            where = f"{operation}, {dtype}, {batch} × {classes}, {phase}"
            yield f"Slower than compiled: {where}: {time:.1f} µs against {rival:.1f}."


def tiles(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of ``--tune``."""
    yield "| kernel | dtype | B × C | tile of the table | µs | best neighbour | µs |"
    yield "|---|---|---|---|---|---|---|"
    for entry in found:
        yield (
            f"| {entry['kernel']} | {entry['dtype']} | {entry['batch']} × {entry['classes']} | {entry['own']} | "
            f"{entry['own_us']:.1f} | {entry['best']} | {entry['best_us']:.1f} |"
        )


def epilogues(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of the candidate for the advisor's output layer."""
    yield "| B × D | output layer, then re-weighting, µs | with the epilogue, µs |"
    yield "|---|---|---|"
    for entry in found:
        yield f"| {entry['batch']} × {entry['features']} | {entry['separate']:.1f} | {entry['epilogue']:.1f} |"
