"""The forward pass on a train batch that serves loss pre-calculation, virtual step and actual step (Algorithm 1).

The phases see the same images and the same weights, so the backbone runs forward once, and its graph serves them all. Where
memory is short the graph is let go in between and computed again (``SharedForward.release_graph`` and ``restore_graph``).

Shapes: B train batch, C classes, D features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad.tangent import Recording, Tape
from fastadvisor.methods.base import Advice, Method, Seen
from fastadvisor.methods.beta import select_rows
from fastadvisor.models import Cut, EntryState, SplitClassifier, is_plain_linear
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.random_state import RandomState
from fastadvisor_kernels import Beta


class Plan(NamedTuple):
    """What an engine asks the next shared forward pass to keep for it."""

    cut: Cut | None = None
    """Keep what enters the backbone here."""
    record: bool = False
    """Keep the outputs of convolutions and linear layers (most of them are in the graph anyway)."""


@dataclass
class SharedForward:
    """The one forward pass of the backbone on the train batch; its graph serves virtual and actual step."""

    batch: Batch
    features: Tensor
    """(B, D), with the backbone's graph."""
    logits: Tensor
    """(B, C) of the unmasked features, constants."""
    loss_pre: Tensor
    """(B,) plain cross-entropy on unmasked features (Algorithm 1, Loss pre-calculation); with a graph only where the
    advisor's inputs are attached."""
    draw: Beta
    """The method's random numbers of this iteration."""
    start: EntryState
    """The images, and the random state the pass began with, so that the tangent pass drops the same units."""
    entry_at_cut: EntryState | None = None
    """The same at the engine's cut, where it has one."""
    head_random_state: RandomState | None = None
    """The random state in which the head first ran on the features, unless it is a plain linear layer, which draws nothing."""
    tape: Tape | None = None
    """Outputs of the pass, where the engine asked for them."""
    recompute: Callable[["SharedForward"], None] | None = None
    """Runs the pass a second time and puts its graph into what it is handed; there with ``--lean``, or as a micro-batch."""
    restore_before_tangent: bool = True
    """Whether a pass that has been let go is to be run again for the tangent pass already, which then finds its tape."""
    released: bool = False
    """Whether the graph has been let go."""
    restorations: int = 0
    """How often it has been had again."""

    def entry_state(self, cut: Cut | None) -> EntryState:
        """Return what entered the part of the backbone above ``cut``; all of it for None."""
        if cut is None:
            return self.start
        assert self.entry_at_cut is not None
        return self.entry_at_cut

    def advice_of(self, method: Method, *, attached: bool) -> Advice:
        """Return what ``method`` advises on the features; ``attached``: with a graph to them, too."""
        features = self.features if attached else self.features.detach()
        return method.advise(Seen(features, self.loss_pre, self.batch, self.draw))

    @contextmanager
    def replaying_head(self, model: SplitClassifier) -> Iterator[None]:
        """Run the head inside the block as it ran first: it draws the same numbers and leaves its buffers alone, as backbone
        passes after the first do. So virtual step, tangent and actual step see one function.
        """
        if self.head_random_state is None:
            yield
            return
        with self.head_random_state.replayed(), model.frozen_statistics():
            yield

    def release_graph(self) -> None:
        """Let the graph go, if it can be had again."""
        if self.recompute is not None:
            self.features, self.loss_pre, self.tape = self.features.detach(), self.loss_pre.detach(), None
            self.released = True

    def restore_graph(self) -> None:
        """Have the graph again, if it was let go."""
        if self.released:
            assert self.recompute is not None
            self.recompute(self)
            self.released = False
            self.restorations += 1


@dataclass
class SharedPass:
    """Runs the classifier forward on train batches."""

    model: SplitClassifier
    execution: Execution
    attached: bool = False
    """The losses on unmasked features carry a graph (``--advisor-inputs attached``)."""
    accumulate: int = 1
    """Micro-batches that a batch comes in."""
    lean: bool = False
    """Run the backbone on the train batch a second time rather than hold its graph through the meta step."""

    @property
    def one_graph_at_a_time(self) -> bool:
        """Whether the graph is let go between the phases, and computed again."""
        return self.lean or self.accumulate > 1

    def run(self, train: Batch, draw: Beta, plan: Plan, *, record: bool, releasable: bool) -> SharedForward:
        """Run the backbone on ``train``, and the head on the unmasked features.

        Args:
            train: a batch or a micro-batch.
            draw: the method's random numbers for it.
            plan: what the engine wants kept.
            record: whether outputs of operations are kept, if the plan asks for them.
            releasable: whether the pass can be let go and run again.
        """
        start = EntryState(train.images, RandomState.now(train.images.device))
        tape = Tape() if plan.record and record and not self.model.compiled else None
        with self.execution():
            features, entry_at_cut = self._run_backbone(train, plan, tape)
        head_random_state = None if is_plain_linear(self.model.head) else RandomState.now(train.images.device)
        logits, loss_pre = self._run_head(features, train)
        shared = SharedForward(train, features, logits, loss_pre, draw, start, entry_at_cut, head_random_state, tape)
        if releasable:
            shared.recompute = partial(self._recompute, plan)  # not bound to it: a cycle would hold its tape until collected
        return shared

    def micro_batches(self, train: Batch, draw: Beta) -> Iterator[tuple[Batch, Beta]]:
        """Return the parts of ``train``, each with its part of what was drawn for the whole."""
        each = len(train.labels) // self.accumulate
        for number, part in enumerate(train.split(self.accumulate)):
            yield part, select_rows(draw, slice(number * each, (number + 1) * each))

    def _run_backbone(self, train: Batch, plan: Plan, tape: Tape | None) -> tuple[Tensor, EntryState | None]:
        with nullcontext() if tape is None else Recording(tape):
            if plan.cut is None:
                return self.model(train.images, features=True), None
            with self.model.capture(plan.cut, tape=() if tape is None else tape) as seen:
                features = self.model(train.images, features=True)
        if tape is not None:
            tape.forget(seen[0].position)
        return features, seen[0]

    def _run_head(self, features: Tensor, train: Batch) -> tuple[Tensor, Tensor]:
        with nullcontext() if self.attached else torch.no_grad(), self.execution():
            logits = self.model.head(features)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return logits.detach(), cross_entropy(wide, train.labels, reduction="none")

    def _recompute(self, plan: Plan, shared: SharedForward) -> None:
        shared.tape = Tape() if plan.record and not self.model.compiled else None
        with shared.start.random_state.replayed(), self.model.frozen_statistics(), self.execution():
            shared.features, shared.entry_at_cut = self._run_backbone(shared.batch, plan, shared.tape)
        with shared.replaying_head(self.model):
            _, shared.loss_pre = self._run_head(shared.features, shared.batch)
