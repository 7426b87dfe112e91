"""``fastadvisor export``: the plain classifier for use elsewhere, each file compared with the original on real images."""

import contextlib
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadvisor.config import Config
from fastadvisor.datasets import TrainingData
from fastadvisor.errors import UserError, cannot_write, suggest
from fastadvisor.loading import Batch, build_test_loader
from fastadvisor.models import build_model
from fastadvisor.runtime import checkpoint as checkpoints
from fastadvisor.runtime import memory
from fastadvisor.runtime.environment import environment
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.run_folder import write_text
from fastadvisor.training.predictions import predictions
from fastadvisor.training.saved_run import SavedRun

FORMATS = {"state-dict": "classifier.pt", "torch-export": "classifier.pt2", "onnx": "classifier.onnx"}
"""File name of each format."""
TOLERANCE = 1e-4
"""Largest difference of a logit to the original's, absolute and relative to the largest logit: another runtime adds up in
another order."""
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Network = Callable[[Tensor], Tensor]


def export_run(
    run: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    formats: Sequence[str] = tuple(FORMATS),
    checkpoint: str = "model",
    data_root: str | None = None,
    images: int = 64,
) -> dict[str, Any]:
    """Write the classifier of a run folder, and ``export.json``: classes, normalisation, and how close each file is.

    Args:
        run: the folder.
        output: where to; None: ``export`` in the run's folder.
        formats: of ``FORMATS``; torch-export and onnx take batches of any size of (N, 3, S, S) float32, normalised.
        checkpoint: ``model`` (the finished classifier), ``best`` or ``last``.
        data_root: where the data set lies now; None: where it lay.
        images: test images to compare on.

    Returns:
        The content of ``export.json``.

    Raises:
        UserError: no such run, format or package, a model that cannot be exported, or a file whose logits differ (it is then
            not left behind).
    """
    check_formats(formats)
    saved = SavedRun.open(run, data_root=data_root)
    saved.weights(checkpoint)  # a checkpoint that is not there is found before the data set is read
    config, data = saved.config, saved.data()
    folder = saved.folder.path / "export" if output is None else Path(output).expanduser()
    real, size = _images(config, data, images)
    classes = data.classes
    normalisation = {"mean": list(data.mean), "std": list(data.std)}
    whole = saved.model(checkpoint, size)
    wanted = _logits(whole, real)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); choose another --output.") from None
    found = {name: _export(name, folder / FORMATS[name], whole.model, config, len(classes), wanted) for name in formats}
    about = {
        "model": config.model,
        "classes": classes,
        "image_size": size,
        "input": {"name": "images", "shape": ["batch", 3, size, size], "dtype": "float32", **normalisation},
        "output": {"name": "logits", "shape": ["batch", len(classes)], "dtype": "float32"},
        "compared_on": len(real.images),
        "files": found,
        "notes": list(data.notes),
        "versions": environment(),
    }
    write_text(folder / "export.json", json.dumps(about, indent=2) + "\n")
    return about


def check_formats(formats: Sequence[str]) -> None:
    """Raise a UserError for a format there is not, or whose packages are missing."""
    if not formats:
        raise UserError(f"--formats names none; give some of {', '.join(FORMATS)}.")
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"Unknown format {name!r}.{suggest(name, FORMATS)} Formats: {', '.join(FORMATS)}.")
    missing = [package for package in ONNX_PACKAGES if find_spec(package) is None]
    if "onnx" in formats and missing:
        raise UserError(
            f"The format onnx needs {', '.join(missing)}: pip install 'fastadvisor[export]', or leave it out with "
            "--formats state-dict,torch-export."
        )


def _images(config: Config, data: TrainingData, count: int) -> tuple[Batch, int]:
    """Return a batch of normalised test images (at most ``count``, 3, S, S), and S."""
    config.eval_batch_size = count
    device = torch.device("cpu")
    test, size = build_test_loader(config, data, device)
    with memory.explain_out_of_memory(device), closing(test):
        batch = next(iter(test), None)
    if batch is None:
        raise UserError("None of the test images can be read: replace them, or name other data with --data-root.")
    return batch, size


def _logits(model: nn.Module, real: Batch) -> list[tuple[Tensor, Tensor]]:
    """Return images and the logits of the original on them: of all of ``real`` at once, and of the first alone."""
    batches = [real, Batch(*(tensor[:1] for tensor in real))]
    found = predictions(model, batches, Execution())
    return [(batch.images, one.logits) for batch, one in zip(batches, found, strict=True)]


def _export(
    name: str, path: Path, model: nn.Module, config: Config, classes: int, wanted: list[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """Write one file under a name of its own, compare what is read back, and give it its name."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _quietly():
            read_back = _WRITERS[name](temporary, model, config, classes, wanted[0][0])
        found = _compare(name, path, wanted, read_back)
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)
    return {"file": path.name, "bytes": path.stat().st_size, **found}


def _compare(name: str, path: Path, wanted: list[tuple[Tensor, Tensor]], read_back: Network) -> dict[str, Any]:
    """Hold the logits of what is read back against those ``wanted`` of the original, for each batch of images.

    Raises:
        UserError: they differ.
    """
    differences, agree = [], True
    with torch.no_grad():
        for images, logits in wanted:
            got = read_back(images)
            differences.append(float((got - logits).abs().max() / (1 + logits.abs().max())))
            agree = agree and torch.equal(got.argmax(1), logits.argmax(1))
    worst = max(differences, key=lambda one: (math.isnan(one), one))
    if not worst <= TOLERANCE:
        raise UserError(
            f"{path.name} does not give the logits of the original (off by {worst:.2g} of the largest): it is not written; "
            f"leave {name} out with --formats."
        )
    return {"largest_difference": worst, "same_top1": agree}


def _state_dict(path: Path, model: nn.Module, config: Config, classes: int, real: Tensor) -> Network:
    checkpoints.write(path, model.state_dict())
    size = int(real.shape[2])
    again = build_model(config, classes, (size, size)).model
    again.load_state_dict(torch.load(path, weights_only=True))
    return again.eval()


def _torch_export(path: Path, model: nn.Module, config: Config, classes: int, real: Tensor) -> Network:
    with _traceable("torch-export", config):
        program = torch.export.export(model, (_example(real),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with path.open("wb") as file:
        torch.export.save(program, file)
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _onnx(path: Path, model: nn.Module, config: Config, classes: int, real: Tensor) -> Network:
    import onnxruntime

    with _traceable("onnx", config):
        program = torch.onnx.export(
            model,
            (_example(real),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


_WRITERS: dict[str, Callable[[Path, nn.Module, Config, int, Tensor], Network]] = {
    "state-dict": _state_dict,
    "torch-export": _torch_export,
    "onnx": _onnx,
}


def _example(real: Tensor) -> Tensor:
    """Return a batch to trace with: of two, for torch takes a batch of one for a constant."""
    return real[:2] if len(real) > 1 else real.expand(2, -1, -1, -1)


@contextlib.contextmanager
def _traceable(name: str, config: Config) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever the tracer meets in a model
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{config.model} cannot be exported as {name} ({reason}); leave it out with --formats.") from None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporters' progress, advice and warnings from the user's terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
