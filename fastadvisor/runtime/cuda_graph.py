"""A whole iteration in one launch: recorded once as a CUDA graph, replayed from then on.

Launched one by one, the 1,900 operations of an exact iteration keep the processor busier than the GPU. A graph holds them all,
with the addresses that they read and write. So whatever changes from one iteration to the next has to reach it through memory:
batches are copied into tensors of the graph's own, learning rates are filled into tensors on the device, and random numbers are
drawn from an offset that torch moves on at each replay. What Python counts besides is counted here.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)
WARM_UP = 3
"""Iterations of a kind that run eagerly first: momentum buffers come into being, cuDNN tries algorithms, kernels compile."""


class Iteration(Protocol[Result_co]):
    """What can be recorded: a step that is taken in two parts, one on the device and one on the host."""

    iteration: int
    """Number of iterations so far."""

    def compute(self, train: Any, meta: Any | None) -> Result_co:
        """Do all that happens on the device; the part that is recorded."""
        ...

    def finish(self) -> None:
        """Do what is left to the host, after each iteration."""
        ...

    def graph_kind(self) -> Hashable | None:
        """Return what tells the next iteration's operations from those of others; None if it has to run eagerly."""
        ...

    def capturable(self) -> str | None:
        """Return why no iteration can be recorded; None if they can."""
        ...

    def count(self, by: int) -> None:
        """Count ``by`` meta steps, as ``compute`` does when it is called: a replay does not call it."""
        ...

    def leftovers(self) -> Any:
        """Return what ``compute`` leaves on the host for others to read, in tensors that a replay fills anew."""
        ...

    def put_back(self, leftovers: Any) -> None:
        """Leave ``leftovers`` as ``compute`` would have."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return what iterations change in place, such as weights and running statistics."""
        ...

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return those that take a step in it."""
        ...


class Graph(Protocol):
    """Records what a function launches."""

    def capture(self, run: Callable[[], Result]) -> Result:
        """Record ``run`` and return its result, whose tensors each replay fills; a first replay follows at once."""
        ...

    def replay(self) -> None:
        """Launch it all again."""
        ...


class CudaGraph:
    """torch's, captured on a stream of its own."""

    def __init__(self, stream: "torch.cuda.Stream", pool: Any) -> None:
        self._graph, self._stream, self._pool = torch.cuda.CUDAGraph(), stream, pool

    def capture(self, run: Callable[[], Result]) -> Result:
        """Record ``run``; other threads, such as those of a loader, may use the device meanwhile."""
        with torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            return run()

    def replay(self) -> None:
        """Launch it."""
        self._graph.replay()


class StandIn:
    """Calls the function again where a graph would be replayed, so that all around a graph can be tried without a GPU."""

    def __init__(self, uncount: Callable[[], None]) -> None:
        self._uncount = uncount
        self._run: Callable[[], Any] = lambda: None
        self._filled: list[Any] = []
        self._taken = False

    def capture(self, run: Callable[[], Result]) -> Result:
        """Call ``run``, which is to be what the first replay does."""
        self._run, result = run, run()
        self._filled, self._taken = tree_leaves(result), True
        return result

    def replay(self) -> None:
        """Call it, and fill the tensors of the first result."""
        if self._taken:
            self._taken = False
            return
        leaves = tree_leaves(self._run())
        self._uncount()
        for old, new in zip(self._filled, leaves, strict=True):
            if isinstance(old, Tensor):
                old.detach().copy_(new.detach())


@dataclass
class _Recorded(Generic[Result]):
    """A graph, and what goes in and comes out of it."""

    graph: Graph
    inputs: list[Tensor]
    result: Result
    leftovers: Any


class Graphed(Generic[Result]):
    """Takes iterations: the first of a kind eagerly, then by replaying the graph of their kind.

    Args:
        iteration: to take.
        device: of its tensors; on a CPU a stand-in calls the function again.
        say: where the reason goes if recording fails.
    """

    def __init__(self, iteration: Iteration[Result], device: torch.device, say: Callable[[str], None] = print) -> None:
        self._iteration, self._device, self._say = iteration, device, say
        self.reason: str | None = iteration.capturable()
        """Why iterations run eagerly; None while they are recorded."""
        self.replays = 0
        self.warm_up = WARM_UP
        self._recorded: dict[Hashable, _Recorded[Result]] = {}
        self._seen: dict[Hashable, int] = {}
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._pool = torch.cuda.graph_pool_handle() if cuda else None
        groups = _groups(iteration.optimizers())
        self._rates = [torch.zeros((), device=device) for _ in groups]
        """Of each parameter group, on the device."""
        self._filled = [0.0 for _ in groups]
        """What was last put there."""

    def reset(self) -> None:
        """Forget all graphs: whoever puts other tensors in the place of weights or optimizer states has to say so."""
        self._recorded, self._seen = {}, {}

    def __call__(self, train: Any, meta: Any | None) -> Result:
        """Take an iteration on batches of tensors, named tuples of them; ``meta`` is None where no meta step is due."""
        iteration = self._iteration
        if self.reason is not None:
            return self._eagerly(train, meta)
        self._fill()
        kind = iteration.graph_kind()
        if kind is None:
            return self._eagerly(train, meta)
        batches = [*train, *(() if meta is None else meta)]
        key = kind, meta is None, *((tensor.shape, tensor.stride(), tensor.dtype) for tensor in batches)
        recorded = self._recorded.get(key)
        if recorded is None:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= self.warm_up:
                return self._eagerly(train, meta)
            recorded = self._record(train, meta)
            if recorded is None:
                return self._eagerly(train, meta)
            self._recorded[key] = recorded
        else:
            iteration.count(0 if meta is None else 1)
            torch._foreach_copy_(recorded.inputs, batches)
        recorded.graph.replay()
        self.replays += 1
        iteration.iteration += 1
        iteration.put_back(recorded.leftovers)
        iteration.finish()
        return recorded.result

    def _eagerly(self, train: Any, meta: Any | None) -> Result:
        """Run on the stream that graphs are captured on: autograd remembers the stream of a weight's first gradient."""
        self._iteration.iteration += 1
        if self._stream is None:
            result = self._compute(train, meta)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                result = self._compute(train, meta)
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._iteration.finish()
        return result

    def _compute(self, train: Any, meta: Any | None) -> Result:
        """Do what is on the device, with rates that are there: so an iteration gives the same numbers replayed or not."""
        if self.reason is not None:
            return self._iteration.compute(train, meta)
        with put_rates_on_device(self._iteration.optimizers(), self._rates):
            return self._iteration.compute(train, meta)

    def _record(self, train: Any, meta: Any | None) -> "_Recorded[Result] | None":
        """Record an iteration without taking it; None, and the reason noted, where it cannot be."""
        iteration, meta_steps = self._iteration, 0 if meta is None else 1
        own = type(train)(*(tensor.clone() for tensor in train))
        own_meta = None if meta is None else type(meta)(*(tensor.clone() for tensor in meta))
        before = [tensor.data_ptr() for tensor in iteration.tensors()]
        uncount = partial(iteration.count, -meta_steps)
        graph: Graph = StandIn(uncount) if self._stream is None else CudaGraph(self._stream, self._pool)
        try:
            result, leftovers = graph.capture(lambda: (self._compute(own, own_meta), iteration.leftovers()))
        except Exception as error:
            self.reason = f"they cannot be recorded as a CUDA graph ({' '.join(str(error).split())[:200]})"
        else:
            if before != [tensor.data_ptr() for tensor in iteration.tensors()]:
                self.reason = "the model puts new tensors in the place of its weights or buffers"
        if self.reason is not None:
            uncount()
            self.reset()
            self._say(f"Iterations run one operation at a time: {self.reason}.")
            return None
        inputs = [*own, *(() if own_meta is None else own_meta)]
        return _Recorded(graph, inputs, result, leftovers)

    def _fill(self) -> None:
        """Put today's learning rates where the operations read them."""
        for index, group in enumerate(_groups(self._iteration.optimizers())):
            if self._filled[index] != group["lr"]:
                self._filled[index] = group["lr"]
                self._rates[index].fill_(group["lr"])


@contextmanager
def put_rates_on_device(optimizers: Sequence[torch.optim.Optimizer], rates: Sequence[Tensor]) -> Iterator[None]:
    """Let ``rates``, a scalar on the device for each parameter group, be the learning rates inside the block, and the
    optimizers fit to be captured.
    """
    groups = _groups(optimizers)
    before = [(group["lr"], group.get("capturable")) for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        if "capturable" in group and rate.device.type == "cuda":
            group["capturable"] = True
    try:
        yield
    finally:
        for group, (lr, capturable) in zip(groups, before, strict=True):
            group["lr"] = lr
            if "capturable" in group:
                group["capturable"] = capturable


def _groups(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]
