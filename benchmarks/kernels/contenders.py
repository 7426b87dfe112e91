"""Who takes part: operations, their inputs, and the ways to compute them. A new one is a row in ``OPERATIONS``.

Shapes: B samples, C classes. What a contender returns autograd can go back through, to the inputs that require a gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.contenders import Unavailable, incompatible
from fastadvisor_kernels import (
    Bernoulli,
    backend,
    mes_cross_entropy,
    mes_cross_entropy_with_gradients,
    reweight_dual,
    reweight_features,
    tangent_loss,
)

Inputs = tuple[Tensor, ...]
Function = Callable[..., Any]
MARGIN = {torch.float64: 1e-10, torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""By which a contender may be further from float64 than plain torch in the same dtype (design section 7)."""


@dataclass(frozen=True)
class Contender:
    """One way to compute an operation."""

    label: str
    build: Callable[[], Function]
    """Return the function of the operation's inputs; raises Unavailable with the reason."""
    plain: bool = False
    """Whether it knows no weights: it computes plain cross-entropy of z, which is less work."""
    gradients_in_forward: bool = False
    """Whether the forward pass gives the gradients too, and there is no backward pass."""
    summed: bool = False
    """Whether it returns the sum of the losses: its backward pass has one number above it."""
    destroys: bool = False
    """Whether it writes over its input."""
    on_gpu_only: bool = False
    waits: bool = False
    """Whether it waits for the device, so that no CUDA graph can hold it: its kernel time has the host's in it."""


@dataclass(frozen=True)
class Operation:
    """What is computed."""

    name: str
    make: Callable[[int, int, torch.dtype, torch.device], Inputs]
    truth: Function
    """Plain torch, for the check in float64."""
    contenders: dict[str, Contender]
    read: int
    """Tensors (B, C) that go in, and whose gradients come out."""
    written: int = 0
    """Tensors (B, C) that come out, and whose gradients go in."""
    wide: bool = False
    """Whether these are float32, whatever goes in."""

    def bytes(self, phase: str, elements: int, width: int, *, contender: Contender) -> int:
        """Return the bytes that must move in a phase: each input read once, each output written once."""
        inputs = (1 if contender.plain else self.read) * width
        outputs = self.written * (max(width, 4) if self.wide else width)
        forward, back = inputs + outputs, 2 * inputs + outputs
        if contender.gradients_in_forward:
            forward, back = 2 * inputs, 0
        return elements * {"forward": forward, "backward": back, "both": forward + back}[phase]


def using(name: str, function: Function) -> Function:
    """Return ``function`` with its operations computed by ``name``."""

    def run(*inputs: Any) -> Any:
        with backend(name):  # type: ignore[arg-type]
            return function(*inputs)

    return run


def compiled(function: Function) -> Callable[[], Function]:
    """Return a builder of ``function``'s reference, compiled for each shape by itself."""

    def build() -> Function:
        torch._functorch.config.donated_buffer = False  # a backward pass is timed again and again on one graph
        return torch.compile(using("reference", function), dynamic=False)

    return build


def ours(function: Function) -> Callable[[], Function]:
    """Return a builder of ``function`` by Triton on a GPU, by the torch twins on the CPU."""
    return lambda: using("auto", function)


def plain_torch(function: Function) -> Callable[[], Function]:
    """Return a builder of the reference, in eager mode."""
    return lambda: using("reference", function)


def liger() -> Function:
    """Return Liger's cross-entropy, which computes the gradient in its forward pass and writes it over the logits."""
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss
    except ModuleNotFoundError:
        raise Unavailable("not installed; pip install 'fastadvisor[peers]'") from None
    except Exception as error:
        raise Unavailable(incompatible(error)) from None
    loss = LigerCrossEntropyLoss(reduction="sum")
    return lambda z, v, y: loss(z, y)


def apex() -> Function:
    """Return NVIDIA apex's cross-entropy."""
    try:
        from apex.contrib.xentropy import SoftmaxCrossEntropyLoss
    except ImportError:
        raise Unavailable("not installed; build NVIDIA's apex from its source repository with --xentropy") from None
    return lambda z, v, y: SoftmaxCrossEntropyLoss.apply(z, y, 0.0, -100, True)


def make_loss(batch: int, classes: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return z, v, y."""
    generator = torch.Generator(device).manual_seed(0)
    z, v = (torch.randn(batch, classes, generator=generator, device=device, dtype=dtype) for _ in range(2))
    return z, v, torch.randint(classes, (batch,), generator=generator, device=device)


def make_tangent(batch: int, classes: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return z, ż, v, y."""
    z, v, y = make_loss(batch, classes, dtype, device)
    return z, torch.randn_like(z), v, y


def make_features(batch: int, features: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return f, u."""
    return make_loss(batch, features, dtype, device)[:2]


def make_dual(batch: int, features: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return f, ḟ, u."""
    return make_tangent(batch, features, dtype, device)[:3]


def make_drawn(batch: int, classes: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return z, v, y and a seed."""
    return *make_loss(batch, classes, dtype, device), torch.full((), 7, dtype=torch.int64, device=device)


def drawn(z: Tensor, v: Tensor, y: Tensor, seed: Tensor) -> Tensor:
    """MES with β drawn per sample and class, 0.9."""
    return mes_cross_entropy(z, v, y, Bernoulli(0.9, seed))


def three(function: Function) -> dict[str, Contender]:
    """Return what every operation is compared with."""
    return {
        "eager": Contender("plain torch", plain_torch(function)),
        "compiled": Contender("plain torch, compiled", compiled(function)),
        "ours": Contender("ours", ours(function)),
    }


LOSS = {
    **three(mes_cross_entropy),
    "one_launch": Contender("ours, with gradients at once", ours(mes_cross_entropy_with_gradients), gradients_in_forward=True),
    "ours_plain": Contender("ours, plain weights", ours(lambda z, v, y: mes_cross_entropy(z, None, y)), plain=True),
    "torch_plain": Contender(
        "torch cross_entropy, plain weights", lambda: lambda z, v, y: cross_entropy(z, y, reduction="none"), plain=True
    ),
    "liger": Contender(
        "Liger cross-entropy, plain weights", liger, plain=True, summed=True, destroys=True, on_gpu_only=True, waits=True
    ),
    "apex": Contender("apex xentropy, plain weights", apex, plain=True, on_gpu_only=True),
}

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("mes_cross_entropy", make_loss, mes_cross_entropy, LOSS, read=2),
        Operation("mes_cross_entropy, β drawn", make_drawn, drawn, three(drawn), read=2),
        Operation("tangent_loss", make_tangent, tangent_loss, three(tangent_loss), read=3),
        Operation("reweight_features", make_features, reweight_features, three(reweight_features), read=2, written=1),
        Operation("reweight_dual", make_dual, reweight_dual, three(reweight_dual), read=3, written=2, wide=True),
    )
}


def differentiable(inputs: Inputs) -> list[Tensor]:
    """Return the inputs as leaves: floating ones require a gradient."""
    return [part.detach().requires_grad_(part.is_floating_point()) for part in inputs]


def outputs_of(result: Any) -> list[Tensor]:
    """Return what a contender gave as a list."""
    return list(result) if isinstance(result, tuple) else [result]


def check(operation: Operation, contender: Contender, function: Function, inputs: Inputs) -> str | None:
    """Hold values and gradients against float64 by the rule of design section 7; return what is wrong, or None."""
    same = results(operation.truth, inputs, contender, plain=contender.plain)
    wide = results(operation.truth, tuple(_wide(part) for part in inputs), contender, plain=contender.plain)
    got = results(function, tuple(part.clone() for part in inputs), contender, own=True)
    for index, (value, plain, true) in enumerate(zip(got, same, wide, strict=True)):
        error, allowed = (float((part.double() - true.double()).abs().max()) for part in (value, plain))
        # Sums of many terms, and products of large ones, are judged by their size.
        margin = MARGIN[value.dtype] * max(1.0, float(true.abs().max()))
        if not error <= allowed + margin:
            return f"output {index} is off by {error:.2e} (plain torch {allowed:.2e}, margin {margin:.1e}), so it is not timed"
    return None


def results(
    function: Function, inputs: Inputs, contender: Contender, *, plain: bool = False, own: bool = False
) -> Sequence[Tensor]:
    """Return the values and the gradients of everything differentiable, under ones from above."""
    leaves = differentiable(inputs)
    if own and contender.gradients_in_forward:
        return [part for part in function(*leaves) if part is not None]
    if not own:
        truth = function
        function = using("reference", partial(_without_weights, truth) if plain else truth)
    outputs = outputs_of(function(*leaves))
    if contender.summed and not own:
        outputs = [part.sum() for part in outputs]
    wanted = leaves[:1] if contender.plain else [part for part in leaves if part.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, [torch.ones_like(part) for part in outputs])
    return [*(part.detach() for part in outputs), *gradients]


def _without_weights(truth: Function, z: Tensor, v: Tensor, y: Tensor) -> Any:
    return truth(z, None, y)


def _wide(part: Tensor) -> Tensor:
    return part.double() if part.is_floating_point() else part
