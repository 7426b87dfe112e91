"""The exact meta-gradient from one forward-mode pass, through the whole backbone or through a part of it.

    ∇θ Lmeta = −α ∇θ ⟨g, ∇w L(w; θ)⟩ = −α ∇θ L̇,   L̇ = d/dε L(w + ε g; θ) at ε = 0,   g = ∇w' Lmeta(w')

θ enters L only behind the features. So a forward-mode pass of the backbone gives ḟ = J gb (gb: the part of g that belongs to
the backbone), L̇ is a small closed form of ḟ, and an ordinary backward pass takes its gradient to θ. Nothing is differentiated
twice. Derivation and cost: README.md in this folder.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad.base import Engine, MetaGradient, MetaProblem
from fastadvisor.metagrad.head_tangent import (
    Dual,
    HeadTangent,
    cross_entropy_tangent,
    forward_mode_error,
    training_loss_tangent,
)
from fastadvisor.metagrad.shared_pass import Plan, SharedForward
from fastadvisor.metagrad.tangent import Tangents
from fastadvisor.methods.base import Advice, Seen
from fastadvisor.models import Cut, SplitClassifier
from fastadvisor.runtime.execution import Execution

# torch scripts some of its own forward-mode formulas on first use, and then warns the user that scripting is deprecated.
for kind in (FutureWarning, DeprecationWarning):  # in torch 2.14 and in torch 2.11
    warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated", category=kind)

Tangent = Literal["forward", "difference"]

DIFFERENCE_STEP = 1e-5
"""Norm of the finite-difference step, divided by the norm of the weights. A longer step crosses more kinks of the ReLUs, a
shorter one drowns in float32 rounding. Mean relative error of the meta-gradient: 0.002; with 1e-4 it is 0.006
(docs/results/approximation.md)."""


@dataclass
class ForwardEngine(Engine):
    """Forward over reverse mode. A layer *counts* if the meta-gradient passes through its weights; all others are constants.

    By default all layers count, and the meta-gradient is exact. The head always counts.
    """

    execution: Execution
    """Runs forward and backward passes."""
    cut: Cut | None = None
    """Layers below this cut do not count; None: there is no cut."""
    only: tuple[str, ...] | None = None
    """Names of the backbone's modules above the cut that count; None: all of them."""
    tangent: Tangent = "forward"
    """How ḟ is computed: "forward" by a forward-mode pass; "difference" as (f(w + ε g) − f(w)) / ε, which takes one plain
    forward pass, and is accurate enough in float32 only."""

    def describe(self) -> str:
        """Return a few words on how the engine computes the meta-gradient."""
        part = "exact" if self.cut is None else f"through the layers from {self.cut.entry} up"
        return part if self.tangent == "forward" else f"{part}, tangents by differences".replace("exact", "all layers")

    def plan(self) -> Plan:
        """Ask for the activation at the cut, and for the outputs that the tangent pass can reuse."""
        return Plan(self.cut, record=self.tangent == "forward")

    def virtual_train(self, problem: MetaProblem) -> dict[str, Tensor]:
        """Return w' of the layers that count, by parameter name, without a graph to θ."""
        model, shared, method = problem.model, problem.shared, problem.method
        parameters = model.part_parameters(self.cut, self.only)
        if method.of_one_batch:  # its sample weights are 0 here, and so is the gradient
            shared.release_graph()
            return problem.step.apply(parameters, tuple(torch.zeros_like(p) for p in parameters.values()))
        gradients = self.execution.gradients(
            problem.micro_batches(),
            self._training_loss,
            list(parameters.values()),
            retain_graph=shared.recompute is None,  # the actual step needs the graph, too
            done=lambda part: part.shared.release_graph(),
        )
        return problem.step.apply(parameters, gradients)

    def _training_loss(self, part: MetaProblem) -> Tensor:
        shared = part.shared
        shared.restore_graph()
        with self.execution(), shared.replaying_head(part.model):
            return part.method.loss(shared.features, shared.batch, part.model.head, part.training_advice())

    def meta_gradient(self, problem: MetaProblem, virtual: dict[str, Tensor], meta: Batch) -> MetaGradient:
        """Return Lmeta(w') and ∇θ Lmeta(w'). ``virtual`` may hold more layers than those that count."""
        loss, gradient = self.differentiate_meta_loss(problem.model, virtual, meta, len(problem.micro_batches()))
        return MetaGradient(loss, self.propagate_to_advisor(problem, gradient))

    def differentiate_meta_loss(
        self, model: SplitClassifier, virtual: dict[str, Tensor], meta: Batch, parts: int = 1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute Lmeta(w') and g = ∇w' Lmeta(w').

        Args:
            model: the classifier.
            virtual: w' by parameter name.
            meta: this rank's meta batch.
            parts: number of micro-batches that ``meta`` is split into.

        Returns:
            Lmeta(w') on this rank's images, a detached scalar; and g by parameter name, of the layers that count, averaged
            over all ranks.
        """
        values, weights = self.prepare_virtual_weights(model, virtual)
        losses: list[Tensor] = []

        def loss_of(part: Batch) -> Tensor:
            losses.append(self.meta_loss(model, values, part))
            return losses[-1]

        def forget(_: Batch) -> None:
            losses[-1] = losses[-1].detach()

        gradient = self.execution.gradients(meta.split(parts), loss_of, list(weights.values()), done=forget)
        return torch.stack(losses).mean(), dict(zip(weights, gradient, strict=True))

    def prepare_virtual_weights(
        self, model: SplitClassifier, virtual: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return all of w', detached, and those of the layers that count, which require gradients and are in both results."""
        values = {name: weight.detach() for name, weight in virtual.items()}
        return values, {name: values[name].requires_grad_() for name in model.part_parameters(self.cut, self.only)}

    def meta_loss(self, model: SplitClassifier, values: dict[str, Tensor], meta: Batch) -> Tensor:
        """Return the meta loss, a scalar: the plain cross-entropy on ``meta``, with the weights ``values`` in the model."""
        with model.frozen_statistics(), self.execution():
            entering = meta.images
            if self.cut is not None:
                with torch.no_grad():
                    entering = functional_call(model, values, (meta.images,), {"until": self.cut})
            logits = functional_call(model, values, (entering,), {"start": self.cut})
        return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), meta.labels)

    def propagate_to_advisor(self, problem: MetaProblem, gradient: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the meta-gradient −α ∇θ L̇, where L̇ is the derivative of the training loss along ``gradient``.

        Args:
            problem: what the meta step starts from.
            gradient: g by parameter name.

        Raises:
            UserError: the backbone or the head has an operation without a forward-mode derivative.
        """
        gradient = problem.step.scale_by_rates(gradient)
        return self.execution.gradients(
            problem.micro_batches(),
            lambda part: -problem.step.lr * self._training_loss_tangent(part, gradient),
            problem.method.meta_parameters(),
            average=not problem.method.of_one_batch,  # otherwise the meta-parameters belong to this rank's samples alone
            retain_graph=True,  # a second engine may need the advice's graph; it holds the advisor only, and is small
        )

    def _training_loss_tangent(self, problem: MetaProblem, gradient: dict[str, Tensor]) -> Tensor:
        model, shared = problem.model, problem.shared
        if self.plan().record and shared.restore_before_tangent:
            shared.restore_graph()  # before the tangent pass, which uses the tape
        tangent = (self._forward_tangent if self.tangent == "forward" else self._difference_tangent)(model, shared, gradient)
        features = Dual(shared.features.detach(), tangent)
        # A trainable parameter without a direction would give a wrong gradient, so it must be a KeyError here.
        direction = {own: gradient[name] for own, name in model.head_parameters().items()}
        advice, advice_tangent = problem.advice, None
        if problem.attached:
            advice, advice_tangent = self._advise_with_tangent(problem, features, direction)
        with shared.replaying_head(model):
            return training_loss_tangent(problem.method, features, shared.batch, model.head, direction, advice, advice_tangent)

    def _forward_tangent(self, model: SplitClassifier, shared: SharedForward, gradient: dict[str, Tensor]) -> Tensor:
        """Return ḟ (B, D), the derivative of the features along ``gradient``, by a forward-mode pass, which stores no graph.

        All parameters of the layers that count become dual numbers, also the affine ones of normalisations: under autocast a
        batch normalisation with constant affine parameters may return a float32 tangent, which the next convolution rejects.
        """
        parameters, entering = model.part_parameters(self.cut, self.only), shared.entry_state(self.cut)
        scale = None
        if self.execution.dtype is torch.float16:  # scaled to the norm of the weights, or float16 would round it to 0
            scale = _joint_norm(list(parameters.values())) / _joint_norm([gradient[name] for name in parameters])
            gradient = {name: scale * gradient[name] for name in parameters}
        # Of torch's attention kernels only the plain one (MATH) has a forward-mode formula.
        with (
            torch.no_grad(),
            forward_ad.dual_level(),
            entering.random_state.replayed(),
            model.frozen_statistics(),
            sdpa_kernel(SDPBackend.MATH),
            torch.compiler.set_stance("force_eager"),  # compiled code drops tangents
        ):
            duals = {name: forward_ad.make_dual(p.detach(), gradient[name]) for name, p in parameters.items()}
            try:
                with self.execution(), Tangents(shared.tape, entering.position):
                    dual = functional_call(model, duals, (entering.activation,), {"start": self.cut, "features": True})
            except NotImplementedError as error:
                raise forward_mode_error(f"The backbone of {model.name}", error) from None
            tangent = forward_ad.unpack_dual(dual).tangent
        # No tangent: the features do not depend on any parameter that counts.
        if tangent is None:
            return torch.zeros_like(shared.features)
        return tangent if scale is None else tangent.float() / scale

    def _difference_tangent(self, model: SplitClassifier, shared: SharedForward, gradient: dict[str, Tensor]) -> Tensor:
        """Return ḟ (B, D), the derivative of the features along ``gradient``, by a finite difference."""
        parameters = model.backbone_parameters(
            self.cut, self.only
        )  # without the head, which may hold most of the direction's norm
        entering = shared.entry_state(self.cut)
        if not parameters:
            return torch.zeros_like(shared.features)
        weights, directions = [p.detach() for p in parameters.values()], [gradient[name] for name in parameters]
        step = DIFFERENCE_STEP * _joint_norm(weights) / _joint_norm(directions)
        moved = torch._foreach_add(weights, torch._foreach_mul(directions, step))
        with torch.no_grad(), entering.random_state.replayed(), model.frozen_statistics(), self.execution():
            values = dict(zip(parameters, moved, strict=True))
            features = functional_call(model, values, (entering.activation,), {"start": self.cut, "features": True})
        return (features - shared.features.detach()) / step

    @staticmethod
    def _advise_with_tangent(problem: MetaProblem, f: Dual, direction: HeadTangent) -> tuple[Advice, Advice]:
        """Run the advisor on dual numbers, for advice that depends on w through the advisor's inputs.

        Returns:
            The advice, with its graph to θ only; and its tangent along those of the features and of ℓpre.
        """
        shared = problem.shared
        with torch.no_grad(), shared.replaying_head(problem.model):
            loss_dot = cross_entropy_tangent(f, shared.batch.labels, problem.model.head, direction)
        with forward_ad.dual_level():
            features = forward_ad.make_dual(f.primal, f.tangent.to(f.primal.dtype))
            loss_pre = shared.loss_pre.detach()
            losses = forward_ad.make_dual(loss_pre, loss_dot.to(loss_pre.dtype))
            advice = problem.method.advise(Seen(features, losses, shared.batch, shared.draw))
            parts = {name: forward_ad.unpack_dual(part) for name, part in advice.outputs.items()}
        primal = Advice(beta=advice.beta, **{name: part.primal for name, part in parts.items()})
        return primal, Advice(**{name: part.tangent for name, part in parts.items()})


def _joint_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of the concatenation of ``tensors``, bounded away from 0 so that one can divide by it."""
    length = torch.stack(torch._foreach_norm([tensor.detach() for tensor in tensors])).norm()
    return length.clamp_min(torch.finfo(length.dtype).tiny ** 0.5)
