"""Models by name: our own, those of torchvision, and those of timm if it is installed."""

import re
from collections.abc import Callable
from functools import partial
from urllib.error import URLError

import torchvision
from torch import nn

from fastadvisor.config import ModelConfig
from fastadvisor.errors import UserError, suggest
from fastadvisor.models.cifar_resnet import CifarResNet
from fastadvisor.models.split import SplitClassifier, split


def resnet18_cifar(classes: int) -> nn.Module:
    """Build a ResNet-18 with a 3×3 stem of stride 1 and without max-pooling: 11.17 million parameters, 512 features."""
    model = torchvision.models.resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


def resnet10(classes: int) -> nn.Module:
    """Build a ResNet-10: one basic block in each stage, the stem for ImageNet, 512 features."""
    resnet = torchvision.models.resnet
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=classes)


OURS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (8, 14, 20, 32, 44, 56)},
    "resnet18-cifar": resnet18_cifar,
    "resnet10": resnet10,
}


def torchvision_names() -> list[str]:
    """Return the names of all classifiers of torchvision."""
    return torchvision.models.list_models(module=torchvision.models)


def check_model(name: str) -> None:
    """Raise a UserError that names the most similar model, unless ``name`` is the name of a model."""
    if name in OURS or name in torchvision_names():
        return
    if name.startswith("timm/"):
        _timm_name(name)
        return
    near = suggest(name, [*OURS, *torchvision_names()])
    raise UserError(f"Unknown model {name!r}.{near} Models: {', '.join(OURS)}, torchvision's names, timm/<name>.")


def _timm_name(name: str) -> str:
    try:
        import timm
    except ImportError:
        raise UserError(f"Model {name!r} needs timm: pip install timm.") from None
    bare = name.removeprefix("timm/")
    if not timm.is_model(bare):
        raise UserError(f"timm has no model {bare!r}.{suggest(bare, timm.list_models())}")
    return bare


def build_model(config: ModelConfig, classes: int, image_shape: tuple[int, int]) -> SplitClassifier:
    """Build ``config.model`` for C ``classes`` and split it into backbone and head.

    Args:
        config: the model's name, and whether to start from the pretrained weights of its library.
        classes: C.
        image_shape: (height, width) in pixels of the dummy images on which the split is checked.

    Raises:
        UserError: there is no model of that name, it has no pretrained weights, it does not take images of that size, or it
            cannot be split.
    """
    name = config.model
    check_model(name)
    if name in OURS:
        if config.pretrained:
            raise UserError(f"There are no pretrained weights for {name}; drop --pretrained or take a torchvision model.")
        model = OURS[name](classes)
    elif name.startswith("timm/"):
        import timm

        model = _weights(name, lambda: timm.create_model(_timm_name(name), pretrained=config.pretrained, num_classes=classes))
    else:
        model = _torchvision(name, classes, config.pretrained)
    return split(model, name, image_shape, classes)


def _torchvision(name: str, classes: int, pretrained: bool) -> nn.Module:
    get = torchvision.models.get_model
    if not pretrained:
        extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        model = get(name, weights=None, num_classes=classes, **extra)
    else:
        model = _weights(name, lambda: get(name, weights="DEFAULT"))
        head = [module for module in model.named_modules() if isinstance(module[1], nn.Linear)][-1:]
        for head_name, layer in head:
            if layer.out_features != classes:
                parent = model.get_submodule(head_name.rpartition(".")[0])
                setattr(parent, head_name.rpartition(".")[2], nn.Linear(layer.in_features, classes))
    # With auxiliary classifiers a model returns tuples in training; the method has no use for them.
    for auxiliary in ("AuxLogits", "aux1", "aux2"):
        if hasattr(model, auxiliary):
            setattr(model, auxiliary, None)
            model.aux_logits = False
    return model


def _weights(name: str, load: Callable[[], nn.Module]) -> nn.Module:
    try:
        return load()
    except (URLError, OSError, RuntimeError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:150]
        raise UserError(
            f"The pretrained weights of {name} cannot be had ({reason}); put them into the library's cache, "
            "or drop --pretrained."
        ) from None
