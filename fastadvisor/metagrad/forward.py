"""The exact meta-gradient from one forward-mode pass; with a cut, the same through the top stages only.

    ∇θ Lmeta = −α ∇θ ⟨g, ∇w L(w; θ)⟩ = −α ∇θ L̇,   L̇ = d/dε L(w + ε g; θ) at ε = 0,   g = ∇w' Lmeta(w')

θ enters L behind the features only, so a forward-mode pass of the backbone gives ḟ = J gb, and the rest is a small closed
form that an ordinary backward takes to θ. Nothing is differentiated twice. Derivation and cost: README.md here.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from fastadvisor.data.types import Batch
from fastadvisor.metagrad.base import MetaGradient, MetaProblem, Plan, Precision, SharedForward
from fastadvisor.metagrad.tangent import Tangents
from fastadvisor.methods.base import Dual, HeadTangent
from fastadvisor.models import Cut, SplitClassifier

# torch scripts some of its own forward-mode formulas on first use, and tells the user that scripting is deprecated.
warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated", category=FutureWarning)


@dataclass
class ForwardEngine:
    """Forward over reverse. Exact with ``cut`` None; else layers below the cut count as constants of the virtual step."""

    precision: Precision
    cut: Cut | None = None

    def plan(self) -> Plan:
        """Ask for the activation at the cut, and for the outputs the tangent pass would compute again."""
        return Plan(self.cut, record=True)

    def virtual_train(self, problem: MetaProblem) -> dict[str, Tensor]:
        """Return w' as constants: the advice carries no graph into it."""
        model, shared = problem.model, problem.shared
        parameters = model.part_parameters(self.cut)
        with self.precision():
            loss = problem.method.loss(shared.features, shared.batch.labels, model.head, problem.advice.detach())
        gradients = torch.autograd.grad(
            loss,
            list(parameters.values()),
            retain_graph=True,  # the backbone's graph still has the actual step to serve
            allow_unused=True,
            materialize_grads=True,
        )
        return problem.step.apply(parameters, gradients)

    def meta_gradient(self, problem: MetaProblem, virtual: dict[str, Tensor], meta: Batch) -> MetaGradient:
        """Return Lmeta(w') and its gradient."""
        model, shared = problem.model, problem.shared
        loss, gradient = self._gradient_at(model, virtual, meta)
        features = Dual(shared.features.detach(), self._features_tangent(model, shared, gradient))
        weight, bias = model.head_parameter_names()
        direction = HeadTangent(gradient[weight], None if bias is None else gradient[bias])
        tangent_loss = problem.method.tangent_loss(features, shared.batch.labels, model.head, direction, problem.advice)
        gradients = torch.autograd.grad(
            -problem.step.lr * tangent_loss,
            problem.advisor_parameters(),
            retain_graph=True,  # the advice may be judged by a second engine; its graph is the advisor's alone, and small
            allow_unused=True,
            materialize_grads=True,
        )
        return MetaGradient(loss, gradients)

    def _gradient_at(self, model: SplitClassifier, virtual: dict[str, Tensor], meta: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return Lmeta(w') and g = ∇w' Lmeta(w')."""
        weights = {name: weight.detach().requires_grad_() for name, weight in virtual.items()}
        with model.frozen_statistics(), self.precision():
            entering = meta.images
            if self.cut is not None:
                with torch.no_grad():
                    entering = model.below(meta.images, self.cut)
            logits = functional_call(model, weights, (entering,), {"start": self.cut})
        loss = cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), meta.labels)
        gradient = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
        return loss.detach(), dict(zip(weights, gradient, strict=True))

    def _features_tangent(self, model: SplitClassifier, shared: SharedForward, gradient: dict[str, Tensor]) -> Tensor:
        """Return ḟ (B, D), the features' derivative along ``gradient``, by one forward-mode pass that stores nothing.

        Every parameter above the cut becomes dual, normalisations' affine ones included: under autocast a BatchNorm with
        constant affine parameters may emit a float32 tangent, which the next convolution rejects.
        """
        parameters, entering = model.part_parameters(self.cut), shared.entering(self.cut)
        # Of the attention kernels only the plain one has a forward-mode formula.
        with (
            torch.no_grad(),
            forward_ad.dual_level(),
            entering.random_state.replayed(),
            model.frozen_statistics(),
            sdpa_kernel(SDPBackend.MATH),
            torch.compiler.set_stance("force_eager"),  # compiled code drops tangents
        ):
            duals = {name: forward_ad.make_dual(p.detach(), gradient[name]) for name, p in parameters.items()}
            with self.precision(), Tangents(shared.tape, entering.position):
                dual = functional_call(model, duals, (entering.activation,), {"start": self.cut, "features": True})
            tangent = forward_ad.unpack_dual(dual).tangent
        # No tangent at all: the features do not depend on anything above the cut.
        return torch.zeros_like(shared.features) if tangent is None else tangent
