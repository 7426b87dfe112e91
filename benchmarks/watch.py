"""What it costs to look for values that are not finite: a step under each ``--nan-policy``.

    python -m benchmarks.watch [--model resnet32] [--batch-size 128] [--rounds 7] [--json FILE] [--markdown FILE]

One process, the policies in turn, medians, MFRW-MES, exact. All start from the same weights, and nothing is timed unless they
leave the same ones after two steps.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import parameters_to_vector

from benchmarks.contenders import CLASSES, SIDE
from benchmarks.step import Cycle, interleaved
from benchmarks.tables import about, command, place, publish
from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.loading import Batch, cache_images
from fastadvisor.runtime.allocator import keep_freed_memory
from fastadvisor.runtime.precision import pick_device
from fastadvisor.runtime.run_folder import RunFolder
from fastadvisor.training.trainer import Trainer

POLICIES = ("ignore", "skip", "stop")
CHECKED_STEPS = 2
LIMIT = 1e-5
"""Of the relative difference of all weights: a step moves them by a hundredth, a GPU's order of sums by far less than this."""


def trainer(policy: str, model: str, device: torch.device) -> Trainer:
    """Return a run on the digits that has not begun; it writes nothing unless a value is not finite."""
    config = resolve(Config, nan_policy=policy, model=model, method="mfrw-mes", device=device.type, tensorboard=False)
    run = Trainer(config, prepare(cache_images(load_source(config), config, device), config, config.seed), device)
    run.folder = RunFolder(Path("nowhere"))  # "stop" keeps a state for replay only where there is a folder
    run.model.train()
    return run


def measure(model: str, batch_size: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Check, then time; return milliseconds a step.

    Raises:
        SystemExit: a policy that met nothing has left other weights.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, SIDE, SIDE, generator=generator).to(device)
    batch = Batch(images, torch.randint(CLASSES, (batch_size,), generator=generator).to(device), torch.arange(batch_size))
    steps: dict[str, Cycle] = {}
    weights: dict[str, torch.Tensor] = {}
    for policy in POLICIES:
        run = trainer(policy, model, device)
        steps[policy] = Cycle(partial(run._watched_step, batch, batch))
        torch.manual_seed(0)
        for _ in range(CHECKED_STEPS):
            steps[policy].run()
        weights[policy] = parameters_to_vector(run.model.parameters()).detach()
        usual = weights["ignore"]
        if not (weights[policy] - usual).norm() <= LIMIT * usual.norm():
            raise SystemExit(f"{policy} leaves other weights than ignore, so nothing is timed.")
    if device.type == "cpu":
        keep_freed_memory()  # as a training run does
    return {"ms": {policy: statistics.median(times) for policy, times in interleaved(steps, rounds, device).items()}}


def report(result: dict[str, Any]) -> str:
    """Return the measurement as Markdown."""
    lines = [
        f"    {result['command']}",
        "",
        f"MFRW-MES, {result['model']}, batch and meta batch {result['batch_size']}, float32; {place(result)}. "
        f"Medians of {result['rounds']} rounds.",
        "",
        "| --nan-policy | ms a step | times ignore |",
        "|---|---|---|",
    ]
    lines += [f"| {policy} | {ms:.1f} | {ms / result['ms']['ignore']:.3f} |" for policy, ms in result["ms"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with ``--json`` and ``--markdown``, write too."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="write what is printed")
    plan = parser.parse_args(arguments)
    device = pick_device(plan.device)
    result = measure(plan.model, plan.batch_size, plan.rounds, device)
    result |= {"model": plan.model, "batch_size": plan.batch_size, "rounds": plan.rounds, "device": device.type}
    result |= {"command": command(arguments, "benchmarks.watch"), "environment": about()}
    publish(result, report(result), plan.json, plan.markdown)


if __name__ == "__main__":
    main()
