"""The iteration that a configuration asks for, put together."""

import torch

from fastadvisor.config import Config
from fastadvisor.errors import UserError
from fastadvisor.iterations import Iteration, build_iteration
from fastadvisor.loading import Loaders
from fastadvisor.metagrad import Engine, build_engine, meta_schedule
from fastadvisor.methods import Method
from fastadvisor.models import SplitClassifier
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.ranks import Ranks
from fastadvisor.runtime.watch import Watch
from fastadvisor.training.optimizers import TORCH, build_optimizer
from fastadvisor.training.parameter_groups import parameter_groups


def build_step(
    config: Config,
    model: SplitClassifier,
    method: Method,
    execution: Execution,
    image_shape: tuple[int, int],
    optimizer: torch.optim.Optimizer | None = None,
) -> Iteration:
    """Return the iteration of ``config`` for a model and a method that are on their device.

    Args:
        config: all settings.
        model: the classifier.
        method: with its advisor, if it has one.
        execution: how passes are run.
        image_shape: (height, width) of the images, to try where the model can be cut.
        optimizer: the classifier's; None builds the one of ``config``.
    """
    deferred = defers(config, execution)
    if optimizer is None:
        optimizer = build_optimizer(config, parameter_groups(model, config.layer_decay, config.lr))
    else:  # only fused ones heed the flag of a watch that does not wait
        deferred = deferred and all(group.get("fused") for group in optimizer.param_groups)
    schedule = meta_schedule(config, type(method))
    watch = Watch(config.nan_policy == "skip", gradients=execution.scaler is None, ranks=execution.ranks, deferred=deferred)
    return build_iteration(
        model,
        method,
        optimizer,
        _advisor_optimizer(config, method, fused=deferred or as_on_gpu(config, execution)),
        _engine(config, model, method, execution, image_shape),
        execution,
        virtual_with_optimizer=config.virtual_step == "optimizer",
        attached=config.advisor_inputs == "attached",
        interval=schedule.interval,
        behind=schedule.behind,
        lean=config.lean,
        accumulate=config.accumulate,
        clip=config.clip_grad_norm,
        watch=None if config.nan_policy == "ignore" else watch,
    )


def defers(config: Config, execution: Execution) -> bool:
    """Whether the watch may leave it to the device to keep bad numbers from the weights: on a GPU, where waiting costs
    something, with optimizers that heed its flag, and where nothing but the weights has to be put back.
    """
    fused = config.optimizer in TORCH
    return config.nan_policy == "stop" and as_on_gpu(config, execution) and fused and execution.scaler is None


def as_on_gpu(config: Config, execution: Execution) -> bool:
    """Whether nothing is to wait for the device: on a GPU, and where a CPU stands in for one (--cuda-graph on)."""
    return execution.device.type == "cuda" or config.cuda_graph == "on"


def _engine(
    config: Config, model: SplitClassifier, method: Method, execution: Execution, image_shape: tuple[int, int]
) -> Engine | None:
    return build_engine(config, model, image_shape, execution) if method.learns else None


def _advisor_optimizer(config: Config, method: Method, *, fused: bool) -> torch.optim.Optimizer | None:
    if method.advisor is None:
        return None
    lr, decay = config.advisor_lr, config.advisor_weight_decay
    return torch.optim.Adam(
        method.advisor.parameters(),
        lr=method.advisor_lr if lr is None else lr,
        weight_decay=method.advisor_weight_decay if decay is None else decay,
        fused=fused or None,
    )


def check_batches_of_one(config: Config, model: SplitClassifier, loaders: Loaders, ranks: Ranks) -> None:
    """Find out before the first step, not in it, whether ``model`` would normalise over a single value.

    Raises:
        UserError: it would; names the flag to raise.
    """
    both = ("--batch-size", loaders.train), ("--meta-batch-size", loaders.meta)
    ones = [flag for flag, loader in both if loader.batch_size == config.accumulate]
    if not ones:
        return
    model.train()
    pieces = config.accumulate * ranks.count
    try:
        with torch.no_grad(), model.frozen_statistics():
            model(torch.zeros(1, 3, loaders.size, loaders.size, device=model.device))
    except ValueError:
        left = "is 1" if pieces == 1 else f"leaves 1 image to each of {pieces} parts"
        raise UserError(
            f"{ones[0]} {left}, and the batch normalisation of {config.model} needs more than one image of "
            f"{loaders.size}×{loaders.size} pixels: raise it."
        ) from None
