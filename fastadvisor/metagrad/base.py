"""What all engines have in common: the state that a meta step starts from, and the interface.

The symbols are explained in README.md in this folder.
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
    """Everything that a meta step starts from."""

    model: SplitClassifier
    method: Method
    shared: SharedForward
    """The forward pass on the train batch."""
    advice: Advice
    """The advice on the train batch, with its graph to the advisor's parameters."""
    step: VirtualStep
    """Takes the virtual step."""
    attached: bool = False
    """Whether the advice also depends on w, through a graph to the features and losses that the advisor was given."""
    uses_actual_step: bool = False
    """Whether the virtual weights come from the gradient of the actual step, whose backward pass has freed the graph of the
    train batch. They then cover all layers, whatever layers the engine counts."""
    parts: tuple["MetaProblem", ...] = ()
    """With gradient accumulation, one problem for each micro-batch; the fields above are then those of the first."""

    def micro_batches(self) -> tuple["MetaProblem", ...]:
        """Return the micro-batches, which are equally large: the mean of their losses is the loss of the batch."""
        return self.parts or (self,)

    def training_advice(self) -> Advice:
        """Return the advice to use in a training loss that is differentiated with respect to the classifier's weights."""
        if not self.attached:
            return self.advice.detach()
        if self.shared.restorations:  # self.advice has a graph to features that were released and recomputed since
            return self.shared.advice_of(self.method, attached=True)
        return self.advice


class MetaGradient(NamedTuple):
    """What an engine returns from a meta step."""

    loss: Tensor
    """Lmeta(w'), a detached scalar: the mean over this rank's meta images."""
    gradients: tuple[Tensor, ...]
    """∇θ Lmeta(w'), in the order and the shapes of ``Method.meta_parameters``."""


class Engine(ABC):
    """The interface of every way to compute the meta-gradient."""

    @abstractmethod
    def plan(self) -> Plan:
        """Return what the coming forward pass on the train batch must keep for the engine.

        Called once before that pass, in every iteration with a meta step.
        """

    @abstractmethod
    def virtual_train(self, problem: MetaProblem) -> dict[str, Tensor]:
        """Return the virtual weights w' by parameter name, of the layers that count in this engine."""

    @abstractmethod
    def meta_gradient(self, problem: MetaProblem, virtual: dict[str, Tensor], meta: Batch) -> MetaGradient:
        """Return Lmeta(w') and ∇θ Lmeta(w').

        Args:
            problem: what the meta step starts from.
            virtual: w' by parameter name; may hold more layers than count in this engine.
            meta: the meta batch.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return a few words on how the engine computes the meta-gradient."""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers of the engine's own parameters; most engines have none."""
        return []

    def learn(self) -> None:  # noqa: B027 (most learn nothing)
        """Step :meth:`optimizers` by the gradients that :meth:`meta_gradient` has left, which are known to be finite."""

    def capturable(self) -> str | None:
        """Return, as a clause, why an iteration with a meta step cannot be recorded as a CUDA graph; None if it can."""
        return None

    def graph_kind(self) -> Hashable | None:
        """Return a key of the operations in the next meta step: steps with equal keys can replay one CUDA graph.

        None if the host reads a number from the device in that step, which a graph cannot do.
        """
        return ()

    def count(self, by: int) -> None:  # noqa: B027 (most count nothing)
        """Count ``by`` meta steps that were taken by replaying a CUDA graph, which does not run the engine's code."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint saves, so that a resumed run continues exactly."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (most have no state)
        """Continue from ``state``."""
