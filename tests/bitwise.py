"""Whether training still does what it did before a change of the code, bit for bit, for every method and kind of step.

    python -m tests.bitwise record before.json             # on the commit before, and again on the one after
    python -m tests.bitwise compare before.json after.json # prints every difference, and exits with 1 if there is one

Each case is a short run on digits, on the CPU, in one thread. What it leaves is compared by digests: the classifier's weights
and buffers by name; the losses and accuracies of its epochs; and all tensors of its last checkpoint (optimizers, advisor,
gradient samplers, loaders, random states) wherever in the file they are, so that another layout of the file is no difference.
A tensor that is new is none either. Both files must come from the same machine and the same torch.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

import fastadvisor
from fastadvisor.errors import UserError

PLAIN = ("ce", "meta-only", "finetune", "focal", "balanced-softmax", "elr", "crt")
LEARNING = ("mw-net", "l2rw", "mes", "mfrw", "mfrw-mes")
SMALL = {
    "dataset": "digits",
    "model": "resnet8",
    "noise": "flip",
    "noise_rate": 0.4,
    "imbalance_factor": 20,  # five batches an epoch are left
    "batch_size": 64,
    "meta_batch_size": 32,
    "epochs": 2,
    "device": "cpu",
    "progress": False,
    "tensorboard": False,
    "validate_meta_every": 2,
}
ANY_METHOD: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "micro-batches": {"accumulate": 2},
    "clipped": {"clip_grad_norm": 0.5},
    "autocast": {"amp": True},
    "averaged weights": {"ema_decay": 0.9},
    "layer-wise rates": {"layer_decay": 0.7, "warmup_epochs": 0.5, "schedule": "cosine"},
    "skipped steps": {"lr": 1e25, "nan_policy": "skip", "epochs": 1},
    "adamw": {"optimizer": "adamw", "lr": 1e-3},
}
WITH_META_STEP: dict[str, dict[str, Any]] = {
    "double backward": {"meta_engine": "reference"},
    "lean": {"lean": True},
    "one step behind": {"virtual_gradient": "actual"},
    "one step behind, micro-batches": {"virtual_gradient": "actual", "accumulate": 2},
    "interval": {"meta_interval": 2},
    "attached": {"advisor_inputs": "attached"},
    "virtual step by the optimizer": {"virtual_step": "optimizer"},
    "approximate": {"approx_meta": True},
    "approximate, the top stage": {"approx_meta": True, "approx_stages": 1, "approx_tangent": "forward"},
    "approximate, layers at random": {"approx_meta": True, "approx_layers": "random", "approx_budget": 2},
    "approximate, learned layers": {"approx_meta": True, "approx_layers": "learned", "approx_budget": 2},
}
MEASURED = ("seconds", "images_per_second", "step_ms_median", "waiting_share", "peak_memory_mb", "time")
"""Of an epoch's record: what differs each time."""


def cases() -> dict[str, dict[str, Any]]:
    """Return the settings of every case by its name."""
    found = {}
    for method in PLAIN + LEARNING:
        kinds = ANY_METHOD if method in PLAIN else ANY_METHOD | WITH_META_STEP
        found |= {f"{method}: {kind}": SMALL | settings | {"method": method} for kind, settings in kinds.items()}
    return found


def record(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Train with ``settings``, and return what is to be compared; ``{"refused": True}`` of settings that are refused."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        try:
            fastadvisor.train(**settings, output=str(output))
        except UserError:
            return {"refused": True}
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        epochs = [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]
        return {
            "model": dict(_digests(torch.load(output / "model.pt", weights_only=True))),
            "epochs": [{key: repr(value) for key, value in epoch.items()} for epoch in epochs],
            "checkpoint": dict(_digests(torch.load(output / "last.pt", weights_only=True))),
        }


def _digests(state: Any) -> Iterator[tuple[str, str]]:
    leaves, _ = tree_flatten_with_path(state)
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            content = leaf.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if leaf.numel() else b""
        elif isinstance(leaf, np.ndarray | bytes):
            content = bytes(leaf)
        else:
            continue
        shape = f"{leaf.dtype} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
        yield keystr(path), f"{shape} {hashlib.blake2b(content, digest_size=16).hexdigest()}"


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what differs between two recordings of one case, in words; nothing where nothing does."""
    if "refused" in before or "refused" in after:
        return [] if before == after else ["refused in one of them only"]
    found = [f"model{name}" for name, digest in before["model"].items() if after["model"].get(name) != digest]
    for number, (old, new) in enumerate(zip(before["epochs"], after["epochs"], strict=False), start=1):
        found += [f"{key} of epoch {number}: {old[key]} and {new.get(key)}" for key in old if new.get(key) != old[key]]
    if len(before["epochs"]) != len(after["epochs"]):
        found.append(f"{len(before['epochs'])} and {len(after['epochs'])} epochs")
    left = Counter(after["checkpoint"].values())
    for name, digest in before["checkpoint"].items():
        if left[digest]:
            left[digest] -= 1
        else:
            found.append(f"checkpoint{name}, or it is not saved any more")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the cases and write what they leave")
    recording.add_argument("file", type=Path)
    recording.add_argument("--only", default="", help="cases whose name holds this")
    comparing = commands.add_parser("compare", help="compare two such files")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "record":
        found = {}
        for name, settings in cases().items():
            if options.only in name:
                found[name] = record(settings)
                print(f"{name}{' (refused)' if 'refused' in found[name] else ''}", flush=True)
        options.file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        return 0
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in (options.before, options.after))
    differing = {name: differences(before[name], after[name]) for name in before if name in after}
    for name, lines in differing.items():
        for line in lines:
            print(f"{name}: {line}")
    same = sum(not lines for lines in differing.values())
    refused = sum("refused" in before[name] for name in differing)
    missing, new = len(before.keys() - after.keys()), len(after.keys() - before.keys())
    print(f"{same} of {len(differing)} cases are the same bit for bit, {refused} of them refused in both.")
    if new:
        print(f"{new} cases are new in {options.after}.")
    if missing:
        print(f"{missing} cases are missing in {options.after}.")
    return int(same < len(differing) or missing > 0)


if __name__ == "__main__":
    sys.exit(main())
