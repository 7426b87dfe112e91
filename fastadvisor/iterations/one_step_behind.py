"""Algorithm 1 (section 3.6) with the advisor one step behind (``--virtual-gradient actual``), which saves a backward pass.

The gradient of the actual step also serves as that of the virtual step, so the advisor can only be updated after it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastadvisor.iterations.base import Iteration, StepResult
from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad import MetaProblem, Plan, SharedForward
from fastadvisor_kernels import Beta


@dataclass
class OneStepBehind(Iteration):
    """One gradient, taken under the advice of the current advisor, serves both the virtual and the actual step.

    The updated advisor gives its first advice in the next iteration. The backward pass of the actual step comes before the meta
    step and frees the graph of the train batch.
    """

    def take(self, train: Batch, meta: Batch | None) -> StepResult:
        """Take one step on ``train``. Without ``meta`` the advisor still gives advice, but is not updated."""
        if meta is None:
            loss, taken = self.actual_train(self.micro_batches(train))
            return StepResult(loss, None, not taken)
        assert self.meta_train is not None
        # (a) Loss Pre-calculation, and the gradient ∇w L(w; θ) that (b) and (d) both use.
        problem, losses = self.actual_gradient(train)
        # (b) Virtual-Train: w' = w − α ∇w L(w; θ).
        parameters = self.model.part_parameters()
        gradients = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values())
        virtual = problem.step.apply(parameters, gradients)
        # (c) Meta-Train, which only the next iteration profits from.
        meta_loss = self.meta_train(problem, virtual, meta)
        # (d) Actual-Train: w ← SGD(w, ∇w L(w; θ)).
        loss, taken = self.classifier_step(losses)
        return StepResult(loss, meta_loss, not taken)

    def actual_gradient(self, train: Batch) -> tuple[MetaProblem, list[Tensor]]:
        """Accumulate the gradient of the training loss in the parameters' ``grad``, one micro-batch at a time.

        Returns:
            What the meta step starts from, and the losses of the micro-batches, detached scalars.
        """
        assert self.meta_train is not None
        plan = self.meta_train.engine.plan()
        losses: list[Tensor] = []
        problems: list[MetaProblem] = []
        for part in self.shared_pass.micro_batches(train, self.draw(train)):
            shared = self.let_method_observe(self.forward_pass(*part, plan))
            problem = replace(self.meta_train.problem([shared], self.optimizer), uses_actual_step=True)
            losses.append(self.backward(shared, problem.training_advice(), len(losses)))
            problems.append(problem)
        return problems[0] if len(problems) == 1 else replace(problems[0], parts=tuple(problems)), losses

    def forward_pass(self, train: Batch, draw: Beta, plan: Plan | None = None) -> SharedForward:
        """Run the classifier forward on ``train``, a batch or a micro-batch.

        A tape keeps the tensors of the graph alive through the meta step, so outputs are recorded only if the engine has a
        cut: the part of the graph above a cut is small.
        """
        if plan is None:
            return super().forward_pass(train, draw)
        record = plan.cut is not None and not self.shared_pass.one_graph_at_a_time
        return self.shared_pass.run(train, draw, plan, record=record, releasable=False)
