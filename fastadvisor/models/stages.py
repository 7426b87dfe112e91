"""Where a backbone can be cut into a lower and an upper part."""

from typing import NamedTuple

from torch import nn

STAGE_FRACTION = 0.02
"""A link of the chain counts as a stage from this fraction of the backbone's parameters on: a stem's or a last
normalisation's few parameters are no stage of their own."""

TRUNK_FRACTION = 0.9
"""A ``Sequential`` with more than this fraction of the parameters is the chain itself (``features`` of a VGG or ConvNeXt),
not one of its links (the last stage of a ResNet holds 75 %)."""


class Cut(NamedTuple):
    """A place in a chain of modules."""

    entry: str
    """The module whose input crosses the cut."""
    below: tuple[str, ...]
    """The modules under it, bottom first."""


def chain(model: nn.Module, head: str) -> list[str]:
    """Return the modules before ``head`` in order: the model's children, with a ``Sequential`` that holds most
    parameters, or the head, opened up.
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
    """Return the cut with ``stages`` stages above it; None if the model has no more stages than that.

    Whether the modules really form a chain only a run can tell: see ``split.cut_at``.
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
    """A piece of the chain that an approximation may count or leave out: a residual block of a ResNet, its stem."""

    modules: tuple[str, ...]
    cut: Cut | None
    """Right below it; None for the lowest."""


def layers(model: nn.Module, head: str) -> list[Layer]:
    """Return the chain as layers, bottom first, without the head: stages opened into their blocks, and modules without
    a weight matrix (normalisations, activations, pooling) put to the layer before them.

    Whether the modules really form a chain only a run can tell: see ``split.layers_of``.
    """
    links: list[str] = []
    for link in chain(model, head):
        module = model.get_submodule(link)
        opened = isinstance(module, nn.Sequential) and len(module) > 1
        links += [f"{link}.{inner}" for inner, _ in module.named_children()] if opened else [link]
    pieces: list[list[str]] = [[]]
    begun = False  # whether the last piece has a weight matrix
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
