"""What one iteration of training consists of: one file a kind. README.md here."""

import torch

from fastadvisor.iterations.algorithm1 import Algorithm1
from fastadvisor.iterations.base import Iteration, StepResult
from fastadvisor.iterations.meta_train import MetaTrain
from fastadvisor.iterations.one_step_behind import OneStepBehind
from fastadvisor.iterations.supervised import Supervised
from fastadvisor.metagrad import Engine, SharedPass
from fastadvisor.methods import Method
from fastadvisor.models import SplitClassifier
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.update import Update
from fastadvisor.runtime.watch import Watch

__all__ = ["Algorithm1", "Iteration", "MetaTrain", "OneStepBehind", "StepResult", "Supervised", "build_iteration"]


def build_iteration(
    model: SplitClassifier,
    method: Method,
    optimizer: torch.optim.Optimizer,
    advisor_optimizer: torch.optim.Optimizer | None,
    engine: Engine | None,
    execution: Execution,
    *,
    virtual_with_optimizer: bool = False,
    attached: bool = False,
    interval: int = 1,
    behind: bool = False,
    lean: bool = False,
    accumulate: int = 1,
    clip: float | None = None,
    watch: Watch | None = None,
) -> Iteration:
    """Put an iteration together.

    Args:
        model: the classifier.
        method: with its advisor, if it has one.
        optimizer: the classifier's.
        advisor_optimizer: the advisor's, if there is one.
        engine: computes the meta-gradient; None will do for a method without meta-parameters.
        execution: how passes are run.
        virtual_with_optimizer: the virtual step has the optimizer's momentum and weight decay.
        attached: the advisor's inputs carry gradients.
        interval: iterations from one meta step to the next.
        behind: the advisor is one step behind.
        lean: hold one graph at a time.
        accumulate: micro-batches that a batch comes in.
        clip: norm that the actual gradient is cut to; None leaves it.
        watch: looks at the numbers before they reach a weight.
    """
    shared_pass = SharedPass(model, execution, attached, accumulate, lean)
    update = Update(optimizer, execution, model, watch, clip, accumulate)
    if not method.learns:
        return Supervised(model, method, shared_pass, update)
    assert engine is not None
    advisor_update = Update(advisor_optimizer, execution, watch=watch)
    meta_train = MetaTrain(model, method, engine, advisor_update, virtual_with_optimizer, attached, interval)
    kind = OneStepBehind if behind else Algorithm1
    return kind(model, method, shared_pass, update, meta_train)
