"""(c) Meta-Train: the advisor learns from what its advice does to the classifier's loss on the meta batch."""

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
    """How and when the meta-parameters learn."""

    model: SplitClassifier
    method: Method
    engine: Engine
    """Computes the meta-gradient."""
    update: Update
    """Takes the advisor's steps."""
    virtual_with_optimizer: bool = False
    """The virtual step has the optimizer's momentum and weight decay."""
    attached: bool = False
    """The advisor's inputs carry gradients (``--advisor-inputs attached``)."""
    interval: int = 1
    """A meta step every ``interval``-th iteration."""

    def problem(self, shared: list[SharedForward], optimizer: torch.optim.Optimizer) -> MetaProblem:
        """Return what the meta step starts from.

        Args:
            shared: the forward pass on the train batch, or those of its micro-batches.
            optimizer: the classifier's, for the rates of the virtual step.
        """
        step = VirtualStep.of(optimizer, self.model, with_optimizer=self.virtual_with_optimizer)
        parts = tuple(
            MetaProblem(self.model, self.method, one, one.advice_of(self.method, attached=self.attached), step, self.attached)
            for one in shared
        )
        return parts[0] if len(parts) == 1 else replace(parts[0], parts=parts)

    def __call__(self, problem: MetaProblem, virtual: dict[str, Tensor], meta: Batch) -> Tensor | None:
        """θ ← Adam(θ, ∇θ Lmeta(w')); return the meta loss, None where something was not finite and the step is left out.

        Args:
            problem: what the virtual step started from.
            virtual: w' by parameter name.
            meta: the meta batch.
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
        """Return what a checkpoint holds of it, by name."""
        optimizer = self.update.optimizer
        own: dict[str, Part] = {} if optimizer is None else {"advisor_optimizer": Optimizer(optimizer)}
        return {**own, "engine": self.engine}

    def capturable(self) -> str | None:
        """Return why an iteration with a meta step cannot be captured in a CUDA graph, as a clause; None if it can."""
        return self.engine.capturable()
