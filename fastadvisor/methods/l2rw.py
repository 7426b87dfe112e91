"""Learning to Reweight Examples (Ren et al. 2018): every batch finds the weights of its own samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastadvisor.config import MetaConfig
from fastadvisor.methods.base import Advice, DataFacts, Method, Seen


class L2RW(Method):
    """Weights w_i = max(−∂Lmeta/∂ε_i, 0), scaled to sum to 1, where ε_i = 0 weighs sample i in the virtual step.

    The meta-parameters are ε, one a sample, and there is no network: Meta-Train is that formula. At ε = 0 the virtual weights
    are today's, so the virtual step costs nothing.
    """

    @dataclass
    class Settings:
        """None of its own, and those of the meta-gradient."""

        USES: ClassVar[tuple[type, ...]] = (MetaConfig,)

    @classmethod
    def needs_whole_batch(cls, settings: Settings) -> str | None:
        """Return the method itself: its weights sum to 1 over the batch."""
        return "--method l2rw"

    of_one_batch: ClassVar[bool] = True

    def __init__(self, settings: Settings, features: int, facts: DataFacts) -> None:
        super().__init__(settings, features, facts)
        self._weight_B: Tensor | None = None

    @property
    def learns(self) -> bool:
        """Whether there is a meta step."""
        return True

    def meta_parameters(self) -> list[Tensor]:
        """Return ε (B,) of the batch last advised on."""
        assert self._weight_B is not None
        return [self._weight_B]

    def draw(self, rows: int, device: torch.device) -> None:
        """Forget the last batch."""
        self._weight_B = None

    def advise(self, seen: Seen) -> Advice:
        """Return ε before Meta-Train, the learnt weights after it."""
        if self._weight_B is None:
            self._weight_B = torch.zeros_like(seen.losses, requires_grad=True)
        return Advice(weight=self._weight_B)

    def meta_parameter_names(self) -> list[str]:
        """Return the one name."""
        return ["the sample weights"]

    def learn(self, gradients: Sequence[Tensor]) -> None:
        """Meta-Train: take the weights from ∂Lmeta/∂ε (B,); all 0 where no sample would help (their paper, eq. 8 and 9)."""
        useful_B = (-gradients[0]).clamp_min(0)
        mean = self.batch_mean(useful_B)
        # The loss takes a mean: weights whose mean is 1 there are weights that sum to 1 in a sum.
        self._weight_B = useful_B / torch.where(mean > 0, mean, torch.ones_like(mean))
