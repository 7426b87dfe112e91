"""What all kinds of iteration have in common: one call takes one training step."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadvisor.iterations.meta_train import MetaTrain
from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad import Engine, Plan, SharedForward, SharedPass
from fastadvisor.methods import Advice, Method
from fastadvisor.methods.beta import select_rows
from fastadvisor.models import SplitClassifier
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.state import Fixed, Optimizer, Part, Value
from fastadvisor.runtime.update import Update
from fastadvisor.runtime.watch import Watch
from fastadvisor_kernels import Beta


class StepResult(NamedTuple):
    """The losses of one iteration on this rank's images: scalars on the device, so reading one waits for the device."""

    loss: Tensor
    """Training loss of the actual step, detached."""
    meta_loss: Tensor | None
    """Lmeta(w'), detached; None if there was no meta step, or if it was skipped because a value was not finite."""
    skipped: bool = False
    """Whether the classifier's step was skipped because a value was not finite."""


@dataclass
class Iteration(ABC):
    """One iteration of training. It is called once for each train batch; a subclass defines what it does."""

    model: SplitClassifier
    method: Method
    shared_pass: SharedPass
    """Runs the classifier forward on train batches."""
    update: Update
    """Takes the classifier's steps."""
    meta_train: MetaTrain | None = None
    """Updates the meta-parameters; None for a method that has none."""
    iteration: int = 0
    """Number of iterations taken so far."""
    advice: Advice | None = None
    """The advice that the last actual step used; with micro-batches, that on the last one."""

    @abstractmethod
    def take(self, train: Batch, meta: Batch | None) -> StepResult:
        """Take the training step itself; arguments and result are those of :meth:`__call__`."""

    def __call__(self, train: Batch, meta: Batch | None = None) -> StepResult:
        """Take one training step.

        Args:
            train: this rank's train batch.
            meta: this rank's meta batch; None if no meta step is due.

        Raises:
            NonFiniteError: the watch found a value that is not finite, and is not set to skip such steps.
        """
        self.iteration += 1
        result = self.compute(train, meta)
        self.finish()
        return result

    def compute(self, train: Batch, meta: Batch | None) -> StepResult:
        """Do the part of an iteration that runs on the device; ``finish`` does the rest."""
        watch = self.watch
        kept = [*self.model.buffers(), *self.method.buffers()] if watch is not None and watch.skip else []
        before = [buffer.clone() for buffer in kept]
        result = self.take(train, meta)
        if result.skipped:  # the forward pass has already updated running statistics and the method's buffers
            for buffer, value in zip(kept, before, strict=True):
                buffer.copy_(value)
        return result

    def finish(self) -> None:
        """Do the part of an iteration that runs on the host.

        Raises:
            NonFiniteError: the watch found a value that is not finite in the iteration before.
        """
        self.execution.end_iteration()
        if self.watch is not None:
            self.watch.end_iteration(self.iteration)

    def due(self) -> tuple[str, ...]:
        """Return the names of the batches that the next iteration needs: "train", and "meta" if it takes a meta step."""
        meta = self.meta_train is not None and self.iteration % self.meta_train.interval == 0
        return ("train", "meta") if meta else ("train",)

    def parts(self) -> dict[str, Part]:
        """Return, by name, the parts of the iteration that a checkpoint saves."""
        found: dict[str, Part] = {
            "iteration": Value(self, "iteration", int),
            "skipped": Fixed(0) if self.watch is None else Value(self.watch, "skipped", int),
            "optimizer": Optimizer(self.optimizer),
        }
        return found if self.meta_train is None else {**found, **self.meta_train.parts()}

    @property
    def meta_is_due(self) -> bool:
        """Whether the next iteration takes a meta step, and so needs a meta batch."""
        return "meta" in self.due()

    def draw(self, train: Batch) -> Beta:
        """Draw the method's random numbers for the batch of all ranks, and return those of ``train``, this rank's batch."""
        common, rows = self.execution.common, len(train.labels)
        with common.drawing():
            whole = self.method.draw(common.share.whole(rows), train.labels.device)
        return select_rows(whole, common.share.part(rows))

    def forward_pass(self, train: Batch, draw: Beta, plan: Plan | None = None) -> SharedForward:
        """Run the classifier forward on ``train``, for (a) Loss Pre-calculation and all phases after it.

        Args:
            train: a batch or a micro-batch.
            draw: the method's random numbers for it.
            plan: what the engine needs from this pass; None if no meta step follows.
        """
        return self.shared_pass.run(train, draw, Plan() if plan is None else plan, record=False, releasable=False)

    def micro_batches(self, train: Batch) -> Iterator[SharedForward]:
        """Run the micro-batches of ``train`` forward, one at a time, in an iteration without a meta step."""
        for part in self.shared_pass.micro_batches(train, self.draw(train)):
            yield self.let_method_observe(self.forward_pass(*part))

    def let_method_observe(self, shared: SharedForward) -> SharedForward:
        """Call the method's ``observe`` on a forward pass, with the samples of all ranks, and return the pass unchanged.

        Called exactly once for each forward pass of an iteration, because ``observe`` may change the method's buffers.
        """
        if type(self.method).observe is not Method.observe:
            z_BC, batch = shared.logits, shared.batch
            if self.execution.ranks.count > 1:
                z_BC, labels, ids = (self._gather_from_ranks(part) for part in (z_BC, batch.labels, batch.ids))
                batch = Batch(batch.images, labels, ids)
            self.method.observe(z_BC, batch)
        return shared

    @torch.no_grad()
    def _gather_from_ranks(self, rows: Tensor) -> Tensor:
        share = self.execution.common.share
        whole = rows.new_zeros((share.whole(len(rows)), *rows.shape[1:]))
        whole[share.part(len(rows))] = rows
        return self.execution.ranks.total(whole)

    def actual_train(self, parts: Iterable[SharedForward]) -> tuple[Tensor, bool]:
        """(d) Actual-Train: w ← SGD(w, ∇w L(w; θ)) under the advice of the current advisor.

        Args:
            parts: the forward passes on the micro-batches of the train batch, or the one on all of it.

        Returns:
            The training loss, a detached scalar, and whether the step was taken.
        """
        losses: list[Tensor] = []
        for shared in parts:
            shared.restore_graph()
            with nullcontext() if self.shared_pass.attached else torch.no_grad():
                advice = shared.advice_of(self.method, attached=self.shared_pass.attached)
            losses.append(self.backward(shared, advice, len(losses)))
        return self.classifier_step(losses)

    def backward(self, shared: SharedForward, advice: Advice, number: int) -> Tensor:
        """Add the gradient of micro-batch ``number``'s loss under ``advice`` to the parameters' ``grad``; return the loss."""
        with self.execution(), shared.replaying_head(self.model):
            loss = self.method.loss(shared.features, shared.batch, self.model.head, advice)
        self.advice = advice.detach()
        self.update.backward(loss, number)
        return loss.detach()

    def classifier_step(self, losses: list[Tensor]) -> tuple[Tensor, bool]:
        """Step the classifier's optimizer; return the mean of ``losses``, and whether the step was taken."""
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        outputs = {} if self.advice is None else self.advice.named("the advisor's {}")
        return loss, self.update.step({**outputs, "the training loss": loss}, self._named_gradients)

    def _named_gradients(self) -> dict[str, Tensor | None]:
        return {f"the gradient of {name}": parameter.grad for name, parameter in self.model.model.named_parameters()}

    @property
    def execution(self) -> Execution:
        """Runs forward and backward passes (precision, ranks, random numbers)."""
        return self.update.execution

    @property
    def watch(self) -> Watch | None:
        """Looks for infinities and NaN before they reach a weight; None: nothing is checked."""
        return self.update.watch

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The classifier's optimizer."""
        assert self.update.optimizer is not None
        return self.update.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self.update.optimizer = optimizer

    @property
    def advisor_optimizer(self) -> torch.optim.Optimizer | None:
        """The advisor's optimizer; None if there is no advisor."""
        return None if self.meta_train is None else self.meta_train.update.optimizer

    @advisor_optimizer.setter
    def advisor_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.meta_train is not None
        self.meta_train.update.optimizer = optimizer

    @property
    def engine(self) -> Engine | None:
        """Computes the meta-gradient; None for a method without meta-parameters."""
        return None if self.meta_train is None else self.meta_train.engine

    @property
    def interval(self) -> int:
        """Number of iterations from one meta step to the next."""
        return 1 if self.meta_train is None else self.meta_train.interval

    # What a recorder of CUDA graphs asks (runtime/cuda_graph.py).

    def capturable(self) -> str | None:
        """Return why iterations cannot be recorded as a CUDA graph, as a clause; None if they can."""
        if self.execution.ranks.count > 1:
            return "several processes average their gradients"
        if self.execution.scaler is not None:
            return "the host reads whether float16 overflowed"
        if self.watch is not None and not self.watch.deferred:
            return f"the host reads whether the numbers are finite (--nan-policy {'skip' if self.watch.skip else 'stop'})"
        for optimizer in self.optimizers():
            if not all(group.get("fused") for group in optimizer.param_groups):
                return f"{type(optimizer).__name__}, which is not torch's fused one, takes its learning rate from the host"
        if self.model.compiled:
            return "the model is compiled"
        return None if self.engine is None else self.engine.capturable()

    def graph_kind(self) -> Hashable | None:
        """Return what, beside its batches, tells the next iteration's operations; None if the host reads something in it."""
        return self.engine.graph_kind() if self.engine is not None and self.meta_is_due else ()

    def count(self, by: int) -> None:
        """Count ``by`` meta steps of a replayed graph."""
        if by and self.engine is not None:
            self.engine.count(by)

    def leftovers(self) -> Any:
        """Return the advice, and what the watch has looked at."""
        advice = None if self.advice is None else (self.advice.beta, self.advice.outputs)
        return advice, [] if self.watch is None else list(self.watch.looks)

    def put_back(self, leftovers: Any) -> None:
        """Leave them as :meth:`compute` would have."""
        advice, looks = leftovers
        self.advice = None if advice is None else Advice(beta=advice[0], **advice[1])
        if self.watch is not None:
            self.watch.looks = list(looks)

    def tensors(self) -> list[Tensor]:
        """Return weights and buffers of the classifier and the method."""
        return [tensor for module in (self.model, self.method) for tensor in (*module.parameters(), *module.buffers())]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the classifier's and, if there is one, the advisor's."""
        return [self.optimizer, *([] if self.advisor_optimizer is None else [self.advisor_optimizer])]
