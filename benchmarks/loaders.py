"""What the loaders deliver: images a second from JPEGs on disk, and how long training waits for them.

    python -m benchmarks.loaders [--sides 256,500] [--workers 1,2] [--train resnet18] [--json FILE] [--markdown FILE]

Random crop of area and aspect ratio to 224 pixels, mirror, normalise, batches of 64; the loaders in turn in one process, each
opened anew, medians. Before anything is timed their batches are compared: ids, labels, pixels within JPEG tolerance.
``pillow`` is the loop that one would write: open, convert, torchvision's RandomResizedCrop, one thread. ``synthetic`` makes no
images: it is the ceiling. The files are generated and have been read before, so they come from the page cache.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.photos import write_benchmark_set
from benchmarks.tables import about, command, publish
from fastadvisor.config import Config, resolve
from fastadvisor.datasets import TrainingData, load_source, prepare
from fastadvisor.loading import Loaders, build_loaders
from fastadvisor.loading.backends import dali
from fastadvisor.runtime.allocator import keep_freed_memory
from fastadvisor.runtime.environment import cpu_cores
from fastadvisor.runtime.precision import pick_device
from fastadvisor.training.trainer import Trainer

REFERENCE, CEILING, LOOP = "torch", "synthetic", "pillow"
NAMES = (REFERENCE, "dali", CEILING, LOOP)
SIZE, META = 224, 2
GREY_LEVEL = 1 / (255 * 0.226)
"""Of normalised pixels, about."""
MOST, MEAN = 6.0, 0.6
"""Grey levels that two decoders and resizers may be apart: at most, and on average."""
WARM_UP = 6
"""Batches before the clock starts: what a loader has made ahead while it was opened."""

Next = Callable[[], Tensor]


class Setting:
    """A folder of JPEGs and how it is read."""

    def __init__(self, root: Path, device: torch.device, batch_size: int) -> None:
        """Take the folder, the device of the batches and their size."""
        self.root, self.device, self.batch_size = root, device, batch_size

    def config(self, loader: str, workers: int, **more: Any) -> Config:
        """Return the settings of a run with ``loader``."""
        usual = {"crop": "resized", "image_size": SIZE, "method": "ce", "progress": False}
        usual |= {"batch_size": self.batch_size, "meta_batch_size": META, "eval_batch_size": self.batch_size}
        return resolve(
            Config, dataset="imagefolder", data_root=str(self.root), loader=loader, workers=workers, **{**usual, **more}
        )

    def data(self) -> TrainingData:
        """Return the data set."""
        config = self.config(REFERENCE, 1)
        return prepare(load_source(config), config, config.seed)

    @contextmanager
    def opened(self, loader: str, workers: int) -> Iterator[Loaders]:
        """Open the loaders of a run, and close them."""
        loaders = build_loaders(self.config(loader, workers), self.data(), self.device)
        try:
            yield loaders
        finally:
            loaders.close()


def pillow_batches(setting: Setting) -> Iterator[Tensor]:
    """Make batches as one would without a loader."""
    from PIL import Image
    from torchvision.transforms import v2

    make = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    files = sorted((setting.root / "train").rglob("*.jpg"))
    while True:
        for start in range(0, len(files) - setting.batch_size + 1, setting.batch_size):
            some = files[start : start + setting.batch_size]
            yield torch.stack([make(Image.open(file).convert("RGB")) for file in some]).to(setting.device)


def fault(name: str, setting: Setting) -> str | None:
    """Compare two training batches and a test batch of ``name`` with the reference's; say what is wrong, or nothing."""
    if name == LOOP:
        return None  # with draws of its own: nothing to compare
    with setting.opened(REFERENCE, 1) as one, setting.opened(name, 1) as two:
        for part in ("train", "test"):
            first, second = iter(getattr(one, part)), iter(getattr(two, part))
            for _ in range(2 if part == "train" else 1):
                wanted, got = next(first), next(second)
                if not (torch.equal(wanted.ids, got.ids) and torch.equal(wanted.labels, got.labels)):
                    return "other ids or labels than the torch loader's"
                if name == CEILING:
                    continue
                apart = (wanted.images - got.images).abs() / GREY_LEVEL
                if float(apart.max()) > MOST or float(apart.mean()) > MEAN:
                    return f"pixels are {float(apart.max()):.1f} grey levels off ({float(apart.mean()):.2f} on average)"
    return None


def images_per_second(name: str, setting: Setting, workers: int, batches: int) -> float:
    """Open a loader, let it warm up, and time ``batches`` batches."""
    if name == LOOP:
        made = pillow_batches(setting)
        return _rate(lambda: next(made), setting, batches, warm_up=1)
    with setting.opened(name, workers) as loaders:
        return _rate(lambda: loaders.train.next_batch().images, setting, batches, WARM_UP)


def _rate(next_batch: Next, setting: Setting, batches: int, warm_up: int) -> float:
    for _ in range(warm_up):
        next_batch()
    _synchronize(setting.device)
    began = time.perf_counter()
    for _ in range(batches):
        next_batch()
    _synchronize(setting.device)
    return batches * setting.batch_size / (time.perf_counter() - began)


@contextmanager
def trained(name: str, setting: Setting, workers: int, model: str, batch_size: int) -> Iterator[Trainer]:
    """Open a run of ``model`` by cross-entropy (bfloat16 on a GPU) that reads by ``name``, two steps into it, and close it."""
    amp = setting.device.type == "cuda"
    config = setting.config(name, workers, model=model, amp=amp, batch_size=batch_size)
    with closing(Trainer(config, setting.data(), setting.device)) as trainer:
        trainer.model.train()
        for _ in range(2):  # cuDNN chooses, the loader fills its queue
            trainer.step(trainer.train_loader.next_batch(), None)
        _synchronize(setting.device)
        yield trainer


def training(name: str, setting: Setting, workers: int, model: str, batch_size: int, steps: int) -> tuple[float, float]:
    """Train ``steps`` steps; return images a second and the share of time spent waiting."""
    with trained(name, setting, workers, model, batch_size) as trainer:
        began, waited = time.perf_counter(), trainer.train_loader.waited
        for _ in range(steps):
            trainer.step(trainer.train_loader.next_batch(), None)
        _synchronize(setting.device)
        seconds = time.perf_counter() - began
        return steps * batch_size / seconds, (trainer.train_loader.waited - waited) / seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(plan: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Check, then time every loader at every size; a loader whose check is red is left out with the reason."""
    result: dict[str, Any] = {"rows": [], "training": [], "left_out": {}}
    for side in plan.sides:
        folder = root / str(side)
        setting = Setting(folder, plan.torch_device, plan.batch_size)
        if not folder.is_dir():
            write_benchmark_set(folder, side, plan.images)
        names = []
        for name in plan.names:
            reason = "NVIDIA DALI is not installed" if name == "dali" and not dali.available() else fault(name, setting)
            if reason is None:
                names.append(name)
            else:
                result["left_out"][f"{name}, {side} px"] = reason
        cases = [(name, workers) for workers in plan.workers for name in names if name not in (LOOP, CEILING)]
        cases += [(name, 1) for name in (CEILING, LOOP) if name in names]
        rates: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
        for _ in range(plan.rounds):
            for name, workers in cases:
                gc.collect()
                batches = max(2, plan.batches // 4) if name == LOOP else plan.batches
                rates[name, workers].append(images_per_second(name, setting, workers, batches))
        for (name, workers), values in rates.items():
            result["rows"].append(
                {
                    "side": side,
                    "loader": name,
                    "workers": workers,
                    "images_per_second": statistics.median(values),
                    "all": values,
                }
            )
        if plan.train:
            result["training"] += _measure_training(plan, setting, side, [name for name in names if name != LOOP])
    return result


def _measure_training(plan: argparse.Namespace, setting: Setting, side: int, names: Sequence[str]) -> list[dict[str, Any]]:
    workers = max(plan.workers)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(max(1, plan.rounds // 2)):
        for name in names:
            gc.collect()
            found[name].append(training(name, setting, workers, plan.train, plan.train_batch_size, plan.steps))
    return [
        {
            "side": side,
            "loader": name,
            "workers": workers,
            "images_per_second": statistics.median(rate for rate, _ in values),
            "waiting_share": statistics.median(share for _, share in values),
        }
        for name, values in found.items()
    ]


def report(result: dict[str, Any]) -> str:
    """Return the measurement as Markdown."""
    where = result["environment"]
    device = where["processor"] if result["device"] == "cpu" else f"{where['device']}, {where['processor']}"
    lines = [
        f"    {result['command']}",
        "",
        f"{device}, {where['cpu_cores']} cores; torch {where['torch']}, torchvision {where['torchvision']}, DALI "
        f"{where['nvidia-dali'] or 'not installed'}; commit {where['commit'] or 'unknown'}. JPEGs of SIDE × 3/4 SIDE pixels, "
        f"to {SIZE} × {SIZE} float32 on {result['device']}, batches of {result['batch_size']}. "
        f"Medians of {result['rounds']} rounds in turn.",
        "",
        "| JPEGs | loader | workers | images/s | over torch |",
        "|---|---|---|---|---|",
    ]
    torchs = {(row["side"], row["workers"]): row["images_per_second"] for row in result["rows"] if row["loader"] == REFERENCE}
    for row in result["rows"]:
        base = torchs.get((row["side"], row["workers"])) if row["loader"] == "dali" else None
        ratio = "" if base is None else f"{row['images_per_second'] / base:.2f}"
        workers = row["workers"] if row["loader"] in (REFERENCE, "dali") else "–"
        lines.append(f"| {row['side']} px | {row['loader']} | {workers} | {row['images_per_second']:,.0f} | {ratio} |")
    if result["training"]:
        amp = "bfloat16" if result["device"] == "cuda" else "float32"
        lines += [
            "",
            f"Training {result['model']} by cross-entropy, {amp}, batch {result['train_batch_size']}:",
            "",
            "| JPEGs | loader | workers | images/s | of synthetic | share of time waiting |",
            "|---|---|---|---|---|---|",
        ]
        ceilings = {row["side"]: row["images_per_second"] for row in result["training"] if row["loader"] == CEILING}
        for row in result["training"]:
            share = row["images_per_second"] / ceilings[row["side"]] if row["side"] in ceilings else None
            lines.append(
                f"| {row['side']} px | {row['loader']} | {row['workers']} | {row['images_per_second']:,.1f} | "
                f"{'' if share is None else f'{share:.1%}'} | {row['waiting_share']:.1%} |"
            )
    lines += [f"\n{name}: {reason}." for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = cpu_cores()
    parser.add_argument("--sides", default="256,500", help="longer sides of the JPEGs in pixels, with commas between")
    parser.add_argument("--workers", default=",".join(str(n) for n in sorted({1, max(1, cores // 2), cores})))
    parser.add_argument("--only", default=",".join(NAMES), help=f"of {', '.join(NAMES)}, with commas between")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=1024, help="JPEGs to generate")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=24, help="timed a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train", metavar="MODEL", help="also train this model with each loader")
    parser.add_argument("--train-batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="training steps that are timed")
    parser.add_argument("--data", type=Path, help="folder for the JPEGs, kept; none: one that goes away")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="write what is printed")
    options = parser.parse_args(arguments)
    try:
        options.sides, options.workers = ([int(n) for n in text.split(",")] for text in (options.sides, options.workers))
    except ValueError:
        raise SystemExit("--sides and --workers take whole numbers with commas between, as in 256,500.") from None
    options.names = [name.strip() for name in options.only.split(",")]
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        raise SystemExit(f"--only: unknown {', '.join(unknown)}; loaders {', '.join(NAMES)}.")
    options.torch_device = pick_device(options.device)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; with ``--json`` and ``--markdown``, write too."""
    arguments = sys.argv[1:] if arguments is None else arguments
    plan = parse(arguments)
    if plan.torch_device.type == "cpu":
        keep_freed_memory()  # as a training run does
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(plan, plan.data or Path(scratch))
    result |= {
        "command": command(arguments, "benchmarks.loaders"),
        "device": plan.torch_device.type,
        "batch_size": plan.batch_size,
        "train_batch_size": plan.train_batch_size,
        "model": plan.train,
        "rounds": plan.rounds,
        "environment": about(),
    }
    text = report(result)
    publish(result, text, plan.json, plan.markdown)
    if any(reason.startswith(("other ids", "pixels")) for reason in result["left_out"].values()):
        raise SystemExit("A loader's check is red: see above.")


if __name__ == "__main__":
    main()
