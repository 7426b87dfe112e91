"""Checkpoints: written atomically, and read without executing code from the file."""

import os
import random
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastadvisor.errors import UserError, cannot_write

FOLDER = 0x10
"""Attribute of a zip entry (MS-DOS): a folder."""
FORMAT = "fastadvisor-checkpoint-4"
MODEL, AVERAGE, CLASSES = "model", "average", "classes"
"""Parts of a checkpoint that are read without the run: the classifier, the average of its weights, the names of the classes."""
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which other trainers save a state dict."""
PREFIXES = ("module.", "_orig_mod.", "model.")


def save(path: Path, payload: Mapping[str, Any]) -> None:
    """Write ``payload`` (with the key ``format`` added) to ``path``, as :func:`write` does.

    Raises:
        UserError: the file cannot be written.
    """
    write(path, {**payload, "format": FORMAT})


def write(path: Path, payload: Mapping[str, Any]) -> None:
    """Write ``payload``, such as a state dict, to ``path``; after a crash the previous file is still there.

    Raises:
        UserError: the file cannot be written, such as on a full disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(dict(payload), file)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power cut leaves a new name on an empty file
        os.replace(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    except RuntimeError as error:
        # torch closes its archive on the way out and complains of that instead of the failed write.
        if isinstance(error.__context__, OSError):
            raise cannot_write(path, error.__context__) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint that ``save`` wrote, onto the CPU.

    Raises:
        UserError: missing, damaged, or not a checkpoint of fastadvisor.
    """
    payload = read(path)
    found = payload.get("format")
    if found == FORMAT:
        return payload
    if isinstance(found, str) and found.startswith(FORMAT.rstrip("0123456789")):
        raise UserError(
            f"{path} was written by another version of fastadvisor (it has the format {found}, this one reads {FORMAT}): go on "
            "with that version, or begin a new run from its weights, as with --weights model.pt --output NEW."
        )
    raise UserError(f"{path} is not a checkpoint of this version of fastadvisor (no format {FORMAT!r}); name another.")


def read(path: Path) -> dict[str, Any]:
    """Read any file of tensors and plain values that holds a dict, such as ``model.pt``, onto the CPU.

    Raises:
        UserError: missing, damaged, or something else.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        _check_sums(path)
        payload = torch.load(path, map_location="cpu", weights_only=True)
    # Damage shows as almost anything: RuntimeError, EOFError, UnpicklingError, KeyError, UnicodeDecodeError, ...
    except Exception as error:
        foreign = re.search(r"GLOBAL ([\w.]+) was not an allowed", str(error))
        if foreign is not None:
            raise UserError(
                f"{path} holds objects other than tensors and plain values ({foreign[1]}), which are not loaded, as they may "
                "run code: save the state dict alone, torch.save(model.state_dict(), FILE)."
            ) from None
        others = [other for other in (*list_kept(path.parent), path.with_name("best.pt")) if _is_another(other, path)]
        way = f"copy {others[0]} over it, or train" if path.name == "last.pt" and others else "train"
        raise UserError(
            f"{path} is damaged or cut short, or no checkpoint at all; {way} again into another --output."
        ) from None
    if not isinstance(payload, dict):
        raise UserError(f"{path} holds no dict of weights; name a checkpoint or a state dict.")
    return payload


def list_kept(folder: Path) -> list[Path]:
    """Return the checkpoints of ``--keep`` in ``folder``, newest first."""
    return sorted(folder.glob("iteration-*.pt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _is_another(other: Path, path: Path) -> bool:
    return other.is_file() and not other.samefile(path)


def _check_sums(path: Path) -> None:
    """Raise BadZipFile if a checksum is wrong: torch.load does not look at them and returns flipped bits as weights.

    Nor if a tensor is marked as a folder: torch would read nothing for it, and return whatever its memory held before.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            folders = [entry.filename for entry in archive.infolist() if entry.is_dir() or entry.external_attr & FOLDER]
            bad = folders[0] if folders else archive.testzip()
        if bad is not None:
            raise zipfile.BadZipFile(bad)


def load_model_state(module: torch.nn.Module, state: Mapping[str, Any], path: Path | str) -> None:
    """Load ``state``, read from ``path``, into ``module``.

    Raises:
        UserError: it belongs to another model; names the first key that differs. ``module`` is then unchanged.
    """
    own = module.state_dict()
    for key in [*own, *(key for key in state if key not in own)]:
        if key not in state:
            reason = "missing there"
        elif key not in own:
            reason = "unknown here"
        elif getattr(state[key], "shape", None) != own[key].shape:
            reason = f"{tuple(getattr(state[key], 'shape', ()))} there, {tuple(own[key].shape)} here"
        else:
            continue
        raise UserError(
            f"{path} is a checkpoint of another model (first differing key {key}: {reason}); "
            "use the --model and --dataset it was trained with."
        )
    module.load_state_dict(dict(state), strict=True)


@contextmanager
def refuse_misfit(path: Path) -> Iterator[None]:
    """Turn any exception inside the block, which reads the content of a checkpoint, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any kind: a part that is missing, of another type, of another size
        raise UserError(
            f"{path} does not fit this run ({type(error).__name__}: {' '.join(str(error).split())[:100]}): it was changed, or "
            "written by another version of fastadvisor; name another, or train again into another --output."
        ) from None


def check_weights_file(name: str | None) -> None:
    """Raise a UserError if a file of weights is named and does not exist."""
    if name is not None and not os.path.isfile(name):
        raise UserError(f"There is no file of weights {name}: check --weights.")


def load_weights(module: torch.nn.Module, name: str) -> None:
    """Load the classifier in the file ``name``: a run's ``model.pt``, ``best.pt`` or ``last.pt``, or any state dict, in what
    other trainers wrap it in (:func:`unwrap_state`).

    Raises:
        UserError: missing, damaged, or of another model.
    """
    path = Path(name)
    load_model_state(module, unwrap_state(read_classifier(path), module.state_dict()), path)


def unwrap_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state dict in ``state`` under the names of ``own``: taken out of an entry such as ``state_dict``, and without
    the prefixes that DataParallel (``module.``), torch.compile (``_orig_mod.``) and Lightning (``model.``) put before names.
    """
    while not any(key in own for key in state):
        inner = next((state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping)), None)
        prefix = next((one for one in PREFIXES if state and all(str(key).startswith(one) for key in state)), None)
        if inner is not None:
            state = inner
        elif prefix is not None:
            state = {key.removeprefix(prefix): value for key, value in state.items()}
        else:
            break
    return state


def read_classifier(path: Path) -> dict[str, Any]:
    """Return the state dict of the classifier in a checkpoint, the average of its weights if there is one, or in ``model.pt``.

    Raises:
        UserError: as :func:`read`, or the checkpoint is of another version, or holds no classifier.
    """
    state = read(path)
    if "format" not in state:
        return state
    return extract_classifier(load(path), path)


def extract_classifier(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the state dict of the classifier in the checkpoint ``state``, read from ``path``: the average of its weights if
    there is one.

    Raises:
        UserError: it holds no classifier.
    """
    with refuse_misfit(path):
        return dict(state[AVERAGE]["model"] if AVERAGE in state else state[MODEL])


def random_states() -> dict[str, Any]:
    """Return the state of the generators of torch, CUDA, numpy (legacy) and Python, in types that ``load`` accepts."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), next_gauss],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Set the generators to what ``random_states`` returned.

    States of CUDA devices that are not here are left out: a run may be resumed on another machine.
    """
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, words, next_gauss = states["python"]
    random.setstate((version, tuple(words), next_gauss))
