"""What an epoch adds up, and the record that it leaves.

The sums so far are enough to save in the middle of an epoch and to go on as if nothing had happened.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from fastadvisor.errors import UserError
from fastadvisor.iterations import Iteration, StepResult
from fastadvisor.metagrad import ValidatedEngine
from fastadvisor.runtime.ranks import Ranks
from fastadvisor.runtime.timer import median
from fastadvisor.training.evaluation import Accuracy


class Progress:
    """Sums over the iterations of an epoch; losses stay on the device, where adding them waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.step = 0
        """Iterations taken."""
        self.images = 0
        """Trained on, by this rank."""
        self.steps = 0
        """Those whose losses are in the sums: the others were left out."""
        self.meta_steps = 0
        self.seconds = 0.0
        self.waited = 0.0
        """Of these, without a batch to train on."""
        self.saturated: dict[str, float] = {}
        """What the advisor's outputs looked like when it was saved, for an epoch that is continued after its last step."""
        self.losses: Tensor = torch.zeros(2, device=device)
        """Of the training and of the meta batches."""

    def add(self, result: StepResult, images: int) -> None:
        """Count an iteration."""
        self.step += 1
        self.images += images
        if result.skipped:
            return
        self.steps += 1
        self.losses[0] += result.loss
        if result.meta_loss is not None:
            self.losses[1] += result.meta_loss
            self.meta_steps += 1

    def means(self, ranks: Ranks) -> tuple[float, float | None]:
        """Return the mean training loss and the mean meta loss (None without a meta step), over all ranks."""
        (sums,) = ranks.average([self.losses])
        loss, meta_loss = sums.tolist()
        return loss / self.steps if self.steps else float("nan"), meta_loss / self.meta_steps if self.meta_steps else None

    def state_dict(self) -> dict[str, Any]:
        """Return all of it as CPU tensors and plain values."""
        return {**self.__dict__, "saturated": dict(self.saturated), "losses": self.losses.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.losses = state["losses"].to(self.losses.device)
        self.step, self.steps, self.meta_steps = int(state["step"]), int(state["steps"]), int(state["meta_steps"])
        self.images = int(state["images"])
        self.saturated = {str(name): float(share) for name, share in state["saturated"].items()}
        self.seconds, self.waited = float(state["seconds"]), float(state["waited"])


def epoch_record(
    epoch: int,
    losses: tuple[float, float | None],
    progress: Progress,
    step: Iteration,
    tests: Mapping[str, Accuracy],
    advice: Mapping[str, float],
    times: Sequence[float],
) -> dict[str, Any]:
    """Return what an epoch leaves in ``metrics.jsonl``, but for what is of all ranks; the engine's checks are reset.

    Args:
        epoch: counted from 0.
        losses: means of the training loss and of the meta loss.
        progress: at the epoch's end.
        step: the iteration.
        tests: accuracies by name: ``test`` and, where there are validation images, ``val``.
        advice: shares of saturated outputs of the advisor, by key of the record.
        times: milliseconds of each step; none for an epoch that is continued after its last step.
    """
    engine, val = step.engine, tests.get("val")
    return {
        "epoch": epoch + 1,
        "loss": losses[0],
        "meta_loss": losses[1],
        **({**engine.collect(), "meta_fallback": engine.falling_back} if isinstance(engine, ValidatedEngine) else {}),
        **advice,
        "lr": step.optimizer.param_groups[0]["lr"],
        **{f"test_{key}": value for key, value in asdict(tests["test"]).items()},
        **({} if val is None else {"val_top1": val.top1, "val_top5": val.top5}),
        "skipped_steps": 0 if step.watch is None else step.watch.skipped,
        "waiting_share": progress.waited / progress.seconds,
        "step_ms_median": step_ms(times, step.interval) if times else 1000 * progress.seconds / progress.step,
        "seconds": progress.seconds,
    }


def step_ms(times: Sequence[float], interval: int) -> float | None:
    """Return the median over groups of ``interval`` steps of a step's mean time: a meta step is in each of them."""
    groups = [times[start : start + interval] for start in range(0, len(times), interval)]
    return median([sum(group) / len(group) for group in groups if len(group) == interval] or list(times))


def check_finite(loss: float, model: nn.Module, epoch: int) -> None:
    """Find out at the end of ``epoch``, counted from 0, whether the training has diverged.

    Raises:
        UserError: the loss or a weight is not finite.
    """
    finite = bool(torch.stack([parameter.detach().isfinite().all() for parameter in model.parameters()]).all())
    if not (finite and math.isfinite(loss)):  # the last step's damage shows in the weights only
        raise UserError(
            f"Training diverged in epoch {epoch + 1} (loss {loss:.3g}, weights {'' if finite else 'not '}finite); "
            "lower --lr or --advisor-lr."
        )
