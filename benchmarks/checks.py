"""What has to hold before anything is timed: the meta-gradients, in float64, against double backward.

The gradient is read off the very iteration that is timed afterwards, out of the ``grad`` it leaves at the advisor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.contenders import (
    CONTENDERS,
    REFERENCE,
    Contender,
    Replayed,
    Setting,
    Unavailable,
    batches,
    incompatible,
    iterate,
    require,
)


@dataclass
class Checked:
    """Which contenders may be timed, and how far each one's meta-gradient is from double backward."""

    green: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    """‖got − expected‖ / ‖expected‖ at random weights, by name."""
    cosines: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """The reason, by name."""
    red: list[str] = field(default_factory=list)
    """Those of ``left_out`` that computed a wrong meta-gradient."""


def correctness(
    names: Sequence[str], model: str, device: torch.device, batch: int = 16, *, channels_last: bool = False
) -> Checked:
    """Check the contenders ``names`` on a batch of ``batch`` images and as many of the meta-set.

    Raises:
        SystemExit: the exact engine is off.
    """
    setting = Setting(model, device, dtype=torch.float64, channels_last=channels_last)
    expected = first_gradient(CONTENDERS[REFERENCE], setting, batch)
    if expected is None:
        raise SystemExit("Double backward gives no meta-gradient: nothing can be checked, so nothing is timed.")
    checked = Checked()
    for name in names:
        contender = CONTENDERS[name]
        try:
            require(contender)
            gradient = None
            if contender.graphed:
                checked.errors[name] = replay_error(contender, setting, batch)
            elif contender.advised and contender.comparable:
                gradient = first_gradient(contender, setting, batch)
        except Unavailable as reason:
            checked.left_out[name] = str(reason)
            continue
        except Exception as error:
            if contender.needs is None:
                raise
            checked.left_out[name] = incompatible(error)
            continue
        if gradient is not None:
            checked.errors[name] = float((gradient - expected).norm() / expected.norm())
            checked.cosines[name] = float(torch.cosine_similarity(gradient, expected, dim=0))
        judge(name, checked)
    return checked


def judge(name: str, checked: Checked) -> None:
    """Put ``name`` among the green or the red, by its error and its limit; SystemExit if it is the exact engine's to be red."""
    limit, error = CONTENDERS[name].limit, checked.errors.get(name)
    if limit is None or (error is not None and error <= limit):  # a NaN is not
        checked.green.append(name)
        return
    fault = "there is no meta-gradient" if error is None else f"the meta-gradient is off by {error:.2e} (limit {limit:.0e})"
    if name == "exact":
        raise SystemExit(f"exact: {fault}, so nothing is timed.")
    checked.red.append(name)
    checked.left_out[name] = f"{fault}, so it is not timed"


def replay_error(contender: Contender, setting: Setting, batch: int, iterations: int = 12) -> float:
    """Return how far replayed iterations take the weights from where the same ones do that are not replayed, over how far both
    take them; infinite where nothing was replayed.
    """
    ends = []
    for replayed in (True, False):
        iteration = contender.build(setting)
        assert isinstance(iteration, Replayed)
        if not replayed:
            iteration.take.warm_up = iterations
        begun = flat(iteration.step.model)
        train, meta = batches(batch, setting.device, setting.dtype, setting.memory_format)
        torch.manual_seed(1)
        for _ in range(iterations):
            iterate(contender, iteration, train, meta)
        if (iteration.take.replays > 0) != replayed:
            return float("inf")
        ends.append(flat(iteration.step.model))
    return float((ends[0] - ends[1]).norm() / (ends[1] - begun).norm())


def flat(model: torch.nn.Module) -> Tensor:
    """Return all weights in one vector, a copy."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def first_gradient(contender: Contender, setting: Setting, batch: int) -> Tensor | None:
    """Run the first iteration from a fixed random state; return its meta-gradient, flat, or None if it took no meta step."""
    iteration = contender.build(setting)
    train, meta = batches(batch, setting.device, setting.dtype, setting.memory_format)
    torch.manual_seed(1)
    iterate(contender, iteration, train, meta)
    assert iteration.method.advisor is not None
    gradients = [parameter.grad for parameter in iteration.method.advisor.parameters()]
    if all(gradient is None for gradient in gradients):
        return None
    return torch.cat([gradient.detach().flatten() for gradient in gradients if gradient is not None])
