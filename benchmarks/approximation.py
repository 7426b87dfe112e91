"""How far each approximation is from the exact meta-gradient, through a real training.

    python -m benchmarks.approximation --data-root DIR [--model resnet32] [--epochs 8] [--every 20] --json FILE
    python -m benchmarks.approximation --draw FILE --png FILE

DIR is an image folder (train/<class>, test/<class>). The run itself is exact; every so many iterations each approximation
computes its gradient for the same batches and weights, and its cosine and relative error to the exact one are kept.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.loading import cache_images
from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad import Engine, ForwardEngine, GradientSamplers, LayerwiseEngine, LearnedLayers
from fastadvisor.metagrad import forward as forward_module
from fastadvisor.models import Layer, cut_at, layers_of
from fastadvisor.runtime.allocator import keep_freed_memory
from fastadvisor.runtime.environment import environment
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.precision import pick_device
from fastadvisor.runtime.random_state import RandomState
from fastadvisor.training.trainer import Trainer


@dataclass
class Candidate:
    """One approximation."""

    engine: Engine
    meta_share: float = 1.0
    """Part of the meta batch that it sees."""
    own_virtual: bool = False
    """Its virtual step moves only the layers that count, by a backward of its own; else all of them, as when the virtual
    gradient is the actual one."""
    difference_step: float | None = None


def candidates(trainer: Trainer, shape: tuple[int, int]) -> dict[str, Candidate]:
    """Return what is compared, by name."""
    model, execution = trainer.model, trainer.execution
    layers: list[Layer] = layers_of(model, shape)
    found = {
        "differences": Candidate(ForwardEngine(execution, tangent="difference")),
        "differences, step 1e-4": Candidate(ForwardEngine(execution, tangent="difference"), difference_step=1e-4),
        "bfloat16": Candidate(ForwardEngine(Execution(trainer.device, torch.bfloat16))),
        "half the meta batch": Candidate(ForwardEngine(execution), meta_share=0.5),
        "top block": Candidate(ForwardEngine(execution, layers[-1].cut)),
        "random 4": Candidate(LayerwiseEngine(ForwardEngine(execution), model, layers, 4)),
        "random 8": Candidate(LayerwiseEngine(ForwardEngine(execution), model, layers, 8)),
    }
    for stages in (1, 2):
        cut = cut_at(model, shape, stages)
        if cut is not None:
            name = "top stage" if stages == 1 else f"top {stages} stages"
            found[name] = Candidate(ForwardEngine(execution, cut))
            if stages == 1:
                found[f"{name}, virtual step of its own"] = Candidate(ForwardEngine(execution, cut), own_virtual=True)
    learned = LearnedLayers(GradientSamplers(len(layers)), 4)
    found["learned 4"] = Candidate(LayerwiseEngine(ForwardEngine(execution), model, layers, 4, learned))
    return found


def probe(trainer: Trainer, compared: dict[str, Candidate], train: Batch, meta: Batch) -> dict[str, dict[str, float]]:
    """Compute every gradient from the same weights, batches and random numbers; nothing of the run is touched."""
    step, begun = trainer.step, RandomState.now(train.images.device)
    draw, meta_train = step.draw(train), step.meta_train
    assert meta_train is not None

    def gradient(candidate: Candidate, virtual: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        with begun.replayed(), trainer.model.frozen_statistics():
            shared = step.forward_pass(train, draw, candidate.engine.plan())
            problem = meta_train.problem([shared], step.optimizer)
            if virtual is None:
                virtual = candidate.engine.virtual_train(problem)
            few = Batch(*(part[: round(candidate.meta_share * len(part))] for part in meta))
            result = candidate.engine.meta_gradient(problem, virtual, few)
        return torch.cat([part.flatten() for part in result.gradients]), virtual

    exact, virtual = gradient(Candidate(ForwardEngine(trainer.execution)), None)
    found: dict[str, dict[str, float]] = {}
    usual = forward_module.DIFFERENCE_STEP
    for name, candidate in compared.items():
        forward_module.DIFFERENCE_STEP = candidate.difference_step or usual
        got, _ = gradient(candidate, None if candidate.own_virtual else virtual)
        cosine = torch.cosine_similarity(got, exact, dim=0)
        found[name] = {"cosine": float(cosine), "error": float((got - exact).norm() / exact.norm())}
    forward_module.DIFFERENCE_STEP = usual
    return found


def watch(config: Config, every: int, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Train exactly as ``config`` says and probe every so many iterations."""
    device = pick_device(config.device)
    keep_freed_memory()
    data = prepare(cache_images(load_source(config), config, device), config, config.seed)
    trainer = Trainer(config, data, device)
    compared = candidates(trainer, (trainer.loaders.size, trainer.loaders.size))
    records: list[dict[str, Any]] = []
    steps = len(trainer.train_loader)
    for epoch in range(config.epochs):
        trainer.model.train()
        for index in range(steps):
            trainer.set_lr(trainer.stages[0], index)
            train, meta = trainer.train_loader.next_batch(), trainer.meta_loader.next_batch()
            if trainer.step.iteration % every == 0:
                with RandomState.now(device).replayed():  # the run's own stream goes on as if nothing had been drawn
                    found = probe(trainer, compared, train, meta)
                records.append({"iteration": trainer.step.iteration, "epoch": epoch + index / steps, "engines": found})
            trainer.step(train, meta)
        trainer.epoch += 1
        top1 = trainer.test(trainer.loaders.test).top1
        records[-1]["test_top1"] = top1
        cosines = {name: round(value["cosine"], 3) for name, value in records[-1]["engines"].items()}
        say(f"epoch {trainer.epoch}: test {top1:.2f} %; cosines {cosines}")
    return records


def averages(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean and smallest cosine, and mean relative error, of each approximation."""
    result = {}
    for name in records[0]["engines"]:
        cosines, errors = ([record["engines"][name][key] for record in records] for key in ("cosine", "error"))
        result[name] = {"cosine": sum(cosines) / len(cosines), "smallest": min(cosines), "error": sum(errors) / len(errors)}
    return result


def table(records: list[dict[str, Any]]) -> str:
    """Return the averages as Markdown."""
    rows = ["| approximation | mean cosine | smallest | mean relative error |", "|---|---|---|---|"]
    for name, value in averages(records).items():
        rows.append(f"| {name} | {value['cosine']:.3f} | {value['smallest']:.3f} | {value['error']:.3f} |")
    return "\n".join(rows)


def draw(records: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw cosine and relative error over the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(9, 9), sharex=True, layout="constrained")
    epochs = [record["epoch"] for record in records]
    colours = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for index, name in enumerate(records[0]["engines"]):
        distances = [1 - record["engines"][name]["cosine"] for record in records]
        errors = [record["engines"][name]["error"] for record in records]
        for axis, values in zip(axes, (distances, errors), strict=True):
            # The points jump from batch to batch: a running median of five shows where they go.
            middle = [max(statistics.median(values[max(0, i - 2) : i + 3]), 1e-7) for i in range(len(values))]
            axis.plot(epochs, middle, label=name, linewidth=1.5, color=colours[(2 * index) % 20 + (index > 9)])
    axes[0].axhline(0.05, color="grey", linestyle=":", linewidth=1)
    axes[0].text(epochs[0], 0.052, "cosine 0.95", fontsize=8, va="bottom", color="grey")
    axes[0].set(ylabel="1 − cosine to the exact meta-gradient", yscale="log", title=title)
    axes[1].set(xlabel="epoch", ylabel="relative error", yscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=4)
    figure.savefig(path, dpi=110)


def names_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings on the command line that decide the figures, by name."""
    names = ("data_root", "dataset", "model", "method", "epochs", "every", "imbalance_factor", "noise_rate", "device")
    return {name: getattr(options, name) for name in names}


def main() -> None:
    """Measure, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root")
    parser.add_argument("--dataset", default="imagefolder")
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--method", default="mfrw-mes")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--imbalance-factor", type=float, default=10.0)
    parser.add_argument("--noise-rate", type=float, default=0.4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draw", type=Path, help="an earlier --json: measure nothing")
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    if options.draw is not None:
        result = json.loads(options.draw.read_text())
    else:
        settings = names_of(options)
        every, rate = settings.pop("every"), settings.pop("noise_rate")
        noise = {"noise": "flip" if rate else "none", "noise_rate": rate}
        records = watch(resolve(Config, **settings, **noise), every)
        settings["data_root"] = None
        shown = {**names_of(options), "data_root": "data" if options.data_root else None}
        command = "python -m benchmarks.approximation " + " ".join(
            f"--{name.replace('_', '-')} {value}" for name, value in shown.items() if value is not None
        )
        about = {"settings": {**settings, **noise}, "command": command, "environment": environment()}
        result = {**about, "averages": averages(records), "records": records}
    print(table(result["records"]))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.png is not None:
        set_up = result["settings"]
        title = (
            f"{set_up['method']}, {set_up['model']}, long tail {set_up['imbalance_factor']:g}, "
            f"{100 * set_up['noise_rate']:g} % flips: a running median of five"
        )
        draw(result["records"], title, options.png)


if __name__ == "__main__":
    main()
