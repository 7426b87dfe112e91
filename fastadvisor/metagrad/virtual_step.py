"""Virtual-Train: the step that the classifier takes for the meta loss alone (Algorithm 1)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastadvisor.models import SplitClassifier


@dataclass
class VirtualStep:
    """w' = w − α d, d = ∇w L: plain SGD; or with the optimizer's weight decay and momentum (Algorithm 1, Virtual-Train)."""

    lr: float
    """α; with layer-wise rates the largest."""
    optimizer: torch.optim.Optimizer | None = None
    """Given: d also holds its weight decay and its momentum buffers."""
    shares: Mapping[str, float] = field(default_factory=dict)
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
        largest = max(group["lr"] for group in groups)
        shares: dict[str, float] = {}
        if len(groups) > 1 and largest:
            of_parameter = {id(p): group["lr"] / largest for group in groups for p in group["params"]}
            shares = {name: of_parameter[id(p)] for name, p in model.part_parameters().items()}
        return cls(largest, optimizer if with_optimizer else None, shares)

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
        directions = tuple(self.scaled(dict(zip(parameters, directions, strict=True))).values())
        return dict(zip(parameters, torch._foreach_add(weights, list(directions), alpha=-self.lr), strict=True))

    def scaled(self, direction: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``direction`` times the layers' shares of the rate."""
        if not self.shares:
            return direction
        return {name: self.shares.get(name, 1.0) * value for name, value in direction.items()}
