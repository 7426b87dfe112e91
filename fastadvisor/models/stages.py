"""Where a backbone can be cut into a lower and an upper part, and into layers."""

from typing import NamedTuple

from torch import nn

STAGE_FRACTION = 0.02
"""Smallest fraction of the backbone's parameters that makes a link of the chain a stage. Below it are, for example, the stem
and the last normalisation."""

TRUNK_FRACTION = 0.9
"""A ``Sequential`` with more than this fraction of the model's parameters is the chain itself (like ``features`` of a VGG or
ConvNeXt), not one of its links (the last stage of a ResNet holds 75 %)."""


class Cut(NamedTuple):
    """A place in a chain of modules."""

    entry: str
    """Name of the module whose input crosses the cut."""
    below: tuple[str, ...]
    """Names of the modules below the cut, bottom first."""


def chain(model: nn.Module, head: str) -> list[str]:
    """Return the names of the modules before ``head``, in order.

    They are the children of the model; a ``Sequential`` that holds most of the parameters, or the head, is replaced by its own
    children.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    links: list[str] = []
    for name, child in model.named_children():
        fraction = sum(parameter.numel() for parameter in child.parameters()) / max(total, 1)
        if isinstance(child, nn.Sequential) and (fraction > TRUNK_FRACTION or head.startswith(name + ".")):
            links += [f"{name}.{inner}" for inner, _ in child.named_children()]
        else:
            links.append(name)
    return links[: links.index(head)] if head in links else links


def find_cut(model: nn.Module, head: str, stages: int) -> Cut | None:
    """Return the cut with ``stages`` stages above it; None if the model has no more than ``stages`` stages.

    Only a forward pass can tell whether the modules really form a chain: ``split.cut_at`` checks it.
    """
    links = chain(model, head)
    sizes = [sum(parameter.numel() for parameter in model.get_submodule(link).parameters()) for link in links]
    threshold = STAGE_FRACTION * sum(sizes)
    positions = [position for position, size in enumerate(sizes) if size >= threshold and size > 0]
    if len(positions) <= stages:
        return None
    entry = positions[-stages]
    return Cut(links[entry], tuple(links[:entry]))


class Layer(NamedTuple):
    """A part of the backbone that an approximation can count or leave out, such as a residual block or the stem of a ResNet."""

    modules: tuple[str, ...]
    """Names of its modules, bottom first."""
    cut: Cut | None
    """The cut right below it; None for the lowest layer."""


def layers(model: nn.Module, head: str) -> list[Layer]:
    """Return the backbone as a list of layers, bottom first.

    Stages are divided into their blocks, and modules without a weight matrix (normalisations, activations, pooling) are added
    to the layer before them. Only a forward pass can tell whether the modules really form a chain: ``split.layers_of``
    checks it.
    """
    links: list[str] = []
    for link in chain(model, head):
        module = model.get_submodule(link)
        opened = isinstance(module, nn.Sequential) and len(module) > 1
        links += [f"{link}.{inner}" for inner, _ in module.named_children()] if opened else [link]
    pieces: list[list[str]] = [[]]
    begun = False  # whether the current piece already has a weight matrix
    for link in links:
        weighty = any(parameter.dim() > 1 for parameter in model.get_submodule(link).parameters())
        if weighty and begun:
            pieces.append([])
        pieces[-1].append(link)
        begun = begun or weighty
    below = [[link for piece in pieces[:index] for link in piece] for index in range(len(pieces))]
    return [
        Layer(tuple(piece), Cut(piece[0], tuple(under)) if under else None) for piece, under in zip(pieces, below, strict=True)
    ]
