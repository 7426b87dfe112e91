"""The forward pass on a train batch that serves loss pre-calculation, virtual step and actual step (Algorithm 1).

The three phases use the same images and the same weights, so the backbone runs forward once, and its graph serves them all.
To save memory the graph can be released between the phases and recomputed (``SharedForward.release_graph``,
``restore_graph``).

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
    """What an engine needs the next forward pass on a train batch to keep."""

    cut: Cut | None = None
    """The cut of the engine: the activation that crosses it is kept. None: the engine has no cut."""
    record: bool = False
    """Whether to keep the outputs of convolutions and linear layers, and the statistics of batch normalisations, on a tape."""


@dataclass
class SharedForward:
    """One forward pass of the classifier on a train batch, or on a micro-batch, and what is needed to repeat parts of it."""

    batch: Batch
    features: Tensor
    """(B, D), with the graph of the backbone unless it has been released."""
    logits: Tensor
    """(B, C) from unmasked features, detached."""
    loss_pre: Tensor
    """ℓpre (B,): plain cross-entropy of each sample on unmasked features, float32 or wider (Algorithm 1, Loss
    Pre-calculation). It has a graph only with ``--advisor-inputs attached``."""
    draw: Beta
    """The method's random numbers for these samples, the same in every phase of the iteration."""
    start: EntryState
    """The images, and the random state at the start of the pass: a repeated pass must drop the same units."""
    entry_at_cut: EntryState | None = None
    """The activation and the random state at the engine's cut; None if it has no cut."""
    head_random_state: RandomState | None = None
    """The random state before the head ran; None for a plain linear layer, which draws no random numbers."""
    tape: Tape | None = None
    """What the pass computed, if the engine asked for it (``Plan.record``)."""
    recompute: Callable[["SharedForward"], None] | None = None
    """Repeats the pass and stores its results, with their graph, in the object it is called with. None if the graph must not be
    released; set with ``--lean`` and with micro-batches."""
    restore_before_tangent: bool = True
    """Whether a released graph is restored before the tangent pass rather than after it. Before, the tangent pass can use the
    outputs on the tape; after, the graphs of several micro-batches never exist at the same time."""
    released: bool = False
    """Whether the graph is released at the moment."""
    restorations: int = 0
    """How often the graph has been restored."""

    def entry_state(self, cut: Cut | None) -> EntryState:
        """Return the activation and the random state at ``cut``; for None, those at the start of the whole pass."""
        if cut is None:
            return self.start
        assert self.entry_at_cut is not None
        return self.entry_at_cut

    def advice_of(self, method: Method, *, attached: bool) -> Advice:
        """Return the advice of ``method`` on this batch, with its graph to the advisor's parameters.

        Args:
            method: the method that advises.
            attached: whether the advice has a graph to the features, too.
        """
        features = self.features if attached else self.features.detach()
        return method.advise(Seen(features, self.loss_pre, self.batch, self.draw))

    @contextmanager
    def replaying_head(self, model: SplitClassifier) -> Iterator[None]:
        """Make the head repeat its first run inside the block: it draws the same random numbers and updates no buffer.

        So virtual step, tangent pass and actual step all differentiate the same function.
        """
        if self.head_random_state is None:
            yield
            return
        with self.head_random_state.replayed(), model.frozen_statistics():
            yield

    def release_graph(self) -> None:
        """Release the graph, if it can be recomputed."""
        if self.recompute is not None:
            self.features, self.loss_pre, self.tape = self.features.detach(), self.loss_pre.detach(), None
            self.released = True

    def restore_graph(self) -> None:
        """Recompute the graph, if it was released."""
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
    """Whether ℓpre gets a graph to the weights (``--advisor-inputs attached``)."""
    accumulate: int = 1
    """Number of micro-batches that a batch is split into."""
    lean: bool = False
    """Whether the graph is released during the meta step, at the price of a second forward pass (``--lean``)."""

    @property
    def one_graph_at_a_time(self) -> bool:
        """Whether graphs are released between the phases, so that no two exist at the same time."""
        return self.lean or self.accumulate > 1

    def run(self, train: Batch, draw: Beta, plan: Plan, *, record: bool, releasable: bool) -> SharedForward:
        """Run the backbone on ``train``, and the head on the unmasked features.

        Args:
            train: a batch or a micro-batch.
            draw: the method's random numbers for it.
            plan: what the engine needs from this pass.
            record: whether outputs may be kept on a tape; they are if ``plan`` asks for them and the model is not compiled.
            releasable: whether the graph may be released and recomputed.
        """
        start = EntryState(train.images, RandomState.now(train.images.device))
        tape = Tape() if plan.record and record and not self.model.compiled else None
        with self.execution():
            features, entry_at_cut = self._run_backbone(train, plan, tape)
        head_random_state = None if is_plain_linear(self.model.head) else RandomState.now(train.images.device)
        logits, loss_pre = self._run_head(features, train)
        shared = SharedForward(train, features, logits, loss_pre, draw, start, entry_at_cut, head_random_state, tape)
        if releasable:
            shared.recompute = partial(
                self._recompute, plan
            )  # not bound to ``shared``: a reference cycle would keep its tape alive
        return shared

    def micro_batches(self, train: Batch, draw: Beta) -> Iterator[tuple[Batch, Beta]]:
        """Yield the micro-batches of ``train``, each with its rows of ``draw``, the random numbers for the whole batch."""
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
