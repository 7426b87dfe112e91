"""The meta-gradient through a few layers, chosen anew at every meta step (FaMUS, Xu et al. 2021), in forward over reverse mode.

The meta-gradient is a sum over layers, of which a few terms may be enough. With a set of *active* layers, gb is zero in all
others: the tangent pass starts at the lowest active layer, and the virtual and the meta backward pass end there. The active
layers are K random ones, or are chosen by *gradient samplers*, one for each layer l, which decide on
r_l = GumbelSoftmax(FC(PReLU(FC(pool(ḡ_l))))) ∈ {0, 1}, where ḡ_l is the last training gradient, and which minimise

    Lmeta(w'(r)) + λ1 (Σ_l r_l − K)² + λ2 ‖pool(ḡ_L of the training loss) − pool(ḡ_L of the meta loss)‖²
    w'_l(r) = w_l − α r_l ∇_l L

by straight-through gradients; the sums run over all samplers, the index L is the head. The first term has the gradient
∂Lmeta/∂r_l = ⟨g_l, w'_l − w_l⟩, an inner product of tensors that are computed anyway. For fixed top layers use
``ForwardEngine(cut=…)`` instead.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, gumbel_softmax

from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad.base import Engine, MetaGradient, MetaProblem
from fastadvisor.metagrad.forward import ForwardEngine
from fastadvisor.metagrad.shared_pass import Plan
from fastadvisor.models import Layer, SplitClassifier
from fastadvisor.runtime.execution import Execution

POOLED = 64
"""Number of averages to which the gradient of a layer is pooled."""


class GradientSamplers(nn.Module):
    """One small network for each of L layers, which decides by the layer's pooled gradient whether the layer is active.

    Args:
        layers: L.
        hidden: width between the two linear layers of each network (FaMUS: 128).
        temperature: temperature of the Gumbel softmax (FaMUS: 5).
    """

    def __init__(self, layers: int, hidden: int = 128, temperature: float = 5.0) -> None:
        super().__init__()
        self.temperature = temperature
        each = [nn.Sequential(nn.Linear(POOLED, hidden), nn.PReLU(), nn.Linear(hidden, 2)) for _ in range(layers)]
        self.each = nn.ModuleList(each)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the decisions r (L,), each 0 or 1, with straight-through gradients, on ``pooled`` gradients (L, 64)."""
        logits = torch.stack([sampler(row) for sampler, row in zip(self.each, pooled, strict=True)])
        return gumbel_softmax(logits, self.temperature, hard=True)[:, 1]


@dataclass
class LearnedLayers:
    """The gradient samplers and their training."""

    samplers: GradientSamplers
    budget: int
    """K, the number of layers that should be active."""
    lr: float = 0.1
    """Learning rate of the samplers' SGD (FaMUS: 0.1; 0.01 for long tails)."""
    budget_weight: float = 0.1
    """λ1, the weight of the budget's term."""
    matching_weight: float = 0.1
    """λ2, the weight of the term that matches gradients; 0 saves a backward pass in each meta step."""
    decisions: Tensor | None = None
    """r (L,) of the current meta step, with its graph to the samplers; None between meta steps."""
    ready: bool = False
    """Whether the samplers have gradients that have not been used for a step yet."""

    def __post_init__(self) -> None:
        # Only a fused optimizer can skip a step by a flag on the device, as a watch sets it without waiting for the device.
        fused = next(self.samplers.parameters()).device.type == "cuda" or None
        self.optimizer = torch.optim.SGD(self.samplers.parameters(), lr=self.lr, fused=fused)

    def choose(self, pooled: Tensor) -> list[bool]:
        """Return for each layer whether it is active in this meta step. Reads L numbers from the device, so waits for it."""
        self.decisions = self.samplers(pooled)
        return [bool(value) for value in self.decisions.tolist()]

    def differentiate(self, effects: Tensor) -> None:
        """Store the samplers' gradients in their ``grad``, for :meth:`learn`.

        Args:
            effects: (L,) derivatives of the first and the third term of the objective with respect to r; 0 if unknown.
        """
        assert self.decisions is not None
        loss = (self.decisions * effects).sum() + self.budget_weight * (self.decisions.sum() - self.budget) ** 2
        parameters = list(self.samplers.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self.decisions = None
        self.ready = True

    def learn(self, execution: Execution) -> None:
        """Take a step of SGD, if there are new gradients since the last one."""
        if self.ready:
            execution.step(self.optimizer)
        self.ready = False


@dataclass
class LayerwiseEngine(Engine):
    """A :class:`ForwardEngine` through the head and the layers that are chosen at each meta step."""

    forward: ForwardEngine
    """Computes the meta-gradient; its ``cut`` and ``only`` are set at each meta step."""
    model: SplitClassifier
    layers: list[Layer]
    """The layers of the backbone, bottom first."""
    budget: int
    """K, the number of layers that should be active."""
    learned: LearnedLayers | None = None
    """Chooses the layers; None: K random layers are active."""
    active: list[bool] = field(default_factory=list)
    """For each layer, whether it is active in the current meta step."""
    restored: tuple[Tensor, Tensor] | None = None
    """Pooled gradients (L, 64) and the head's gradient of the training loss, as loaded from a checkpoint."""

    def describe(self) -> str:
        """Return a few words on how the engine computes the meta-gradient."""
        way = "at random" if self.learned is None else "by learned samplers"
        return f"through {self.budget} of {len(self.layers)} layers, chosen {way}"

    def capturable(self) -> str | None:
        """Return why an iteration with a meta step cannot be recorded as a CUDA graph."""
        return "the host chooses the layers of each meta step (--approx-layers random, learned)"

    def plan(self) -> Plan:
        """Choose the active layers, and ask for the input of the lowest of them."""
        with self.forward.execution.common.drawing():
            if self.learned is None:
                chosen = set(torch.randperm(len(self.layers))[: self.budget].tolist())
                self.active = [index in chosen for index in range(len(self.layers))]
            else:
                self.active = self.learned.choose(self._training_gradients()[0])
        if not any(self.active):
            self.active[-1] = True  # without an active layer nothing below the head would count
        self.forward.cut = self.layers[self.active.index(True)].cut
        self.forward.only = tuple(
            name for layer, active in zip(self.layers, self.active, strict=True) if active for name in layer.modules
        )
        return self.forward.plan()

    def virtual_train(self, problem: MetaProblem) -> dict[str, Tensor]:
        """Return w' of the active layers and the head, by parameter name."""
        return self.forward.virtual_train(problem)

    def meta_gradient(self, problem: MetaProblem, virtual: dict[str, Tensor], meta: Batch) -> MetaGradient:
        """Return Lmeta(w') and ∇θ Lmeta(w') through the active layers; store the samplers' gradients, if there are any."""
        learned = self.learned
        if learned is None or learned.decisions is None:
            return self.forward.meta_gradient(problem, virtual, meta)
        values, weights = self.forward.prepare_virtual_weights(problem.model, virtual)
        loss = self.forward.meta_loss(problem.model, values, meta)
        matched = learned.matching_weight and self._head_weight_name() is not None
        pull = self._matching_gradient(learned.matching_weight, loss, weights) if matched else None
        gradient = dict(zip(weights, self._gradients(loss, list(weights.values())), strict=True))
        learned.differentiate(self._decision_gradients(gradient, pull, virtual))
        return MetaGradient(loss.detach(), self.forward.propagate_to_advisor(problem, gradient))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimizer of the samplers, if there are any."""
        return [] if self.learned is None else [self.learned.optimizer]

    def learn(self) -> None:
        """Take the samplers' step, if there are any."""
        if self.learned is not None:
            self.learned.learn(self.forward.execution)

    def _gradients(self, loss: Tensor, inputs: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
        return self.forward.execution.gradients([loss], lambda loss: loss, inputs, **options)

    def _matching_gradient(self, matching_weight: float, loss: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return λ2 times the gradient of the matching loss by the weights: a double backward through the head's gradient."""
        head = self._head_weight_name()
        assert head is not None
        _, of_training = self._training_gradients()
        (of_meta,) = torch.autograd.grad(loss, weights[head], create_graph=True)
        (of_all,) = self.forward.execution.ranks.average([of_meta])
        mismatch = pool_gradient(of_training) - pool_gradient(of_all.detach())
        # 2 ⟨mismatch, −∂⟩ is the derivative of the square. It is linear in each rank's gradient, so ranks can be averaged.
        matching = -2 * matching_weight * (mismatch * pool_gradient(of_meta)).sum()
        return dict(zip(weights, self._gradients(matching, list(weights.values()), retain_graph=True), strict=True))

    def _decision_gradients(
        self, gradient: dict[str, Tensor], pull: dict[str, Tensor] | None, virtual: dict[str, Tensor]
    ) -> Tensor:
        """Return (L,) ⟨g_l + λ2 …, w'_l − w_l⟩, the derivative of Lmeta and the matching loss with respect to r_l.

        0 for inactive layers, whose g_l is not computed.

        Args:
            gradient: g by parameter name.
            pull: the result of :meth:`_matching_gradient`; None: without that term.
            virtual: w' by parameter name.
        """
        parameters = dict(self.model.named_parameters())
        effects = torch.zeros(len(self.layers), device=self.model.device)
        for index, layer in enumerate(self.layers):
            prefixes = tuple(f"model.{name}." for name in layer.modules)
            for name in gradient:
                if name.startswith(prefixes):
                    force = gradient[name] if pull is None else gradient[name] + pull[name]
                    effects[index] += (force * (virtual[name] - parameters[name].detach())).sum()
        return effects

    def _training_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the pooled gradients of all layers (L, 64), divided by their common root mean square, and the head's gradient.

        They are those that the parameters hold: of the last actual step; one step behind, in :meth:`meta_gradient` they are
        those of the current iteration.
        """
        device, name = self.model.device, self._head_weight_name()
        if all(p.grad is None for p in self.model.parameters()):  # before the first actual step of a run, or of a resumed one
            head = torch.zeros(1, device=device) if name is None else torch.zeros_like(self.model.get_parameter(name))
            return self.restored or (torch.zeros(len(self.layers), POOLED, device=device), head)
        rows = []
        for layer in self.layers:
            prefixes = tuple(f"model.{name}." for name in layer.modules)
            parts = [
                p.grad.flatten() for n, p in self.model.named_parameters() if n.startswith(prefixes) and p.grad is not None
            ]
            rows.append(pool_gradient(torch.cat(parts)) if parts else torch.zeros(POOLED, device=device))
        stacked = torch.stack(rows)
        of_head = None if name is None else self.model.get_parameter(name).grad
        return (
            stacked / stacked.square().mean().sqrt().clamp_min(torch.finfo(stacked.dtype).tiny),
            torch.zeros(1, device=device) if of_head is None else of_head,
        )

    def _head_weight_name(self) -> str | None:
        """Return the name of the head's largest trainable parameter, its weight matrix, whose gradients are matched.

        None if the head is frozen.
        """
        names = self.model.head_parameters().values()
        return max(names, key=lambda name: self.model.get_parameter(name).numel(), default=None)

    def state_dict(self) -> dict[str, Any]:
        """Return the samplers' weights, and the gradients by which they will decide next."""
        if self.learned is None:
            return {}
        pooled_gradients, of_head = self._training_gradients()
        return {
            "samplers": self.learned.samplers.state_dict(),
            "pooled_gradients": pooled_gradients.clone(),
            "head_gradient": of_head.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        if self.learned is not None:
            self.learned.samplers.load_state_dict(state["samplers"])
            device = self.model.device
            self.restored = (state["pooled_gradients"].to(device), state["head_gradient"].to(device))


def pool_gradient(gradient: Tensor) -> Tensor:
    """Return the averages (64,) of ``gradient``, flattened, over 64 stretches of equal length; in float32 or wider."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return adaptive_avg_pool1d(wide.reshape(1, 1, -1), POOLED).flatten()
