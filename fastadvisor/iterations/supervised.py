"""Plain training: one forward pass, one backward pass, one step."""

from dataclasses import dataclass

from fastadvisor.iterations.base import Iteration, StepResult
from fastadvisor.loading.batch import Batch


@dataclass
class Supervised(Iteration):
    """The iteration of a method without meta-parameters."""

    def take(self, train: Batch, meta: Batch | None) -> StepResult:
        """Take one step on ``train``."""
        loss, taken = self.actual_train(self.micro_batches(train))
        return StepResult(loss, None, not taken)
