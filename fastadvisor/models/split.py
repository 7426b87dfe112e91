"""Split any classifier into backbone and head, without changing its code.

The head is the last ``nn.Linear``; the backbone is everything before it. Modules that a pass must leave out are replaced by
identities during that pass. So the model's own ``forward`` runs, whatever it does between its modules, and the names in its
state dict do not change.
"""

from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from fastadvisor.errors import UserError
from fastadvisor.models.stages import Cut, Layer, find_cut, layers
from fastadvisor.runtime.random_state import RandomState


class EntryState(NamedTuple):
    """The state of a forward pass when it entered the model, or reached a cut: enough to continue the pass from there."""

    activation: Tensor
    """The images, or the activation that crosses the cut; detached."""
    random_state: RandomState
    """The state of the random number generators at that moment."""
    position: int = 0
    """Number of entries that the pass had recorded on its tape by then (metagrad/tangent.py)."""


def is_plain_linear(head: nn.Module) -> bool:
    """Whether ``head`` just computes W h + b from its parameters: it is no subclass, and has no parametrization and no hook."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return type(head) is nn.Linear and not any(hooks) and "forward" not in head.__dict__


def _is_spectral(module: nn.Module) -> bool:
    """Whether ``module`` is a spectral normalisation, which iterates as it runs, or a layer with the older hook for one."""
    return isinstance(module, _SpectralNorm) or any(isinstance(h, SpectralNorm) for h in module._forward_pre_hooks.values())


class _Arrived(Exception):
    """Raised to end a forward pass at the cut that it was to reach."""


class SplitClassifier(nn.Module):
    """A classifier Φ = Φc ∘ Φb, backbone Φb and head Φc (advisor paper, section 3.6), with access to its features.

    Args:
        model: any module from images (B, 3, H, W) to logits (B, C) whose last ``nn.Linear`` computes the logits.
        head: the dotted name of that layer.
        name: the model's name in messages.
    """

    def __init__(self, model: nn.Module, head: str, name: str = "model") -> None:
        super().__init__()
        self.model = model
        self.head_name = head
        self.name = name
        self._head_alone = False
        self._frozen: list[nn.Parameter] = []
        """The parameters that :meth:`train_head_alone` has frozen."""
        self._identity = (nn.Identity(),)  # in a tuple, so that it is not registered as a submodule
        self._normalisations = [
            module
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        ]
        self._spectral = [module for module in model.modules() if _is_spectral(module)]

    @property
    def head(self) -> nn.Linear:
        """The head Φc, from the features (B, D) to the logits (B, C)."""
        head = self.model.get_submodule(self.head_name)
        assert isinstance(head, nn.Linear)
        return head

    def forward(self, x: Tensor, *, start: Cut | None = None, until: Cut | None = None, features: bool = False) -> Tensor:
        """Run the model, or a part of it.

        Args:
            x: (B, 3, H, W) images; with ``start``, the activation that enters that cut.
            start: leave out all modules below this cut.
            until: stop at this cut.
            features: leave out the head, and return the features (B, D).

        Returns:
            Logits (B, C); features (B, D); or the activation that enters ``until``.
        """
        if until is not None:
            with self.capture(until, stop=True) as seen, suppress(_Arrived):
                self.model(x)
            return seen[0].activation
        skipped = (list(start.below) if start is not None else []) + ([self.head_name] if features else [])
        with swap_modules(self.model, dict.fromkeys(skipped, self._identity[0])):
            return self.model(x)

    @contextmanager
    def capture(self, cut: Cut, *, stop: bool = False, tape: Sized = ()) -> Iterator[list[EntryState]]:
        """Collect the state of each forward pass inside the block when it reaches ``cut``.

        Args:
            cut: where the state is collected.
            stop: whether to end the passes there, by an exception.
            tape: what the pass records; its length at that moment is stored as the position.
        """
        seen: list[EntryState] = []

        def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(EntryState(inputs[0].detach(), RandomState.now(inputs[0].device), len(tape)))
            if stop:
                raise _Arrived

        handle = self.model.get_submodule(cut.entry).register_forward_pre_hook(collect)
        try:
            yield seen
        finally:
            handle.remove()

    @contextmanager
    def frozen_statistics(self) -> Iterator[None]:
        """Keep forward passes inside the block from updating running statistics and the vectors of spectral normalisations.

        Training mode still normalises by the statistics of the batch. A batch normalisation in training mode that does not
        track statistics updates no buffer in place, which also makes forward-mode AD possible. A spectral normalisation in
        evaluation mode uses the singular vectors of its last pass; in training mode it would iterate, so that each pass of an
        iteration would be a different function.
        """
        tracking = [module for module in self._normalisations if module.training and module.track_running_stats]
        iterating = [module for module in self._spectral if module.training]
        for module in tracking:
            module.track_running_stats = False
        for spectral in iterating:
            spectral.training = False  # not by eval(): the layer that it belongs to must stay in training mode
        try:
            yield
        finally:
            for module in tracking:
                module.track_running_stats = True
            for spectral in iterating:
                spectral.training = True

    def train_head_alone(self, alone: bool = True) -> None:
        """Freeze the backbone, whose normalisations and dropout then behave as at test time; ``alone=False`` undoes it."""
        if alone == self._head_alone:
            return
        if alone:
            head = {id(parameter) for parameter in self.head.parameters()}
            self._frozen = [p for p in self.model.parameters() if p.requires_grad and id(p) not in head]
        for parameter in self._frozen:
            parameter.requires_grad_(not alone)
        self._head_alone = alone
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation mode; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self._head_alone:
            self.model.eval()
            self.head.train(mode)
        return self

    @property
    def compiled(self) -> bool:
        """Whether any module of the model is compiled by ``torch.compile``."""
        return any(
            module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule)
            for module in self.model.modules()
        )

    def part_parameters(self, cut: Cut | None = None, only: tuple[str, ...] | None = None) -> dict[str, nn.Parameter]:
        """Return the trainable parameters of backbone and head, by their names in this module.

        Args:
            cut: leave out the parameters below this cut.
            only: names of modules of the backbone; leave out the parameters of all others. None: leave out none.
        """
        below = () if cut is None else tuple(f"model.{name}." for name in cut.below)
        kept = ("",) if only is None else tuple(f"model.{name}." for name in only)
        head = set(self.head_parameters().values())
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and (name in head or (not name.startswith(below) and name.startswith(kept)))
        }

    def head_parameters(self) -> dict[str, str]:
        """Return the names of the head's trainable parameters: from the name in the head to the name in this module.

        A parameter that is tied to one of the backbone has the latter's name in this module.
        """
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        return {own: names[id(p)] for own, p in self.head.named_parameters() if p.requires_grad}

    def backbone_parameters(self, cut: Cut | None = None, only: tuple[str, ...] | None = None) -> dict[str, nn.Parameter]:
        """Return those of :meth:`part_parameters` that the features depend on; the head's, if they are tied to the backbone."""
        inside = set(self.head.modules())
        used = {id(p) for module in self.model.modules() if module not in inside for p in module.parameters(recurse=False)}
        return {name: parameter for name, parameter in self.part_parameters(cut, only).items() if id(parameter) in used}

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.model.parameters()).device


@contextmanager
def swap_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the named modules inside the block."""
    originals: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for name, replacement in replacements.items():
            parent_name, _, child = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            originals.append((parent, child, parent._modules[child]))  # type: ignore[arg-type]  # get_submodule found it
            parent._modules[child] = replacement
        yield
    finally:
        for parent, child, module in originals:
            parent._modules[child] = module


def split(model: nn.Module, name: str, image_shape: tuple[int, int], classes: int | None = None) -> SplitClassifier:
    """Find the head of ``model``, and check on a dummy batch that backbone and head together compute its logits.

    Args:
        model: from images (B, 3, H, W) to logits (B, C), on any device.
        name: the model's name in messages.
        image_shape: (height, width) of its images in pixels.
        classes: C; None: as many as the model has.

    Raises:
        UserError: the model does not take images of this size, or does not end in a linear layer on its features.
    """
    images = torch.randn(2, 3, *image_shape, generator=torch.Generator().manual_seed(0))
    weight = next(model.parameters(), images)
    images = images.to(weight.device, weight.dtype)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = run_on_dummy_batch(model, name, images)
            for candidate in reversed([n for n, m in model.named_modules() if isinstance(m, nn.Linear)]):
                whole = SplitClassifier(model, candidate, name)
                fits = whole.head.out_features == (logits.shape[1] if classes is None else classes)
                if fits and _head_gives_logits(whole, images, logits) and _head_weights_matter(whole, images):
                    _check_training(whole, images)
                    return whole
    finally:
        model.train(training)
    raise UserError(
        f"{name} does not end in a linear layer on a feature vector, so it has no features to advise on; "
        "choose a model that does, such as resnet18, convnext_tiny or vit_b_16."
    )


def run_on_dummy_batch(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """Return the logits of ``model`` on a dummy batch of images.

    Raises:
        UserError: the model does not take images of that size, or does not return logits.
    """
    try:
        logits = model(images)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        height, width = images.shape[2:]
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{name} does not take images of {height}×{width} pixels ({reason}); set --image-size.") from None
    if not isinstance(logits, Tensor):
        raise UserError(f"{name} returns {type(logits).__name__} instead of logits; choose another model.")
    return logits


def _head_gives_logits(whole: SplitClassifier, images: Tensor, logits: Tensor) -> bool:
    try:
        features = whole(images, features=True)
    except (AttributeError, RuntimeError, ValueError, TypeError, IndexError):
        return False  # the model needs this layer: it reads its weight, or relies on the size of its output
    if not isinstance(features, Tensor):
        return False
    if features.dim() != 2 or features.shape[1] != whole.head.in_features:
        return False
    return torch.allclose(whole.head(features), logits, rtol=1e-4, atol=1e-5)


def _head_weights_matter(whole: SplitClassifier, images: Tensor) -> bool:
    """Whether the head computes the logits with other weights in it, too: with two heads of zeros either would fit at first."""
    parameters = list(whole.head.parameters())
    before = [parameter.clone() for parameter in parameters]
    try:
        generator = torch.Generator().manual_seed(1)
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return _head_gives_logits(whole, images, whole(images))
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


def _check_training(whole: SplitClassifier, images: Tensor) -> None:
    """Raise a UserError if the model returns something other than logits in training mode; its buffers are restored."""
    before = [buffer.clone() for buffer in whole.buffers()]
    whole.model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            logits = whole(images)
    except (
        RuntimeError,
        ValueError,
    ):  # two images may be too few for a normalisation; the trainer checks the first batch of the run
        return
    finally:
        whole.model.eval()
        for buffer, value in zip(whole.buffers(), before, strict=True):
            buffer.copy_(value)
    if not isinstance(logits, Tensor):
        raise UserError(f"{whole.name} returns {type(logits).__name__} instead of logits in training; choose another model.")


def cut_at(whole: SplitClassifier, image_shape: tuple[int, int], stages: int) -> Cut | None:
    """Return the cut below the top ``stages`` stages, checked on a dummy batch; None if the model cannot be cut there."""
    cut = find_cut(whole.model, whole.head_name, stages)
    return cut if cut is not None and _cut_works(whole, image_shape, cut) else None


def layers_of(whole: SplitClassifier, image_shape: tuple[int, int]) -> list[Layer]:
    """Return the backbone as a list of layers, bottom first, with every cut checked on a dummy batch.

    Where the model cannot be cut, the two layers become one. A single layer means that it cannot be cut anywhere.
    """
    found: list[Layer] = []
    for layer in layers(whole.model, whole.head_name):
        if found and not _cut_works(whole, image_shape, layer.cut):
            found[-1] = Layer((*found[-1].modules, *layer.modules), found[-1].cut)
        else:
            found.append(layer)
    return found


def _cut_works(whole: SplitClassifier, image_shape: tuple[int, int], cut: Cut | None) -> bool:
    weight = next(whole.parameters())
    images = torch.randn(2, 3, *image_shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    if cut is None:
        return False
    training, versions = whole.training, []
    whole.eval()
    entry = whole.model.get_submodule(cut.entry)
    handle = entry.register_forward_pre_hook(lambda _, inputs: versions.append(inputs[0]._version))
    try:
        with torch.no_grad():
            with whole.capture(cut) as seen:
                expected = whole(images, features=True)
            if seen[0].activation._version != versions[0]:
                return False  # overwritten in place above the cut, so no pass could start from it
            features = whole(whole(images, until=cut), start=cut, features=True)
        return torch.allclose(features, expected, rtol=1e-4, atol=1e-5)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
        return False  # not a chain: code of the model before the cut fails on the activation
    finally:
        handle.remove()
        whole.train(training)
