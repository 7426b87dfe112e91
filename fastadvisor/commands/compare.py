"""``fastadvisor compare``: train several methods with several seeds, and print a table."""

import json
import logging
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastadvisor.commands import grid
from fastadvisor.commands.train import check_config
from fastadvisor.config import CompareConfig, Config, build_config, to_dict
from fastadvisor.datasets import load_source
from fastadvisor.errors import UserError
from fastadvisor.loading import cache_images
from fastadvisor.methods import check_method
from fastadvisor.runtime import console
from fastadvisor.runtime.environment import environment
from fastadvisor.runtime.precision import pick_device
from fastadvisor.runtime.run_folder import write_text

logger = logging.getLogger(__name__)

COLUMNS: dict[str, Callable[[dict[str, Any]], float]] = {
    "last": lambda summary: summary["test_top1"]["last"],
    "peak": lambda summary: summary["test_top1"]["peak"],
    "mean_last5": lambda summary: summary["test_top1"]["mean_last5"],
    "step_ms": lambda summary: summary["step_ms_median"],
}


def compare(config: str | os.PathLike[str] | Config | None = None, /, **settings: Any) -> dict[str, Any]:
    """Train several methods with several seeds; every setting of :class:`CompareConfig` is a keyword.

    Args:
        config: a recipe's name, a YAML file, or a configuration; the keywords win over it.
        **settings: as ``methods="ce,mfrw-mes", seeds=3, noise="flip", noise_rate=0.4``.

    Returns:
        The content of ``compare.json``.
    """
    return compare_config(build_config(CompareConfig, config, settings))


def compare_config(config: CompareConfig) -> dict[str, Any]:
    """Train every method of ``config.methods`` with every seed, print the table, write ``compare.json``.

    With ``resume``, finished runs are taken as they are and the one that was cut off continues.

    Raises:
        UserError: an unknown method or model, an output folder that holds something already, or with ``resume`` none
            or other settings.
    """
    methods = [name.strip() for name in config.methods.split(",") if name.strip()]
    if not methods:
        raise UserError("--methods names none; give some, as in --methods ce,meta-only,mfrw-mes.")
    if config.dry_run:
        raise UserError("--dry-run tries out one run: use it with fastadvisor train.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("fastadvisor compare trains in one process: start it without torchrun, or use fastadvisor train.")
    for name in methods:
        check_method(name)
        check_config(replace(config, method=name))
    with console.show_log(config.progress):
        return _compare(config, list(dict.fromkeys(methods)))


def _compare(config: CompareConfig, methods: list[str]) -> dict[str, Any]:
    folder, resumes = grid.open_folder(config)
    source = cache_images(load_source(config), config, pick_device(config.device))  # decoded once for all runs
    for line in source.notes:
        logger.warning(line)
    rows = []
    for method in methods:
        summaries = [
            grid.load_or_train(config, method, seed, folder, source, resumes=resumes, check=_columns)
            for seed in range(config.seed, config.seed + config.seeds)
        ]
        rows.append({"method": method, **_statistics(summaries), "runs": summaries})
        # After every method, so that a comparison that is cut off leaves what it has.
        result = {"config": to_dict(config), "rows": rows, "versions": environment()}
        write_text(folder / "compare.json", json.dumps(result, indent=2) + "\n")
    logger.info(f"{format_comparison(rows)}\n\nRuns and compare.json are in {folder}.")
    return result


def _columns(summary: dict[str, Any]) -> dict[str, float]:
    return {name: read(summary) for name, read in COLUMNS.items()}


def _statistics(summaries: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and sample standard deviation of each column; the deviation of one run is None."""
    columns = {name: [_columns(summary)[name] for summary in summaries] for name in COLUMNS}
    return {
        name: {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
        for name, values in columns.items()
    }


def format_comparison(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table: mean ± deviation over the seeds, accuracies in percent."""

    def cell(value: dict[str, float | None], digits: int) -> str:
        spread = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
        return f"{value['mean']:.{digits}f}{spread}"

    lines = ["", "| method | last | peak | mean of last five | ms a step |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [cell(row[name], 1) for name in COLUMNS]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines)
