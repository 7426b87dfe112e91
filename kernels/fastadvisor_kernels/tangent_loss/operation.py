"""``tangent_loss``: dispatch, gradients, and the operations of torch.library. Shapes: B samples, C classes."""

from typing import Any

import torch
from torch import Tensor

from fastadvisor_kernels.dispatch import explain_forward_mode, refuse_tangents, uses_triton
from fastadvisor_kernels.equalization_softmax.flat import FlatBeta, Options
from fastadvisor_kernels.equalization_softmax.operation import FLAT
from fastadvisor_kernels.equalization_softmax.reference import (
    Beta,
    Reduction,
    check_beta,
    check_options,
    smoothed_target,
    split_ignored,
    weighted_logits,
)
from fastadvisor_kernels.launch import compute_dtype, run
from fastadvisor_kernels.tangent_loss import reference

NAME = "tangent_loss"


def tangent_loss(
    z_BC: Tensor,
    z_dot_BC: Tensor,
    v_BC: Tensor | None,
    y_B: Tensor,
    beta: Beta = None,
    v_dot_BC: Tensor | None = None,
    *,
    reduction: Reduction = "none",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the derivative of :func:`mes_cross_entropy` along a direction (ż, v̇).

    L̇ = Σ_k p̃_k (ż_k + ȧ_k) − Σ_k t_k ż_k with p̃ = softmax(z + a), a = log w, ȧ = (∂a/∂v) v̇. Its gradients with respect to
    v, z and ż are what the exact meta-gradient takes to the advisor (fastadvisor's metagrad/README.md, step 2). By
    Triton on a GPU: one launch for L̇, one for all its gradients. Differentiable twice in all tensors.

    Args:
        z_BC: (B, C) logits, any float dtype.
        z_dot_BC: (B, C) their tangent, a plain tensor.
        v_BC: (B, C) the advisor's output before the sigmoid; None for the derivative of plain cross-entropy.
        y_B: (B,) integer targets in [0, C), or ``ignore_index``.
        beta: as in :func:`mes_cross_entropy`, and so are the keywords.
        v_dot_BC: (B, C) the tangent of v; None where v does not move.
        reduction: see there.
        ignore_index: see there.
        label_smoothing: see there.

    Returns:
        (B,) float32 derivatives, or () after a reduction (float64 where an input is float64).

    Raises:
        ValueError: as :func:`mes_cross_entropy`; ż or v̇ of another shape, or v̇ without v.
        NotImplementedError: a tensor carries a forward-mode tangent itself, on a GPU.
    """
    reference.check_tangent_inputs(z_BC, z_dot_BC, v_BC, y_B, v_dot_BC)
    check_options(reduction, label_smoothing)
    if v_BC is not None:
        check_beta(beta, v_BC)
    if not uses_triton(z_BC):
        return reference.tangent_loss(
            z_BC, z_dot_BC, v_BC, y_B, beta, v_dot_BC,
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
        )  # fmt: skip
    call = tangent_op if torch.compiler.is_compiling() else TangentLoss.apply
    return call(z_BC, z_dot_BC, v_BC, v_dot_BC, y_B, *FlatBeta.of(beta), reduction, ignore_index, label_smoothing)[0]


def _tangent(
    z: Tensor,
    z_dot: Tensor,
    v: Tensor | None,
    v_dot: Tensor | None,
    y: Tensor,
    beta: float,
    mask: Tensor | None,
    seed: Tensor | None,
    first_row: int,
    reduction: Reduction,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return L̇, and for the gradients log-sum-exp and mean of ż + ȧ (B,), and the samples in a reduction to the mean (1,)."""
    refuse_tangents(NAME, z, z_dot, v, v_dot)
    flat, options = FlatBeta(beta, mask, seed, first_row), Options(reduction, ignore_index, label_smoothing)
    if uses_triton(z):
        from fastadvisor_kernels.tangent_loss.plan import Inputs, plan_tangent

        plan = plan_tangent(Inputs(z, z_dot, v, v_dot), y, flat, options)
        run(plan.launches)
        return plan.loss, plan.lse, plan.mean, plan.loss.new_empty(0) if plan.counted is None else plan.counted
    loss = reference.tangent_loss(z, z_dot, v, y, flat.beta(), v_dot, **options._asdict())
    counted, safe = split_ignored(y, ignore_index)
    lse = torch.logsumexp(weighted_logits(z, v, safe, flat.beta()), dim=1).to(loss.dtype)
    # L̇ is the mean less the target's part, which a sample that is ignored has not.
    each = reference.tangent_loss(z, z_dot, v, safe, flat.beta(), v_dot, ignore_index=-1, label_smoothing=label_smoothing)
    mean = each + smoothed_target(z_dot.to(each.dtype), safe, label_smoothing)
    return loss, lse, mean, counted.sum().to(loss.dtype)[None] if reduction == "mean" else lse.new_empty(0)


def _gradients(
    grad: Tensor,
    z: Tensor,
    z_dot: Tensor,
    v: Tensor | None,
    v_dot: Tensor | None,
    y: Tensor,
    lse: Tensor,
    mean: Tensor,
    count: Tensor,
    beta: float,
    mask: Tensor | None,
    seed: Tensor | None,
    first_row: int,
    reduction: Reduction,
    ignore_index: int,
    label_smoothing: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of z, ż, v and v̇, (0,) for one that is not wanted."""
    refuse_tangents(f"The gradient of {NAME}", grad, z, z_dot, v, v_dot)
    flat, options = FlatBeta(beta, mask, seed, first_row), Options(reduction, ignore_index, label_smoothing)
    found: list[Tensor | None]
    if uses_triton(z):
        from fastadvisor_kernels.tangent_loss.plan import Inputs, Kept, plan_tangent_gradients

        kept = Kept(grad, lse, mean, count if reduction == "mean" else None)
        of_z, of_z_dot, of_v, of_v_dot = wanted
        launch, found = plan_tangent_gradients(
            Inputs(z, z_dot, v, v_dot), y, flat, options, kept, (of_z, of_z_dot, of_v, of_v_dot)
        )
        launch.run()
    else:
        found = list(reference.gradients(grad, z, z_dot, v, v_dot, y, flat.beta(), **options._asdict()))
    z_grad, z_dot_grad, v_grad, v_dot_grad = (
        part.contiguous() if needed and part is not None else z.new_empty(0) for part, needed in zip(found, wanted, strict=True)
    )
    return z_grad, z_dot_grad, v_grad, v_dot_grad


class TangentLoss(torch.autograd.Function):
    """L̇ with its gradients, once by the kernel, and twice by plain torch."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :func:`_tangent`."""
        return _tangent(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the inputs, as they are, and three numbers a sample."""
        *tensors, beta, mask, seed, first_row, reduction, ignore_index, label_smoothing = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros for those three would be launches of their own
        ctx.save_for_backward(*tensors, *output[1:], mask, seed)
        ctx.beta, ctx.first_row, ctx.options = beta, first_row, (reduction, ignore_index, label_smoothing)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        """One launch; where the gradient's own gradient is wanted, formulas that autograd can follow."""
        if grad is not None and torch.is_grad_enabled():
            z, z_dot, v, v_dot, y, _, _, _, mask, seed = ctx.saved_tensors
            beta = FlatBeta(ctx.beta, mask, seed, ctx.first_row).beta()
            gradients = reference.gradients(grad, z, z_dot, v, v_dot, y, beta, *ctx.options)
            return (*gradients, *[None] * 8)
        return _backward(ctx, grad, _gradients)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        """Raise: a NotImplementedError."""
        raise NotImplementedError(explain_forward_mode(NAME))


def _backward(ctx: Any, grad: Tensor | None, call: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 12
    *tensors, mask, seed = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:4])
    found = call(grad, *tensors, ctx.beta, mask, seed, ctx.first_row, *ctx.options, wanted)
    return (*(part if needed else None for part, needed in zip(found, wanted, strict=True)), *[None] * 8)


tangent_op = torch.library.custom_op(
    f"fastadvisor::{NAME}",
    _tangent,
    mutates_args=(),
    schema=f"(Tensor z, Tensor z_dot, Tensor? v, Tensor? v_dot, Tensor y, {FLAT}) -> (Tensor, Tensor, Tensor, Tensor)",
)
gradients_op = torch.library.custom_op(
    f"fastadvisor::{NAME}_backward",
    _gradients,
    mutates_args=(),
    schema="(Tensor grad, Tensor z, Tensor z_dot, Tensor? v, Tensor? v_dot, Tensor y, Tensor lse, Tensor mean, Tensor count, "
    f"{FLAT}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)


@tangent_op.register_fake
def _(z: Tensor, z_dot: Tensor, v: Tensor | None, v_dot: Tensor | None, y: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    dtype, reduction = compute_dtype(z, z_dot, v, v_dot), flat[4]
    lse, mean = z.new_empty(len(z), dtype=dtype), z.new_empty(len(z), dtype=dtype)
    loss = z.new_empty(len(z) if reduction == "none" else (), dtype=dtype)
    return loss, lse, mean, z.new_empty(int(reduction == "mean"), dtype=dtype)


@gradients_op.register_fake
def _(grad: Tensor, z: Tensor, z_dot: Tensor, v: Tensor | None, v_dot: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    inputs = (z, z_dot, v, v_dot)
    return tuple(
        z.new_empty(0) if part is None or not needed else part.new_empty(part.shape)
        for part, needed in zip(inputs, rest[-1], strict=True)
    )


tangent_op.register_autograd(lambda ctx, grad, *_: _backward(ctx, grad, gradients_op), setup_context=TangentLoss.setup_context)
