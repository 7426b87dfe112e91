"""Batch normalisation over the batch of all ranks (``--sync-bn``).

torch's ``SyncBatchNorm`` runs on GPUs only, and has no forward-mode derivative, which the meta-gradient needs. This module
computes the same in plain torch, on any device, with both derivatives. With x̂ = (x − μ)/σ, and all means over all ranks,

    backward: dx = γ/σ (dy − mean dy − x̂ mean(x̂ dy))         forward: ẏ = γ/σ (ẋ − mean ẋ − x̂ mean(x̂ ẋ)) + γ̇ x̂ + β̇
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function, has_torch_function

from fastadvisor.models.normalisation import affine, combine, inner_sums
from fastadvisor.runtime.ranks import Ranks


class SynchronisedBatchNorm(_BatchNorm):
    """A batch normalisation of any dimension whose training statistics are taken over the images of all ranks."""

    ranks: Ranks

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any input (B, C, ...), of whatever dimension the replaced layer accepted."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, ...)."""
        if not self.training:
            return super().forward(input)
        track = self.track_running_stats and self.running_mean is not None
        if track and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None and track:  # a cumulative average
            momentum = 1 / float(self.num_batches_tracked)  # type: ignore[arg-type]  # tracked
        mean, var = (self.running_mean, self.running_var) if track else (None, None)
        return batch_norm(input, mean, var, self.weight, self.bias, momentum or 0.0, self.eps, self.ranks)


def synchronise(module: nn.Module, ranks: Ranks) -> int:
    """Make all batch normalisations in ``module`` normalise over all ranks; return their number.

    The layers keep their parameters, buffers and names, so the state dict does not change.
    """
    plain = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and type(layer) is not nn.SyncBatchNorm]
    for layer in plain:
        layer.plain_class = type(layer)  # type: ignore[assignment]  # for separate()
        layer.__class__ = SynchronisedBatchNorm
        layer.ranks = ranks  # type: ignore[assignment]  # not a tensor or module
    return len(plain)


def separate(module: nn.Module) -> None:
    """Undo :func:`synchronise`: every layer normalises over the images of its own rank again."""
    for layer in module.modules():
        if isinstance(layer, SynchronisedBatchNorm):
            layer.__class__ = layer.plain_class  # type: ignore[assignment]
            del layer.plain_class, layer.ranks


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    ranks: Ranks,
) -> Tensor:
    """Normalise ``input`` (B, C, ...) over all ranks, and update the running statistics; B may differ between ranks."""
    if has_torch_function((input,)):
        return handle_torch_function(batch_norm, (input,), input, running_mean, running_var, weight, bias, momentum, eps, ranks)
    mean, var, count = statistics(input.detach(), ranks)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1).clamp_min(1))).to(running_var.dtype), momentum)
    scale = torch.ones_like(mean) if weight is None else weight
    shift = torch.zeros_like(mean) if bias is None else bias
    return _Normalise.apply(input, scale, shift, mean, (var + eps).rsqrt(), count, ranks)


def statistics(x: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance of each channel (C,), in float32 or wider, and the number of values of a channel.

    All three are over all ranks, which exchange one message. The variance is a difference of means of squares; it is computed
    in float64, so that it is accurate in float32.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = [0, *range(2, x.dim())]
    own = x.numel() // x.shape[1]
    own_mean = wide.mean(dims)
    squares = (wide - _shaped(own_mean, x)).square().sum(dims).double()
    long = own_mean.double()
    sums = ranks.total(torch.cat([own * long, squares + own * long.square(), long.new_full((1,), own)]))
    mean, square = (sums[:-1] / sums[-1]).chunk(2)
    var = (square - mean.square()).clamp_min(0)
    return mean.to(wide.dtype), var.to(wide.dtype), sums[-1].to(wide.dtype)


def inner_means(d: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, count: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return the means of x̂ d and of d of each channel over all ranks, (C,) each."""
    sums = ranks.total(torch.stack(inner_sums(d, x, mean, inverse))) / count
    return sums[0], sums[1]


def saved_statistics(output: Tensor) -> tuple[Tensor, ...]:
    """Return mean, 1/σ and count from the graph of an ``output`` of :func:`batch_norm`; empty if it has no graph."""
    node: Any = output.grad_fn
    return tuple(node.saved_tensors[2:]) if getattr(node, "_forward_cls", None) is _Normalise else ()


class _Normalise(torch.autograd.Function):
    """y = γ (x − μ)/σ + β, differentiated with μ and σ as functions of x on all ranks."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, inverse: Tensor, count: Tensor, ranks: Ranks
    ) -> Tensor:
        ctx.save_for_backward(x, gamma, mean, inverse, count)
        ctx.ranks = ranks
        slope = gamma * inverse
        return affine(x, slope, beta - slope * mean)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, mean, inverse, count = ctx.saved_tensors
        of_gamma, of_beta = inner_sums(dy, x, mean, inverse)
        mean_hat, mean_dy = ctx.ranks.total(torch.stack([of_gamma, of_beta])) / count
        slope = gamma * inverse
        dx = combine(dy, slope, x, -inverse * slope * mean_hat, mean, -slope * mean_dy)
        return dx, of_gamma.to(gamma.dtype), of_beta.to(gamma.dtype), None, None, None, None


def _shaped(channels: Tensor, like: Tensor) -> Tensor:
    """Return ``channels`` (C,) as (1, C, 1, ...), so that it broadcasts with ``like``."""
    return channels.reshape(1, -1, *(1 for _ in like.shape[2:]))
