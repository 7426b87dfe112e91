"""The forward-mode pass of a backbone, without repeating the work of the shared forward pass.

torch's dual numbers compute every operation twice, for the primal value and for the tangent, and some of their formulas are
slow or missing. Two torch function modes replace these; all other operations stay torch's own:

- the primal output of a convolution or a linear layer is taken from the shared pass, whose graph holds that tensor anyway;
- batch normalisation takes mean and 1/σ from there; its tangent is affine in x and ẋ, and costs two reductions and two passes;
- weight normalisation is written out in operations that have forward-mode formulas;
- an operation of an extension that drops tangents raises NotImplementedError instead.

``python -m benchmarks.phases`` times the pass with these replacements and with torch's dual numbers alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastadvisor.models import sync_batch_norm
from fastadvisor.models.normalisation import affine, combine, inner_sums
from fastadvisor.runtime.ranks import Ranks

PRODUCTS = (torch.conv1d, torch.conv2d, torch.conv3d, F.linear)
"""Operations that are bilinear in input and weight; a backbone spends most of its time in them."""


class _Kept(NamedTuple):
    function: Callable[..., Any]
    values: tuple[Tensor, ...]
    versions: tuple[int, ...]
    """Versions of the tensors when they were computed; an in-place operation since then would have raised them."""


@dataclass
class Tape:
    """What a forward pass computed, in order: the outputs of products, and the statistics of batch normalisations.

    The tensors are not copied: the graph holds them anyway.
    """

    kept: list[_Kept] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.kept)

    def append(self, function: Callable[..., Any], *values: Tensor) -> None:
        """Keep the ``values`` that ``function`` computed; without values they count as unknown."""
        self.kept.append(_Kept(function, tuple(value.detach() for value in values), tuple(value._version for value in values)))

    def forget(self, position: int) -> None:
        """Drop all values before ``position``; the positions of later ones do not change."""
        self.kept[:position] = [kept._replace(values=(), versions=()) for kept in self.kept[:position]]

    def find(self, position: int, function: Callable[..., Any]) -> tuple[Tensor, ...]:
        """Return the values that ``function`` computed at ``position``.

        Empty if they are unknown or have been overwritten, or if another function was recorded at that position.
        """
        if position >= len(self.kept):
            return ()
        kept = self.kept[position]
        intact = all(value._version == version for value, version in zip(kept.values, kept.versions, strict=True))
        return kept.values if kept.function == function and intact else ()


class Recording(TorchFunctionMode):
    """Records the products and batch normalisations inside the block on ``tape``."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, and record what it computed."""
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.tape.append(func, result)
        elif func is F.batch_norm:
            self.tape.append(func, *_saved_statistics(result))
        elif func is sync_batch_norm.batch_norm:
            self.tape.append(func, *sync_batch_norm.saved_statistics(result))
        return result


def _saved_statistics(output: Tensor) -> tuple[Tensor, ...]:
    """Return mean and 1/σ of each channel from the graph of a batch normalisation; empty if the graph does not hold them."""
    node = output.grad_fn
    saved = tuple(getattr(node, f"_saved_result{index}", None) for index in (1, 2))
    shape = output.shape[1:2]
    if all(isinstance(value, Tensor) and value.shape == shape and value.is_floating_point() for value in saved):
        return tuple(value for value in saved if value is not None)
    return ()


class Tangents(TorchFunctionMode):
    """Inside a dual level, computes products, batch and weight normalisations of dual numbers by the rules below.

    With a tape, the pass inside the block must repeat the recorded one from ``position`` on, operation by operation, with the
    same activations, random state and training mode.
    """

    def __init__(self, tape: Tape | None = None, position: int = 0) -> None:
        super().__init__()
        self.tape = Tape() if tape is None else tape
        self.position = position

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, or the rule that replaces it."""
        if isinstance(func, OpOverload | OpOverloadPacket):
            return run_registered(func, *args, **(kwargs or {}))
        if func is torch._weight_norm:
            return weight_norm(*args, **(kwargs or {}))
        if func in (F.group_norm, torch.group_norm):
            return func(make_contiguous(args[0]), *args[1:], **(kwargs or {}))
        if func not in PRODUCTS and func not in (F.batch_norm, sync_batch_norm.batch_norm):
            return func(*args, **(kwargs or {}))
        known = self.tape.find(self.position, func)
        self.position += 1
        if func is sync_batch_norm.batch_norm:
            return synchronised_batch_norm(known, *args, **(kwargs or {}))
        if func is F.batch_norm:
            return batch_norm(known, *args, **(kwargs or {}))
        return product(func, known, *args, **(kwargs or {}))


def product(
    function: Callable[..., Tensor],
    known: tuple[Tensor, ...],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *rest: Any,
    **settings: Any,
) -> Tensor:
    """Return y = w * x + b with its tangent ẏ = w * ẋ + ẇ * x + ḃ, where * is the convolution or product of ``function``.

    ``known`` is (y,) if the tape holds it, else empty.
    """
    x, x_dot = forward_ad.unpack_dual(input)
    w, w_dot = forward_ad.unpack_dual(weight)
    b, b_dot = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    y = known[0] if known and known[0].shape[0] == x.shape[0] else function(x, w, b, *rest, **settings)
    tangents = []
    if x_dot is not None:
        tangents.append(function(x_dot, w, None, *rest, **settings))
    if w_dot is not None or b_dot is not None:
        tangents.append(function(x, torch.zeros_like(w) if w_dot is None else w_dot, b_dot, *rest, **settings))
    if not tangents:
        return y
    return forward_ad.make_dual(y, tangents[0] if len(tangents) == 1 else tangents[0].add_(tangents[1]))


def batch_norm(
    known: tuple[Tensor, ...],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return y = γ x̂ + β with its tangent ẏ = γ/σ (ẋ - mean ẋ - x̂ mean(x̂ ẋ)) + γ̇ x̂ + β̇.

    The two means are the results of the backward kernel for γ and β, with ẋ in place of the output's gradient. ``known`` is
    (mean of x, 1/σ) if the tape holds them, else empty.
    """
    x, x_dot = forward_ad.unpack_dual(input)
    if not training or x_dot is None or weight is None or bias is None or running_mean is not None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    gamma, gamma_dot = forward_ad.unpack_dual(weight)
    beta, beta_dot = forward_ad.unpack_dual(bias)
    mean, inverse = known or _statistics(x, eps)
    slope = gamma * inverse
    y = affine(x, slope, beta - slope * mean)
    of_gamma, of_beta = inner_sums(x_dot, x, mean, inverse)
    count = x.numel() // x.shape[1]
    slope_x = -inverse * slope * of_gamma / count
    shift = -slope * of_beta / count
    if gamma_dot is not None:
        slope_x = slope_x + inverse * gamma_dot
    if beta_dot is not None:
        shift = shift + beta_dot
    return forward_ad.make_dual(y, combine(x_dot, slope, x, slope_x, mean, shift))


def synchronised_batch_norm(
    known: tuple[Tensor, ...],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    ranks: Ranks,
) -> Tensor:
    """Return the result of ``sync_batch_norm.batch_norm`` with its tangent; running statistics are not updated.

    ``known`` is (mean of x, 1/σ, count) over all ranks if the tape holds them, else empty.
    """
    x, x_dot = forward_ad.unpack_dual(input)
    gamma, gamma_dot = (torch.ones(()), None) if weight is None else forward_ad.unpack_dual(weight)
    beta, beta_dot = (torch.zeros(()), None) if bias is None else forward_ad.unpack_dual(bias)
    if known:
        mean, inverse, count = known
    else:
        mean, var, count = sync_batch_norm.statistics(x, ranks)
        inverse = (var + eps).rsqrt()
    slope = gamma.to(mean) * inverse
    y = affine(x, slope, beta.to(mean) - slope * mean)
    slope_x = torch.zeros_like(mean) if gamma_dot is None else gamma_dot.to(mean) * inverse
    shift = torch.zeros_like(mean) if beta_dot is None else beta_dot.to(mean)
    if x_dot is None and gamma_dot is None and beta_dot is None:
        return y
    if x_dot is None:  # the same on all ranks, which the communication below relies on
        return forward_ad.make_dual(y, affine(x, slope_x, shift - slope_x * mean))
    mean_hat, mean_dot = sync_batch_norm.inner_means(x_dot, x, mean, inverse, count, ranks)
    slope_x = slope_x - inverse * slope * mean_hat
    return forward_ad.make_dual(y, combine(x_dot, slope, x, slope_x, mean, shift - slope * mean_dot))


def run_registered(function: OpOverload | OpOverloadPacket, *args: Any, **settings: Any) -> Any:
    """Run an operation that is called through torch's registry, as operations of extensions are.

    Raises:
        NotImplementedError: the operation drops tangents. Those registered with torch.library (such as torchvision's
            deform_conv2d) otherwise do so without an error.
    """
    result = function(*args, **settings)
    if not str(function).startswith("aten.") and _has_tangent((args, settings)) and not _has_tangent(result):
        raise NotImplementedError(f"{function} drops tangents")
    return result


def _has_tangent(values: Any) -> bool:
    """Whether any tensor in ``values``, however nested, has a tangent."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def make_contiguous(input: Tensor) -> Tensor:
    """Return ``input`` with contiguous primal and tangent, which torch 2.11's tangent of group normalisation needs."""
    x, x_dot = forward_ad.unpack_dual(input)
    return x.contiguous() if x_dot is None else forward_ad.make_dual(x.contiguous(), x_dot.contiguous())


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return g v / ‖v‖, with norms over all dimensions but ``dim`` (-1: over all).

    torch's own kernel for it has no forward-mode formula.
    """
    others = [d for d in range(v.dim()) if d != dim] if dim != -1 else list(range(v.dim()))
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1))


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and 1/σ of each channel, in float32 or wider.

    On the CPU in three separate passes, because torch.var_mean takes several times as long there.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = [0, *range(2, x.dim())]
    if x.device.type != "cpu":
        var, mean = torch.var_mean(wide, dims, correction=0)
        return mean, (var + eps).rsqrt()
    mean = wide.mean(dims)
    centred = wide - mean.reshape(1, -1, *(1 for _ in dims[1:]))
    var = torch.linalg.vector_norm(centred, dim=dims).square() / (x.numel() // x.shape[1])
    return mean, (var + eps).rsqrt()
