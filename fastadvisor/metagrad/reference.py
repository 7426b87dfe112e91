"""The meta-gradient by double backward through the virtual step: slow, obvious, the oracle of the other engines."""

from dataclasses import dataclass

import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fastadvisor.data.types import Batch
from fastadvisor.metagrad.base import MetaGradient, Precision, SharedForward, VirtualStep
from fastadvisor.methods.base import Advice, Method
from fastadvisor.models import Cut, SplitClassifier


@dataclass
class ReferenceEngine:
    """∇θ Lmeta(w − α ∇w L(w; θ)), literally."""

    precision: Precision
    cut: Cut | None = None

    def virtual_train(
        self, model: SplitClassifier, method: Method, shared: SharedForward, advice: Advice, step: VirtualStep
    ) -> dict[str, torch.Tensor]:
        """Return w' with its graph to the advisor's parameters."""
        parameters = model.part_parameters(self.cut)
        with self.precision():
            loss = method.loss(shared.features, shared.batch.labels, model.head, advice)
        gradients = torch.autograd.grad(
            loss, list(parameters.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        return step.apply(parameters, gradients)

    def meta_gradient(
        self,
        model: SplitClassifier,
        method: Method,
        shared: SharedForward,
        advice: Advice,
        virtual: dict[str, torch.Tensor],
        meta: Batch,
        step: VirtualStep,
    ) -> MetaGradient:
        """Return Lmeta(w') and its gradient, through the second-order graph of ``virtual``."""
        assert method.advisor is not None
        with model.frozen_statistics(), self.precision():
            logits = functional_call(model, virtual, (meta.images,))
        loss = cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), meta.labels)
        gradients = torch.autograd.grad(
            loss,
            list(method.advisor.parameters()),
            retain_graph=True,  # the backbone's graph still has the actual step to serve
            allow_unused=True,
            materialize_grads=True,
        )
        return MetaGradient(loss.detach(), gradients)
