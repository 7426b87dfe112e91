import json
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastadvisor.errors import UserError
from fastadvisor.runtime import environment, logger
from fastadvisor.runtime.precision import pick_device


def part(name):
    [found] = [(active, why) for part, active, why in environment.optional_parts() if part == name]
    return found


@pytest.fixture
def machine(monkeypatch):
    """Return a function that pretends: which packages are installed, and whether there is a GPU."""

    def pretend(packages=(), gpu=False, specs=()):
        def version(name):
            if name not in packages:
                raise metadata.PackageNotFoundError(name)
            return "1.2.3"

        monkeypatch.setattr(environment.metadata, "version", version)
        monkeypatch.setattr(environment, "find_spec", lambda name: dict(specs).get(name))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    return pretend


def test_environment_goes_into_a_summary():
    got = environment.environment()
    assert json.loads(json.dumps(got)) == got
    assert (got["torch"], got["numpy"]) == (torch.__version__, np.__version__)
    assert got["python"] == ".".join(map(str, sys.version_info[:3]))
    assert got["cpu_threads"] == torch.get_num_threads()
    assert {"fastadvisor", "torchvision", "triton", "cuda", "device", "cpu_cores"} <= got.keys()


def test_nothing_installed(machine):
    machine()
    parts = environment.optional_parts()
    assert [name for name, _, _ in parts] == ["triton", "nvidia-dali", "apex", "lightly", "tensorboard", "timm"]
    assert not any(active for _, active, _ in parts)
    assert all(why.startswith("not installed: ") for _, _, why in parts)
    assert part("timm") == (False, "not installed: pip install timm")
    assert environment.environment()["triton"] is None


def test_installed_without_a_gpu(machine, monkeypatch):
    machine(packages=["triton", "tensorboard"], specs={"nvidia": 1, "nvidia.dali": 1})
    assert part("triton") == (False, "1.2.3 installed, no GPU driver (plain torch does its work)")
    assert part("nvidia-dali") == (True, "installed (on the CPU)")
    assert part("tensorboard") == (True, "1.2.3")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert part("triton") == (True, "1.2.3 (interpreter)")
    monkeypatch.setenv("FASTADVISOR_KERNELS", "reference")
    assert part("triton") == (False, "1.2.3 turned off by FASTADVISOR_KERNELS=reference (plain torch does its work)")


def test_installed_with_a_gpu(machine):
    machine(packages=["triton", "nvidia-dali-cuda120"], gpu=True, specs={"nvidia": 1, "nvidia.dali": 1})
    assert part("triton") == (True, "1.2.3")
    assert part("nvidia-dali") == (True, "1.2.3")


def test_apex_of_nvidia_is_told_from_its_namesake(machine, tmp_path):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    machine(packages=["apex"], gpu=True, specs={"apex": spec})
    active, why = part("apex")
    assert not active
    assert "not NVIDIA's but an unrelated one" in why
    (tmp_path / "optimizers").mkdir()
    assert part("apex") == (True, "1.2.3")
    machine(packages=["apex"], gpu=False, specs={"apex": spec, "amp_C": 1})
    assert part("apex") == (False, "installed, no GPU driver")


def test_importing_the_module_imports_nothing_heavy():
    code = "import sys, fastadvisor.runtime.environment; assert not {'torch', 'numpy'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="No CUDA device is available to torch; use --device cpu or --device auto"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = logger.TensorBoard(tmp_path / "events")
    board.scalars(4, {"loss": 0.5})
    board.close()
    board.close()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(4, 0.5)]


def test_without_tensorboard_it_says_so_once_and_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(logger, "_said", False)
    for _ in range(2):
        board = logger.TensorBoard(tmp_path / "events")
        board.scalars(0, {"loss": 0.5})
        board.close()
    assert caplog.messages == ["No TensorBoard files: tensorboard is not installed (pip install tensorboard)."]
    assert not (tmp_path / "events").exists()


def test_turned_off_it_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    board = logger.TensorBoard(None)
    board.scalars(0, {"loss": 0.5})
    board.close()
    assert list(tmp_path.iterdir()) == []
