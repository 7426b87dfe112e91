"""How long a contender takes: wall time, and on a GPU the time of its kernels alone, with the caches flushed."""

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.contenders import Contender, Function, Inputs, differentiable, outputs_of

PHASES = ("forward", "backward", "both")
Run = Callable[[], Any]


def runs(contender: Contender, function: Function, inputs: Inputs) -> dict[str, Run]:
    """Return what is timed, by phase."""
    leaves = differentiable(inputs)
    if contender.destroys:  # its own copy: what it leaves there is as good to be timed on
        leaves = [part.detach().clone().requires_grad_(part.requires_grad) for part in leaves]
    wanted = leaves[:1] if contender.plain else [part for part in leaves if part.requires_grad]
    if contender.gradients_in_forward:
        return {"both": lambda: function(*leaves)}
    constants = [part.detach() for part in leaves]
    outputs = outputs_of(function(*leaves))
    above = [torch.ones_like(part) for part in outputs]

    def forward() -> Any:
        return function(*constants)

    def backward() -> Any:
        return torch.autograd.grad(outputs, wanted, above, retain_graph=True)

    def both() -> Any:
        return torch.autograd.grad(outputs_of(function(*leaves)), wanted, above)

    return {"forward": forward, "backward": backward, "both": both}


def wall(cycles: Mapping[str, Run], rounds: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Return the median microseconds of a call, host included: all in turn, ``rounds`` times ``repeats`` calls back to back."""
    times: dict[str, list[float]] = {name: [] for name in cycles}
    for index in range(rounds + 1):
        for name, run in cycles.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            synchronize(device)
            if index:  # the first round warms up
                times[name].append(1e6 * (time.perf_counter() - start) / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Flush:
    """Fills the GPU's caches with something else, and gives the host time to queue what is timed."""

    def __init__(self, device: torch.device, megabytes: int = 256) -> None:
        self.buffer: Tensor = torch.empty(megabytes * 2**20, dtype=torch.int8, device=device)

    def __call__(self) -> None:
        """Write over the buffer."""
        self.buffer.zero_()


def side_stream(device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU, run the block on a stream of its own: on the default one nothing can be captured, and a backward pass runs on
    the stream of its forward pass.
    """
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def captured(run: Run) -> Run:
    """Return a replay of ``run`` as a CUDA graph on the current stream, so that nothing of the host is timed."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    return graph.replay


def on_device(cycles: Mapping[str, Run], rounds: int, flush: Flush, waiting: Collection[str] = ()) -> dict[str, float]:
    """Return the median microseconds that the GPU spends on a call: all in turn, between events, caches flushed before each.

    Everything but ``waiting`` is captured.
    """
    times: dict[str, list[float]] = {name: [] for name in cycles}
    replays = {name: run if name in waiting else captured(run) for name, run in cycles.items()}
    for index in range(rounds + 3):
        for name, replay in replays.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush()
            begin.record()
            replay()
            end.record()
            end.synchronize()
            if index >= 3:
                times[name].append(1e3 * begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(device: torch.device, megabytes: int) -> float:
    """Return the bytes a second that a large copy moves, read and written: what memory gives at best."""
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    run = {"copy": lambda: target.copy_(source)}
    micros = on_device(run, 20, Flush(device)) if device.type == "cuda" else wall(run, 7, 1, device)
    return 2 * source.numel() * 4 / (1e-6 * micros["copy"])
