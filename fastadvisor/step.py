"""One iteration, phase by phase as in Algorithm 1 of the advisor paper.

The four phases see the same images and the same weights, so the backbone runs forward on the train batch once, and its graph
serves Loss Pre-calculation, Virtual-Train and Actual-Train.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastadvisor.data.types import Batch
from fastadvisor.metagrad import Engine, MetaProblem, Plan, Precision, SharedForward, VirtualStep
from fastadvisor.metagrad.tangent import Recording, Tape
from fastadvisor.methods import Advice, Method
from fastadvisor.models import Entering, SplitClassifier
from fastadvisor.runtime.random_state import RandomState


class StepResult(NamedTuple):
    """Losses of an iteration, scalars on the device (reading them waits for it)."""

    loss: Tensor
    meta_loss: Tensor | None
    """None in an iteration without a meta step."""


@dataclass
class Step:
    """The iteration of any method; one without meta-parameters is a plain training step."""

    model: SplitClassifier
    method: Method
    optimizer: torch.optim.Optimizer
    advisor_optimizer: torch.optim.Optimizer | None
    engine: Engine
    precision: Precision
    virtual_with_optimizer: bool = False
    attached: bool = False
    """The advisor's inputs carry gradients (``--advisor-inputs attached``)."""
    interval: int = 1
    """A meta step every ``interval``-th iteration."""
    behind: bool = False
    """The advisor is one step behind: its virtual step is the actual one."""
    lean: bool = False
    """Run the backbone on the train batch a second time rather than hold its graph through the meta step."""
    iteration: int = 0

    @property
    def meta_is_due(self) -> bool:
        """Whether the next iteration has a meta step, and so needs a meta batch."""
        return self.method.learns and self.iteration % self.interval == 0

    def __call__(self, train: Batch, meta: Batch | None) -> StepResult:
        """Take one step on ``train``; ``meta`` is None where no meta step is due."""
        self.iteration += 1
        if not self.method.learns:
            meta = None
        shared = self.loss_pre_calculation(train, with_meta_step=meta is not None)
        if meta is None:
            return StepResult(self.actual_train(shared), None)
        if self.behind:
            return self.actual_then_meta_train(shared, meta)
        meta_loss = self.virtual_and_meta_train(shared, meta)
        return StepResult(self.actual_train(shared), meta_loss)

    def loss_pre_calculation(self, train: Batch, *, with_meta_step: bool = True) -> SharedForward:
        """(a) Run the backbone once, and the head on its unmasked features."""
        start = Entering(train.images, RandomState.now(train.images.device))
        plan = self.engine.plan() if with_meta_step else Plan()
        # A tape holds on to what a lean step, or one step behind, lets go before the meta step; above a cut that is little.
        too_much = self.lean or (self.behind and plan.cut is None)
        tape = Tape() if plan.record and not too_much and not self.model.compiled else None
        with self.precision():
            features, at_cut = self._features(train, plan, tape)
        loss_pre = self._loss_pre(features, train)
        shared = SharedForward(train, features, loss_pre, self.method.draw(train.labels), start, at_cut, tape)
        if self.lean and with_meta_step and not self.behind:
            shared.again = partial(self._run_again, plan)  # not bound to it: a cycle would hold its tape until collected
        return shared

    def virtual_and_meta_train(self, shared: SharedForward, meta: Batch) -> Tensor:
        """(b) Virtual-Train: w' = w − α ∇w L(w; θ). (c) Meta-Train: θ ← Adam(θ, ∇θ Lmeta(w'))."""
        problem = self.problem(shared)
        virtual = self.engine.virtual_train(problem)
        return self._meta_train(problem, virtual, meta)

    def actual_train(self, shared: SharedForward) -> Tensor:
        """(d) Actual-Train: w ← SGD(w, ∇w L(w; θ)) with the updated advisor."""
        shared.restore()
        with nullcontext() if self.attached else torch.no_grad():
            advice = self._advise(shared)
        loss = self._backward(shared, advice)
        self.optimizer.step()
        return loss

    def actual_then_meta_train(self, shared: SharedForward, meta: Batch) -> StepResult:
        """(b), (c), (d) with the advisor one step behind: the actual gradient, taken with today's advisor, is the virtual
        gradient too, and the advisor it teaches serves from the next iteration on. The graph is gone by the meta step.
        """
        problem = replace(self.problem(shared), stepped=True)
        loss = self._backward(shared, problem.training_advice())
        parameters = self.model.part_parameters()
        gradients = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values())
        meta_loss = self._meta_train(problem, problem.step.apply(parameters, gradients), meta)
        self.optimizer.step()
        return StepResult(loss, meta_loss)

    def problem(self, shared: SharedForward) -> MetaProblem:
        """Return what the meta step starts from."""
        lr = self.optimizer.param_groups[0]["lr"]
        step = VirtualStep(lr, self.optimizer if self.virtual_with_optimizer else None)
        return MetaProblem(self.model, self.method, shared, self._advise(shared), step, self.attached)

    def _advise(self, shared: SharedForward) -> Advice:
        features, loss_pre = shared.features, shared.loss_pre
        if not self.attached:
            features = features.detach()
        return self.method.advise(features, loss_pre, shared.batch.labels, shared.draw)

    def _backward(self, shared: SharedForward, advice: Advice) -> Tensor:
        with self.precision():
            loss = self.method.loss(shared.features, shared.batch.labels, self.model.head, advice)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=[p for p in self.model.parameters() if p.requires_grad])
        return loss.detach()

    def _meta_train(self, problem: MetaProblem, virtual: dict[str, Tensor], meta: Batch) -> Tensor:
        loss, gradients = self.engine.meta_gradient(problem, virtual, meta)
        self.method.learn(gradients, self.advisor_optimizer)
        return loss

    def _features(self, train: Batch, plan: Plan, tape: Tape | None) -> tuple[Tensor, Entering | None]:
        with nullcontext() if tape is None else Recording(tape):
            if plan.cut is None:
                return self.model(train.images, features=True), None
            with self.model.captured(plan.cut, tape=() if tape is None else tape) as seen:
                features = self.model(train.images, features=True)
        if tape is not None:
            tape.forget(seen[0].position)
        return features, seen[0]

    def _loss_pre(self, features: Tensor, train: Batch) -> Tensor:
        with nullcontext() if self.attached else torch.no_grad(), self.precision():
            logits = self.model.head(features)
            return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), train.labels, reduction="none")

    def _run_again(self, plan: Plan, shared: SharedForward) -> None:
        shared.tape = Tape() if plan.record and not self.model.compiled else None
        with shared.start.random_state.replayed(), self.model.frozen_statistics(), self.precision():
            shared.features, shared.at_cut = self._features(shared.batch, plan, shared.tape)
        shared.loss_pre = self._loss_pre(shared.features, shared.batch)
