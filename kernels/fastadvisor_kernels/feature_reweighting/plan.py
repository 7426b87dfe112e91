"""Which launches the re-weighting takes: arguments and outputs."""

from typing import Any, NamedTuple

from torch import Tensor

from fastadvisor_kernels.arithmetic import ACC
from fastadvisor_kernels.feature_reweighting.triton import reweight_gradient_kernel, reweight_kernel
from fastadvisor_kernels.launch import Launch, ceil_div, compute_dtype, fast_math


class Rows(NamedTuple):
    """A tensor (…, D) as a kernel reads it."""

    tensor: Tensor | None
    row: int
    """Distance of two rows; 0 where all elements follow each other."""

    @classmethod
    def of(cls, tensor: Tensor | None) -> "Rows":
        """Take it as it is, or a copy where neighbours in a row are not neighbours in memory."""
        if tensor is None or tensor.is_contiguous():
            return cls(tensor, 0)
        if tensor.dim() == 2 and (tensor.shape[1] == 1 or tensor.stride(1) == 1) and tensor.stride(0) != 0:
            return cls(tensor, tensor.stride(0))
        return cls(tensor.contiguous(), 0)


def plan_reweight(f: Tensor, f_dot: Tensor | None, u: Tensor, *, inplace: bool) -> tuple[Launch, Tensor, Tensor | None]:
    """Return the launch, h, and ḣ where ḟ is given; ``inplace``: h is f."""
    dtype = compute_dtype(f, f_dot, u)
    features, features_dot, outputs = Rows.of(f), Rows.of(f_dot), Rows.of(u)
    h = features.tensor if inplace else f.new_empty(f.shape, dtype=f.dtype if f_dot is None else dtype)
    assert h is not None
    h_dot = None if f_dot is None else f.new_empty(f.shape, dtype=dtype)
    arguments = {
        "f_ptr": features.tensor, "f_dot_ptr": features_dot.tensor, "u_ptr": outputs.tensor, "h_ptr": h, "h_dot_ptr": h_dot,
        "count": f.numel(), "D": width(f), "F_ROW": features.row, "F_DOT_ROW": features_dot.row, "U_ROW": outputs.row,
        "H_ROW": features.row if inplace else 0, "ACC": ACC[dtype], "FAST": fast_math(dtype),
    }  # fmt: skip
    return _launch(reweight_kernel, arguments), h, h_dot


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    f: bool
    f_dot: bool
    u: bool


def plan_reweight_gradients(
    grad: Tensor, grad_dot: Tensor | None, f: Tensor, f_dot: Tensor | None, u: Tensor, wanted: Wanted, *, masked: bool
) -> tuple[Launch, Tensor | None, Tensor | None, Tensor | None]:
    """Return the launch and the gradients of f, ḟ and u; ``masked``: ``f`` is the h that has overwritten it."""
    dtype = compute_dtype(f, f_dot, u)
    f_grad = f.new_empty(f.shape) if wanted.f else None
    f_dot_grad = f_dot.new_empty(f.shape) if f_dot is not None and wanted.f_dot else None
    u_grad = u.new_empty(f.shape) if wanted.u else None
    above, above_dot, features, features_dot, outputs = (Rows.of(tensor) for tensor in (grad, grad_dot, f, f_dot, u))
    arguments = {
        "grad_ptr": above.tensor, "grad_dot_ptr": above_dot.tensor, "f_ptr": features.tensor, "f_dot_ptr": features_dot.tensor,
        "u_ptr": outputs.tensor, "f_grad_ptr": f_grad, "f_dot_grad_ptr": f_dot_grad, "u_grad_ptr": u_grad, "count": f.numel(),
        "D": width(f), "GRAD_ROW": above.row, "GRAD_DOT_ROW": above_dot.row, "F_ROW": features.row,
        "F_DOT_ROW": features_dot.row, "U_ROW": outputs.row, "MASKED": masked, "ACC": ACC[dtype], "FAST": fast_math(dtype),
    }  # fmt: skip
    return _launch(reweight_gradient_kernel, arguments), f_grad, f_dot_grad, u_grad


def _launch(kernel: Any, arguments: dict[str, Any]) -> Launch:
    """Return a launch of eight elements a thread, four where their places take a division: more would spill."""
    count, flat = arguments["count"], not any(row for name, row in arguments.items() if name.endswith("_ROW"))
    size = 1024 if flat else 512
    # Whether the elements' numbers take 64 bits; few do, and to divide them takes long.
    sizes = {"BLOCK": size, "WIDE": count + size >= 2**31}
    return Launch(kernel, (ceil_div(count, size),), arguments | sizes)


def width(f: Tensor) -> int:
    """Return D."""
    return f.shape[-1] if f.dim() else 1
