"""What the engines share: the forward pass on the train batch, the virtual step, and one signature.

Shapes: B train batch, D features. Symbols are those of README.md in this folder.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadvisor.data.types import Batch
from fastadvisor.metagrad.tangent import Tape
from fastadvisor.methods.base import Advice, Method
from fastadvisor.models import Cut, Entering, SplitClassifier
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
    loss_pre: Tensor
    """(B,) plain cross-entropy on unmasked features (Algorithm 1, Loss pre-calculation); with a graph only where the
    advisor's inputs are attached."""
    draw: Beta
    """The method's random numbers of this iteration."""
    start: Entering
    """The images, and the random state the pass began with, so that the tangent pass drops the same units."""
    at_cut: Entering | None = None
    """The same at the engine's cut, where it has one."""
    at_head: RandomState | None = None
    """The random state in which the head first ran on the features, unless it is a plain linear layer, which draws nothing."""
    tape: Tape | None = None
    """Outputs of the pass, where the engine asked for them."""
    again: Callable[["SharedForward"], None] | None = None
    """Runs the pass a second time and puts its graph into what it is handed; there with ``--lean``, or as a micro-batch."""
    for_tangent: bool = True
    """Whether a pass that has been let go is to be run again for the tangent pass already, which then finds its tape."""
    released: bool = False
    """Whether the graph has been let go."""
    renewals: int = 0
    """How often it has been had again."""

    def entering(self, cut: Cut | None) -> Entering:
        """Return what entered the part of the backbone above ``cut``; all of it for None."""
        if cut is None:
            return self.start
        assert self.at_cut is not None
        return self.at_cut

    @contextmanager
    def head_again(self, model: SplitClassifier) -> Iterator[None]:
        """Run the head inside the block as it ran first: it draws the same numbers and leaves its buffers alone, as backbone
        passes after the first do. So virtual step, tangent and actual step see one function.
        """
        if self.at_head is None:
            yield
            return
        with self.at_head.replayed(), model.frozen_statistics():
            yield

    def release(self) -> None:
        """Let the graph go, if it can be had again."""
        if self.again is not None:
            self.features, self.loss_pre, self.tape = self.features.detach(), self.loss_pre.detach(), None
            self.released = True

    def restore(self) -> None:
        """Have the graph again, if it was let go."""
        if self.released:
            assert self.again is not None
            self.again(self)
            self.released = False
            self.renewals += 1


@dataclass
class VirtualStep:
    """w' = w − α d, d = ∇w L: plain SGD; or with the optimizer's weight decay and momentum (Algorithm 1, Virtual-Train)."""

    lr: float | Tensor
    """α; with layer-wise rates the largest. A scalar on the device where an iteration is recorded as a CUDA graph."""
    optimizer: torch.optim.Optimizer | None = None
    """Given: d also holds its weight decay and its momentum buffers."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Layer-wise rates in units of ``lr``, by parameter name; 1 where nothing is said."""

    def apply(self, parameters: Mapping[str, nn.Parameter], gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return w' by name; differentiable in ``gradients`` where they carry a graph.

        α stays the factor of θ's gradient in both forms: decay and old momentum do not depend on the advisor.
        """
        weights = [parameter.detach() for parameter in parameters.values()]
        directions: tuple[Tensor, ...] = gradients
        if self.optimizer is not None:
            group = self.optimizer.param_groups[0]
            directions = torch._foreach_add(list(directions), weights, alpha=group["weight_decay"])
            buffers = [self.optimizer.state[p].get("momentum_buffer") for p in parameters.values()]
            if group["momentum"]:
                known = [torch.zeros_like(w) if buffer is None else buffer for w, buffer in zip(weights, buffers, strict=True)]
                directions = torch._foreach_add(list(directions), known, alpha=group["momentum"])
        directions = tuple(self.scaled(dict(zip(parameters, directions, strict=True))).values())
        if isinstance(self.lr, Tensor):
            moved = torch._foreach_sub(weights, torch._foreach_mul(list(directions), self.lr))
        else:
            moved = torch._foreach_add(weights, list(directions), alpha=-self.lr)
        return dict(zip(parameters, moved, strict=True))

    def scaled(self, direction: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``direction`` times the layers' shares of the rate."""
        if not self.shares:
            return direction
        return {name: self.shares.get(name, 1.0) * value for name, value in direction.items()}


@dataclass
class MetaProblem:
    """All that a meta step starts from."""

    model: SplitClassifier
    method: Method
    shared: SharedForward
    advice: Advice
    """With its graph to the advisor's parameters."""
    step: VirtualStep
    attached: bool = False
    """Whether the advice has a graph to the features and the loss it was given, and moves with them."""
    stepped: bool = False
    """Whether the virtual weights are the actual step's, of all layers, and the graph has been used up by it."""
    parts: tuple["MetaProblem", ...] = ()
    """With gradient accumulation, the micro-batches; what stands above is then the first one's."""

    def micro_batches(self) -> tuple["MetaProblem", ...]:
        """Return the parts, equally large, whose mean losses average to the batch's."""
        return self.parts or (self,)

    def training_advice(self) -> Advice:
        """Return the advice as the training loss takes it when its gradient for the classifier is wanted."""
        if not self.attached:
            return self.advice.detach()
        shared = self.shared
        if shared.renewals:  # the advice hangs on the graph that was let go
            return self.method.advise(shared.features, shared.loss_pre, shared.batch.labels, shared.draw)
        return self.advice


class MetaGradient(NamedTuple):
    """What a meta step gives."""

    loss: Tensor
    """Lmeta(w'), a detached scalar."""
    gradients: tuple[Tensor, ...]
    """∇θ Lmeta, in the order of the advisor's parameters."""


class Engine(ABC):
    """The signature of every way to the meta-gradient."""

    @abstractmethod
    def plan(self) -> Plan:
        """Say, before the shared forward pass of an iteration with a meta step, what it is to keep."""

    @abstractmethod
    def virtual_train(self, problem: MetaProblem) -> dict[str, Tensor]:
        """Return the virtual weights w' by parameter name: of all layers that count."""

    @abstractmethod
    def meta_gradient(self, problem: MetaProblem, virtual: dict[str, Tensor], meta: Batch) -> MetaGradient:
        """Return Lmeta at the virtual weights, which may be more than count, and its gradient for the advisor."""

    @abstractmethod
    def describe(self) -> str:
        """Say in a few words how it is computed."""

    def capturable(self) -> str | None:
        """Return why an iteration with a meta step cannot be recorded as a CUDA graph; None if it can."""
        return None

    def graph_kind(self) -> Hashable | None:
        """Return what tells the next meta step's operations from others'; None if the host reads something in it."""
        return ()

    def count(self, by: int) -> None:  # noqa: B027 (most count nothing)
        """Count ``by`` meta steps that a graph's replay has taken."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if nothing had happened."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (most have no state)
        """Continue from ``state``."""
