"""Exact mode as the judge and the fallback of an approximation (design: "exact-mode fallback").

Every N-th meta step computes the exact gradient beside the approximate one. Under a floor for their cosine the engine says so
once and runs exactly; at later checks the approximation is tried again, and takes over when it is back above the floor.
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
    """How far the approximate gradient was from the exact one at one meta step."""

    cosine: float
    norm_ratio: float
    """‖approximate‖ / ‖exact‖."""


@dataclass
class ValidatedEngine(Engine):
    """An approximate engine, watched by an exact one. One more :class:`Engine` to the step.

    A check reads two numbers from the device, so it waits for it: once in ``every`` meta steps.
    """

    approximate: Engine
    exact: Engine
    every: int
    """Meta steps from one check to the next; the first step is checked."""
    floor: float
    """Cosine under which the approximation is not used."""
    say: Callable[[str], None] = print
    """Where the warning goes."""
    ranks: Ranks = ALONE
    """Who decides together."""
    meta_steps: int = 0
    falling_back: bool = False
    warned: bool = False
    checks: list[Check] = field(default_factory=list)
    """Since :meth:`collect`."""

    def describe(self) -> str:
        """Say how, of the approximation."""
        return self.approximate.describe()

    def plan(self) -> Plan:
        """Ask for what the approximation needs: the exact engine can do without."""
        return self.approximate.plan()

    def virtual_train(self, problem: MetaProblem) -> dict[str, torch.Tensor]:
        """Return the virtual weights of the engine in charge."""
        return self._active_engine().virtual_train(problem)

    def meta_gradient(self, problem: MetaProblem, virtual: dict[str, torch.Tensor], meta: Batch) -> MetaGradient:
        """Return the gradient of the engine in charge; at a check, of the one that is in charge after it."""
        due = self.meta_steps % self.every == 0
        self.meta_steps += 1
        begun = RandomState.now(meta.images.device) if due else None
        mine = self._active_engine().meta_gradient(problem, virtual, meta)
        if begun is None:
            return mine
        other = self.approximate if self.falling_back else self.exact
        with begun.replayed():  # the same units dropped in the meta pass, and the run's own stream left alone
            theirs = other.meta_gradient(problem, virtual if problem.uses_actual_step else other.virtual_train(problem), meta)
        approximate, exact = (theirs, mine) if self.falling_back else (mine, theirs)
        self._compare(approximate, exact)
        return exact if self.falling_back else approximate

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return those of the approximation."""
        return self.approximate.optimizers()

    def learn(self) -> None:
        """Let the approximation learn."""
        self.approximate.learn()

    def capturable(self) -> str | None:
        """Return the reason of the engine that has one; None if neither has."""
        return self.approximate.capturable() or self.exact.capturable()

    def graph_kind(self) -> Hashable | None:
        """Return which engine is in charge; None where a check is due, whose numbers the host reads."""
        return None if self.meta_steps % self.every == 0 else self.falling_back

    def count(self, by: int) -> None:
        """Count meta steps."""
        self.meta_steps += by

    def collect(self) -> dict[str, float]:
        """Return mean and smallest cosine and the mean norm ratio since the last call; nothing without a check."""
        checks, self.checks = self.checks, []
        if not checks:
            return {}
        return {
            "meta_cosine": sum(check.cosine for check in checks) / len(checks),
            "meta_cosine_min": min(check.cosine for check in checks),
            "meta_norm_ratio": sum(check.norm_ratio for check in checks) / len(checks),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to decide the same."""
        own = {"meta_steps": self.meta_steps, "falling_back": self.falling_back, "warned": self.warned}
        return {**own, "checks": [list(check) for check in self.checks], "approximate": self.approximate.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``; an empty one is of a run that needed no watching, on another device."""
        if not state:
            return
        self.meta_steps, self.falling_back, self.warned = state["meta_steps"], state["falling_back"], state["warned"]
        self.checks = [Check(*numbers) for numbers in state["checks"]]
        self.approximate.load_state_dict(state["approximate"])

    def _active_engine(self) -> Engine:
        return self.exact if self.falling_back else self.approximate

    def _compare(self, approximate: MetaGradient, exact: MetaGradient) -> None:
        a, e = (torch.cat([part.flatten() for part in result.gradients]) for result in (approximate, exact))
        # Averaged, so that all ranks decide on the same numbers, whatever a gradient of their own samples (L2RW's) says.
        (numbers,) = self.ranks.average([torch.stack([a.norm(), e.norm(), a @ e])])
        norms = numbers.tolist()
        # Two gradients of zero agree; one of zero has no direction.
        cosine = norms[2] / (norms[0] * norms[1]) if norms[0] and norms[1] else float(norms[0] == norms[1])
        self.checks.append(Check(cosine, norms[0] / norms[1] if norms[1] else float(norms[0] == norms[1])))
        self.falling_back = not cosine >= self.floor  # NaN falls back
        if self.falling_back and not self.warned:
            self.warned = True
            self.say(
                f"The approximate meta-gradient has a cosine of {cosine:.3f} to the exact one at meta step {self.meta_steps}, "
                f"under --min-meta-cosine {self.floor:g}: continuing exactly until it is back above (said once)."
            )
