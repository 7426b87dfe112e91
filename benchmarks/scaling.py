"""Bytes moved and time taken by a step on 8 to 1,024 GPUs, on paper.

    python -m benchmarks.scaling [--model resnet50] [--batch-per-gpu 256] [--global-batch 2048] [--markdown FILE]

Nothing is measured: parameters and operations are counted from the real model, everything about the machine is an assumption
that a flag states. The scheme is the product's: gradients are averaged by all-reduce in buckets, each under way while the rest
of its backward pass runs; the advisor's are averaged after the tangent pass, in the open.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastadvisor.config import Config
from fastadvisor.methods import DataFacts, build_method
from fastadvisor.models import build_model, cut_at, layers_of
from fastadvisor.runtime.ranks import BUCKET_BYTES

GPUS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Machine:
    """What is assumed of it."""

    tflops: float = 989.0
    """Dense bfloat16 peak of a GPU (H100 SXM data sheet)."""
    utilisation: float = 0.35
    """Share of it that the passes reach: more than convolutional networks do, so that communication looks worse than it is."""
    node: int = 8
    """GPUs that NVLink joins."""
    nvlink: float = 360e9
    """Bytes a second of an all-reduce within a node: 80 % of NVLink 4's 450 GB/s a direction."""
    network: float = 40e9
    """Bytes a second and GPU between nodes: 80 % of a 400 Gb/s adapter for each GPU."""
    latency: float = 5e-6
    """Seconds a hop."""

    def all_reduce(self, size: float, gpus: int) -> float:
        """Return the seconds of one all-reduce of ``size`` bytes: a ring's bandwidth, a tree's latency."""
        if gpus == 1 or not size:
            return 0.0
        speed = self.nvlink if gpus <= self.node else self.network
        return 2 * (gpus - 1) / gpus * size / speed + 2 * math.ceil(math.log2(gpus)) * self.latency

    def averaged(self, size: float, gpus: int) -> float:
        """Return the seconds of all buckets of a gradient of ``size`` bytes, one after the other."""
        buckets = max(1, math.ceil(size / BUCKET_BYTES))
        return buckets * self.all_reduce(size / buckets, gpus)


@dataclass(frozen=True)
class Network:
    """What a model is made of."""

    parameters: int
    upper: int
    """Of these, in the top two stages and the head."""
    upper_share: float
    """Of the forward operations, above that cut."""
    layer_share: float
    """Of the parameters, in four layers of those that can be chosen, on average, and in the head."""
    head: int
    """Of the parameters, in the last linear layer."""
    advisor: int
    flops: float
    """Of a forward pass, an image."""
    normalisations: int


@dataclass(frozen=True)
class Averaging:
    """A gradient that all GPUs average."""

    parameters: float
    hidden_by: float
    """Units of the backward pass that it leaves with; 0: averaged in the open."""
    every: int = 1
    """Once in so many iterations."""


@dataclass(frozen=True)
class Engine:
    """One iteration on average, in units of a backbone's forward pass."""

    name: str
    units: float
    gradients: tuple[Averaging, ...]
    norm_collectives: float
    """All-reduces a normalisation with --sync-bn: one a pass, and one more in a tangent pass that has no tape."""


def engines(net: Network) -> list[Engine]:
    """Return what ``fastadvisor/metagrad/README.md`` says of each, with forward-mode tangents as on a GPU."""
    whole, some, rho, k = net.parameters, net.layer_share * net.parameters, net.upper_share, 2
    actual, virtual, meta = [Averaging(whole, 2)] * 3
    advisor = Averaging(net.advisor, 0)
    behind = (Averaging(net.upper, 2 * rho, k), Averaging(net.advisor, 0, k))
    # The matching loss takes the head's gradient, and a backward pass of its own; the lowest layer chosen may be any.
    learned = (Averaging(net.head, 0, k), Averaging(some, 2, k), Averaging(some, 2, k), Averaging(net.advisor, 0, k))
    return [
        Engine("plain", 3, (actual,), 2),
        Engine("exact", 10, (virtual, meta, advisor, actual), 6),
        Engine("exact, `--lean`", 11, (virtual, meta, advisor, actual), 7),
        Engine("exact, one step behind", 9, (meta, advisor, actual), 6),
        Engine("`--approx-meta`", 3 + (1 + 4 * rho) / k, (*behind, actual), 2 + (1 + rho + rho) / k),
        Engine("… learned layers", 3 + (1 + 2 + 2 + 2) / k, (*learned, actual), 2 + (1 + 1 + 1 + 1) / k),
    ]


def count(name: str, size: int, classes: int) -> Network:
    """Count the model's parameters and operations; it is built on the CPU, with random weights."""
    config = Config(model=name, method="mfrw-mes")
    model = build_model(config, classes, (size, size))
    images = torch.zeros(1, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
    total = counter.get_total_flops()
    cut = cut_at(model, (size, size), 2)
    below = 0
    if cut is not None:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images, until=cut)
        below = counter.get_total_flops()
    parameters = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for p in model.head.parameters())
    facts = DataFacts(classes, classes, torch.ones(classes, dtype=torch.int64))
    advisor = build_method(config, model.head.in_features, facts).advisor
    assert advisor is not None
    return Network(
        parameters,
        sum(p.numel() for p in model.part_parameters(cut).values()),
        1 - below / total,
        min(1.0, 4 / max(1, len(layers_of(model, (size, size)))) * (parameters - head) / parameters + head / parameters),
        head,
        sum(p.numel() for p in advisor.parameters()),
        total,
        sum(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()),
    )


def compute_seconds(engine: Engine, net: Network, machine: Machine, batch: float) -> float:
    """Return the seconds a GPU computes in a step of ``batch`` images (as many meta images)."""
    return engine.units * net.flops * batch / (machine.tflops * 1e12 * machine.utilisation)


def bytes_moved(engine: Engine, gpus: int, bytes_each: int = 4) -> float:
    """Return the bytes a GPU sends in a step, by a ring."""
    averaged = sum(gradient.parameters / gradient.every for gradient in engine.gradients)
    return 2 * (gpus - 1) / gpus * averaged * bytes_each


def exposed_seconds(engine: Engine, net: Network, machine: Machine, batch: float, gpus: int) -> float:
    """Return the seconds a step waits for others: what no backward pass hides, and the last bucket of each."""
    unit = net.flops * batch / (machine.tflops * 1e12 * machine.utilisation)
    waited = 0.0
    for gradient in engine.gradients:
        size = 4 * gradient.parameters
        last = machine.all_reduce(min(size, BUCKET_BYTES), gpus)
        waited += max(last, machine.averaged(size, gpus) - 0.9 * gradient.hidden_by * unit) / gradient.every
    return waited


def sync_bn_seconds(engine: Engine, net: Network, machine: Machine, gpus: int) -> float:
    """Return the seconds of --sync-bn's all-reduces: a few kilobytes each, all latency, hidden by nothing."""
    return engine.norm_collectives * net.normalisations * machine.all_reduce(8192, gpus)


def table(net: Network, machine: Machine, batch: float | None, whole: float, gpus: Sequence[int] = GPUS) -> str:
    """Return efficiency (compute over compute and waiting) in percent, by engine and number of GPUs: at ``batch`` images a GPU
    (weak scaling), or, for None, sharing a batch of ``whole`` (strong).
    """
    lines = ["| engine | " + " | ".join(f"{n:,}" for n in gpus) + " |", "|---|" + "---|" * len(gpus)]
    for engine in engines(net):
        cells = []
        for n in gpus:
            each = whole / n if batch is None else batch
            busy = compute_seconds(engine, net, machine, each)
            cells.append("–" if each < 1 else f"{100 * busy / (busy + exposed_seconds(engine, net, machine, each, n)):.0f}")
        lines.append(f"| {engine.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def costs(net: Network, machine: Machine, batch: float) -> str:
    """Return bytes, compute and waiting of a step by engine on 8, 64 and 1,024 GPUs, and --sync-bn's share."""
    lines = [
        "| engine | MB sent a GPU and step | compute, ms | waiting on 8 / 64 / 1,024, ms | `--sync-bn` on 8 / 64 / 1,024, ms |",
        "|---|---|---|---|---|",
    ]
    for engine in engines(net):
        waits = [1e3 * exposed_seconds(engine, net, machine, batch, n) for n in (8, 64, 1024)]
        norms = [1e3 * sync_bn_seconds(engine, net, machine, n) for n in (8, 64, 1024)]
        busy = 1e3 * compute_seconds(engine, net, machine, batch)
        lines.append(
            f"| {engine.name} | {bytes_moved(engine, 1024) / 1e6:.0f} | {busy:.1f} | "
            f"{' / '.join(f'{ms:.1f}' for ms in waits)} | {' / '.join(f'{ms:.0f}' for ms in norms)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Bytes against compute of a step on many GPUs, on paper.")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch-per-gpu", type=int, default=256)
    parser.add_argument("--global-batch", type=int, default=2048)
    parser.add_argument("--tflops", type=float, default=Machine.tflops)
    parser.add_argument("--utilisation", type=float, default=Machine.utilisation)
    parser.add_argument("--network", type=float, default=Machine.network, help="bytes a second and GPU between nodes")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    machine = Machine(tflops=args.tflops, utilisation=args.utilisation, network=args.network)
    net = count(args.model, args.image_size, args.classes)
    text = "\n\n".join(
        [
            f"{args.model}, {args.image_size} pixels, {args.classes} classes: {net.parameters / 1e6:.1f} M parameters, "
            f"{net.upper / 1e6:.1f} M of them in the top two stages (and {100 * net.upper_share:.0f} % of the operations), "
            f"{net.advisor / 1e6:.2f} M in the advisor, {net.flops / 1e9:.1f} GFLOP forward an image. {machine}",
            f"{args.batch_per_gpu} images and as many meta images a GPU:",
            costs(net, machine, args.batch_per_gpu),
            "Efficiency in percent, that batch on every GPU:",
            table(net, machine, args.batch_per_gpu, 0),
            f"Efficiency in percent, a batch of {args.global_batch:,} shared by all:",
            table(net, machine, None, args.global_batch),
        ]
    )
    print(text)
    if args.markdown is not None:
        args.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
