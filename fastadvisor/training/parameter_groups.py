"""Which parameters learn at which rate."""

from typing import Any

from torch import nn

from fastadvisor.models import SplitClassifier
from fastadvisor.models.stages import TRUNK_FRACTION, layers


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
        if sum(parameter.numel() for parameter in module.parameters()) <= TRUNK_FRACTION * total:
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
