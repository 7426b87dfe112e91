"""Where the time of an exact step goes, beside the model of its cost.

    python -m benchmarks.phases [--model resnet32] [--batch-size 128] [--rounds 7] [--amp]

Medians of the phases of one step in turn with plain steps; the model counts backbone forward passes (a backward or a tangent is
2, plain training 3), so a phase should take its units times a third of the plain step.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TypeVar
from unittest.mock import patch

import torch

from benchmarks.contenders import CONTENDERS, Setting, batches
from benchmarks.step import synchronize
from benchmarks.tables import commit
from fastadvisor.iterations import Algorithm1
from fastadvisor.metagrad import ForwardEngine
from fastadvisor.runtime.allocator import keep_freed_memory
from fastadvisor.runtime.environment import environment
from fastadvisor.runtime.precision import pick_device

T = TypeVar("T")
UNITS = {
    "plain step": 3.0,
    "shared forward (a)": 1.0,
    "virtual backward (b)": 2.0,
    "meta forward and backward (c)": 3.0,
    "tangent pass and advisor (c)": 2.0,
    "the tangent by dual numbers alone": 3.0,
    "the tangent by a difference": 1.0,
    "actual backward (d)": 2.0,
}


def measure(setting: Setting, batch_size: int, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each phase."""
    plain, step = CONTENDERS["plain"].build(setting), CONTENDERS["exact"].build(setting)
    assert isinstance(step, Algorithm1)
    assert step.meta_train is not None
    engine, difference = step.engine, ForwardEngine(setting.execution(), tangent="difference")
    assert isinstance(engine, ForwardEngine)
    train, meta = batches(batch_size, setting.device)
    times: dict[str, list[float]] = {name: [] for name in UNITS}

    def timed(name: str, run: Callable[[], T]) -> T:
        synchronize(setting.device)
        start = time.perf_counter()
        result = run()
        synchronize(setting.device)
        times[name].append(1000 * (time.perf_counter() - start))
        return result

    for _ in range(rounds + 1):
        timed("plain step", partial(plain, train, None))
        [shared] = timed("shared forward (a)", partial(step.loss_pre_calculation, train))
        problem = step.meta_train.problem([shared], step.optimizer)
        virtual = timed("virtual backward (b)", partial(engine.virtual_train, problem))
        _, g = timed("meta forward and backward (c)", partial(engine.differentiate_meta_loss, step.model, virtual, meta))
        gradients = timed("tangent pass and advisor (c)", partial(engine.propagate_to_advisor, problem, g))
        with patch("fastadvisor.metagrad.forward.Tangents", lambda *_: nullcontext()):
            timed("the tangent by dual numbers alone", partial(engine.propagate_to_advisor, problem, g))
        if not setting.amp:
            timed("the tangent by a difference", partial(difference.propagate_to_advisor, problem, g))
        step.method.learn(gradients)
        assert step.advisor_optimizer is not None
        step.advisor_optimizer.step()
        timed("actual backward (d)", partial(step.actual_train, [shared]))
    return {name: statistics.median(values[1:]) for name, values in times.items() if values}  # the first round warms up


def table(result: dict[str, float]) -> str:
    """Return the phases as Markdown, each as a share of the plain step beside the model's."""
    plain = result["plain step"]
    rows = ["| phase | ms | times plain | model |", "|---|---|---|---|"]
    rows += [f"| {name} | {ms:.1f} | {ms / plain:.2f} | {UNITS[name] / 3:.2f} |" for name, ms in result.items()]
    return "\n".join(rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", action="store_true")
    options = parser.parse_args()
    device = pick_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()  # as a training run does
    print(f"{options.model}, batch and meta batch {options.batch_size}, {'bfloat16' if options.amp else 'float32'};", end=" ")
    print(f"{environment()['device']}, {torch.get_num_threads()} threads; torch {torch.__version__}; commit {commit()}\n")
    print(table(measure(Setting(options.model, device, options.amp), options.batch_size, options.rounds)))


if __name__ == "__main__":
    main()
