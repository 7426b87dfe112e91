"""Algorithm 1 with the advisor one step behind: the virtual gradient is the actual one, and a backward pass is spared."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastadvisor.iterations.base import Iteration, StepResult
from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad import MetaProblem, Plan, SharedForward
from fastadvisor_kernels import Beta


@dataclass
class OneStepBehind(Iteration):
    """The actual gradient, taken with today's advisor, is the virtual gradient too; the advisor it teaches serves from the next
    iteration on. The graph of the train batch is gone by the meta step.
    """

    def take(self, train: Batch, meta: Batch | None) -> StepResult:
        """Take one step on ``train``; without ``meta`` the advisor stays as it is, and advises."""
        if meta is None:
            loss, taken = self.actual_train(self.micro_batches(train))
            return StepResult(loss, None, not taken)
        assert self.meta_train is not None
        # (a), and the gradient of (b) and (d).
        problem, losses = self.actual_gradient(train)
        # (b) Virtual-Train: w' = w − α ∇w L(w; θ).
        parameters = self.model.part_parameters()
        gradients = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values())
        virtual = problem.step.apply(parameters, gradients)
        # (c) Meta-Train, for the next iteration; (d) Actual-Train.
        meta_loss = self.meta_train(problem, virtual, meta)
        loss, taken = self.classifier_step(losses)
        return StepResult(loss, meta_loss, not taken)

    def actual_gradient(self, train: Batch) -> tuple[MetaProblem, list[Tensor]]:
        """Leave the gradient of the training loss in the parameters' ``grad``, micro-batch by micro-batch.

        Returns:
            What the meta step starts from, and the losses of the micro-batches.
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
        """Run the classifier forward; a record would hold on to the graph, which above a cut is little."""
        if plan is None:
            return super().forward_pass(train, draw)
        little = plan.cut is not None and not self.shared_pass.one_graph_at_a_time
        return self.shared_pass.run(train, draw, plan, record=little, releasable=False)
