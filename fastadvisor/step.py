"""One iteration, phase by phase as in Algorithm 1 of the advisor paper.

The four phases see the same images and the same weights, so the backbone runs forward on the train batch once, and its graph
serves Loss Pre-calculation, Virtual-Train and Actual-Train.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastadvisor.data.types import Batch
from fastadvisor.metagrad import Engine, MetaProblem, Precision, SharedForward, VirtualStep
from fastadvisor.metagrad.tangent import Recording, Tape
from fastadvisor.methods import Method
from fastadvisor.models import Cut, Entering, SplitClassifier
from fastadvisor.runtime.random_state import RandomState


class StepResult(NamedTuple):
    """Losses of an iteration, scalars on the device (reading them waits for it)."""

    loss: Tensor
    meta_loss: Tensor | None


@dataclass
class Step:
    """The iteration of any method; one without an advisor is a plain training step."""

    model: SplitClassifier
    method: Method
    optimizer: torch.optim.Optimizer
    advisor_optimizer: torch.optim.Optimizer | None
    engine: Engine
    precision: Precision
    virtual_with_optimizer: bool = False

    def __call__(self, train: Batch, meta: Batch | None) -> StepResult:
        """Take one step on ``train``; ``meta`` is None only where the method has no advisor."""
        shared = self.loss_pre_calculation(train)
        meta_loss = None if self.method.advisor is None or meta is None else self.virtual_and_meta_train(shared, meta)
        return StepResult(self.actual_train(shared), meta_loss)

    def loss_pre_calculation(self, train: Batch) -> SharedForward:
        """(a) Run the backbone once, and the head on its unmasked features."""
        start = Entering(train.images, RandomState.now(train.images.device))
        plan = self.engine.plan()
        tape = Tape() if plan.record and not self.model.compiled else None  # compiled code does not pass by
        with self.precision():
            features, at_cut = self._features(train.images, plan.cut, tape)
            with torch.no_grad():
                logits = self.model.head(features)
        loss_pre = cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), train.labels, reduction="none")
        return SharedForward(train, features, loss_pre, self.method.draw(train.labels), start, at_cut, tape)

    def virtual_and_meta_train(self, shared: SharedForward, meta: Batch) -> Tensor:
        """(b) Virtual-Train: w' = w − α ∇w L(w; θ). (c) Meta-Train: θ ← Adam(θ, ∇θ Lmeta(w'))."""
        assert self.method.advisor is not None
        assert self.advisor_optimizer is not None
        lr = self.optimizer.param_groups[0]["lr"]
        step = VirtualStep(lr, self.optimizer if self.virtual_with_optimizer else None)
        advice = self.method.advise(shared.features.detach(), shared.loss_pre, shared.batch.labels, shared.draw)
        problem = MetaProblem(self.model, self.method, shared, advice, step)
        virtual = self.engine.virtual_train(problem)
        loss, gradients = self.engine.meta_gradient(problem, virtual, meta)
        for parameter, gradient in zip(self.method.advisor.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self.advisor_optimizer.step()
        return loss

    def actual_train(self, shared: SharedForward) -> Tensor:
        """(d) Actual-Train: w ← SGD(w, ∇w L(w; θ)) with the updated advisor."""
        with torch.no_grad():
            advice = self.method.advise(shared.features, shared.loss_pre, shared.batch.labels, shared.draw)
        with self.precision():
            loss = self.method.loss(shared.features, shared.batch.labels, self.model.head, advice)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _features(self, images: Tensor, cut: Cut | None, tape: Tape | None) -> tuple[Tensor, Entering | None]:
        with nullcontext() if tape is None else Recording(tape):
            if cut is None:
                return self.model(images, features=True), None
            with self.model.captured(cut, tape=() if tape is None else tape) as seen:
                features = self.model(images, features=True)
        return features, seen[0]
