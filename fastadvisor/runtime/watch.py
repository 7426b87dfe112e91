"""Checks for infinities and NaN before they reach a weight."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastadvisor.runtime.ranks import ALONE, Ranks

OTHERS = "a tensor of another process"

CAUSES = ("the advisor's", "the training loss", "the meta loss", "the meta-gradient", "the gradient")
"""Tensors by how near they are to the images they come from: from the meta loss on, other ranks' images have a part in them."""


def distance_to_cause(name: str) -> int:
    """Return the index in ``CAUSES`` of the entry that ``name`` begins with; their number if there is none."""
    return next((place for place, start in enumerate(CAUSES) if name.startswith(start)), len(CAUSES))


class NonFiniteError(Exception):
    """A tensor of a step holds infinities or NaN."""

    def __init__(self, name: str, iteration: int = 0) -> None:
        super().__init__(name)
        self.name = name
        """Of the tensor, in words."""
        self.iteration = iteration
        """In which it was, counted from 1."""


class _Peaks(NamedTuple):
    """The largest absolute values of named tensors, still on the device."""

    names: list[str]
    values: Tensor

    @classmethod
    @torch.no_grad()  # a graph would hold the advisor's activations until the peaks are read
    def of(cls, tensors: Mapping[str, Tensor | None]) -> "_Peaks":
        named = {name: value for name, value in tensors.items() if value is not None}
        peaks = torch._foreach_norm(list(named.values()), torch.inf)
        return cls(list(named), torch.stack([peak.float() for peak in peaks]))

    def first_bad(self) -> str | None:
        """Return the name of the first that is not finite; waits for the device."""
        peaks = zip(self.names, self.values.tolist(), strict=True)
        return next((name for name, peak in peaks if not abs(peak) < float("inf")), None)


@dataclass
class Watch:
    """Checks the values of an iteration before they reach any weight. All ranks get the same answer.

    As it stands it waits for the device, once before the advisor's step and once before the classifier's. ``deferred`` it does
    not: a flag on the device keeps the optimizers from stepping (``found_inf`` of torch's fused ones) from the first bad number
    on, and the host reads it one iteration later.
    """

    skip: bool = False
    """Whether to leave the step out and count it, instead of raising an error."""
    gradients: bool = True
    """Whether to check gradients; off with a gradient scaler, which checks them itself and leaves out steps as it adapts."""
    ranks: Ranks = ALONE
    skipped: int = 0
    deferred: bool = False
    _bad: Tensor | None = None
    """1.0 on the device once anything was not finite, else 0.0."""
    looks: list[_Peaks] = field(default_factory=list)
    """Of this iteration."""
    _pending: "deque[_Pending]" = field(default_factory=deque)
    """Iterations whose flag has not been read."""

    def passes(self, values: Mapping[str, Tensor | None], gradients: Mapping[str, Tensor | None]) -> bool:
        """Return whether all values are finite; True if the check is deferred.

        Raises:
            NonFiniteError: it is not, and steps are not to be skipped.
        """
        peaks = _Peaks.of({**values, **(gradients if self.gradients else {})})
        bad = self.ranks.any(~peaks.values.isfinite().all())
        if self.deferred:
            self.looks.append(peaks)
            if self._bad is None:
                self._bad = torch.zeros((), device=bad.device)
            torch.maximum(self._bad, bad.float(), out=self._bad)  # in place, for a recorded iteration reads it there, too
            return True
        if not bool(bad):
            return True
        if not self.skip:
            raise NonFiniteError(peaks.first_bad() or OTHERS)
        self.skipped += 1
        return False

    def guard(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Keep a fused ``optimizer`` from taking a step if anything so far was not finite, as a gradient scaler would."""
        if self.deferred and optimizer is not None:
            optimizer.found_inf = self._bad  # type: ignore[attr-defined]  # torch looks for it there

    def end_iteration(self, number: int) -> None:
        """Start to copy the flag of iteration ``number`` to the host, and read that of the iteration before.

        Raises:
            NonFiniteError: something in that one was not finite.
        """
        if not self.deferred or self._bad is None:
            return
        self._pending.append(_Pending.of(number, self._bad, self.looks))
        self.looks = []
        while len(self._pending) > 1:
            self._read(self._pending.popleft())

    def settle(self) -> None:
        """Read all flags, as before a checkpoint is written; raises as :meth:`end_iteration`."""
        while self._pending:
            self._read(self._pending.popleft())

    def _read(self, pending: "_Pending") -> None:
        numbers = pending.read()
        if not numbers[0]:
            return
        self._pending.clear()
        bad = (name for name, peak in zip(pending.names, numbers[1:], strict=True) if not abs(peak) < float("inf"))
        raise NonFiniteError(next(bad, OTHERS), pending.number)


class _Pending(NamedTuple):
    """What is to be read of an iteration: copied at its end, for the next one may write where it lay."""

    number: int
    names: list[str]
    """Of what was looked at."""
    values: Tensor
    """The flag, and then the peaks; on the host, once ``ready`` has happened."""
    ready: "torch.cuda.Event | None"

    @classmethod
    def of(cls, number: int, flag: Tensor, looks: list[_Peaks]) -> "_Pending":
        names = [name for look in looks for name in look.names]
        values = torch.cat([flag[None], *(look.values for look in looks)])
        if values.device.type != "cuda":
            return cls(number, names, values, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return cls(number, names, host, ready)

    def read(self) -> list[float]:
        if self.ready is not None:
            self.ready.synchronize()  # of an iteration ago: another one is under way meanwhile
        return self.values.tolist()
