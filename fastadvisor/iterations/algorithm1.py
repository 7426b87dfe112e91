"""Algorithm 1 of the advisor paper, phase by phase.

The phases see the same images and the same weights, so the backbone runs forward on the train batch once, and its graph serves
Loss Pre-calculation, Virtual-Train and Actual-Train (``metagrad/shared_pass.py``).
"""

from dataclasses import dataclass

import torch

from fastadvisor.iterations.base import Iteration, StepResult
from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad import Plan, SharedForward
from fastadvisor_kernels import Beta


@dataclass
class Algorithm1(Iteration):
    """The advisor learns from a virtual step, and then advises on the actual one."""

    def take(self, train: Batch, meta: Batch | None) -> StepResult:
        """Take one step on ``train``; without ``meta`` the advisor stays as it is, and advises."""
        meta_train, meta_loss = self.meta_train, None
        assert meta_train is not None
        if meta is None:
            loss, taken = self.actual_train(self.micro_batches(train))
        else:
            # (a) Loss Pre-calculation: f = Φb(x; wb), ℓpre = CE(Φc(f; wc), y) for each sample, on unmasked features.
            shared = self.loss_pre_calculation(train)
            # (b) Virtual-Train: w' = w − α ∇w L(w; θ), L under the advice Ψ(f, ℓpre; θ).
            problem = meta_train.problem(shared, self.optimizer)
            virtual = meta_train.engine.virtual_train(problem)
            # (c) Meta-Train: θ ← Adam(θ, ∇θ Lmeta(w')), Lmeta the plain cross-entropy on the meta batch.
            meta_loss = meta_train(problem, virtual, meta)
            del problem, virtual  # a copy of the weights, and what the meta step held
            # (d) Actual-Train: w ← SGD(w, ∇w L(w; θ)) with the updated advisor.
            loss, taken = self.actual_train(shared)
        return StepResult(loss, meta_loss, not taken)

    def loss_pre_calculation(self, train: Batch) -> list[SharedForward]:
        """(a) Run the classifier forward on ``train``: once, or on each of its micro-batches, whose graphs are let go."""
        assert self.engine is not None
        plan, shared_pass = self.engine.plan(), self.shared_pass
        if shared_pass.accumulate == 1:
            return [self.let_method_observe(self.forward_pass(train, self.draw(train), plan))]
        parts = []
        for part in shared_pass.micro_batches(train, self.draw(train)):
            with torch.no_grad():  # the graph is made when it is asked for
                parts.append(self.let_method_observe(self.forward_pass(*part, plan)))
            parts[-1].restore_before_tangent = False  # or all graphs would be there at once
            parts[-1].release_graph()
        return parts

    def forward_pass(self, train: Batch, draw: Beta, plan: Plan | None = None) -> SharedForward:
        """Run the classifier forward; a graph that is let go between the phases is not recorded, or it would stay."""
        if plan is None:
            return super().forward_pass(train, draw)
        again = self.shared_pass.one_graph_at_a_time
        return self.shared_pass.run(train, draw, plan, record=not again, releasable=again)
