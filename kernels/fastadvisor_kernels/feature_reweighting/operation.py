"""``reweight_features`` and ``reweight_dual``: dispatch, gradients, and the operation of torch.library."""

from typing import Any

import torch
from torch import Tensor

from fastadvisor_kernels.dispatch import explain_forward_mode, refuse_tangents, uses_triton
from fastadvisor_kernels.feature_reweighting import reference
from fastadvisor_kernels.launch import compute_dtype

NAME = "reweight_features"


def reweight_features(f_BD: Tensor, u_BD: Tensor, *, inplace: bool = False) -> Tensor:
    """Return f ⊙ σ(u): features masked by the advisor (paper eq. 3). One launch forward, one backward, on a GPU.

    Differentiable twice in f and u.

    Args:
        f_BD: (..., D) features, any float dtype.
        u_BD: (..., D) the advisor's output before the sigmoid, any float dtype.
        inplace: write the result over ``f_BD`` and return it. The gradient of u is then computed from the result: in half
            precision it is rounded once more. As with any operation in place, whoever needs ``f_BD`` as it was fails in its
            backward pass.

    Returns:
        (..., D) in the dtype of ``f_BD``; the product is taken in float32 at least.

    Raises:
        ValueError: shapes that differ, or a leaf that requires a gradient in place.
        NotImplementedError: f or u carries a forward-mode tangent, on a GPU or in place.
    """
    reference.check_shapes(f_BD, u_BD)
    if not uses_triton(f_BD) and not inplace:
        return reference.reweight_features(f_BD, u_BD)
    if torch.compiler.is_compiling():  # a compiler finds out by itself what can be overwritten
        h_BD = reweight_op(f_BD, None, u_BD)[0] if uses_triton(f_BD) else reference.reweight_features(f_BD, u_BD)
        return f_BD.copy_(h_BD) if inplace else h_BD
    if inplace and f_BD.is_leaf and f_BD.requires_grad and torch.is_grad_enabled():
        raise ValueError("inplace=True would write over a leaf that requires a gradient: leave it off for this tensor.")
    return Reweight.apply(f_BD, u_BD, inplace)


def reweight_dual(f_BD: Tensor, f_dot_BD: Tensor, u_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Return f ⊙ σ(u) and ḟ ⊙ σ(u), the masked features and their derivative along a direction in the backbone's weights.

    One launch forward, one backward, on a GPU: the mask is read once. Differentiable twice in all three.

    Args:
        f_BD: (..., D) features, any float dtype.
        f_dot_BD: (..., D) their tangent, a plain tensor.
        u_BD: (..., D) the advisor's output before the sigmoid.

    Returns:
        (..., D) twice, in the dtype that holds all three, float32 at least.

    Raises:
        ValueError: shapes that differ.
        NotImplementedError: one carries a forward-mode tangent, on a GPU.
    """
    reference.check_shapes(f_BD, f_dot_BD, u_BD)
    if not uses_triton(f_BD):
        return reference.reweight_dual(f_BD, f_dot_BD, u_BD)
    if torch.compiler.is_compiling():
        return reweight_op(f_BD, f_dot_BD, u_BD)
    h_BD, h_dot_BD = ReweightDual.apply(f_BD, f_dot_BD, u_BD)
    return h_BD, h_dot_BD


def _reweight(f: Tensor, f_dot: Tensor | None, u: Tensor, inplace: bool = False) -> tuple[Tensor, Tensor]:
    """Return h, and ḣ, (0,) without ḟ."""
    refuse_tangents(NAME, f, f_dot, u)
    if uses_triton(f):
        from fastadvisor_kernels.feature_reweighting.plan import plan_reweight

        launch, h, h_dot = plan_reweight(f, f_dot, u, inplace=inplace)
        launch.run()
    elif f_dot is None:
        h, h_dot = reference.reweight_features(f, u), None
    else:
        h, h_dot = reference.reweight_dual(f, f_dot, u)
    if inplace:
        return f if h is f else f.copy_(h), f.new_empty(0)
    # Contiguous, as the kernels leave them: what a compiler was told must hold whoever computes.
    return h.contiguous(), h.new_empty(0) if h_dot is None else h_dot.contiguous()


def _gradients(
    grad: Tensor,
    grad_dot: Tensor,
    f: Tensor,
    f_dot: Tensor | None,
    u: Tensor,
    of_f: bool,
    of_f_dot: bool,
    of_u: bool,
    masked: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of f, ḟ and u, (0,) for one that is not wanted."""
    refuse_tangents(f"The gradient of {NAME}", grad, grad_dot, f, f_dot, u)
    above_dot = None if f_dot is None else grad_dot
    if uses_triton(f):
        from fastadvisor_kernels.feature_reweighting.plan import Wanted, plan_reweight_gradients

        launch, *found = plan_reweight_gradients(grad, above_dot, f, f_dot, u, Wanted(of_f, of_f_dot, of_u), masked=masked)
        launch.run()
    else:
        found = list(reference.gradients(grad, above_dot, f, f_dot, u, masked=masked))
    f_grad, f_dot_grad, u_grad = (
        part.contiguous() if wanted and part is not None else f.new_empty(0)
        for part, wanted in zip(found, (of_f, of_f_dot, of_u), strict=True)
    )
    return f_grad, f_dot_grad, u_grad


class Reweight(torch.autograd.Function):
    """One masked feature with its gradients, once by the kernel, and twice by plain torch.

    One output: torch takes a view in place from a function with no other.
    """

    @staticmethod
    def forward(f: Tensor, u: Tensor, inplace: bool) -> Tensor:
        """See :func:`_reweight`."""
        return _reweight(f, None, u, inplace)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs; in place the result, which is what there is."""
        f, u, ctx.masked = inputs
        if ctx.masked:
            ctx.mark_dirty(f)
        ctx.save_for_backward(output if ctx.masked else f, u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """One launch; where the gradient's own gradient is wanted, formulas that autograd can follow."""
        f, u = ctx.saved_tensors
        if torch.is_grad_enabled():
            f_grad, _, u_grad = reference.gradients(grad, None, f, None, u, masked=ctx.masked)
            return f_grad, u_grad, None
        of_f, of_u, _ = ctx.needs_input_grad
        f_grad, _, u_grad = _gradients(grad, grad, f, None, u, of_f, False, of_u, ctx.masked)
        return f_grad if of_f else None, u_grad if of_u else None, None

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        """Raise: a NotImplementedError."""
        raise NotImplementedError(explain_forward_mode(NAME))


class ReweightDual(torch.autograd.Function):
    """Two masked features with their gradients."""

    @staticmethod
    def forward(f: Tensor, f_dot: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`_reweight`."""
        return _reweight(f, f_dot, u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the inputs."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_dot: Tensor) -> tuple[Any, ...]:
        """One launch; where the gradient's own gradient is wanted, formulas that autograd can follow."""
        if torch.is_grad_enabled():
            f, f_dot, u = ctx.saved_tensors
            return reference.gradients(grad, grad_dot, f, f_dot, u)
        return _backward(ctx, grad, grad_dot, _gradients)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        """Raise: a NotImplementedError."""
        raise NotImplementedError(explain_forward_mode("reweight_dual"))


def _backward(ctx: Any, grad: Tensor, grad_dot: Tensor, call: Any) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad[:3]
    found = call(grad, grad_dot, *ctx.saved_tensors, *wanted, False)
    return tuple(part if needed else None for part, needed in zip(found, wanted, strict=True))


reweight_op = torch.library.custom_op(
    "fastadvisor::reweight", _reweight, mutates_args=(), schema="(Tensor f, Tensor? f_dot, Tensor u) -> (Tensor, Tensor)"
)
gradients_op = torch.library.custom_op(
    "fastadvisor::reweight_backward",
    _gradients,
    mutates_args=(),
    schema="(Tensor grad, Tensor grad_dot, Tensor f, Tensor? f_dot, Tensor u, bool of_f, bool of_f_dot, bool of_u, bool masked)"
    " -> (Tensor, Tensor, Tensor)",
)


@reweight_op.register_fake
def _(f: Tensor, f_dot: Tensor | None, u: Tensor) -> tuple[Tensor, Tensor]:
    if f_dot is None:
        return f.new_empty(f.shape), f.new_empty(0)
    dtype = compute_dtype(f, f_dot, u)
    return f.new_empty(f.shape, dtype=dtype), f.new_empty(f.shape, dtype=dtype)


@gradients_op.register_fake
def _(
    grad: Tensor,
    grad_dot: Tensor,
    f: Tensor,
    f_dot: Tensor | None,
    u: Tensor,
    of_f: bool,
    of_f_dot: bool,
    of_u: bool,
    masked: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    f_dot_grad = f_dot.new_empty(f.shape) if f_dot is not None and of_f_dot else f.new_empty(0)
    return f.new_empty(f.shape if of_f else 0), f_dot_grad, u.new_empty(f.shape) if of_u else f.new_empty(0)


reweight_op.register_autograd(
    lambda ctx, grad, grad_dot: _backward(ctx, grad, grad_dot, gradients_op), setup_context=ReweightDual.setup_context
)
