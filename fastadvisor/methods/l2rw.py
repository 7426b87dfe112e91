"""Learning to Reweight Examples (Ren et al. 2018): each iteration computes weights for the samples of its own batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastadvisor.config import MetaConfig
from fastadvisor.methods.base import Advice, DataFacts, Method, Seen


class L2RW(Method):
    """Sample weights w_i = max(−∂Lmeta/∂ε_i, 0), scaled to sum to 1, where ε_i is the weight of sample i in the virtual step.

    The meta-parameters are ε, one for each sample, with the value 0. There is no network: Meta-Train is the formula above. At
    ε = 0 the virtual weights equal the current ones, so the virtual step costs nothing.
    """

    @dataclass
    class Settings:
        """L2RW has no settings of its own; it uses those of the meta-gradient."""

        USES: ClassVar[tuple[type, ...]] = (MetaConfig,)

    @classmethod
    def needs_whole_batch(cls, settings: Settings) -> str | None:
        """Return the flag of the method itself: its weights sum to 1 over the whole batch."""
        return "--method l2rw"

    of_one_batch: ClassVar[bool] = True

    def __init__(self, settings: Settings, features: int, facts: DataFacts) -> None:
        super().__init__(settings, features, facts)
        self._weight_B: Tensor | None = None

    @property
    def learns(self) -> bool:
        """Whether the method needs meta steps: always."""
        return True

    def meta_parameters(self) -> list[Tensor]:
        """Return ε (B,) of the batch of the last :meth:`advise`."""
        assert self._weight_B is not None
        return [self._weight_B]

    def draw(self, rows: int, device: torch.device) -> None:
        """Discard the weights of the last batch, at the start of an iteration. Draws nothing."""
        self._weight_B = None

    def advise(self, seen: Seen) -> Advice:
        """Return ε before Meta-Train, and the learnt weights after it."""
        if self._weight_B is None:
            self._weight_B = torch.zeros_like(seen.losses, requires_grad=True)
        return Advice(weight=self._weight_B)

    def meta_parameter_names(self) -> list[str]:
        """Return the name of ε for messages."""
        return ["the sample weights"]

    def learn(self, gradients: Sequence[Tensor]) -> None:
        """Meta-Train: compute the weights from ∂Lmeta/∂ε (B,), by equations 8 and 9 of Ren et al.; all 0 if no sample helps."""
        useful_B = (-gradients[0]).clamp_min(0)
        mean = self.batch_mean(useful_B)
        # The loss is a mean over samples: there, weights with a mean of 1 stand for weights that sum to 1 in a sum.
        self._weight_B = useful_B / torch.where(mean > 0, mean, torch.ones_like(mean))
