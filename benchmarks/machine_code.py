"""What the Triton kernels become on GPUs that need not be here: registers, spills, instructions an element.

    python -m benchmarks.machine_code [--json FILE]

Compiles every kernel with every tile of its table, in its most demanding variant (β drawn in the kernel, label smoothing, all
gradients), for sm_80, sm_90 and sm_100, and reads the machine code with the ``cuobjdump`` of the Triton wheel. Two minutes of
two CPU cores. The instructions say whether a kernel can be as fast as memory: ``instructions_allowed``.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from fastadvisor_kernels.bernoulli import Bernoulli
from fastadvisor_kernels.equalization_softmax import plan as loss_plan
from fastadvisor_kernels.equalization_softmax.flat import FlatBeta, Options
from fastadvisor_kernels.equalization_softmax.reference import Reduction
from fastadvisor_kernels.feature_reweighting.plan import Wanted, plan_reweight, plan_reweight_gradients
from fastadvisor_kernels.launch import Launch
from fastadvisor_kernels.tangent_loss.plan import Inputs, Kept, plan_tangent, plan_tangent_gradients

CAPABILITIES = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
ROWS = 128
CLASSES = (10, 30, 60, 100, 200, 365, 1000, 2048, 4096, 8142, 2**20)
"""One for each tile of the table, and for each number of chunks and segments."""
WIDTHS = (2048, 513)
"""D: rows that are aligned, and rows that are not."""
SM_90_INSTRUCTIONS_PER_SECOND = 132 * 4 * 32 * 1.7e9
SM_90_BYTES_PER_SECOND = 4.3e12
"""An H200: multiprocessors × schedulers × lanes × clock, and what a copy reaches."""


class Case(NamedTuple):
    """A launch to compile, and the bytes that it moves for each element."""

    name: str
    size: int
    dtype: torch.dtype
    launch: Launch
    bytes: int


def cases(beta: str = "drawn") -> Iterator[Case]:
    """Return every kernel with every tile, on tensors that take no memory.

    ``beta``: one, fraction, class or drawn; ``variants``: one tile each of all other ways to call the kernels.
    """
    if beta == "variants":
        yield from variants()
        return
    for dtype in DTYPES:
        for classes in CLASSES:
            yield from of_classes(classes, beta, dtype, dtype)
        for features in WIDTHS:
            yield from of_features(features, dtype, dtype)
        losses = torch.empty(ROWS, dtype=torch.promote_types(dtype, torch.float32), device="meta")
        labels = torch.empty(ROWS, dtype=torch.int64, device="meta")
        yield Case("reduce", 1, dtype, loss_plan.reduction_launch(losses, labels, Options("mean"))[0], 0)


def variants() -> Iterator[Case]:
    """Return mixed dtypes, every kind of β, no v, means and features in place, at a size that has no row in the table."""
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    for z_dtype, v_dtype in ((half, single), (single, torch.float16), (double, half), (half, double), (double, single)):
        yield from of_classes(1008, "drawn", z_dtype, v_dtype)
        yield from of_features(2064, z_dtype, v_dtype)
    for beta in ("one", "fraction", "class", "bool", "row", "batch", "v is None"):
        yield from of_classes(1008, beta, single, single, reduction="mean")
        yield from of_classes(40_000, beta, half, half, reduction="mean")
    f, u = (torch.empty(ROWS, 2064, dtype=half, device="meta") for _ in range(2))
    yield Case("reweight", 2064, half, plan_reweight(f, None, u, inplace=True)[0], 0)
    launch, *_ = plan_reweight_gradients(f, None, f, None, u, Wanted(True, False, True), masked=True)
    yield Case("reweight gradients", 2064, half, launch, 0)


def of_classes(
    classes: int, beta: str, dtype: torch.dtype, v_dtype: torch.dtype, reduction: Reduction = "none"
) -> Iterator[Case]:
    """Return the kernels of the loss and its derivative for (128, ``classes``)."""
    z, z_dot = (torch.empty(ROWS, classes, dtype=dtype, device="meta") for _ in range(2))
    v, v_dot = (None if beta == "v is None" else torch.empty(ROWS, classes, dtype=v_dtype, device="meta") for _ in range(2))
    y = torch.empty(ROWS, dtype=torch.int64, device="meta")
    flat, options = FlatBeta.of(_beta(beta, classes)), Options(reduction, -100, 0.1)
    z_bytes, v_bytes, mask = dtype.itemsize, v_dtype.itemsize, 4 if beta == "class" else 0
    both = z_bytes + v_bytes

    plan = loss_plan.plan_loss(z, v, y, flat, options)
    assert plan.lse is not None
    count = plan.lse[:1] if reduction == "mean" else None
    yield Case("loss", classes, dtype, plan.launches[0], both + mask)
    if plan.launches[0].arguments["SEGMENTS"] > 1:
        yield Case("combine", classes, dtype, plan.launches[1], 0)
    together = loss_plan.plan_loss_and_gradients(z, v, y, flat, options, plan.lse, of_v=True)
    if len(together.launches) == 1:
        yield Case("loss with gradients", classes, dtype, together.launches[0], 2 * both + mask)
    launches, *_ = loss_plan.plan_gradients(plan.loss, z, v, y, plan.lse, count, flat, options, of_z=True, of_v=True)
    yield Case("gradients", classes, dtype, launches[0], 2 * both + mask)

    inputs = Inputs(z, z_dot, v, v_dot)
    tangent = plan_tangent(inputs, y, flat, options)
    yield Case("tangent", classes, dtype, tangent.launches[0], 2 * both + mask)
    if tangent.launches[0].arguments["SEGMENTS"] > 1:
        yield Case("combine tangent", classes, dtype, tangent.launches[1], 0)
    kept = Kept(tangent.loss, tangent.lse, tangent.mean, count)
    launch, _ = plan_tangent_gradients(inputs, y, flat, options, kept, (True, True, True, True))
    yield Case("tangent gradients", classes, dtype, launch, 4 * both + mask)


def of_features(features: int, dtype: torch.dtype, u_dtype: torch.dtype) -> Iterator[Case]:
    """Return the kernels of the re-weighting for (128, ``features``), of a tensor with one more column where that is odd."""
    whole = features + features % 2
    f, f_dot = (torch.empty(ROWS, whole, dtype=dtype, device="meta")[:, :features] for _ in range(2))
    u = torch.empty(ROWS, whole, dtype=u_dtype, device="meta")[:, :features]
    launch, h, h_dot = plan_reweight(f, f_dot, u, inplace=False)
    f_bytes, u_bytes, h_bytes = dtype.itemsize, u_dtype.itemsize, h.dtype.itemsize
    yield Case("reweight", features, dtype, plan_reweight(f, None, u, inplace=False)[0], 2 * f_bytes + u_bytes)
    yield Case("reweight dual", features, dtype, launch, 2 * f_bytes + u_bytes + 2 * h_bytes)
    pair = plan_reweight_gradients(h, h_dot, f, f_dot, u, Wanted(True, True, True), masked=False)[0]
    yield Case("reweight dual gradients", features, dtype, pair, 4 * f_bytes + 2 * u_bytes + 2 * h_bytes)
    single = plan_reweight_gradients(f, None, f, None, u, Wanted(True, False, True), masked=False)[0]
    yield Case("reweight gradients", features, dtype, single, 3 * f_bytes + 2 * u_bytes)


def _beta(kind: str, classes: int) -> float | Tensor | Bernoulli | None:
    if kind == "drawn":
        return Bernoulli(0.9, torch.empty((), dtype=torch.int64, device="meta"))
    shapes = {"class": (ROWS, classes), "bool": (ROWS, classes), "row": (ROWS, 1), "batch": (1, 1)}
    if kind in shapes:
        return torch.empty(shapes[kind], dtype=torch.bool if kind == "bool" else torch.float32, device="meta")
    return 0.9 if kind == "fraction" else None


def compiled(launch: Launch, capability: int) -> bytes:
    """Return the machine code of ``launch``, specialised as Triton does: for tensors that begin at multiples of 16 bytes, and
    for numbers that are multiples of 16.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = mangle_type(value)
        if isinstance(value, Tensor) or (value % 16 == 0 and not parameter.do_not_specialize):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    code: bytes = triton.compile(source, target=target, options={"num_warps": launch.warps}).asm["cubin"]
    return code


def cuobjdump(code: bytes, option: str) -> str:
    """Return what ``cuobjdump`` says of machine code."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([program, option, file.name], capture_output=True, text=True, check=True).stdout


def inspect(case: Case, capability: int) -> dict[str, Any]:
    """Compile and measure one launch."""
    code = compiled(case.launch, capability)
    usage = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", cuobjdump(code, "-res-usage"))}
    constants = case.launch.arguments
    result = {
        "kernel": case.name,
        "size": case.size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "sm": capability,
        "rows": constants.get("ROWS", 1),
        "block": constants["BLOCK"],
        "chunks": constants.get("CHUNKS", 1),
        "segments": constants.get("SEGMENTS", 1),
        "warps": case.launch.warps,
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
    }
    return result | _instructions(case, code) if in_table(result) else result


def in_table(result: dict[str, Any]) -> bool:
    """Return whether a result has a row in the table: listing the instructions takes longer than to compile them."""
    size = WIDTHS[0] if result["kernel"].startswith("reweight") else 1000
    return result["sm"] == 90 and result["size"] == size


def _instructions(case: Case, code: bytes) -> dict[str, Any]:
    """Count the instructions an element, beside what an H200 can run in the time it takes to move the element."""
    listing = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", cuobjdump(code, "-sass"))
    instructions = [name for name in listing if name != "NOP"]
    elements = case.launch.arguments["BLOCK"] * case.launch.arguments.get("ROWS", 1) / (32 * case.launch.warps)
    return {
        "wide_accesses": sum(name.startswith(("LDG", "STG")) and ".128" in name for name in instructions),
        "instructions_per_element": round(len(instructions) / elements, 1),
        "instructions_allowed": round(case.bytes * SM_90_INSTRUCTIONS_PER_SECOND / SM_90_BYTES_PER_SECOND, 1),
    }


def _inspect(task: tuple[str, int, int]) -> dict[str, Any]:
    beta, index, capability = task
    return inspect(_listed(beta)[index], capability)


@cache
def _listed(beta: str) -> list[Case]:
    """Return the first case of each kernel, dtype and tile, those of the table all the same; all of the variants."""
    if beta == "variants":
        return list(cases(beta))
    found: dict[tuple[Any, ...], Case] = {}
    for case in cases(beta):
        constants = case.launch.arguments
        tile = (constants.get("ROWS"), constants["BLOCK"], constants.get("CHUNKS", 1) > 1, constants.get("SEGMENTS", 1) > 1)
        shape = case.size if case.size == 1000 or case.size in WIDTHS else 0
        found.setdefault((case.name, case.dtype, *tile, shape), case)
    return list(found.values())


def inspect_all(betas: dict[str, tuple[int, ...]], workers: int = 2) -> list[dict[str, Any]]:
    """Inspect every case for each β on the given capabilities, in ``workers`` processes."""
    tasks = [
        (beta, index, capability)
        for beta, capabilities in betas.items()
        for index in range(len(_listed(beta)))
        for capability in capabilities
    ]
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(_inspect, tasks, chunksize=16)
        return [{"beta": beta, **result} for (beta, _, _), result in zip(tasks, results, strict=True)]


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of what sm_90 runs at 1,000 classes, or 2,048 features."""
    heads = [
        "kernel",
        "beta",
        "dtype",
        "rows",
        "block",
        "warps",
        "registers",
        "instructions_per_element",
        "instructions_allowed",
    ]
    lines = ["| " + " | ".join(name.replace("_", " ") for name in heads) + " |", "|" + "---|" * len(heads)]
    for result in results:
        if in_table(result):
            lines.append("| " + " | ".join(str(result[name]) for name in heads) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compile, print, and with ``--json`` write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--demanding", action="store_true", help="that variant and one tile of all others: enough to look for spills"
    )
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1: an interpreted kernel cannot be compiled; unset it.")
    betas = {"drawn": CAPABILITIES, "variants": (90,)}
    if not options.demanding:
        betas |= {"one": (90,), "class": (90,)}
    results = inspect_all(betas)
    print(f"triton {triton.__version__}; {len(results)} kernels; bytes spilled: {sum(r['spilled_bytes'] for r in results)}\n")
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
