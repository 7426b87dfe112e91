"""The environment of a run: versions, device, and which optional parts are active."""

import os
import platform
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastadvisor.version import __version__

NO_DRIVER = "installed, no GPU driver"


def environment() -> dict[str, Any]:
    """Return versions and hardware as plain values, for ``summary.json`` and ``fastadvisor env``."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "fastadvisor": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "numpy": _version("numpy"),
        "nvidia-dali": dali_version(),
        "triton": _version("triton", "pytorch-triton"),
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "cpu_cores": cpu_cores(),
        "cpu_threads": torch.get_num_threads(),
    }


def cpu_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """Return fastadvisor's folder among the user's caches, which need not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home, "fastadvisor")


def optional_parts() -> list[tuple[str, bool, str]]:
    """Return ``(name, active, version or reason)`` for each part that fastadvisor works without."""
    return [
        _triton(),
        _dali(),
        _apex(),
        _plain("lightly", "lightly"),
        _plain("tensorboard", "tensorboard"),
        _plain("timm", "timm"),
    ]


def _triton() -> tuple[str, bool, str]:
    version = _version("triton", "pytorch-triton")
    if version is None:
        return "triton", False, "not installed: pip install triton (plain torch does its work)"
    # A Triton wheel imports without a driver and fails only at launch, so the import proves nothing.
    if os.environ.get("FASTADVISOR_KERNELS") == "reference":
        return "triton", False, f"{version} turned off by FASTADVISOR_KERNELS=reference (plain torch does its work)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "triton", True, f"{version} (interpreter)"
    return ("triton", True, version) if _gpu() else ("triton", False, f"{version} {NO_DRIVER} (plain torch does its work)")


def _dali() -> tuple[str, bool, str]:
    installed = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    if not installed:
        return "nvidia-dali", False, "not installed: pip install nvidia-dali-cuda130 (or the one for your CUDA)"
    version = dali_version() or "installed"
    return "nvidia-dali", True, version if _gpu() else f"{version} (on the CPU)"


def dali_version() -> str | None:
    """Return DALI's version, None where it is not installed."""
    return _version("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")


def _apex() -> tuple[str, bool, str]:
    how = "build NVIDIA's from its source repository, NVIDIA/apex"
    spec = find_spec("apex")
    if spec is None:
        return "apex", False, f"not installed: {how} (the package called apex that pip installs is an unrelated one)"
    # Looked up on disk: find_spec("apex.optimizers") would import the package, whichever of the two it is.
    folders = [Path(folder) / "optimizers" for folder in spec.submodule_search_locations or ()]
    if find_spec("amp_C") is None and not any(folder.is_dir() for folder in folders):
        return "apex", False, f"the installed package 'apex' is not NVIDIA's but an unrelated one; {how}"
    return ("apex", True, _version("apex") or "installed") if _gpu() else ("apex", False, NO_DRIVER)


def _plain(name: str, package: str) -> tuple[str, bool, str]:
    version = _version(package)
    return (name, False, f"not installed: pip install {package}") if version is None else (name, True, version)


def _version(*packages: str) -> str | None:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()
