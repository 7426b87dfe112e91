"""Several processes, one model: who this process is, and averages over all of them (torch.distributed, started by torchrun).

Every rank holds the whole model and the whole advisor and sees its part of each batch; gradients are averaged, so all ranks
take the same step. A process that torchrun did not start is rank 0 of 1, and nothing here costs it anything.
"""

import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from fastadvisor.errors import UserError

BUCKET_BYTES = 25 * 2**20
"""Gradients that travel together: DistributedDataParallel's default, small enough to overlap, large enough to fill a link."""

TIMEOUT = timedelta(hours=2)
"""A rank that does not come to a collective: while one of them makes small copies of a large data set, the others wait."""

GROUPS = itertools.count()
"""Numbers of the groups that this process joins, one after the other: each finds its members under keys of its own."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as seen by one of them."""

    rank: int = 0
    count: int = 1
    local: int = 0
    """Number of this process on its machine, and of its GPU."""
    joined: bool = False
    """Whether this object initialised torch.distributed, and so has to shut it down."""

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Join the processes torchrun started; ``ALONE`` if it started none.

        Raises:
            UserError: the others cannot be reached.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return ALONE
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        ranks = cls(rank, count, int(os.environ.get("LOCAL_RANK", "0")), not dist.is_initialized())
        if ranks.count == 1:
            return ALONE
        if torch.cuda.is_available():
            if ranks.local >= torch.cuda.device_count():
                raise UserError(
                    f"torchrun started {ranks.local + 1} or more processes on a machine with {torch.cuda.device_count()} GPUs: "
                    "lower --nproc-per-node."
                )
            torch.cuda.set_device(ranks.local)
        if not dist.is_initialized():
            try:
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
                store = _agent_store(TIMEOUT)
                if store is None:
                    dist.init_process_group(backend, timeout=TIMEOUT)
                else:
                    store = PrefixStore(f"group {next(GROUPS)}", store)
                    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=ranks.rank, world_size=ranks.count)
            except (RuntimeError, ValueError, dist.DistError) as error:
                reason = " ".join(str(error).split())[:150]
                raise UserError(f"The other processes cannot be reached ({reason}); start them with torchrun.") from None
        return ranks

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the files and prints for all ranks."""
        return self.rank == 0

    def gradients(
        self, loss: Tensor, inputs: Sequence[Tensor], plus: Sequence[Tensor | None] | None = None, **options: Any
    ) -> tuple[Tensor | None, ...]:
        """``torch.autograd.grad(loss, inputs, **options)``, averaged over the ranks while the backward pass is under way.

        Args:
            loss: a scalar, the mean over this rank's samples.
            inputs: the same on all ranks; tensors that the loss does not reach must be the same ones, too.
            plus: added to the gradients before they are averaged, such as those of earlier micro-batches.
            options: of ``torch.autograd.grad``.
        """
        if self.count == 1:
            found = torch.autograd.grad(loss, inputs, **options)
            return found if plus is None else tuple(map(add_gradients, found, plus))
        buckets = _Buckets(inputs, self.count, plus)
        handles = [
            tensor.register_hook(lambda gradient, at=at: buckets.ready(at, gradient)) for at, tensor in enumerate(inputs)
        ]
        try:
            found = torch.autograd.grad(loss, inputs, **options)
        finally:
            for handle in handles:
                handle.remove()
        return buckets.finish(found)

    def average(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the means over the ranks of ``tensors``, of the same shapes and one dtype on all of them; in one go."""
        if self.count == 1 or not tensors:
            return tuple(tensors)
        flat = _flatten_dense_tensors([tensor.detach() for tensor in tensors]).div_(self.count)
        dist.all_reduce(flat)
        return tuple(_unflatten_dense_tensors(flat, tensors))

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks, differentiable backwards and forwards."""
        return tensor if self.count == 1 else _Total.apply(tensor)

    def any(self, flag: Tensor) -> Tensor:
        """Return whether ``flag``, a boolean scalar, is true on any rank."""
        if self.count == 1:
            return flag
        number = flag.to(torch.int32)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.bool()

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in order, on rank 0; an empty list on the others."""
        if self.count == 1:
            return [value]
        values: list[Any] | None = [None] * self.count if self.first else None
        dist.gather_object(value, values)
        return values or []

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's ``value`` on all ranks."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def let_first_go_ahead(self) -> Iterator[None]:
        """Let rank 0 run the block before the others do."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.count > 1:
            dist.barrier()

    def broadcast_module(self, module: torch.nn.Module) -> None:
        """Give all ranks rank 0's parameters and buffers."""
        if self.count > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), 0)

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """Give all ranks rank 0's buffers, such as running statistics, which each has gathered from its own images."""
        if self.count > 1:
            for tensor in module.buffers():
                dist.broadcast(tensor.detach(), 0)

    def leave(self) -> None:
        """Shut down torch.distributed when all ranks are done. Not to be called after a failure: it waits for all ranks.

        A process that ends without it may be aborted by a thread of torch's that nobody has joined.
        """
        if self.joined and dist.is_initialized():
            self.wait()
            dist.destroy_process_group()


ALONE = Ranks()

LOST = re.compile("connection (closed|reset|refused)|broken pipe|remote process exited|by peer|timed out", re.IGNORECASE)


def means_lost_rank(error: BaseException) -> bool:
    """Return whether ``error`` is one that a collective raises because another rank has ended."""
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return many and isinstance(error, RuntimeError) and LOST.search(str(error)) is not None


def claim_message(message: str) -> bool:
    """Return whether this process is to print ``message``: of several ranks with the same message, only the first one is."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    key = hashlib.sha256(message.encode()).hexdigest()[:16]
    try:
        store = _agent_store(timedelta(seconds=5))
        return store is None or store.add(key, 1) == 1
    except (KeyError, ValueError, RuntimeError):  # better twice than not at all
        return True


def _agent_store(timeout: timedelta) -> Store | None:
    """Return the store that torchrun's agent holds for its processes, as of this restart; None without an agent.

    torch itself would look where the processes of before a restart have left their addresses (static rendezvous, the default),
    and now and then call one that is gone.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    agent = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    return PrefixStore(f"fastadvisor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", agent)


def add_gradients(gradient: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients, either of which may be None."""
    return more if gradient is None else gradient if more is None else gradient + more


class _Total(torch.autograd.Function):
    """Sum over the ranks; its derivative is the same sum, in either direction."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Total.apply(gradient)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _Total.apply(tangent)


class _Buckets:
    """Gradients on their way to the other ranks, in buckets that leave as soon as the backward pass has filled them.

    The last parameters come first, as their gradients do. Buckets leave in the same order on every rank, whichever fills first.
    """

    def __init__(self, inputs: Sequence[Tensor], count: int, plus: Sequence[Tensor | None] | None) -> None:
        self.count, self.plus = count, plus
        self.gradients: list[Tensor | None] = [None] * len(inputs)
        self.members: list[list[int]] = []
        self.bucket_of = [0] * len(inputs)
        size, dtype = 0, None
        for at in reversed(range(len(inputs))):
            tensor = inputs[at]
            if not self.members or size >= BUCKET_BYTES or tensor.dtype != dtype:
                self.members.append([])
                size, dtype = 0, tensor.dtype
            self.members[-1].append(at)
            self.bucket_of[at] = len(self.members) - 1
            size += tensor.numel() * tensor.element_size()
        self.missing = [len(members) for members in self.members]
        self.inputs = inputs
        self.flying: list[tuple[Tensor, Any]] = []

    def ready(self, at: int, gradient: Tensor) -> None:
        """Take the gradient of input ``at``, and send what is complete."""
        self.gradients[at] = gradient.detach()
        self.missing[self.bucket_of[at]] -= 1
        while len(self.flying) < len(self.members) and not self.missing[len(self.flying)]:
            self._send()

    def finish(self, found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Send the rest and return the means; None where no rank has a gradient."""
        self.gradients = list(found)
        while len(self.flying) < len(self.members):
            self._send()
        means: list[Tensor | None] = [None] * len(self.inputs)
        for members, (flat, work) in zip(self.members, self.flying, strict=True):
            work.wait()
            for at, mean in zip(members, _unflatten_dense_tensors(flat, [self.inputs[at] for at in members]), strict=True):
                means[at] = None if self._of(at) is None else mean
        return tuple(means)

    def _of(self, at: int) -> Tensor | None:
        return self.gradients[at] if self.plus is None else add_gradients(self.gradients[at], self.plus[at])

    def _send(self) -> None:
        members = self.members[len(self.flying)]
        parts = [self._of(at) for at in members]
        whole = [torch.zeros_like(self.inputs[at]) if part is None else part for at, part in zip(members, parts, strict=True)]
        flat = _flatten_dense_tensors(whole).div_(self.count)
        self.flying.append((flat, dist.all_reduce(flat, async_op=True)))
