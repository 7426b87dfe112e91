"""(c) Meta-Train of Algorithm 1 (section 3.6): update the advisor by the effect of its advice on the meta loss."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad import Engine, MetaProblem, SharedForward, VirtualStep
from fastadvisor.methods import Method
from fastadvisor.models import SplitClassifier
from fastadvisor.runtime.state import Optimizer, Part
from fastadvisor.runtime.update import Update


@dataclass
class MetaTrain:
    """Updates the meta-parameters θ, every ``interval``-th iteration."""

    model: SplitClassifier
    method: Method
    engine: Engine
    """Computes the meta-gradient."""
    update: Update
    """Takes the advisor's steps."""
    virtual_with_optimizer: bool = False
    """Whether the virtual step applies the optimizer's momentum and weight decay."""
    attached: bool = False
    """Whether the advisor's inputs carry gradients (``--advisor-inputs attached``)."""
    interval: int = 1
    """Number of iterations from one meta step to the next."""

    def problem(self, shared: list[SharedForward], optimizer: torch.optim.Optimizer) -> MetaProblem:
        """Return everything that the meta step starts from: forward passes, advice and virtual step.

        Args:
            shared: the forward pass on the train batch, or one for each of its micro-batches.
            optimizer: the classifier's optimizer, which holds the learning rates of the virtual step.
        """
        step = VirtualStep.of(optimizer, self.model, with_optimizer=self.virtual_with_optimizer)
        parts = tuple(
            MetaProblem(self.model, self.method, one, one.advice_of(self.method, attached=self.attached), step, self.attached)
            for one in shared
        )
        return parts[0] if len(parts) == 1 else replace(parts[0], parts=parts)

    def __call__(self, problem: MetaProblem, virtual: dict[str, Tensor], meta: Batch) -> Tensor | None:
        """Take the meta step θ ← Adam(θ, ∇θ Lmeta(w')).

        Args:
            problem: what the virtual step started from.
            virtual: the virtual weights w' by parameter name.
            meta: the meta batch.

        Returns:
            The meta loss Lmeta(w'), a detached scalar; None if the step was skipped because a value was not finite.
        """
        loss, gradients = self.engine.meta_gradient(problem, virtual, meta)
        names = self.method.meta_parameter_names()
        named: dict[str, Tensor | None] = {
            f"the meta-gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)
        }
        values = {**problem.advice.named("the advisor's {}"), "the meta loss": loss}

        def learn() -> None:
            for optimizer in self.engine.optimizers():
                self.update.guard(optimizer)
            self.engine.learn()
            self.method.learn(gradients)

        return loss if self.update.step(values, lambda: named, before=learn) else None

    def parts(self) -> dict[str, Part]:
        """Return, by name, the parts of the meta step that a checkpoint saves."""
        optimizer = self.update.optimizer
        own: dict[str, Part] = {} if optimizer is None else {"advisor_optimizer": Optimizer(optimizer)}
        return {**own, "engine": self.engine}

    def capturable(self) -> str | None:
        """Return, as a clause, why an iteration with a meta step cannot be recorded as a CUDA graph; None if it can."""
        return self.engine.capturable()
