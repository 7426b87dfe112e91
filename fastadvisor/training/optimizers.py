"""The classifier's optimizer."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from fastadvisor.config import Config, OptimizerConfig
from fastadvisor.errors import UserError
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
