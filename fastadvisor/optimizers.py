"""The classifier's optimizer, its parameter groups, and the average of its weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fastadvisor.config import OptimizerConfig
from fastadvisor.errors import UserError
from fastadvisor.models import SplitClassifier
from fastadvisor.models.stages import layers
from fastadvisor.runtime.environment import optional_parts

APEX = {"apex-sgd": ("FusedSGD", "sgd"), "apex-adam": ("FusedAdam", "adamw"), "apex-lamb": ("FusedLAMB", "lamb")}
"""Our names, apex's, and what to take without it."""
TIMM = {"lars": "Lars", "lamb": "Lamb"}


def check_optimizer(config: OptimizerConfig) -> None:
    """Find out, before any data is read, whether the optimizer that ``config`` names is there.

    Raises:
        UserError: it is not; names what to install, or to take instead.
    """
    name = config.optimizer
    if name in TIMM:
        try:
            import timm.optim  # noqa: F401
        except ImportError:
            raise UserError(f"--optimizer {name} is timm's: pip install 'fastadvisor[timm]', or take sgd or adamw.") from None
    if name in APEX:
        _, active, why = next(part for part in optional_parts() if part[0] == "apex")
        if not active:
            raise UserError(f"--optimizer {name} needs NVIDIA apex and a GPU ({why}): {APEX[name][1]} does the same.")
    if config.ema_decay is not None and config.ema_decay == 0:
        raise UserError("--ema-decay 0 would average nothing: give a decay such as 0.9998, or drop it.")


def build_optimizer(config: OptimizerConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimizer that ``config`` names, on parameter groups with ``params`` and ``lr``."""
    name, decay = config.optimizer, config.weight_decay
    parameters = list(groups)
    device = parameters[0]["params"][0].device
    if name in ("sgd", "nesterov"):
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=decay,
            nesterov=name == "nesterov",
            **implementation(device),
        )
    if name in ("adam", "adamw"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return kind(parameters, lr=config.lr, weight_decay=decay, **implementation(device))
    if name in TIMM:
        import timm.optim

        settings = {"momentum": config.momentum} if name == "lars" else {}
        return getattr(timm.optim, TIMM[name])(parameters, lr=config.lr, weight_decay=decay, **settings)
    from apex import optimizers as apex

    settings = {"momentum": config.momentum} if name == "apex-sgd" else {}
    return getattr(apex, APEX[name][0])(parameters, lr=config.lr, weight_decay=decay, **settings)


def implementation(device: torch.device) -> dict[str, Any]:
    """Return which of torch's implementations of SGD and Adam to take on ``device``."""
    return {"fused": True} if device.type == "cuda" else {"foreach": True}


def parameter_groups(model: SplitClassifier, layer_decay: float, lr: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups of one rate: the head at ``lr``, each layer at ``layer_decay`` times the rate
    of the one above it (as in BEiT). ``lr_scale`` is a group's rate over ``lr``, for the schedule. With 1 one group.
    """
    trainable = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
    if layer_decay == 1:
        return [{"params": list(trainable.values()), "lr": lr, "lr_scale": 1.0}]
    pieces = layers(model.model, model.head_name)
    depth = dict.fromkeys(trainable, 0)  # what is outside all layers, such as a class token, counts with the lowest
    for index, piece in enumerate(pieces):
        for name in piece.modules:
            depth.update({id(parameter): index for parameter in model.model.get_submodule(name).parameters()})
    depth.update({id(parameter): len(pieces) for parameter in model.head.parameters()})
    groups: dict[int, list[nn.Parameter]] = {}
    for key, parameter in trainable.items():
        groups.setdefault(depth[key], []).append(parameter)
    scales = {level: layer_decay ** (len(pieces) - level) for level in groups}
    return [{"params": groups[level], "lr": lr * scales[level], "lr_scale": scales[level]} for level in sorted(groups)]


class WeightAverage:
    """An exponential moving average of weights and running statistics, whose decay rises to ``decay`` in the beginning:
    min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not left with its first weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        def average(averages: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
            share = 1 - min(decay, (1 + int(count)) / (10 + int(count)))  # the count is on the host
            pairs = list(zip(averages, current, strict=True))
            moved = [pair for pair in pairs if pair[0].is_floating_point()]
            torch._foreach_lerp_([mean for mean, _ in moved], [value for _, value in moved], share)
            for mean, value in pairs:
                if not mean.is_floating_point():  # a count of batches
                    mean.copy_(value)

        self._average = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self._average.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The averaged classifier."""
        return self._average.module

    def update(self, model: nn.Module) -> None:
        """Take in the weights of ``model`` as of now."""
        self._average.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of updates."""
        return self._average.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self._average.load_state_dict(dict(state))
