"""One iteration, phase by phase as in Algorithm 1 of the advisor paper.

The four phases see the same images and the same weights, so the backbone runs forward on the train batch once, and its graph
serves Loss Pre-calculation, Virtual-Train and Actual-Train.

With gradient accumulation a batch comes in micro-batches, whose graphs are let go and had again (``SharedForward.again``).
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastadvisor.data.types import Batch
from fastadvisor.metagrad import Engine, MetaProblem, Plan, SharedForward, VirtualStep
from fastadvisor.metagrad.tangent import Recording, Tape
from fastadvisor.methods import Advice, Method
from fastadvisor.methods.beta import rows_of
from fastadvisor.models import Entering, SplitClassifier, is_plain_linear
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.random_state import RandomState
from fastadvisor.watch import Watch
from fastadvisor_kernels import Beta


class StepResult(NamedTuple):
    """Losses of an iteration, scalars on the device (reading them waits for it), of this rank's images."""

    loss: Tensor
    meta_loss: Tensor | None
    """None in an iteration without a meta step, or where it was left out because something was not finite."""
    skipped: bool = False
    """Whether the classifier's step was left out because something was not finite."""


@dataclass
class Step:
    """The iteration of any method; one without meta-parameters is a plain training step."""

    model: SplitClassifier
    method: Method
    optimizer: torch.optim.Optimizer
    advisor_optimizer: torch.optim.Optimizer | None
    engine: Engine
    execution: Execution
    virtual_with_optimizer: bool = False
    attached: bool = False
    """The advisor's inputs carry gradients (``--advisor-inputs attached``)."""
    interval: int = 1
    """A meta step every ``interval``-th iteration."""
    behind: bool = False
    """The advisor is one step behind: its virtual step is the actual one."""
    lean: bool = False
    """Run the backbone on the train batch a second time rather than hold its graph through the meta step."""
    accumulate: int = 1
    """Micro-batches that a batch comes in."""
    clip: float | None = None
    """Norm that the actual gradient is cut to."""
    watch: Watch | None = None
    """Looks at the numbers before they reach a weight."""
    iteration: int = 0
    advice: Advice | None = None
    """Of the last actual step (with micro-batches, of the last of them)."""

    @property
    def meta_is_due(self) -> bool:
        """Whether the next iteration has a meta step, and so needs a meta batch."""
        return self.method.learns and self.iteration % self.interval == 0

    def __call__(self, train: Batch, meta: Batch | None) -> StepResult:
        """Take one step on ``train``; ``meta`` is None where no meta step is due.

        Raises:
            NonFiniteError: the watch found something, and does not skip.
        """
        self.iteration += 1
        result = self.compute(train, meta)
        self.finish()
        return result

    def compute(self, train: Batch, meta: Batch | None) -> StepResult:
        """Do all of an iteration that happens on the device."""
        statistics = [buffer.clone() for buffer in self.model.buffers()] if self.watch is not None and self.watch.skip else []
        if meta is None or not self.method.learns:
            parts = (self.loss_pre_calculation(*part, with_meta_step=False) for part in self._micro_batches(train))
            loss, taken, meta_loss = *self.actual_train(parts), None
        elif self.behind:
            loss, taken, meta_loss = self.actual_then_meta_train(train, meta)
        else:
            shared = self._shared(train)
            meta_loss = self.virtual_and_meta_train(shared, meta)
            loss, taken = self.actual_train(shared)
        if not taken:  # the forward pass has moved the running statistics
            for buffer, before in zip(self.model.buffers(), statistics, strict=True):
                buffer.copy_(before)
        return StepResult(loss, meta_loss, not taken)

    def finish(self) -> None:
        """Do what an iteration leaves to the host.

        Raises:
            NonFiniteError: the watch found something in the iteration before.
        """
        self.execution.end_iteration()
        if self.watch is not None:
            self.watch.end_iteration(self.iteration)

    def capturable(self) -> str | None:
        """Return why iterations cannot be recorded as a CUDA graph (runtime/cuda_graph.py); None if they can."""
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
        return self.engine.capturable() if self.method.learns else None

    def graph_kind(self) -> Hashable | None:
        """Return what, beside its batches, tells the next iteration's operations; None if the host reads something in it."""
        return self.engine.graph_kind() if self.meta_is_due else ()

    def count(self, by: int) -> None:
        """Count ``by`` meta steps of a replayed graph."""
        if by:
            self.engine.count(by)

    def leftovers(self) -> tuple[Advice | None, list[Any]]:
        """Return the advice, and what the watch has looked at."""
        return self.advice, [] if self.watch is None else list(self.watch.looks)

    def put_back(self, leftovers: tuple[Advice | None, list[Any]]) -> None:
        """Leave them as :meth:`compute` would have."""
        self.advice = leftovers[0]
        if self.watch is not None:
            self.watch.looks = list(leftovers[1])

    def tensors(self) -> list[Tensor]:
        """Return weights and buffers of the classifier and the advisor."""
        modules = [self.model] if self.method.advisor is None else [self.model, self.method.advisor]
        return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the classifier's and, if there is one, the advisor's."""
        return [self.optimizer, *([] if self.advisor_optimizer is None else [self.advisor_optimizer])]

    def draw(self, train: Batch) -> Beta:
        """Return the method's random numbers for ``train``: this rank's part of those for the batch of all ranks."""
        common, rows = self.execution.common, len(train.labels)
        with common.drawing():
            whole = self.method.draw(common.share.whole(rows), train.labels.device)
        return rows_of(whole, common.share.part(rows))

    def loss_pre_calculation(
        self, train: Batch, draw: Beta, plan: Plan | None = None, *, with_meta_step: bool = True
    ) -> SharedForward:
        """(a) Run the backbone once, and the head on its unmasked features. ``plan``: the engine's, if it has been asked."""
        start = Entering(train.images, RandomState.now(train.images.device))
        if plan is None:
            plan = self.engine.plan() if with_meta_step else Plan()
        # A tape holds on to what a lean step, or one step behind, lets go before the meta step; above a cut that is little.
        too_much = self.lean or self.accumulate > 1 or (self.behind and plan.cut is None)
        tape = Tape() if plan.record and not too_much and not self.model.compiled else None
        with self.execution():
            features, at_cut = self._features(train, plan, tape)
        at_head = None if is_plain_linear(self.model.head) else RandomState.now(train.images.device)
        loss_pre = self._loss_pre(features, train)
        shared = SharedForward(train, features, loss_pre, draw, start, at_cut, at_head, tape)
        if (self.lean or self.accumulate > 1) and with_meta_step and not self.behind:
            shared.again = partial(self._run_again, plan)  # not bound to it: a cycle would hold its tape until collected
        return shared

    def virtual_and_meta_train(self, shared: list[SharedForward], meta: Batch) -> Tensor | None:
        """(b) Virtual-Train: w' = w − α ∇w L(w; θ). (c) Meta-Train: θ ← Adam(θ, ∇θ Lmeta(w'))."""
        problem = self.problem(*shared)
        virtual = self.engine.virtual_train(problem)
        return self._meta_train(problem, virtual, meta)

    def actual_train(self, parts: Iterable[SharedForward]) -> tuple[Tensor, bool]:
        """(d) Actual-Train: w ← SGD(w, ∇w L(w; θ)) with the updated advisor; return the loss, and whether it was taken."""
        losses: list[Tensor] = []
        for shared in parts:
            shared.restore()
            with nullcontext() if self.attached else torch.no_grad():
                advice = self._advise(shared)
            losses.append(self._backward(shared, advice, len(losses)))
        return self._classifier_step(losses)

    def actual_then_meta_train(self, train: Batch, meta: Batch) -> tuple[Tensor, bool, Tensor | None]:
        """(b), (c), (d) with the advisor one step behind: the actual gradient, taken with today's advisor, is the virtual
        gradient too, and the advisor it teaches serves from the next iteration on. The graph is gone by the meta step.
        """
        plan = self.engine.plan()
        losses: list[Tensor] = []
        problems: list[MetaProblem] = []
        for part in self._micro_batches(train):
            problem = replace(self.problem(self.loss_pre_calculation(*part, plan)), stepped=True)
            losses.append(self._backward(problem.shared, problem.training_advice(), len(losses)))
            problems.append(problem)
        parameters = self.model.part_parameters()
        gradients = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values())
        whole = problems[0] if len(problems) == 1 else replace(problems[0], parts=tuple(problems))
        meta_loss = self._meta_train(whole, whole.step.apply(parameters, gradients), meta)
        return *self._classifier_step(losses), meta_loss

    def problem(self, *shared: SharedForward) -> MetaProblem:
        """Return what the meta step starts from: one forward pass, or those of the micro-batches."""
        lr, shares = self._rates()
        step = VirtualStep(lr, self.optimizer if self.virtual_with_optimizer else None, shares)
        parts = tuple(MetaProblem(self.model, self.method, one, self._advise(one), step, self.attached) for one in shared)
        return parts[0] if len(parts) == 1 else replace(parts[0], parts=parts)

    def _rates(self) -> tuple[float | Tensor, dict[str, float]]:
        """Return the largest rate, and the others' shares of it by parameter name. In a graph rates are on the device, where
        nothing compares them: there the groups' fixed scales do.
        """
        groups = self.optimizer.param_groups
        key = "lr_scale" if isinstance(groups[0]["lr"], Tensor) else "lr"
        top = max(groups, key=lambda group: group[key]) if len(groups) > 1 else groups[0]
        largest = top["lr"]
        if len(groups) == 1 or not top[key]:
            return largest, {}
        shares = {id(p): group[key] / top[key] for group in groups for p in group["params"]}
        return largest, {name: shares[id(p)] for name, p in self.model.part_parameters().items()}

    def _micro_batches(self, train: Batch) -> Iterator[tuple[Batch, Beta]]:
        """Return the parts of ``train``, each with its part of what is drawn for the whole."""
        drawn, each = self.draw(train), len(train.labels) // self.accumulate
        for number, part in enumerate(train.split(self.accumulate)):
            yield part, rows_of(drawn, slice(number * each, (number + 1) * each))

    def _shared(self, train: Batch) -> list[SharedForward]:
        plan = self.engine.plan()
        if self.accumulate == 1:
            return [self.loss_pre_calculation(train, self.draw(train), plan)]
        parts = []
        for part in self._micro_batches(train):
            with torch.no_grad():  # the graph is made when it is asked for
                parts.append(self.loss_pre_calculation(*part, plan))
            parts[-1].for_tangent = False  # or all graphs would be there at once
            parts[-1].release()
        return parts

    def _advise(self, shared: SharedForward) -> Advice:
        features, loss_pre = shared.features, shared.loss_pre
        if not self.attached:
            features = features.detach()
        return self.method.advise(features, loss_pre, shared.batch.labels, shared.draw)

    def _backward(self, shared: SharedForward, advice: Advice, number: int) -> Tensor:
        """Take the gradients of micro-batch ``number``, and return its loss."""
        with self.execution(), shared.head_again(self.model):
            loss = self.method.loss(shared.features, shared.batch.labels, self.model.head, advice)
        if number == 0:
            self.optimizer.zero_grad()
        self.advice = advice.detach()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        share = loss if self.accumulate == 1 else loss / self.accumulate
        self.execution.backward(share, self.optimizer, parameters, last=number == self.accumulate - 1)
        return loss.detach()

    def _classifier_step(self, losses: list[Tensor]) -> tuple[Tensor, bool]:
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        if not self._finite("the training loss", loss, self.advice, self._named_gradients):
            return loss, False
        if self.watch is not None:
            self.watch.guard(self.optimizer)
        if self.clip is not None:
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], self.clip)
        self.execution.step(self.optimizer)
        return loss, True

    def _meta_train(self, problem: MetaProblem, virtual: dict[str, Tensor], meta: Batch) -> Tensor | None:
        loss, gradients = self.engine.meta_gradient(problem, virtual, meta)
        names = self.method.meta_parameter_names()
        named = {f"the meta-gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
        if not self._finite("the meta loss", loss, problem.advice, lambda: named):
            return None
        if self.watch is not None:
            self.watch.guard(self.advisor_optimizer)
        self.method.learn(gradients)
        if self.advisor_optimizer is not None:
            self.execution.step(self.advisor_optimizer)
        return loss

    def _named_gradients(self) -> dict[str, Tensor | None]:
        return {f"the gradient of {name}": parameter.grad for name, parameter in self.model.model.named_parameters()}

    def _finite(
        self, name: str, loss: Tensor, advice: Advice | None, gradients: Callable[[], Mapping[str, Tensor | None]]
    ) -> bool:
        """Ask the watch, if there is one; what it is shown has the cause before the effect."""
        if self.watch is None:
            return True
        advice = Advice() if advice is None else advice
        outputs = {"mask": advice.mask, "equalisation": advice.equalisation, "weight": advice.weight}
        values: dict[str, Tensor | None] = {f"the advisor's {key}": value for key, value in outputs.items()}
        return self.watch.passes({**values, name: loss}, gradients())

    def _features(self, train: Batch, plan: Plan, tape: Tape | None) -> tuple[Tensor, Entering | None]:
        with nullcontext() if tape is None else Recording(tape):
            if plan.cut is None:
                return self.model(train.images, features=True), None
            with self.model.captured(plan.cut, tape=() if tape is None else tape) as seen:
                features = self.model(train.images, features=True)
        if tape is not None:
            tape.forget(seen[0].position)
        return features, seen[0]

    def _loss_pre(self, features: Tensor, train: Batch) -> Tensor:
        with nullcontext() if self.attached else torch.no_grad(), self.execution():
            logits = self.model.head(features)
            return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), train.labels, reduction="none")

    def _run_again(self, plan: Plan, shared: SharedForward) -> None:
        shared.tape = Tape() if plan.record and not self.model.compiled else None
        with shared.start.random_state.replayed(), self.model.frozen_statistics(), self.execution():
            shared.features, shared.at_cut = self._features(shared.batch, plan, shared.tape)
        with shared.head_again(self.model):
            shared.loss_pre = self._loss_pre(shared.features, shared.batch)
