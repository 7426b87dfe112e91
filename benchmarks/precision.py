"""Compare the meta-gradient of mixed precision with that of float32, on trained weights.

    python -m benchmarks.precision [--config FILE or flags of fastadvisor train after --] [--batches 8] [--json FILE]

Trains a classifier as told (default: the digits), and then, at its trained weights, computes the meta-gradient of every method
in float32, bfloat16 and float16 on the same batches and random numbers. A gate: exit status 1 if a mean cosine to float32 is
under 0.99.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastadvisor.assembly import build_step
from fastadvisor.cli import parse_config
from fastadvisor.config import Config
from fastadvisor.data import Batch, load_source, prepare, stage
from fastadvisor.methods import METHODS, build_method
from fastadvisor.runtime.environment import environment
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.precision import pick_device
from fastadvisor.runtime.random_state import RandomState
from fastadvisor.runtime.run_folder import RunFolder
from fastadvisor.trainer import Trainer

GATE = 0.99
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def trained(config: Config) -> Trainer:
    """Return a trainer that has trained."""
    device = pick_device(config.device)
    data = prepare(stage(load_source(config), config, device), config, config.seed)
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
            config = replace(trainer.config, method=name, meta_engine="forward", approx_meta=False, nan_policy="ignore")
            torch.manual_seed(0)
            method = build_method(config, trainer.model.head.in_features, len(trainer.data.classes))
            if not method.learns:
                continue
            if isinstance(trainer.method, kind):
                method = trainer.method
            elif method.advisor is not None:
                method.advisor.to(trainer.device)
            exact = gradient(trainer, config, method, None, train, meta, shape)
            for dtype_name, dtype in DTYPES.items():
                mixed = gradient(trainer, config, method, dtype, train, meta, shape)
                yield name, dtype_name, float(torch.cosine_similarity(mixed, exact, dim=0))


def gradient(
    trainer: Trainer, config: Config, method: Any, dtype: torch.dtype | None, train: Batch, meta: Batch, shape: tuple[int, int]
) -> Tensor:
    """Return the meta-gradient as one vector; nothing of the run is touched."""
    step = build_step(config, trainer.model, method, Execution(trainer.device, dtype), shape)
    step.behind = False
    for group in step.optimizer.param_groups:
        group["lr"] = config.lr
    state = RandomState.now(trainer.device)
    with state.replayed(), trainer.model.frozen_statistics():
        torch.manual_seed(1)
        problem = step.problem(step.loss_pre_calculation(train, step.draw(train)))
        found = step.engine.meta_gradient(problem, step.engine.virtual_train(problem), meta)
    return torch.cat([part.flatten().float() for part in found.gradients])


def main() -> int:
    """Run the command."""
    own, _, flags = " ".join(sys.argv[1:]).partition("-- ")
    parser = argparse.ArgumentParser(description="Cosine of the meta-gradient in mixed precision to that in float32.")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(own.split())
    config = parse_config(Config, "train", "", [*flags.split(), "--no-tensorboard"])
    with closing(trained(config)) as trainer:
        found: dict[tuple[str, str], list[float]] = {}
        for method, dtype, cosine in tqdm(cosines(trainer, args.batches)):
            found.setdefault((method, dtype), []).append(cosine)
    print(f"python -m benchmarks.precision {' '.join(sys.argv[1:])}\n{environment()}")
    print("| method | precision | mean cosine | smallest |", "|---|---|---|---|", sep="\n")
    rows: list[dict[str, Any]] = [
        {"method": method, "dtype": dtype, "mean": sum(values) / len(values), "min": min(values)}
        for (method, dtype), values in found.items()
    ]
    for row in rows:
        print(f"| {row['method']} | {row['dtype']} | {row['mean']:.4f} | {row['min']:.4f} |")
    if args.json is not None:
        args.json.write_text(
            json.dumps(
                {
                    "command": " ".join(["python -m benchmarks.precision", *sys.argv[1:]]),
                    "versions": environment(),
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )
    red = [row for row in rows if not row["mean"] >= GATE]
    print("The gate is open." if not red else f"The gate is shut: {len(red)} under {GATE}.")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
