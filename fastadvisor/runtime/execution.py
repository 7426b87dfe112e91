"""How passes are run: in which precision, with which loss scale, and averaged over which ranks.

The step and the engines ask this for gradients and for optimizer steps, and know no more about it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastadvisor.runtime.random_state import CommonRandomness
from fastadvisor.runtime.ranks import ALONE, Ranks, add_gradients
from fastadvisor.runtime.share import Share

T = TypeVar("T")


class Execution:
    """Autocast, loss scale, ranks; as it stands: full precision on one device.

    float16 has a smaller range than gradients, so the loss is scaled before each backward pass and its gradients are scaled
    back (``torch.amp.GradScaler``, one for all optimizers: a step whose gradients overflow is left out and the scale lowered).

    Args:
        device: of the passes.
        dtype: of autocast; None or float32 for none.
        ranks: over which gradients are averaged.
    """

    def __init__(self, device: torch.device | None = None, dtype: torch.dtype | None = None, ranks: Ranks = ALONE) -> None:
        self.device = torch.device("cpu") if device is None else device
        self.dtype = None if dtype is torch.float32 else dtype
        self.ranks = ranks
        self.common = CommonRandomness(self.device, Share(ranks.rank, ranks.count))
        self.scaler = torch.amp.GradScaler(self.device.type) if dtype is torch.float16 else None
        self._unscaled_of: set[int] = set()
        """Optimizers (by id) whose gradients have been scaled back in this iteration."""

    def __call__(self) -> AbstractContextManager[None]:
        """Make the context that forward passes of the classifier run in."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, dtype=self.dtype)

    def gradients(
        self,
        parts: Sequence[T],
        loss_of: Callable[[T], Tensor],
        inputs: Sequence[Tensor],
        *,
        average: bool = True,
        done: Callable[[T], None] | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Return the gradients of the mean loss of all ``parts`` on all ranks; zeros where it does not reach, infinite or NaN
        where float16 overflowed.

        Args:
            parts: of the batch, equally large; one without gradient accumulation.
            loss_of: a part to its mean loss, a scalar; called for one part after the other.
            inputs: what to differentiate for.
            average: over the ranks; off for what each rank has of its own.
            done: called with each part when its gradients have been taken.
            options: of ``torch.autograd.grad``.
        """
        options = {"allow_unused": True, "materialize_grads": True, **options}
        total: Sequence[Tensor | None] | None = None
        for number, part in enumerate(parts, 1):
            loss = loss_of(part)
            loss = self._scaled(loss if len(parts) == 1 else loss / len(parts))
            if average and number == len(parts):
                total = self.ranks.gradients(loss, inputs, total, **options)
            else:
                found = torch.autograd.grad(loss, inputs, **options)
                total = found if total is None else tuple(map(add_gradients, found, total))
            if done is not None:
                done(part)
        assert total is not None
        return self._unscaled([gradient for gradient in total if gradient is not None])

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer, inputs: Sequence[Tensor], *, last: bool = True) -> None:
        """Add the gradients of ``loss`` to ``inputs``' ``.grad``; with the ``last`` micro-batch of a step they become the
        unscaled mean over the ranks. None stays where the loss does not reach.
        """
        if self.ranks.count == 1 or not last:
            self._scaled(loss).backward(inputs=list(inputs))
        else:
            plus = [tensor.grad for tensor in inputs]
            for tensor, gradient in zip(
                inputs, self.ranks.gradients(self._scaled(loss), inputs, plus, allow_unused=True), strict=True
            ):
                tensor.grad = gradient
        if last and self.scaler is not None:
            self.scaler.unscale_(optimizer)
            self._unscaled_of.add(id(optimizer))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let ``optimizer`` take its step, unless its (unscaled) gradients overflowed in float16."""
        if self.scaler is None:
            optimizer.step()
            return
        if id(optimizer) not in self._unscaled_of:  # gradients that did not come by backward(): the scaler expects scaled ones
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                parameter.grad = self.scaler.scale(parameter.grad)
            self._unscaled_of.add(id(optimizer))
        self.scaler.step(optimizer)

    def end_iteration(self) -> None:
        """Update the loss scale by whether gradients overflowed in this iteration."""
        if self.scaler is not None and self._unscaled_of:
            self.scaler.update()
            self._unscaled_of.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale and the state of the random numbers that all ranks share."""
        return {
            "scaler": {} if self.scaler is None else self.scaler.state_dict(),
            "common": self.common.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state``, as :meth:`state_dict` returned it."""
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.common.load_state_dict(state["common"])

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _unscaled(self, gradients: list[Tensor]) -> tuple[Tensor, ...]:
        if self.scaler is None or not gradients:
            return tuple(gradients)
        inverse = self.scaler.scale(torch.ones((), device=gradients[0].device)).reciprocal()
        return tuple(torch._foreach_mul(gradients, inverse))
