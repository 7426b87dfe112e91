"""What the engines share: what a meta step starts from, and one signature.

Symbols are those of README.md in this folder.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad.shared_pass import Plan, SharedForward
from fastadvisor.metagrad.virtual_step import VirtualStep
from fastadvisor.methods.base import Advice, Method
from fastadvisor.models import SplitClassifier


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
    uses_actual_step: bool = False
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
        if self.shared.restorations:  # the advice hangs on the graph that was let go
            return self.shared.advice_of(self.method, attached=True)
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

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers of what the engine itself learns: most learn nothing."""
        return []

    def learn(self) -> None:  # noqa: B027 (most learn nothing)
        """Take the steps of :meth:`optimizers` by what the last meta-gradient has left, which is known to be finite."""

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
