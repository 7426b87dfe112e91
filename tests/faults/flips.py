"""Flip random bytes in a checkpoint again and again, and see what a run makes of it.

    python -m tests.faults.flips [--times 1000] [--seed 0]

A damaged checkpoint must be refused with one sentence, or, where the flipped bytes mean nothing (padding, dates), give exactly
the state that was saved. Exit status 1 if one does neither.
"""

import argparse
import random
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import torch

from fastadvisor.commands.train import train_config
from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.errors import UserError
from fastadvisor.runtime import checkpoint
from fastadvisor.training.trainer import Trainer
from tests.faults.kills import same

QUIET = {"progress": False, "tensorboard": False, "device": "cpu"}


def regions(path):
    """Return byte ranges to flip in: all of the file, the pickle, and the directory at the end."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        pickle = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
        directory = archive.start_dir
    return {
        "anywhere": (0, size),
        "pickle": (pickle.header_offset, pickle.header_offset + 128 + pickle.compress_size),
        "directory": (directory, size),
    }


def torture(folder, times, seed=0):
    """Return how often what happened: refused, unchanged, and anything else with its story."""
    rng = random.Random(seed)
    config = resolve(Config, **QUIET, epochs=1, method="mfrw-mes", output=str(folder / "run"), save_every=2)
    train_config(config)
    path = folder / "run" / "last.pt"
    good, places = path.read_bytes(), regions(path)
    expected = checkpoint.load(path)
    trainer = Trainer(config, prepare(load_source(config), config, config.seed), torch.device("cpu"))
    trainer.restore(path)
    whole = trainer.state()
    told = Counter()
    for _ in range(times):
        where = rng.choice(list(places))
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            data[rng.randrange(*places[where])] ^= rng.randrange(1, 256)
        path.write_bytes(data)
        try:
            trainer.restore(path)
        except UserError as error:
            told[f"{where}: refused" if "\n" not in str(error) else f"more than a line: {error}"] += 1
        except Exception as error:
            told[f"{where}: {type(error).__name__}: {error}"] += 1
        else:
            intact = same(checkpoint.load(path), expected) and same(trainer.state(), whole)
            told[f"{where}: unchanged" if intact else f"{where}: silently different"] += 1
    return told


def is_fine(story):
    return story.endswith((": refused", ": unchanged"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told = torture(Path(folder), args.times, args.seed)
    for story, count in sorted(told.items()):
        print(f"{count:6}  {story}")
    return 0 if all(map(is_fine, told)) else 1


if __name__ == "__main__":
    sys.exit(main())
