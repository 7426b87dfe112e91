"""The classifier's optimizer, its parameter groups, and the average of its weights."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastadvisor.config import Config, OptimizerConfig
from fastadvisor.errors import UserError
from fastadvisor.models import SplitClassifier
from fastadvisor.models.stages import TRUNK_SHARE, layers
from fastadvisor.runtime.environment import optional_parts

TORCH: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "nesterov": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
TIMM = {"lars": "Lars", "lamb": "Lamb"}
APEX = {"apex-sgd": ("FusedSGD", "sgd"), "apex-adam": ("FusedAdam", "adamw"), "apex-lamb": ("FusedLAMB", "lamb")}
"""Our names, apex's, and what does the same without it (apex's Adam decays weights as AdamW does)."""
WITH_MOMENTUM = ("sgd", "nesterov", "lars", "apex-sgd")
OWN: dict[str, dict[str, Any]] = {
    "nesterov": {"nesterov": True},
    # Both cut the gradient to norm 1 unless told otherwise; that is what --clip-grad-norm is for.
    "lamb": {"max_grad_norm": None},
    "apex-lamb": {"max_grad_norm": float("inf")},
}


def check_optimizer(config: Config) -> None:
    """Find out, before any data is read, whether the optimizer that ``config`` names is there.

    Raises:
        UserError: it is not; names what to install, or to take instead.
    """
    name = config.optimizer
    if name in APEX and config.device == "cpu":
        raise UserError(f"--optimizer {name} needs a CUDA device: take --optimizer {APEX[name][1]}, or drop --device cpu.")
    optimizer_class(name)
    if name == "nesterov" and config.momentum == 0:
        raise UserError("--optimizer nesterov needs --momentum above 0, or take --optimizer sgd.")
    if config.ema_decay is not None and config.ema_decay == 0:
        raise UserError("--ema-decay 0 would average nothing: give a decay such as 0.9998, or drop it.")


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Continue from ``state``, a state dict, with the implementation that ``optimizer`` has here: whether it is fused depends
    on the machine and on what the run is watched for, and torch would take it from the state dict.
    """
    own = [group.get("fused") for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, fused in zip(optimizer.param_groups, own, strict=True):
        if group.get("fused") == fused:
            continue
        group["fused"] = fused
        for parameter in group["params"]:  # a fused optimizer counts its steps on the device
            step = optimizer.state[parameter].get("step") if parameter in optimizer.state else None
            if isinstance(step, Tensor):
                optimizer.state[parameter]["step"] = step.to(parameter.device if fused else "cpu")


def optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the class of the optimizer ``name``; raises as :func:`check_optimizer`."""
    if name in TORCH:
        return TORCH[name]
    if name in TIMM:
        try:
            import timm.optim
        except ImportError:
            raise UserError(f"--optimizer {name} is timm's: pip install 'fastadvisor[timm]', or take sgd or adamw.") from None
        return getattr(timm.optim, TIMM[name])
    _, active, why = next(part for part in optional_parts() if part[0] == "apex")
    if active and find_spec("amp_C") is None:
        active, why = False, "installed without its CUDA extensions: build it with them, as its README says"
    if not active:
        instead = f"take --optimizer {APEX[name][1]}, which does the same"
        raise UserError(f"--optimizer {name} needs NVIDIA apex and a CUDA device ({why}): {instead}.")
    from apex import optimizers

    return getattr(optimizers, APEX[name][0])


def build_optimizer(config: OptimizerConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimizer that ``config`` names, on parameter groups with ``params`` and ``lr``."""
    name = config.optimizer
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, **OWN.get(name, {})}
    if name in WITH_MOMENTUM:
        settings["momentum"] = config.momentum
    settings |= implementation(name, groups[0]["params"][0].device)
    optimizer = optimizer_class(name)(list(groups), **settings)
    if name in APEX or settings.get("fused"):
        optimizer.register_step_pre_hook(align_gradients)
    return optimizer


def implementation(name: str, device: torch.device) -> dict[str, bool]:
    """Return which implementation of the optimizer ``name`` to take on ``device``."""
    # CPU: fused takes 0.2 to 0.5 of the time of the loop over the parameters, foreach 0.75 to 1.15 (benchmarks/optimizers.py:
    # SGD and AdamW on resnet32 and resnet18, 2 cores). CUDA: what torch calls the fastest; not measured here.
    return {"fused": True} if name in TORCH and device.type in ("cpu", "cuda") else {}


def align_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Give each gradient its parameter's strides: fused steps go through memory and take them to be the same. Without a look
    torch's on the CPU would update the wrong weights; its CUDA one refuses.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and gradient.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(gradient)


def parameter_groups(model: SplitClassifier, layer_decay: float, lr: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups of one rate: the head at ``lr``, each layer at ``layer_decay`` times the rate
    of the one above it (as in BEiT). ``lr_scale`` is a group's rate over ``lr``, for the schedule. With 1 one group.
    """
    trainable = {id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}
    if layer_decay == 1:
        return [{"params": list(trainable.values()), "lr": lr, "lr_scale": 1.0}]
    levels = _levels(model)
    depth = dict.fromkeys(trainable, 0)  # what is outside all layers, such as a class token, counts with the lowest
    for index, modules in enumerate(levels):
        depth.update({id(parameter): index for module in modules for parameter in module.parameters()})
    depth.update({id(parameter): len(levels) for parameter in model.head.parameters()})
    groups: dict[int, list[nn.Parameter]] = {}
    for key, parameter in trainable.items():
        groups.setdefault(depth[key], []).append(parameter)
    scales = {level: layer_decay ** (len(levels) - level) for level in groups}
    return [{"params": groups[level], "lr": lr * scales[level], "lr_scale": scales[level]} for level in sorted(groups)]


def _levels(model: SplitClassifier) -> list[list[nn.Module]]:
    """Return the backbone's layers, bottom first, as modules."""
    total = sum(parameter.numel() for parameter in model.parameters())

    def opened(module: nn.Module) -> list[nn.Module]:
        """Return the blocks of a module that holds most of the model, such as the encoder of torchvision's ViT."""
        if sum(parameter.numel() for parameter in module.parameters()) <= TRUNK_SHARE * total:
            return [module]
        return [piece for child in module.children() for piece in opened(child)] or [module]

    levels: list[list[nn.Module]] = [[]]
    begun = False  # whether the last level has a weight matrix
    for name in (name for layer in layers(model.model, model.head_name) for name in layer.modules):
        for module in opened(model.model.get_submodule(name)):
            weighty = any(parameter.dim() > 1 for parameter in module.parameters())
            if weighty and begun:
                levels.append([])
            levels[-1].append(module)
            begun = begun or weighty
    return levels


class WeightAverage:
    """An exponential moving average of weights and running statistics, whose decay rises to ``decay`` in the beginning:
    min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not left with its first weights. The first update
    takes the weights as they are; counts, such as those of batches, are always those of the model.

    It never waits for the device. torch's ``AveragedModel`` does, at each update: it copies its count there, or reads it back.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        """The averaged classifier."""
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of ``model`` as of now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        moved = [pair for pair in pairs if pair[0].is_floating_point()]
        get_ema_multi_avg_fn(decay)([mean for mean, _ in moved], [value for _, value in moved], None)
        for mean, value in pairs:
            if not mean.is_floating_point():
                mean.copy_(value, non_blocking=True)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]


def _tensors(model: nn.Module) -> "itertools.chain[Tensor]":
    return itertools.chain(model.parameters(), model.buffers())
