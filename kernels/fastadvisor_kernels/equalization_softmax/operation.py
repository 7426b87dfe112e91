"""``mes_cross_entropy``: dispatch, gradients, and the operations of torch.library. Shapes: B samples, C classes."""

from typing import Any

import torch
from torch import Tensor

from fastadvisor_kernels.dispatch import explain_forward_mode, refuse_tangents, uses_triton
from fastadvisor_kernels.equalization_softmax import reference
from fastadvisor_kernels.equalization_softmax.flat import FlatBeta, Options
from fastadvisor_kernels.equalization_softmax.reference import Beta, Reduction
from fastadvisor_kernels.launch import compute_dtype, run

NAME = "mes_cross_entropy"
FLAT = "float beta, Tensor? mask, Tensor? seed, int first_row, str reduction, int ignore_index, float label_smoothing"


def mes_cross_entropy(
    z_BC: Tensor,
    v_BC: Tensor | None,
    y_B: Tensor,
    beta: Beta = None,
    *,
    reduction: Reduction = "none",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the equalised softmax cross-entropy (paper eq. 4, 6, 8): −log(e^{z_y} / Σ_k w_k e^{z_k}).

    w_k = 1 − β σ(v_k) for k ≠ y, w_y = 1.

    Non-negative (without smoothing), and finite for every finite input. By Triton on a GPU: one launch for the losses, one for
    both gradients, nothing of size (B, C) kept but the inputs. Differentiable twice in z and v. On a GPU a label outside
    [0, C) gives NaN (finding it would mean to wait for the device); on the CPU torch raises.

    Args:
        z_BC: (B, C) logits, any float dtype.
        v_BC: (B, C) the advisor's output before the sigmoid, any float dtype; None for plain cross-entropy.
        y_B: (B,) integer targets in [0, C), or ``ignore_index``.
        beta: None for 1; a float in [0, 1], taken as an expected value; a {0, 1} tensor, (1, 1), (B, 1) or (B, C); or a
            :class:`~fastadvisor_kernels.Bernoulli`, drawn per sample and class where it is needed and never stored.
        reduction: ``none``, ``sum``, or ``mean`` over the samples that are not ignored, as torch's cross_entropy.
        ignore_index: samples with this target have loss 0 and no gradient.
        label_smoothing: ε in [0, 1]: the target is (1 − ε) [k = y] + ε / C. w_y stays 1 at the label alone.

    Returns:
        (B,) float32 losses, or () after a reduction (float64 where an input is float64); gradients come in the dtype of their
        input.

    Raises:
        ValueError: shapes that do not fit, ``beta`` or ``label_smoothing`` outside [0, 1], an unknown ``reduction``.
        NotImplementedError: z or v carries a forward-mode tangent, on a GPU.
    """
    _check(z_BC, v_BC, y_B, beta, reduction, label_smoothing)
    if not uses_triton(z_BC):
        return reference.mes_cross_entropy(
            z_BC, v_BC, y_B, beta, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing
        )
    # Eager mode passes the operation of torch.library by: it takes longer to call than the kernel to run.
    call = loss_op if torch.compiler.is_compiling() else MESCrossEntropy.apply
    return call(z_BC, v_BC, y_B, *FlatBeta.of(beta), reduction, ignore_index, label_smoothing)[0]


def mes_cross_entropy_with_gradients(
    z_BC: Tensor,
    v_BC: Tensor | None,
    y_B: Tensor,
    beta: Beta = None,
    grad_B: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    of_v: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the losses and their gradients at once: a single launch on a GPU where C ≤ 4096 (float64: 1024).

    For callers who know the gradient that comes from above before they have the loss (1/B for a mean), as in
    ``z.backward(z_grad)``: the backward pass reads z and v once less. The results are constants to autograd.

    Args:
        z_BC: as in :func:`mes_cross_entropy`, and so are ``v_BC``, ``y_B``, ``beta``, ``ignore_index`` and ``label_smoothing``.
        v_BC: see there.
        y_B: see there.
        beta: see there.
        grad_B: (B,) gradient of what is differentiated for each loss; None for 1.
        ignore_index: see there.
        label_smoothing: see there.
        of_v: whether the gradient of v is wanted.

    Returns:
        losses (B,), gradient of z (B, C), gradient of v (B, C) or None.

    Raises:
        ValueError: as :func:`mes_cross_entropy`, or a ``grad_B`` that is not (B,).
        NotImplementedError: z or v carries a forward-mode tangent.
    """
    _check(z_BC, v_BC, y_B, beta, "none", label_smoothing)
    if grad_B is not None and grad_B.shape != y_B.shape:
        raise ValueError(f"Expected grad (B,) = {tuple(y_B.shape)}, got {tuple(grad_B.shape)}.")
    of_v = of_v and v_BC is not None
    flat, options = FlatBeta.of(beta), Options("none", ignore_index, label_smoothing)
    with torch.no_grad():
        call = with_gradients_op if torch.compiler.is_compiling() else _loss_and_gradients
        loss_B, z_grad, v_grad = call(z_BC, v_BC, y_B, grad_B, *flat, *options, of_v)
    return loss_B, z_grad, v_grad if of_v else None


def _check(z_BC: Tensor, v_BC: Tensor | None, y_B: Tensor, beta: Beta, reduction: str, label_smoothing: float) -> None:
    reference.check_inputs(z_BC, v_BC, y_B)
    reference.check_options(reduction, label_smoothing)
    if v_BC is not None:
        reference.check_beta(beta, v_BC)


def _loss(
    z: Tensor,
    v: Tensor | None,
    y: Tensor,
    beta: float,
    mask: Tensor | None,
    seed: Tensor | None,
    first_row: int,
    reduction: Reduction,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, and for the gradients the log-sum-exp (B,) and the number of samples in a mean (1,), else (0,)."""
    refuse_tangents(NAME, z, v)
    flat, options = FlatBeta(beta, mask, seed, first_row), Options(reduction, ignore_index, label_smoothing)
    if uses_triton(z):
        from fastadvisor_kernels.equalization_softmax.plan import plan_loss

        plan = plan_loss(z, v, y, flat, options)
        run(plan.launches)
        assert plan.lse is not None
        return plan.loss, plan.lse, plan.loss.new_empty(0) if plan.counted is None else plan.counted
    loss = reference.mes_cross_entropy(z, v, y, flat.beta(), **options._asdict())
    counted, safe = reference.split_ignored(y, ignore_index)
    lse = torch.logsumexp(reference.weighted_logits(z, v, safe, flat.beta()), dim=1)
    return loss, lse, counted.sum().to(loss.dtype)[None] if reduction == "mean" else lse.new_empty(0)


def _gradients(
    grad: Tensor,
    z: Tensor,
    v: Tensor | None,
    y: Tensor,
    lse: Tensor,
    count: Tensor,
    beta: float,
    mask: Tensor | None,
    seed: Tensor | None,
    first_row: int,
    reduction: Reduction,
    ignore_index: int,
    label_smoothing: float,
    of_z: bool,
    of_v: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of z and v, (0,) for one that is not wanted."""
    refuse_tangents(f"The gradient of {NAME}", grad, z, v)
    flat, options = FlatBeta(beta, mask, seed, first_row), Options(reduction, ignore_index, label_smoothing)
    if uses_triton(z):
        from fastadvisor_kernels.equalization_softmax.plan import plan_gradients

        counted = count if reduction == "mean" else None
        launches, z_grad, v_grad = plan_gradients(grad, z, v, y, lse, counted, flat, options, of_z=of_z, of_v=of_v)
        run(launches)
    else:
        z_grad, v_grad = reference.gradients(grad, z, v, y, flat.beta(), **options._asdict())
    # Contiguous, as the kernels leave them: what a compiler was told must hold whoever computes.
    return (
        z_grad.contiguous() if of_z and z_grad is not None else z.new_empty(0),
        v_grad.contiguous() if of_v and v_grad is not None else z.new_empty(0),
    )


def _loss_and_gradients(
    z: Tensor,
    v: Tensor | None,
    y: Tensor,
    grad: Tensor | None,
    beta: float,
    mask: Tensor | None,
    seed: Tensor | None,
    first_row: int,
    reduction: Reduction,
    ignore_index: int,
    label_smoothing: float,
    of_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses (B,) and the gradients of z and v, (0,) for one that is not wanted."""
    refuse_tangents(f"{NAME}_with_gradients", z, v, grad)
    flat, options = FlatBeta(beta, mask, seed, first_row), Options(reduction, ignore_index, label_smoothing)
    if uses_triton(z):
        from fastadvisor_kernels.equalization_softmax.plan import plan_loss_and_gradients

        plan = plan_loss_and_gradients(z, v, y, flat, options, grad, of_v=of_v)
        run(plan.launches)
        loss, z_grad, v_grad = plan.loss, plan.z_grad, plan.v_grad
    else:
        loss, z_grad, v_grad = reference.loss_and_gradients(z, v, y, grad, flat.beta(), ignore_index, label_smoothing)
    assert z_grad is not None
    return loss, z_grad.contiguous(), z.new_empty(0) if v_grad is None or not of_v else v_grad.contiguous()


class MESCrossEntropy(torch.autograd.Function):
    """The loss with its gradients, once by the kernel, and twice by plain torch."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`_loss`."""
        return _loss(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep the inputs, as they are, and two numbers a sample."""
        z, v, y, beta, mask, seed, first_row, *options = inputs
        _, lse, count = output
        ctx.mark_non_differentiable(lse, count)
        ctx.set_materialize_grads(False)  # zeros for those two would be launches of their own
        ctx.save_for_backward(z, v, y, lse, count, mask, seed)
        ctx.beta, ctx.first_row, ctx.options = beta, first_row, options

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        """One launch; where the gradient's own gradient is wanted, formulas that autograd can follow."""
        if grad is not None and torch.is_grad_enabled():
            z, v, y, _, _, mask, seed = ctx.saved_tensors
            beta = FlatBeta(ctx.beta, mask, seed, ctx.first_row).beta()
            return (*reference.gradients(grad, z, v, y, beta, *ctx.options), *[None] * 8)
        return _backward(ctx, grad, _gradients)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        """Raise: a NotImplementedError."""
        raise NotImplementedError(explain_forward_mode(NAME))


def _backward(ctx: Any, grad: Tensor | None, call: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    z, v, y, lse, count, mask, seed = ctx.saved_tensors
    of_z, of_v = ctx.needs_input_grad[:2]
    z_grad, v_grad = call(grad, z, v, y, lse, count, ctx.beta, mask, seed, ctx.first_row, *ctx.options, of_z, of_v)
    return (z_grad if of_z else None, v_grad if of_v else None, *[None] * 8)


loss_op = torch.library.custom_op(
    f"fastadvisor::{NAME}",
    _loss,
    mutates_args=(),
    schema=f"(Tensor z, Tensor? v, Tensor y, {FLAT}) -> (Tensor, Tensor, Tensor)",
)
gradients_op = torch.library.custom_op(
    f"fastadvisor::{NAME}_backward",
    _gradients,
    mutates_args=(),
    schema="(Tensor grad, Tensor z, Tensor? v, Tensor y, Tensor lse, Tensor count, "
    f"{FLAT}, bool of_z, bool of_v) -> (Tensor, Tensor)",
)
with_gradients_op = torch.library.custom_op(
    f"fastadvisor::{NAME}_with_gradients",
    _loss_and_gradients,
    mutates_args=(),
    schema=f"(Tensor z, Tensor? v, Tensor y, Tensor? grad, {FLAT}, bool of_v) -> (Tensor, Tensor, Tensor)",
)


@loss_op.register_fake
def _(z: Tensor, v: Tensor | None, y: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, reduction = compute_dtype(z, v), options[4]
    loss = z.new_empty(len(z) if reduction == "none" else (), dtype=dtype)
    return loss, z.new_empty(len(z), dtype=dtype), z.new_empty(int(reduction == "mean"), dtype=dtype)


@gradients_op.register_fake
def _(grad: Tensor, z: Tensor, v: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    of_z, of_v = rest[-2:]
    return z.new_empty(z.shape if of_z else 0), z.new_empty(0) if v is None or not of_v else v.new_empty(v.shape)


@with_gradients_op.register_fake
def _(z: Tensor, v: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = z.new_empty(len(z), dtype=compute_dtype(z, v))
    return loss, z.new_empty(z.shape), z.new_empty(0) if v is None or not rest[-1] else v.new_empty(v.shape)


loss_op.register_autograd(lambda ctx, grad, *_: _backward(ctx, grad, gradients_op), setup_context=MESCrossEntropy.setup_context)
