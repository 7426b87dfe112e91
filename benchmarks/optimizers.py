"""What a step of torch's SGD and AdamW costs as a loop over the parameters, by ``foreach`` and fused.

    python -m benchmarks.optimizers [--model resnet32] [--steps 10] [--rounds 15] [--json FILE] [--markdown FILE]

One process, the implementations in turn, each on weights of its own, medians. Before anything is timed the three are held
against each other in float64, over three steps; if one is off, nothing is timed.
``fastadvisor.training.optimizers.implementation`` goes by these figures.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.contenders import CLASSES, SIDE
from benchmarks.step import Cycle, interleaved, quartiles
from benchmarks.tables import about, command, place, publish
from fastadvisor.config import ModelConfig
from fastadvisor.models import build_model
from fastadvisor.runtime.allocator import keep_freed_memory
from fastadvisor.runtime.precision import pick_device

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=5e-4),
    "adamw": partial(torch.optim.AdamW, lr=1e-5, weight_decay=5e-4),
}
LOOP = "for-loop"
IMPLEMENTATIONS = {
    LOOP: {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
LIMIT = 1e-10
"""Largest relative difference to the loop in float64, in norm, of all weights after `CHECKED_STEPS` steps."""
CHECKED_STEPS = 3


def prepared(model: nn.Module, optimizer: str, implementation: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Return the parameters of a copy of ``model`` with gradients, the same in each copy, and the optimizer on them."""
    parameters = list(copy.deepcopy(model).parameters())
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
    return parameters, OPTIMIZERS[optimizer](parameters, **IMPLEMENTATIONS[implementation])


def check(model: nn.Module) -> dict[str, float]:
    """Return each implementation's difference to the loop.

    Raises:
        SystemExit: one is off.
    """
    wide, differences = copy.deepcopy(model).double(), {}
    for name in OPTIMIZERS:
        weights: dict[str, torch.Tensor] = {}
        for implementation in IMPLEMENTATIONS:
            parameters, optimizer = prepared(wide, name, implementation)
            for _ in range(CHECKED_STEPS):
                optimizer.step()
            weights[implementation] = nn.utils.parameters_to_vector(parameters).detach()
        # Over what the steps have moved, as the weights themselves are much larger.
        moved = (weights[LOOP] - nn.utils.parameters_to_vector(wide.parameters()).detach()).norm()
        for implementation in weights:
            difference = float((weights[implementation] - weights[LOOP]).norm() / moved)
            if not difference <= LIMIT:  # a NaN is not
                off = f"off by {difference:.1e} from the loop (limit {LIMIT:.0e})"
                raise SystemExit(f"{name} {implementation} is {off}, so nothing is timed.")
            differences[f"{name} {implementation}"] = difference
    return differences


def measure(name: str, device: torch.device, steps: int, rounds: int) -> dict[str, Any]:
    """Check, then time all implementations in turn; return milliseconds a step."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(name), CLASSES, (SIDE, SIDE)).model.to(device)
    differences = check(model)
    if device.type == "cpu":
        keep_freed_memory()  # as a training run does
    cases = {f"{name} {one}": prepared(model, name, one)[1] for name in OPTIMIZERS for one in IMPLEMENTATIONS}
    times = interleaved({case: Cycle(optimizer.step, steps) for case, optimizer in cases.items()}, rounds, device)
    return {
        "ms": {case: statistics.median(values) for case, values in times.items()},
        "ms_quartiles": {case: quartiles(values) for case, values in times.items()},
        "difference": differences,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensors": sum(1 for _ in model.parameters()),
    }


def report(result: dict[str, Any]) -> str:
    """Return the measurement as Markdown."""
    lines = [
        f"    {result['command']}",
        "",
        f"{result['model']}: {result['parameters']:,} parameters in {result['tensors']} tensors, float32; {place(result)}. "
        f"Medians of {result['rounds']} interleaved rounds of {result['steps']} steps.",
        "",
        "| optimizer | implementation | ms a step | quartiles | times the loop | difference to it (float64) |",
        "|---|---|---|---|---|---|",
    ]
    for case, ms in result["ms"].items():
        name, implementation = case.split()
        low, high = result["ms_quartiles"][case]
        ratio = ms / result["ms"][f"{name} {LOOP}"]
        difference = result["difference"][case]
        lines.append(f"| {name} | {implementation} | {ms:.3f} | {low:.3f} to {high:.3f} | {ratio:.2f} | {difference:.0e} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with ``--json`` and ``--markdown``, write too."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--steps", type=int, default=10, help="timed together")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="write what is printed")
    plan = parser.parse_args(arguments)
    device = pick_device(plan.device)
    result = measure(plan.model, device, plan.steps, plan.rounds)
    result |= {"model": plan.model, "steps": plan.steps, "rounds": plan.rounds, "device": device.type}
    result |= {"command": command(arguments, "benchmarks.optimizers"), "environment": about()}
    text = report(result)
    publish(result, text, plan.json, plan.markdown)


if __name__ == "__main__":
    main()
