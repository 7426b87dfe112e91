"""A run in words and in ``summary.json``."""

from pathlib import Path
from typing import Any

import torch

from fastadvisor.config import Config
from fastadvisor.datasets import TrainingData
from fastadvisor.iterations import Iteration, OneStepBehind
from fastadvisor.runtime.timer import median


def best_epoch(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of the epoch that best.pt is of: the highest accuracy on the val images where the data set has some,
    else on the test images; of equal ones the last.
    """
    return max(reversed(history), key=lambda record: record.get("val_top1", record["test_top1"]))


def summary(config: Config, data: TrainingData, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the part of ``summary.json`` that data and epochs decide.

    Args:
        config: the resolved settings.
        data: what the run trained and tested on.
        history: one record an epoch, as in ``metrics.jsonl``.
    """
    last, top1, best = history[-1], [record["test_top1"] for record in history], best_epoch(history)
    tail = top1[-5:]
    return {
        "method": config.method,
        "dataset": data.name,
        "model": config.model,
        "seed": config.seed,
        "epochs": len(history),
        "test_top1": {"last": top1[-1], "peak": max(top1), "mean_last5": sum(tail) / len(tail)},
        "test_top5": last["test_top5"],
        "best": {
            "epoch": best["epoch"],
            "chosen_by": "val" if "val_top1" in best else "test",
            "test_top1": best["test_top1"],
            "val_top1": best.get("val_top1"),
        },
        "per_class_top1": dict(zip(data.classes, last["test_per_class_top1"], strict=True)),
        "many_medium_few": last["test_many_medium_few"],
        "images_per_second": median([record["images_per_second"] for record in history]),
        "step_ms_median": median([record["step_ms_median"] for record in history]),
        "skipped_steps": last["skipped_steps"],
        "waiting_share": median([record["waiting_share"] for record in history]),
        "train_seconds": sum(record["seconds"] for record in history),
        "train_size": len(data.train_ids),
        "meta_size": len(data.meta_ids),
        "test_size": len(data.test),
        "val_size": 0 if data.val is None else len(data.val),
        "class_counts": data.true_class_counts().tolist(),
        "imbalance_factor": config.imbalance_factor,
        "meta_cosine": _mean_cosine(history),
        "noise": config.noise,
        "noise_rate": data.noise_rate(),
        "amp": config.amp,
    }


def _mean_cosine(history: list[dict[str, Any]]) -> float | None:
    """Mean over the epochs of the cosine between approximate and exact meta-gradient; None where it was not measured."""
    cosines = [record["meta_cosine"] for record in history if "meta_cosine" in record]
    return sum(cosines) / len(cosines) if cosines else None


def headline(config: Config, data: TrainingData, device: torch.device, folder: Path | str, ranks: int = 1) -> str:
    """Say what is about to be trained, on what, and where the results go."""
    origin = "held out of the training images, their labels taken as right" if data.meta_held_out else "a set of its own"
    val = "" if data.val is None else f", {len(data.val):,} val images to choose best.pt by"
    shared = "" if ranks == 1 else f", {ranks} processes with {config.batch_size // ranks} images each"
    return (
        f"{config.method} with {config.model} on {data.name}: {len(data.train_ids):,} training images in "
        f"{len(data.classes)} classes ({100 * data.noise_rate():.1f} % of labels changed by {config.labels or 'us'}), "
        f"{len(data.meta_ids):,} meta images ({origin}), {len(data.test):,} test images{val}; {device}{shared}; "
        f"run folder {folder}"
    )


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """Sum up an epoch."""
    meta = "" if record["meta_loss"] is None else f"  meta loss {record['meta_loss']:.3f}"
    if "meta_cosine" in record:
        meta += f" (cosine to exact {record['meta_cosine']:.2f}{', exact for now' if record['meta_fallback'] else ''})"
    val = f"val {record['val_top1']:.2f} %  " if "val_top1" in record else ""
    return (
        f"epoch {record['epoch']:>3}/{epochs}  loss {record['loss']:.3f}{meta}  "
        f"{val}test {record['test_top1']:.2f} %  lr {record['lr']:.3g}  {record['images_per_second']:,.0f} images/s"
    )


def finished(summary: dict[str, Any], folder: Path) -> str:
    """Sum up a finished run, and say where it is."""
    return f"Finished: {results(summary)}. Everything is in {folder}."


def results(summary: dict[str, Any]) -> str:
    """Sum up a finished run."""
    top1 = summary["test_top1"]
    return (
        f"test accuracy {top1['last']:.2f} % last, {top1['peak']:.2f} % peak, {top1['mean_last5']:.2f} % mean of last five; "
        f"{summary['step_ms_median']:.1f} ms a step, {summary['images_per_second']:,.0f} images/s"
    )


def describe_meta_gradient(step: Iteration) -> str | None:
    """Say how the meta-gradient is computed; None where the method needs none."""
    if step.engine is None:
        return None
    when = "" if step.interval == 1 else f"; every {step.interval} iterations"
    behind = "; the advisor one step behind" if isinstance(step, OneStepBehind) else ""
    return f"{step.engine.describe()}{when}{behind}"
