"""Virtual-Train: the step that the classifier takes for the meta loss alone (Algorithm 1)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastadvisor.models import SplitClassifier


@dataclass
class VirtualStep:
    """w' = w − α d, d = ∇w L: plain SGD; or with the optimizer's weight decay and momentum (Algorithm 1, Virtual-Train)."""

    lr: float | Tensor
    """α; with layer-wise rates the largest. A scalar on the device where an iteration is recorded as a CUDA graph."""
    optimizer: torch.optim.Optimizer | None = None
    """Given: d also holds its weight decay and its momentum buffers."""
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    """Layer-wise rates in units of ``lr``, by parameter name; 1 where nothing is said."""

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, model: SplitClassifier, *, with_optimizer: bool = False) -> "VirtualStep":
        """Return the virtual step at the rates that ``optimizer`` has now.

        Args:
            optimizer: the classifier's.
            model: whose parameters it holds.
            with_optimizer: whether its weight decay and momentum take part.
        """
        groups = optimizer.param_groups
        # In a graph rates are on the device, where nothing compares them: there the groups' fixed scales do.
        key = "lr_scale" if isinstance(groups[0]["lr"], Tensor) else "lr"
        top = max(groups, key=lambda group: group[key]) if len(groups) > 1 else groups[0]
        largest = top["lr"]
        rate_factors: dict[str, float] = {}
        if len(groups) > 1 and top[key]:
            of_parameter = {id(p): group[key] / top[key] for group in groups for p in group["params"]}
            rate_factors = {name: of_parameter[id(p)] for name, p in model.part_parameters().items()}
        return cls(largest, optimizer if with_optimizer else None, rate_factors)

    def apply(self, parameters: Mapping[str, nn.Parameter], gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return w' by name; differentiable in ``gradients`` where they carry a graph.

        α stays the factor of θ's gradient in both forms: decay and old momentum do not depend on the advisor.
        """
        weights = [parameter.detach() for parameter in parameters.values()]
        directions: tuple[Tensor, ...] = gradients
        if self.optimizer is not None:
            group = self.optimizer.param_groups[0]
            directions = torch._foreach_add(list(directions), weights, alpha=group["weight_decay"])
            buffers = [self.optimizer.state[p].get("momentum_buffer") for p in parameters.values()]
            if group["momentum"]:
                known = [torch.zeros_like(w) if buffer is None else buffer for w, buffer in zip(weights, buffers, strict=True)]
                directions = torch._foreach_add(list(directions), known, alpha=group["momentum"])
        directions = tuple(self.scale_by_rates(dict(zip(parameters, directions, strict=True))).values())
        if isinstance(self.lr, Tensor):
            moved = torch._foreach_sub(weights, torch._foreach_mul(list(directions), self.lr))
        else:
            moved = torch._foreach_add(weights, list(directions), alpha=-self.lr)
        return dict(zip(parameters, moved, strict=True))

    def scale_by_rates(self, direction: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``direction`` times the layers' shares of the rate."""
        if not self.rate_factors:
            return direction
        return {name: self.rate_factors.get(name, 1.0) * value for name, value in direction.items()}
