"""Which launches the tangent loss takes: arguments and outputs. Tiles and β are those of the loss itself."""

from typing import Any, NamedTuple

from torch import Tensor

from fastadvisor_kernels.arithmetic import ACC
from fastadvisor_kernels.equalization_softmax.flat import FlatBeta, Options
from fastadvisor_kernels.equalization_softmax.plan import (
    beta_arguments,
    dense_rows,
    grad_step,
    gradient_tile,
    loss_tile,
    reduction_launch,
)
from fastadvisor_kernels.launch import Launch, ceil_div, compute_dtype, fast_math, power_of_two
from fastadvisor_kernels.tangent_loss.triton import combine_tangent_kernel, tangent_gradient_kernel, tangent_kernel


class Inputs(NamedTuple):
    """Logits and advice with their tangents, each (B, C)."""

    z: Tensor
    z_dot: Tensor
    v: Tensor | None
    v_dot: Tensor | None

    def arguments(self) -> dict[str, Any]:
        """Return pointers and distances of rows, by the kernels' names."""
        found: dict[str, Any] = {}
        for name, tensor in self._asdict().items():
            rows = None if tensor is None else dense_rows(tensor)
            found |= {f"{name}_ptr": rows, f"{name.upper()}_ROW": 0 if rows is None else rows.stride(0)}
        return found


class TangentPlan(NamedTuple):
    """The launches of an operation and the outputs that they write."""

    launches: list[Launch]
    loss: Tensor
    """(B,), or () after a reduction."""
    lse: Tensor
    """(B,) log-sum-exp of z + a."""
    mean: Tensor
    """(B,) mean of q under p̃."""
    counted: Tensor | None
    """(1,) samples that the mean is over."""


def plan_tangent(inputs: Inputs, y: Tensor, beta: FlatBeta, options: Options) -> TangentPlan:
    """Return the launches for L̇ and what its gradients need of it: one where a row fits a tile, else two.

    A reduction is one more.
    """
    (rows, classes), dtype = inputs.z.shape, compute_dtype(*inputs)
    tile = loss_tile(rows, classes, dtype)
    loss, lse, mean = (inputs.z.new_empty(rows, dtype=dtype) for _ in range(3))
    part = inputs.z.new_empty((rows, tile.segments, 4), dtype=dtype) if tile.segments > 1 else None
    given = inputs.arguments()
    shared = {
        "z_dot_ptr": given["z_dot_ptr"], "y_ptr": y.contiguous(), "loss_ptr": loss, "lse_ptr": lse, "mean_ptr": mean,
        "part_ptr": part, "rows": rows, "C": classes, "Z_DOT_ROW": given["Z_DOT_ROW"], "SMOOTHING": options.label_smoothing,
        "IGNORE": options.ignore_index, "ACC": ACC[dtype], "SEGMENTS": tile.segments,
    }  # fmt: skip
    own = {"FAST": fast_math(dtype), "ROWS": tile.rows, "BLOCK": tile.block, "CHUNKS": tile.chunks}
    arguments = given | beta_arguments(beta, inputs.v, dtype) | shared | own
    launches = [Launch(tangent_kernel, (ceil_div(rows, tile.rows), tile.segments), arguments, tile.warps)]
    if tile.segments > 1:
        block = power_of_two(tile.segments)
        height = max(1, 256 // block)
        launches.append(Launch(combine_tangent_kernel, (ceil_div(rows, height),), shared | {"ROWS": height, "BLOCK": block}))
    if options.reduction == "none":
        return TangentPlan(launches, loss, lse, mean, None)
    launch, total, count = reduction_launch(loss, y, options)
    return TangentPlan([*launches, launch], total, lse, mean, count)


class Kept(NamedTuple):
    """What the forward pass saves for the gradients, beside the inputs."""

    grad: Tensor
    lse: Tensor
    mean: Tensor
    counted: Tensor | None


def plan_tangent_gradients(
    inputs: Inputs, y: Tensor, beta: FlatBeta, options: Options, kept: Kept, wanted: tuple[bool, bool, bool, bool]
) -> tuple[Launch, list[Tensor | None]]:
    """Return the one launch for the gradients of z, ż, v and v̇, and those that are wanted."""
    (rows, classes), dtype = inputs.z.shape, kept.lse.dtype
    tile = gradient_tile(classes, dtype)
    gradients = [
        tensor.new_empty(tensor.shape) if needed and tensor is not None else None
        for tensor, needed in zip(inputs, wanted, strict=True)
    ]
    arguments = {
        **inputs.arguments(), **beta_arguments(beta, inputs.v, dtype),
        **{f"{name}_grad_ptr": gradient for name, gradient in zip(Inputs._fields, gradients, strict=True)},
        "y_ptr": y.contiguous(), "grad_ptr": kept.grad, "count_ptr": kept.counted, "lse_ptr": kept.lse, "mean_ptr": kept.mean,
        "rows": rows, "C": classes, "GRAD_STEP": grad_step(kept.grad), "SMOOTHING": options.label_smoothing,
        "IGNORE": options.ignore_index, "ACC": ACC[dtype], "FAST": fast_math(dtype), "ROWS": tile.rows, "BLOCK": tile.block,
    }  # fmt: skip
    grid = (ceil_div(rows, tile.rows), ceil_div(classes, tile.block))
    return Launch(tangent_gradient_kernel, grid, arguments, tile.warps), gradients
