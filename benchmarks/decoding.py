"""Where the time of a loader goes: microseconds an image for each step, one thread, by torchvision, Pillow and DALI.

    python -m benchmarks.decoding [--side 500] [--rounds 5] [--json FILE] [--markdown FILE]

The steps of a training image: decode, the window cut out, brought to 224 pixels with antialiasing, normalised. DALI's are
differences between pipelines that stop after one more step each; the windows are those of ``--crop resized``.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loaders import SIZE
from benchmarks.photos import write_benchmark_set
from benchmarks.tables import about, command, publish
from fastadvisor.loading.backends import dali
from fastadvisor.loading.decode import decode_rgb
from fastadvisor.loading.geometry import DRAWS, Geometry
from fastadvisor.loading.jpeg import plain_jpeg_size

IMAGES, BATCH = 512, 64

LEAD = 4
"""Batches that DALI is asked for before the clock starts: it works ahead, and has some ready."""

Run = Callable[[], float]
"""Runs a step on all images, and what comes before it; returns seconds."""


def timed(work: Callable[[], object]) -> Run:
    """Return ``work`` with a clock around it."""

    def run() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return run


def by_torchvision(files: list[bytes], boxes: list[tuple[int, int, int, int]]) -> dict[str, Run]:
    """Return torchvision's steps, each with those before it."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2 import functional as F

    def decode(data: bytes) -> torch.Tensor:
        return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)

    def resized(data: bytes, box: tuple[int, int, int, int]) -> torch.Tensor:
        left, top, right, bottom = box
        return F.resize(decode(data)[:, top:bottom, left:right], [SIZE, SIZE], antialias=True)

    return {
        "decode": timed(lambda: [decode(data) for data in files]),
        "resize": timed(lambda: [resized(data, box) for data, box in zip(files, boxes, strict=True)]),
    }


def by_pillow(files: list[bytes], boxes: list[tuple[int, int, int, int]]) -> dict[str, Run]:
    """Return Pillow's steps, each with those before it."""
    from PIL import Image

    def resized(data: bytes, box: tuple[int, int, int, int]) -> object:
        return np.asarray(decode_rgb(data).resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box))

    return {
        "decode": timed(lambda: [decode_rgb(data) for data in files]),
        "resize": timed(lambda: [resized(data, box) for data, box in zip(files, boxes, strict=True)]),
    }


def by_dali(files: list[bytes], boxes: list[tuple[int, int, int, int]]) -> dict[str, Run]:
    """Return DALI's steps, each with those before it: decoding the window only, resizing, normalising."""
    from nvidia.dali import fn, pipeline_def, types

    encoded = [np.frombuffer(data, dtype=np.uint8) for data in files]
    windows = np.array(boxes, dtype=np.int32)
    anchors, shapes = windows[:, 1::-1], windows[:, 3:1:-1] - windows[:, 1::-1]

    def source(part: int) -> tuple[Any, ...]:
        some = slice(part * BATCH % IMAGES, part * BATCH % IMAGES + BATCH)
        return encoded[some], np.ascontiguousarray(anchors[some]), np.ascontiguousarray(shapes[some])

    def pipeline(step: str) -> Any:
        numbers = iter(range(10**9))

        def make() -> Any:
            data, anchor, shape = fn.external_source(source=lambda: source(next(numbers)), num_outputs=3, batch=True)
            options = {"output_type": types.RGB, "jpeg_fancy_upsampling": True}
            images = fn.decoders.image_slice(data, anchor, shape, axis_names="HW", **options)
            if step == "decode":
                return images
            antialias = step != "resize without antialiasing"
            images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=antialias)
            return fn.crop_mirror_normalize(images, dtype=types.FLOAT) if step == "normalise" else images

        made = pipeline_def(make, batch_size=BATCH, num_threads=1, device_id=None, exec_dynamic=True)()
        made.build()
        return made

    def run(step: str) -> Run:
        made = pipeline(step)
        batches = timed(lambda: [made.run() for _ in range(IMAGES // BATCH)])

        def after_what_was_ready() -> float:
            for _ in range(LEAD):
                made.run()
            return batches()

        return after_what_was_ready

    return {step: run(step) for step in ("decode", "resize without antialiasing", "resize", "normalise")}


def measure(side: int, rounds: int) -> dict[str, Any]:
    """Time every step, in turn; return microseconds an image by library and step."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = write_benchmark_set(Path(scratch), side, IMAGES)
        files = [path.read_bytes() for path in sorted((root / "train").rglob("*.jpg"))]
    geometry, rng = Geometry(SIZE, SIZE, "resized"), np.random.default_rng(0)
    sizes = [size for data in files if (size := plain_jpeg_size(data)) is not None]
    boxes = [geometry.train_box(*size, rng.random(DRAWS)) for size in sizes]
    runs = {"torchvision": by_torchvision(files, boxes), "Pillow": by_pillow(files, boxes)}
    if dali.available():
        runs["DALI"] = by_dali(files, boxes)
    cases = [(library, step, run) for library, steps in runs.items() for step, run in steps.items()]
    times: dict[str, dict[str, list[float]]] = {library: {step: [] for step in steps} for library, steps in runs.items()}
    for round in range(rounds + 1):
        for library, step, run in cases:
            seconds = run()
            if round:
                times[library][step].append(1e6 * seconds / IMAGES)
    return {library: {step: statistics.median(values) for step, values in steps.items()} for library, steps in times.items()}


def report(result: dict[str, Any]) -> str:
    """Return the measurement as Markdown."""
    where = result["environment"]
    lines = [
        f"    {result['command']}",
        "",
        f"{where['processor']}, one thread; torch {where['torch']}, torchvision {where['torchvision']}, DALI "
        f"{where['nvidia-dali'] or 'not installed'}; commit {where['commit'] or 'unknown'}. JPEGs of {result['side']} × "
        f"{3 * result['side'] // 4} pixels; µs an image up to and with the step, medians of {result['rounds']} rounds in turn.",
        "",
        "| library | up to | µs |",
        "|---|---|---|",
    ]
    for library, steps in result["micros"].items():
        lines += [f"| {library} | {step} | {micros:,.0f} |" for step, micros in steps.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with ``--json`` and ``--markdown``, write too."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="write what is printed")
    plan = parser.parse_args(arguments)
    result: dict[str, Any] = {"micros": measure(plan.side, plan.rounds), "side": plan.side, "rounds": plan.rounds}
    result |= {"command": command(arguments, "benchmarks.decoding"), "environment": about()}
    text = report(result)
    publish(result, text, plan.json, plan.markdown)


if __name__ == "__main__":
    main()
