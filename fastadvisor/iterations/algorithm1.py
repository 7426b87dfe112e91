"""Algorithm 1 of the advisor paper (section 3.6), phase by phase; (a) to (d) are the panels of its figure 2.

Loss Pre-calculation, Virtual-Train and Actual-Train use the same images and the same weights, so the backbone runs forward on
the train batch only once, and its graph serves all three (``metagrad/shared_pass.py``).
"""

from dataclasses import dataclass

import torch

from fastadvisor.iterations.base import Iteration, StepResult
from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad import Plan, SharedForward
from fastadvisor_kernels import Beta


@dataclass
class Algorithm1(Iteration):
    """The advisor first learns from a virtual step of the classifier, then advises on the actual step."""

    def take(self, train: Batch, meta: Batch | None) -> StepResult:
        """Take one step on ``train``. Without ``meta`` the advisor still gives advice, but is not updated."""
        meta_train, meta_loss = self.meta_train, None
        assert meta_train is not None
        if meta is None:
            loss, taken = self.actual_train(self.micro_batches(train))
        else:
            # (a) Loss Pre-calculation: f = Φb(x; wb), ℓpre = CE(Φc(f; wc), y) for each sample, on unmasked features.
            shared = self.loss_pre_calculation(train)
            # (b) Virtual-Train: w' = w − α ∇w L(w; θ), where L is the loss under the advice Ψ(f, ℓpre; θ).
            problem = meta_train.problem(shared, self.optimizer)
            virtual = meta_train.engine.virtual_train(problem)
            # (c) Meta-Train: θ ← Adam(θ, ∇θ Lmeta(w')), where Lmeta is the plain cross-entropy on the meta batch.
            meta_loss = meta_train(problem, virtual, meta)
            del problem, virtual  # frees the virtual weights, and the graph that the meta step used
            # (d) Actual-Train: w ← SGD(w, ∇w L(w; θ)) under the advice of the updated advisor.
            loss, taken = self.actual_train(shared)
        return StepResult(loss, meta_loss, not taken)

    def loss_pre_calculation(self, train: Batch) -> list[SharedForward]:
        """(a) Run the classifier forward on ``train``.

        Returns:
            The forward pass on the whole batch; with micro-batches one for each of them, without their graphs.
        """
        assert self.engine is not None
        plan, shared_pass = self.engine.plan(), self.shared_pass
        if shared_pass.accumulate == 1:
            return [self.let_method_observe(self.forward_pass(train, self.draw(train), plan))]
        parts = []
        for part in shared_pass.micro_batches(train, self.draw(train)):
            with torch.no_grad():  # each micro-batch's graph is computed only when a later phase needs it
                parts.append(self.let_method_observe(self.forward_pass(*part, plan)))
            parts[-1].restore_before_tangent = False  # restored for the tangent pass, all graphs would be held at once
            parts[-1].release_graph()
        return parts

    def forward_pass(self, train: Batch, draw: Beta, plan: Plan | None = None) -> SharedForward:
        """Run the classifier forward on ``train``, a batch or a micro-batch.

        A graph that is to be released between the phases is not recorded on a tape, which would keep its tensors alive.
        """
        if plan is None:
            return super().forward_pass(train, draw)
        releasable = self.shared_pass.one_graph_at_a_time
        return self.shared_pass.run(train, draw, plan, record=not releasable, releasable=releasable)
