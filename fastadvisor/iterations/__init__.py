"""The kinds of training iteration, one file for each. See README.md in this folder."""

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
    """Build the kind of iteration that the method and the settings ask for.

    Args:
        model: the classifier.
        method: the method, with its advisor if it has one.
        optimizer: the classifier's optimizer.
        advisor_optimizer: the advisor's optimizer; None if the method has no advisor.
        engine: computes the meta-gradient; may be None for a method without meta-parameters.
        execution: runs forward and backward passes (precision, ranks, random numbers).
        virtual_with_optimizer: whether the virtual step applies the optimizer's momentum and weight decay.
        attached: whether the advisor's inputs carry gradients (``--advisor-inputs attached``).
        interval: number of iterations from one meta step to the next.
        behind: whether the advisor is one step behind (``--virtual-gradient actual``).
        lean: whether the graph of the train batch is released during the meta step, to hold one graph at a time (``--lean``).
        accumulate: number of micro-batches that a batch is split into.
        clip: largest norm of the gradient of the actual step, to which longer ones are scaled down; None: no limit.
        watch: looks for infinities and NaN before they reach a weight; None: nothing is checked.
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
