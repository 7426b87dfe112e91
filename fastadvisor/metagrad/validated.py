"""An approximate engine that is checked against the exact one, and replaced by it while the two disagree.

Every N-th meta step computes the exact meta-gradient, too. If the cosine between both is below a minimum, the engine warns once
and uses the exact gradient. Later checks compare the two again, and return to the approximation once the cosine is high enough.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad.base import Engine, MetaGradient, MetaProblem
from fastadvisor.metagrad.shared_pass import Plan
from fastadvisor.runtime.random_state import RandomState
from fastadvisor.runtime.ranks import ALONE, Ranks


class Check(NamedTuple):
    """How close the approximate meta-gradient was to the exact one at one meta step."""

    cosine: float
    """Cosine of the angle between the two."""
    norm_ratio: float
    """‖approximate‖ / ‖exact‖."""


@dataclass
class ValidatedEngine(Engine):
    """An approximate engine that an exact engine checks.

    A check reads three numbers from the device, so it waits for the device, once in ``every`` meta steps.
    """

    approximate: Engine
    exact: Engine
    every: int
    """Number of meta steps from one check to the next; the first meta step is checked."""
    floor: float
    """Cosine below which the exact engine takes over (``--min-meta-cosine``)."""
    say: Callable[[str], None] = print
    """Receives the warning."""
    ranks: Ranks = ALONE
    """The ranks that train together; all of them decide alike."""
    meta_steps: int = 0
    """Number of meta steps so far."""
    falling_back: bool = False
    """Whether the exact engine is in use."""
    warned: bool = False
    """Whether the warning has been given."""
    checks: list[Check] = field(default_factory=list)
    """The checks since the last :meth:`collect`."""

    def describe(self) -> str:
        """Return the description of the approximate engine."""
        return self.approximate.describe()

    def plan(self) -> Plan:
        """Ask for what the approximate engine needs; the exact engine needs nothing."""
        return self.approximate.plan()

    def virtual_train(self, problem: MetaProblem) -> dict[str, torch.Tensor]:
        """Return the virtual weights of the engine in use."""
        return self._active_engine().virtual_train(problem)

    def meta_gradient(self, problem: MetaProblem, virtual: dict[str, torch.Tensor], meta: Batch) -> MetaGradient:
        """Return the result of the engine in use; at a check, of the one that is in use after it."""
        due = self.meta_steps % self.every == 0
        self.meta_steps += 1
        begun = RandomState.now(meta.images.device) if due else None
        mine = self._active_engine().meta_gradient(problem, virtual, meta)
        if begun is None:
            return mine
        other = self.approximate if self.falling_back else self.exact
        with begun.replayed():  # drops the same units in the meta pass, and draws nothing from the run's own random stream
            theirs = other.meta_gradient(problem, virtual if problem.uses_actual_step else other.virtual_train(problem), meta)
        approximate, exact = (theirs, mine) if self.falling_back else (mine, theirs)
        self._compare(approximate, exact)
        return exact if self.falling_back else approximate

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers of the approximate engine."""
        return self.approximate.optimizers()

    def learn(self) -> None:
        """Step the optimizers of the approximate engine."""
        self.approximate.learn()

    def capturable(self) -> str | None:
        """Return why either engine's meta step cannot be recorded as a CUDA graph; None if both can."""
        return self.approximate.capturable() or self.exact.capturable()

    def graph_kind(self) -> Hashable | None:
        """Return a key that tells which engine is in use; None if a check is due, in which the host reads numbers."""
        return None if self.meta_steps % self.every == 0 else self.falling_back

    def count(self, by: int) -> None:
        """Count ``by`` meta steps that were taken by replaying a CUDA graph."""
        self.meta_steps += by

    def collect(self) -> dict[str, float]:
        """Return the mean and the smallest cosine and the mean norm ratio since the last call; empty if there was no check."""
        checks, self.checks = self.checks, []
        if not checks:
            return {}
        return {
            "meta_cosine": sum(check.cosine for check in checks) / len(checks),
            "meta_cosine_min": min(check.cosine for check in checks),
            "meta_norm_ratio": sum(check.norm_ratio for check in checks) / len(checks),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint saves, so that a resumed run continues exactly."""
        own = {"meta_steps": self.meta_steps, "falling_back": self.falling_back, "warned": self.warned}
        return {**own, "checks": [list(check) for check in self.checks], "approximate": self.approximate.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``; an empty one comes from a device on which the engine was exact, and needed no checks."""
        if not state:
            return
        self.meta_steps, self.falling_back, self.warned = state["meta_steps"], state["falling_back"], state["warned"]
        self.checks = [Check(*numbers) for numbers in state["checks"]]
        self.approximate.load_state_dict(state["approximate"])

    def _active_engine(self) -> Engine:
        return self.exact if self.falling_back else self.approximate

    def _compare(self, approximate: MetaGradient, exact: MetaGradient) -> None:
        a, e = (torch.cat([part.flatten() for part in result.gradients]) for result in (approximate, exact))
        # Averaged, so that all ranks decide by the same numbers even if the gradients differ between ranks (L2RW's weights).
        (numbers,) = self.ranks.average([torch.stack([a.norm(), e.norm(), a @ e])])
        norms = numbers.tolist()
        # If both gradients are zero they agree; if only one is, it has no direction, and the cosine counts as 0.
        cosine = norms[2] / (norms[0] * norms[1]) if norms[0] and norms[1] else float(norms[0] == norms[1])
        self.checks.append(Check(cosine, norms[0] / norms[1] if norms[1] else float(norms[0] == norms[1])))
        self.falling_back = not cosine >= self.floor  # so that a NaN falls back, too
        if self.falling_back and not self.warned:
            self.warned = True
            self.say(
                f"The approximate meta-gradient has a cosine of {cosine:.3f} to the exact one at meta step {self.meta_steps}, "
                f"under --min-meta-cosine {self.floor:g}: continuing exactly until it is back above (said once)."
            )
