"""A step of an optimizer: gradients are added up over micro-batches and ranks, checked for infinities and NaN, and clipped."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.watch import Watch


@dataclass
class Update:
    """How an optimizer takes its steps. It knows a loss and named tensors, and nothing of where they come from."""

    optimizer: torch.optim.Optimizer | None
    """None: nothing is left to step, and the numbers are only looked at."""
    execution: Execution
    module: nn.Module | None = None
    """Whose trainable parameters the optimizer steps; needed for :meth:`backward` and to clip."""
    watch: Watch | None = None
    """Looks at the numbers before they reach a weight."""
    clip: float | None = None
    """Norm that the gradient is cut to."""
    accumulate: int = 1
    """Micro-batches that a batch comes in."""

    def backward(self, loss: Tensor, number: int) -> None:
        """Add the gradients of micro-batch ``number``, counted from 0, to the ``grad`` of the module's parameters.

        Args:
            loss: the mean over the micro-batch, a scalar.
            number: the first one of a batch clears the gradients of the batch before.
        """
        assert self.optimizer is not None
        assert self.module is not None
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        if number == 0:
            self.optimizer.zero_grad()
        share = loss if self.accumulate == 1 else loss / self.accumulate
        self.execution.backward(share, self.optimizer, parameters, last=number == self.accumulate - 1)

    def guard(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Keep ``optimizer`` from stepping where anything so far was not finite."""
        if self.watch is not None:
            self.watch.guard(optimizer)

    def step(
        self,
        values: Mapping[str, Tensor | None],
        gradients: Callable[[], Mapping[str, Tensor | None]],
        before: Callable[[], None] | None = None,
    ) -> bool:
        """Take the step, unless something is not finite; return whether it was taken.

        Args:
            values: what the loss was made of and the loss itself, by what messages call them, the cause before the effect.
            gradients: makes the same of the gradients; called only where there is a watch.
            before: called before the step, once it is certain.

        Raises:
            NonFiniteError: something is not finite, and the watch does not leave steps out.
        """
        if self.watch is not None and not self.watch.passes(values, gradients()):
            return False
        self.guard(self.optimizer)
        if before is not None:
            before()
        if self.optimizer is not None:
            if self.clip is not None and self.module is not None:
                nn.utils.clip_grad_norm_([p for p in self.module.parameters() if p.grad is not None], self.clip)
            self.execution.step(self.optimizer)
        return True
