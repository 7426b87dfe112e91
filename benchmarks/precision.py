"""Compare the meta-gradient of mixed precision with that of float32, on trained weights.

    python -m benchmarks.precision [--batches 8] [--json FILE] [--markdown FILE] [-- flags of fastadvisor train]

Trains a classifier as told (default: the digits), and then, at its trained weights, computes the meta-gradient of every method
in float32, bfloat16 and float16 on the same batches and random numbers. A gate: exit status 1 if a mean cosine to float32 is
under 0.99.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.tables import about, command, place, publish
from fastadvisor.cli import parse_config
from fastadvisor.config import Config
from fastadvisor.datasets import load_source, prepare
from fastadvisor.loading import Batch, cache_images
from fastadvisor.methods import METHODS, build_method
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.precision import pick_device
from fastadvisor.runtime.random_state import RandomState
from fastadvisor.runtime.run_folder import RunFolder
from fastadvisor.training.assembly import build_step
from fastadvisor.training.trainer import Trainer

GATE = 0.99
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def trained(config: Config) -> Trainer:
    """Return a trainer that has trained."""
    device = pick_device(config.device)
    data = prepare(cache_images(load_source(config), config, device), config, config.seed)
    trainer = Trainer(config, data, device)
    with TemporaryDirectory() as folder:
        trainer.run(RunFolder.create(str(Path(folder) / "run"), config, ""))
    trainer.model.train()
    return trainer


def cosines(trainer: Trainer, batches: int) -> Iterator[tuple[str, str, float]]:
    """Yield method, precision and cosine to float32 for each batch: of the run's own advisor, and of the other methods' fresh
    ones on the same trained classifier.
    """
    shape = (trainer.loaders.size, trainer.loaders.size)
    for _ in range(batches):
        train, meta = trainer.train_loader.next_batch(), trainer.meta_loader.next_batch()
        for name, kind in METHODS.items():
            config = replace(
                trainer.config,
                method=name,
                meta_engine="forward",
                approx_meta=False,
                virtual_gradient="own",
                nan_policy="ignore",
            )
            torch.manual_seed(0)
            method = build_method(config, trainer.model.head.in_features, trainer.facts).to(trainer.device)
            if not method.learns:
                continue
            if isinstance(trainer.method, kind):
                method = trainer.method
            exact = gradient(trainer, config, method, None, train, meta, shape)
            for dtype_name, dtype in DTYPES.items():
                mixed = gradient(trainer, config, method, dtype, train, meta, shape)
                yield name, dtype_name, float(torch.cosine_similarity(mixed, exact, dim=0))


def summarised(found: Iterable[tuple[str, str, float]]) -> list[dict[str, Any]]:
    """Return mean and smallest cosine of each method and precision over the batches."""
    values: dict[tuple[str, str], list[float]] = {}
    for method, dtype, cosine in found:
        values.setdefault((method, dtype), []).append(cosine)
    return [
        {"method": method, "dtype": dtype, "mean": sum(each) / len(each), "min": min(each)}
        for (method, dtype), each in values.items()
    ]


def gradient(
    trainer: Trainer, config: Config, method: Any, dtype: torch.dtype | None, train: Batch, meta: Batch, shape: tuple[int, int]
) -> Tensor:
    """Return the meta-gradient as one vector; nothing of the run is touched."""
    step = build_step(config, trainer.model, method, Execution(trainer.device, dtype), shape)
    assert step.meta_train is not None
    for group in step.optimizer.param_groups:
        group["lr"] = config.lr
    state = RandomState.now(trainer.device)
    with state.replayed(), trainer.model.frozen_statistics():
        torch.manual_seed(1)
        shared, engine = step.forward_pass(train, step.draw(train), step.meta_train.engine.plan()), step.meta_train.engine
        problem = step.meta_train.problem([shared], step.optimizer)
        found = engine.meta_gradient(problem, engine.virtual_train(problem), meta)
    return torch.cat([part.flatten().float() for part in found.gradients])


def report(result: dict[str, Any]) -> str:
    """Return the measurement as Markdown."""
    lines = [
        f"    {result['command']}",
        "",
        f"{place(result)}. The gate is {GATE}.",
        "",
        "| method | precision | mean cosine | smallest |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row['method']} | {row['dtype']} | {row['mean']:.4f} | {row['min']:.4f} |" for row in result["rows"]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description="Cosine of the meta-gradient in mixed precision to that in float32.")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="write what is printed")
    args = parser.parse_args(arguments[:at])
    config = parse_config(Config, "train", "", [*arguments[at + 1 :], "--no-tensorboard"])
    with closing(trained(config)) as trainer:
        rows = summarised(tqdm(cosines(trainer, args.batches)))
    result: dict[str, Any] = {"command": command(arguments, "benchmarks.precision"), "environment": about()}
    result |= {"device": trainer.device.type, "rows": rows}
    publish(result, report(result), args.json, args.markdown)
    red = [row for row in rows if not row["mean"] >= GATE]
    print("The gate is open." if not red else f"The gate is shut: {len(red)} under {GATE}.")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
