"""What a first GPU run stands on, as far as a machine without one can tell: half an hour is no time to look for a wrong key."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import contenders, step
from benchmarks.kernels import __main__ as kernels
from fastadvisor.commands.train import train_config
from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.runtime.precision import memory_format, tune_convolutions
from fastadvisor.training.trainer import Trainer
from tests.checkpoints import loss_scale

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_report.sh"
QUIET = {"progress": False, "tensorboard": False, "device": "cpu"}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def report(*args, **environment):
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", str(SCRIPT), *args], capture_output=True, text=True, env=environment)


def test_the_key_of_the_loss_scale(tmp_path):
    """The one that test_gpu.py reads, of a run that saves it."""
    config = resolve(Config, **QUIET, epochs=1, method="ce", amp=True, amp_dtype="float16", output=str(tmp_path / "run"))
    train_config(config)
    assert loss_scale(tmp_path / "run" / "last.pt") >= 1


@needs_bash
@pytest.mark.parametrize("call", ["A", "B", "C"])
def test_a_call_fits_in_ten_minutes_and_leaves_eight_files_at_most(call):
    listed = report(call, "--list")
    assert listed.returncode == 0
    parts = [line.split() for line in listed.stdout.splitlines()]
    assert len(parts) >= 3
    assert sum(int(seconds) for _, seconds, _ in parts) <= 570  # of 600, of which the start takes some
    files = [f"{call}.log", *(file for _, _, file in parts if file != "-")]
    assert len(files) == len(set(files)) <= 8


def test_every_command_of_the_report_can_be_asked_for_help(capsys):
    """A flag that has been renamed is found here."""
    text = SCRIPT.read_text()
    commands = re.findall(r'"\$PYTHON" -m (benchmarks\.\w+)([^\n]*)', text)
    assert {module for module, _ in commands} >= {
        "benchmarks.step",
        "benchmarks.kernels",
        "benchmarks.loaders",
        "benchmarks.watch",
    }
    for module, words in commands:
        package = module == "benchmarks.kernels"
        main = importlib.import_module(f"{module}.__main__" if package else module).main
        with pytest.raises(SystemExit) as stopped:
            main(["--help"])
        assert stopped.value.code == 0
        told = capsys.readouterr().out
        for flag in re.findall(r"--[a-z-]+", words.split(" -- ")[0]):
            assert flag in told, f"{module} {flag}"
    assert "--tune" not in text  # three of its 84 entries in the time there would be
    sanitizer = next(line for line in text.splitlines() if "compute-sanitizer --tool" in line)
    assert "--report-api-errors no" in sanitizer
    assert '-k "not sanitizer"' in text  # which has a part of its own


@needs_bash
def test_wheels_go_into_an_empty_folder_without_what_they_need(tmp_path):
    """pydantic wants a newer typing-extensions than the image has; its wheel is beside it, and pip must not ask further."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("annotated_types", "pydantic"):
        with zipfile.ZipFile(wheels / f"{name}-99.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", f"raise SystemExit('{name} of the wheel')\n")
            about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\nRequires-Dist: a-package-that-nobody-has>=3\n"
            wheel.writestr(f"{name}-99.0.dist-info/METADATA", about)
            wheel.writestr(f"{name}-99.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{name}-99.0.dist-info/RECORD", "")
    before = set(os.listdir("/tmp"))
    done = report("A", str(tmp_path / "out"), WHEELS=str(wheels))
    assert "Installed: annotated_types-99.0 pydantic-99.0" in done.stdout, done.stderr
    if not torch.cuda.is_available():
        assert done.returncode == 1
        assert done.stderr.strip().endswith("pytest runs the kernels through Triton's interpreter instead.")
        assert not (tmp_path / "out").exists()
    left = set(os.listdir("/tmp")) - before
    assert not any((Path("/tmp") / name / "annotated_types").exists() for name in left)
    (wheels / "annotated_types-99.0-py3-none-any.whl").write_bytes(b"no wheel")
    assert report("A", str(tmp_path / "out"), WHEELS=str(wheels)).returncode == 1


@needs_bash
def test_a_call_that_is_none_says_what_there_is():
    done = report("D")
    assert done.returncode == 2
    assert "gpu_report.sh A [FOLDER]" in done.stderr


def test_the_sizes_that_decide_come_first():
    sizes = [classes for _, classes in kernels.sizes("all", CUDA)]
    assert list(dict.fromkeys(sizes))[:3] == [1000, 8142, 131_072]


def test_a_step_is_timed_over_many_iterations_with_the_products_optimizer():
    setting = contenders.Setting("resnet8", CPU)
    parts = contenders.Parts.of(setting)
    assert parts.optimizer.defaults["fused"]
    cycle = step.make_cycle("exact", setting, step.Plan(batch_size=4, cycles=3))
    assert cycle.iterations == 3
    assert step.make_cycle("approx", setting, step.Plan(batch_size=4, cycles=3)).iterations == 6  # a meta step every second
    assert step.GPU_CYCLES > 1
    laid_out = contenders.Setting("resnet8", CPU, channels_last=True)
    weight = contenders.Parts.of(laid_out).model.model.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    train, _ = contenders.batches(4, CPU, memory_format=laid_out.memory_format)
    assert train.images.is_contiguous(memory_format=torch.channels_last)


def test_tests_convolve_in_float32():
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("choice", "device", "amp", "wanted"),
    [
        ("auto", CPU, True, torch.contiguous_format),
        ("auto", CUDA, False, torch.contiguous_format),
        ("auto", CUDA, True, torch.channels_last),
        ("contiguous", CUDA, True, torch.contiguous_format),
        ("channels-last", CPU, False, torch.channels_last),
    ],
)
def test_the_layout_of_images_and_weights(choice, device, amp, wanted):
    assert memory_format(choice, device, amp=amp) is wanted


@pytest.mark.parametrize("changes", [{}, {"approx_meta": True}, {"lean": True}, {"sync_bn": True}], ids=str)
def test_channels_last_trains_the_same(changes):
    losses = {}
    for choice in ("contiguous", "channels-last"):
        config = resolve(Config, **QUIET, memory_format=choice, method="mfrw-mes", **changes)
        run = Trainer(config, prepare(load_source(config), config, 0), CPU)
        run.model.train()
        results = []
        for _ in range(3):
            train, meta = run.batches(run.stages[0])
            layout = torch.channels_last if choice == "channels-last" else torch.contiguous_format
            assert train.images.is_contiguous(memory_format=layout)
            result = run.step(train, meta)
            results += [result.loss, *([] if result.meta_loss is None else [result.meta_loss])]
        assert run.model.model.conv1.weight.is_contiguous(memory_format=layout)
        losses[choice] = torch.stack(results)
    torch.testing.assert_close(losses["contiguous"], losses["channels-last"], rtol=1e-3, atol=1e-4)


def test_a_run_in_channels_last_resumes_and_exports(tmp_path):
    usual = {**QUIET, "method": "ce", "memory_format": "channels-last", "output": str(tmp_path / "run"), "schedule": "constant"}
    train_config(resolve(Config, **usual, epochs=1))
    result = train_config(resolve(Config, **usual, epochs=2, resume=True))
    weights = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert all(torch.equal(value, weights[name]) for name, value in result.model.state_dict().items())


def test_cudnn_looks_for_its_fastest_convolutions_on_a_gpu_alone():
    before = torch.backends.cudnn.benchmark
    for device, deterministic, wanted in ((CUDA, False, True), (CUDA, True, False), (CPU, False, False)):
        with tune_convolutions(device, deterministic=deterministic):
            assert torch.backends.cudnn.benchmark is wanted
        assert torch.backends.cudnn.benchmark is before
