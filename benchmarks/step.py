"""What a training step costs with each way to the meta-gradient, beside plain cross-entropy.

    python -m benchmarks.step [--model resnet32] [--batch-size 128] [--amp] [--json FILE]

One process, the contenders in turn, medians. Before anything is timed the exact engine is held against double backward in
float64 on the same network; if they differ no ratio is printed.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastadvisor.config import MethodConfig, ModelConfig
from fastadvisor.data.types import Batch
from fastadvisor.metagrad import Engine, ForwardEngine, MetaGradient, MetaProblem, ReferenceEngine, VirtualStep
from fastadvisor.methods import build_method
from fastadvisor.models import build_model, cut_at
from fastadvisor.runtime.allocator import keep_freed_memory
from fastadvisor.runtime.environment import environment
from fastadvisor.runtime.precision import autocast, pick_device
from fastadvisor.step import Step

SIDE, CLASSES = 32, 10
CONTENDERS = ("plain", "double_backward", "exact", "approx")
METHOD = "mfrw-mes"
LIMIT = 1e-10


def batches(size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Batch, Batch]:
    """Return a train and a meta batch of random images."""
    generator = torch.Generator().manual_seed(0)

    def one() -> Batch:
        images = torch.randn(size, 3, SIDE, SIDE, generator=generator, dtype=dtype)
        labels = torch.randint(CLASSES, (size,), generator=generator)
        return Batch(images.to(device), labels.to(device), torch.arange(size, device=device))

    return one(), one()


def make_step(name: str, model_name: str, device: torch.device, amp: bool, dtype: torch.dtype = torch.float32) -> Step:
    """Build the step of one contender, with weights that are the same for all of them."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(model_name), CLASSES, (SIDE, SIDE)).to(device, dtype)
    config = MethodConfig(method="ce" if name == "plain" else METHOD)
    method = build_method(config, model.head.in_features, CLASSES)
    advisor_optimizer = None
    if method.advisor is not None:
        method.advisor.to(device, dtype)
        advisor_optimizer = torch.optim.Adam(method.advisor.parameters(), lr=method.advisor_lr)

    def precision() -> torch.autocast:
        return autocast(device, amp)

    cut = cut_at(model, (SIDE, SIDE), 1) if name == "approx" else None
    engine: Engine = ReferenceEngine(precision) if name == "double_backward" else ForwardEngine(precision, cut)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return Step(model, method, optimizer, advisor_optimizer, engine, precision)


def meta_gradient(engine: Engine, step: Step, train: Batch, meta: Batch) -> MetaGradient:
    """Return the meta-gradient of ``engine`` from a fixed random state."""
    step.engine = engine
    torch.manual_seed(1)
    shared = step.loss_pre_calculation(train)
    advice = step.method.advise(shared.features.detach(), shared.loss_pre, train.labels, shared.draw)
    problem = MetaProblem(step.model, step.method, shared, advice, VirtualStep(0.1))
    return engine.meta_gradient(problem, engine.virtual_train(problem), meta)


def correctness(model_name: str, device: torch.device) -> dict[str, float]:
    """Hold the engines against double backward in float64, on a batch of 16.

    Returns:
        ``exact_error``: relative error of the exact engine; ``approx_cosine``: cosine of the approximate gradient to the
        exact one, at random weights.
    """
    step = make_step("exact", model_name, device, amp=False, dtype=torch.float64)
    train, meta = batches(16, device, torch.float64)
    engines: dict[str, Engine] = {
        "expected": ReferenceEngine(step.precision),
        "exact": ForwardEngine(step.precision),
        "approx": ForwardEngine(step.precision, cut_at(step.model, (SIDE, SIDE), 1)),
    }
    flat: dict[str, Tensor] = {}
    for name, engine in engines.items():
        gradients = meta_gradient(engine, step, train, meta).gradients
        flat[name] = torch.cat([gradient.flatten() for gradient in gradients])
    error = float((flat["exact"] - flat["expected"]).norm() / flat["expected"].norm())
    return {"exact_error": error, "approx_cosine": float(torch.cosine_similarity(flat["approx"], flat["expected"], dim=0))}


def interleaved(steps: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Run the contenders in turn and return each one's median milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, run in steps.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if index:  # the first round warms up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    model_name: str, batch_size: int, rounds: int, amp: bool, device: torch.device, keep_memory: bool = True
) -> dict[str, float]:
    """Check, then time every contender; raises SystemExit if the check is red."""
    checked = correctness(model_name, device)
    if not checked["exact_error"] <= LIMIT:
        raise SystemExit(f"The exact engine is off by {checked['exact_error']:.2e} (limit {LIMIT:.0e}): nothing is timed.")
    if keep_memory and device.type == "cpu":
        keep_freed_memory()  # as a training run does
    train, meta = batches(batch_size, device)
    steps = {name: make_step(name, model_name, device, amp) for name in CONTENDERS}
    medians = interleaved({name: partial(step, train, meta) for name, step in steps.items()}, rounds, device)
    return {**{f"{name}_ms": value for name, value in medians.items()}, **checked}


def table(result: dict[str, float], batch_size: int) -> str:
    """Return the measurement as Markdown."""
    rows = ["| step | ms | images/s | times plain |", "|---|---|---|---|"]
    for name in CONTENDERS:
        ms = result[f"{name}_ms"]
        label = {"double_backward": "double backward, one shared forward"}.get(name, name)
        rows.append(f"| {label} | {ms:.1f} | {1000 * batch_size / ms:,.0f} | {ms / result['plain_ms']:.2f} |")
    rows.append(f"\nExact against double backward, float64: {result['exact_error']:.1e} relative. ")
    rows.append(f"Cosine of the approximate gradient at random weights: {result['approx_cosine']:.3f}.")
    return "\n".join(rows)


def main() -> None:
    """Measure and print; with ``--json``, write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-keep-memory", action="store_true", help="CPU: let the C library return freed memory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = pick_device(options.device)
    keep = not options.no_keep_memory
    result = measure(options.model, options.batch_size, options.rounds, options.amp, device, keep)
    about = environment()
    print(f"python -m benchmarks.step {' '.join(sys.argv[1:])}".rstrip())
    print(f"{METHOD}, {options.model}, batch and meta batch {options.batch_size}, {'bfloat16' if options.amp else 'float32'};")
    print(f"{platform.machine()}, {about['device']}, {torch.get_num_threads()} threads, torch {about['torch']}\n")
    print(table(result, options.batch_size))
    if options.json:
        options.json.write_text(json.dumps({**result, "environment": about}, indent=2) + "\n")


if __name__ == "__main__":
    main()
