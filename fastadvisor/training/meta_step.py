"""One training step with a meta-gradient, for a training loop of one's own."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from fastadvisor.config import Config, MetaConfig, validate
from fastadvisor.errors import UserError, suggest
from fastadvisor.iterations import StepResult
from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad import check_meta
from fastadvisor.methods import METHODS, DataFacts, Stage, build_method, check_method
from fastadvisor.models import split
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.precision import amp_dtype
from fastadvisor.runtime.ranks import ALONE
from fastadvisor.runtime.state import Module, load_parts, save_parts
from fastadvisor.runtime.watch import NonFiniteError
from fastadvisor.training.assembly import build_step

OF_THE_STEP = ("clip_grad_norm", "amp", "amp_dtype", "nan_policy")
"""Settings of a run, besides those of the method and the meta-gradient, that a step takes."""


class MetaStep:
    """A training step of any method, on a classifier and an optimizer of one's own.

    ::

        step = fastadvisor.MetaStep(model, optimizer, method="mfrw-mes", image_size=224)
        for (images, labels), (meta_images, meta_labels) in zip(train_loader, cycle(meta_loader)):
            loss, meta_loss, skipped = step(images, labels, meta_images, meta_labels)

    It takes the place of forward pass, loss, ``backward()`` and ``optimizer.step()``. Learning-rate schedule, evaluation and
    saving stay yours; save :meth:`state_dict` beside the model's, for the advisor is in it.

    Args:
        model: the classifier, on its device: (B, 3, H, W) → logits (B, C), by a linear layer at the end.
        optimizer: on its parameters.
        method: by name, as ``--method``; one that trains in a single stage.
        image_size: side in pixels, or (height, width), of the images.
        label_counts: (C,) training samples of each class, by the labels as given, for methods that need them.
        samples: number of training samples, for methods that remember samples; ``ids`` are below it.
        settings: of the method and the meta-gradient, as of ``fastadvisor.train``, and ``clip_grad_norm``, ``amp``,
            ``amp_dtype`` and ``nan_policy``.

    Raises:
        UserError: the model has no linear layer at its end, the method or a setting is unknown, or the method needs something
            that is not given.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        method: str = "mfrw-mes",
        *,
        image_size: int | tuple[int, int] = 224,
        label_counts: Tensor | None = None,
        samples: int | None = None,
        **settings: Any,
    ) -> None:
        check_method(method)
        kind = METHODS[method]
        given = {"label_counts": label_counts, "samples": samples}
        for need in kind.needs:
            if given[need] is None:
                raise UserError(f"The method {method} needs {need}: hand it to MetaStep.")
        _check_settings(settings, {field.name for field in fields(kind.Settings)})
        config = validate(Config, {**settings, "method": method})
        check_meta(config, kind, amp=config.amp)
        if config.virtual_step == "optimizer" and not isinstance(optimizer, torch.optim.SGD):
            raise UserError("virtual_step='optimizer' knows torch.optim.SGD alone: take 'sgd', or that optimizer.")
        shape = (image_size, image_size) if isinstance(image_size, int) else image_size
        device = next(model.parameters()).device
        whole = split(model, type(model).__name__, shape)
        classes = whole.head.out_features
        counts = torch.zeros(classes, dtype=torch.int64) if label_counts is None else label_counts.cpu()
        if len(counts) != classes:
            raise UserError(f"label_counts has {len(counts)} entries, and the model {classes} classes.")
        built = build_method(config, whole.head.in_features, DataFacts(classes, samples or 0, counts)).to(device)
        if built.stages() != (Stage(),):
            raise UserError(f"The method {method} trains in stages of its own: take fastadvisor.train for it.")
        execution = Execution(device, amp_dtype(config.amp_dtype, device) if config.amp else None)
        self.method = built
        """An ``nn.Module``: the advisor is in it."""
        self.iteration = build_step(config, whole, built, execution, shape, optimizer)
        self._with_ids = samples is not None

    @property
    def meta_is_due(self) -> bool:
        """Whether the next call needs a meta batch: every one, unless ``meta_interval`` or ``approx_meta`` says otherwise."""
        return self.iteration.meta_is_due

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        meta_images: Tensor | None = None,
        meta_labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
    ) -> StepResult:
        """Take one step; the model is to be in training mode.

        Args:
            images: (B, 3, H, W) float, on the model's device.
            labels: (B,) int64.
            meta_images: (M, 3, H, W), clean and balanced; may be left out where :attr:`meta_is_due` says so.
            meta_labels: (M,) int64.
            ids: (B,) int64 stable sample numbers, for methods that remember samples.

        Returns:
            ``loss``, ``meta_loss`` (None without a meta step) and ``skipped``; the losses are scalars on the device.

        Raises:
            UserError: a meta batch or ids are missing, or something is not finite.
        """
        due = self.meta_is_due
        if due and (meta_images is None or meta_labels is None):
            raise UserError("This step needs meta_images and meta_labels: hand them over, or look at meta_is_due first.")
        if self._with_ids and ids is None:
            raise UserError("The method remembers samples: hand over their ids.")
        train = Batch(images, labels, torch.arange(len(labels), device=labels.device) if ids is None else ids)
        meta = None
        if due and meta_images is not None and meta_labels is not None:
            meta = Batch(meta_images, meta_labels, torch.arange(len(meta_labels), device=meta_labels.device))
        try:
            return self.iteration(train, meta)
        except NonFiniteError as error:
            number = error.iteration or self.iteration.iteration
            raise UserError(
                f"Step {number}: {error.name} is not finite; lower the learning rate or advisor_lr, or take nan_policy='skip'."
            ) from None

    def state_dict(self) -> dict[str, Any]:
        """Return all that a step goes by, but for the model: advisor, both optimizers, counters."""
        return save_parts(self._parts(), {}, ALONE)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; a UserError if it is of another method."""
        load_parts(state, "The state", self._parts())

    def _parts(self) -> dict[str, Any]:
        method = Module(self.method, "is of another method: hand over that of the method it was made by.")
        return {"method": method, **self.iteration.parts(), "execution": self.iteration.execution}


def _check_settings(settings: Mapping[str, Any], of_method: set[str]) -> None:
    """Raise a UserError for a setting that a step has no use for."""
    known = {*(field.name for field in fields(MetaConfig)), *of_method, *OF_THE_STEP}
    for name in settings:
        if name not in known:
            raise UserError(f"MetaStep has no setting {name!r}.{suggest(name, known)} It takes: {', '.join(sorted(known))}.")
