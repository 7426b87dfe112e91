"""(b) Virtual-Train of Algorithm 1 (section 3.6): the step of the classifier at which only the meta loss is computed."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastadvisor.models import SplitClassifier


@dataclass
class VirtualStep:
    """w' = w − α d, with d = ∇w L as in plain SGD, or with the optimizer's weight decay and momentum added to d."""

    lr: float | Tensor
    """α; with layer-wise rates the largest of them. A scalar tensor on the device with CUDA graphs."""
    optimizer: torch.optim.Optimizer | None = None
    """Whose weight decay and momentum buffers are added to d; None: neither is."""
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    """Layer-wise learning rates divided by ``lr``, by parameter name; 1 for a name that is missing."""

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, model: SplitClassifier, *, with_optimizer: bool = False) -> "VirtualStep":
        """Return the virtual step at the current learning rates of ``optimizer``.

        Args:
            optimizer: the classifier's optimizer.
            model: the classifier, whose parameters ``optimizer`` updates.
            with_optimizer: whether the virtual step applies its weight decay and momentum.
        """
        groups = optimizer.param_groups
        # With CUDA graphs the rates are on the device, where the host must not read them; it compares the groups' fixed scales.
        key = "lr_scale" if isinstance(groups[0]["lr"], Tensor) else "lr"
        top = max(groups, key=lambda group: group[key]) if len(groups) > 1 else groups[0]
        largest = top["lr"]
        rate_factors: dict[str, float] = {}
        if len(groups) > 1 and top[key]:
            of_parameter = {id(p): group[key] / top[key] for group in groups for p in group["params"]}
            rate_factors = {name: of_parameter[id(p)] for name, p in model.part_parameters().items()}
        return cls(largest, optimizer if with_optimizer else None, rate_factors)

    def apply(self, parameters: Mapping[str, nn.Parameter], gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return w' by parameter name; differentiable in ``gradients`` if they have a graph.

        With weight decay and momentum, too, w' depends on θ through −α ∇w L only: neither depends on the advisor.

        Args:
            parameters: w by name.
            gradients: ∇w L, in the same order.
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
        """Return ``direction``, each layer's part multiplied by its rate factor."""
        if not self.rate_factors:
            return direction
        return {name: self.rate_factors.get(name, 1.0) * value for name, value in direction.items()}
