"""How a measurement is shown: a header that says where it is from, and a Markdown table."""

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, METHOD, REFERENCE
from fastadvisor.runtime.environment import environment
from fastadvisor.runtime.provenance import git_commit

NOTHING = "–"
OUTPUT_OPTIONS = ("--json", "--markdown")


def about() -> dict[str, Any]:
    """Return versions, hardware and commit as plain values."""
    versions: dict[str, str | None] = {}
    for package in ("higher", "torchopt", "liger-kernel"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {**environment(), **versions, "processor": _processor(), "commit": commit()}


def commit() -> str | None:
    """Return the commit's short hash, with a + where files under version control differ from it; None outside git."""
    found = git_commit(Path(__file__).parent)
    return None if found is None else found[:7] + "+" * found.endswith("+changes")


def place(result: Mapping[str, Any]) -> str:
    """Return where a measurement was made: device, threads, torch, commit."""
    where = result["environment"]
    device = where["device"] if result["device"] != "cpu" else where["processor"]
    return f"{device}, {where['cpu_threads']} threads; torch {where['torch']}; commit {where['commit'] or 'unknown'}"


def publish(result: Mapping[str, Any], text: str, json_file: Path | None, markdown: Path | None) -> None:
    """Print ``text``, the Markdown of ``result``; write both where asked to."""
    print(text)
    if markdown:
        markdown.write_text(text + "\n")
    if json_file:
        json_file.write_text(json.dumps(result, indent=1) + "\n")


def _processor() -> str:
    """Return the CPU's name as the kernel gives it, else the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def command(arguments: Sequence[str], module: str = "benchmarks.step") -> str:
    """Return the command to repeat a measurement with, without the options that only say where its figures go."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument not in OUTPUT_OPTIONS and not argument.startswith(tuple(f"{o}=" for o in OUTPUT_OPTIONS)):
            kept.append(argument)
        skip = argument in OUTPUT_OPTIONS
    return shlex.join(["python", "-m", module, *kept])


def report(result: dict[str, Any]) -> str:
    """Return the whole measurement as Markdown."""
    where = result["environment"]
    amps = result["precisions"]
    device = where["device"] if result["device"] != "cpu" else where["processor"]
    peers = "".join(f", {name} {where[name]}" for name in ("higher", "torchopt") if where[name])
    lines = [
        f"    {result['command']}",
        "",
        f"{METHOD}, {result['model']}, batch and meta batch {result['batch_size']}, {' and '.join(amps)}; {device}, "
        f"{where['cpu_threads']} threads; torch {where['torch']}{peers}; commit {where['commit'] or 'unknown'}. "
        f"Medians of {result['rounds']} interleaved rounds.",
        "",
        *table(result),
        "",
        "Error: of the meta-gradient, relative, against double backward in float64; for approximations its cosine instead. "
        "Both at random weights.",
    ]
    if result["memory_batch_size"]:
        lines.append(
            f"Peak: over what the process held before model and batches were built; batch and meta batch "
            f"{result['memory_batch_size']}, {amps[0]}, each contender in a process of its own (CPU: "
            "resident set, every tensor a mapping of its own)."
        )
    lines += [f"\n{name}: {reason}." for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def table(result: dict[str, Any]) -> list[str]:
    """Return the table's lines: a row for each contender that was timed."""
    suffixes = suffixes_of(result["precisions"])
    heads = ["contender", "ms", "images/s", "times plain"]
    heads += ["bfloat16: ms", "images/s", "times plain"] if len(suffixes) == 2 else []
    heads += ["peak MB", "peak over plain"] if result["memory_batch_size"] else []
    rows = [[*heads, "error or cosine"], ["---"] * (len(heads) + 1)]
    for name, contender in CONTENDERS.items():
        if name not in result["timed"]:
            continue
        row = [contender.label]
        for suffix in suffixes:
            ms, plain = result[f"{name}{suffix}_ms"], result[f"plain{suffix}_ms"]
            row += [
                _figure(ms, ".1f"),
                _figure(_ratio(1000 * result["batch_size"], ms), ",.0f"),
                _figure(_ratio(ms, plain), ".2f"),
            ]
        if result["memory_batch_size"]:
            peak = result[f"{name}_peak_mb"]
            row += [_figure(peak, ",.0f"), _figure(_ratio(peak, result["plain_peak_mb"]), ".2f")]
        rows.append([*row, _quality(name, result)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def suffixes_of(precisions: Sequence[str]) -> list[str]:
    """Return what stands between a contender's name and ``_ms`` in each precision's keys."""
    return ["", "_amp"][: len(precisions)]


def _quality(name: str, result: dict[str, Any]) -> str:
    if name == REFERENCE:
        return "reference"
    if CONTENDERS[name].limit is not None:
        return _figure(result[f"{name}_error"], ".1e")
    cosine = result[f"{name}_cosine"]
    return NOTHING if cosine is None else f"cosine {cosine:.3f}"


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _figure(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)
