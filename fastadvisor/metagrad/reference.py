"""The meta-gradient by double backward through the virtual step: slow but obvious, the reference for the other engines."""

from dataclasses import dataclass

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad.base import Engine, MetaGradient, MetaProblem
from fastadvisor.metagrad.shared_pass import Plan
from fastadvisor.models import Cut
from fastadvisor.runtime.execution import Execution


@dataclass
class ReferenceEngine(Engine):
    """Differentiates Lmeta(w − α ∇w L(w; θ)) with respect to θ as it is written, with a second-order graph."""

    execution: Execution
    """Runs forward passes in the right precision."""
    cut: Cut | None = None
    """Layers below this cut are constants; None: all layers count."""

    def describe(self) -> str:
        """Return a few words on how the engine computes the meta-gradient."""
        return "exact, by double backward"

    def plan(self) -> Plan:
        """Ask for nothing: the graph holds all that is needed."""
        return Plan()

    def virtual_train(self, problem: MetaProblem) -> dict[str, torch.Tensor]:
        """Return w' by parameter name, with a graph to the advisor's parameters."""
        model, shared = problem.model, problem.shared
        parameters = model.part_parameters(self.cut)
        with self.execution(), shared.replaying_head(model):
            loss = problem.method.loss(shared.features, shared.batch, model.head, problem.advice)
        gradients = torch.autograd.grad(
            loss, list(parameters.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        return problem.step.apply(parameters, gradients)

    def meta_gradient(self, problem: MetaProblem, virtual: dict[str, torch.Tensor], meta: Batch) -> MetaGradient:
        """Return Lmeta(w') and ∇θ Lmeta(w'), through the second-order graph of ``virtual``."""
        with problem.model.frozen_statistics(), self.execution():
            logits = functional_call(problem.model, virtual, (meta.images,))
        loss = cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), meta.labels)
        gradients = torch.autograd.grad(
            loss,
            problem.method.meta_parameters(),
            retain_graph=True,  # the actual step needs the backbone's graph, too
            allow_unused=True,
            materialize_grads=True,
        )
        return MetaGradient(loss.detach(), gradients)
