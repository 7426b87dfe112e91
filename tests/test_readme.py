"""Every code block of the README runs: shell commands through the command line, Python as it stands."""

import re
import shlex
import shutil
import subprocess
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastadvisor import cli
from tests.distributed.test_equivalence import torchrun

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def commands(program):
    lines = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.startswith(program)]


def photos(folder, side):
    generator = np.random.default_rng(0)
    for part, count in (("train", 24), ("meta", 4), ("test", 4)):
        for name in ("cat", "dog", "horse"):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the commands speak of: photos/, and data/ as CIFAR-10 in folders, both tiny."""
    folder = tmp_path_factory.mktemp("readme")
    photos(folder / "photos", 40)
    generator = np.random.default_rng(1)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for part, count in (("train", 210), ("test", 2)):
        for name in names:
            (folder / "data" / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "data" / part / name / f"{index}.png")
    return folder


@pytest.fixture
def short(monkeypatch):
    """Runs of at most one epoch and two seeds, on little data: the commands are what is tested here, not the training."""
    parse = cli.parse_config

    def cut(kind, *args):
        config = parse(kind, *args)
        config.epochs, config.eval_batch_size, config.progress = 1, 100, False
        if config.dataset == "cifar10":
            config.batch_size, config.meta_per_class, config.model = 32, 10, "resnet8"
        if hasattr(config, "seeds"):
            config.seeds = 1
        return config

    monkeypatch.setattr(cli, "parse_config", cut)


def test_make_demo_and_make_test_do_what_the_readme_says():
    assert commands("make") == ["make demo", "make test"]
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    dry = {name: subprocess.run(["make", "-n", name], cwd=ROOT, capture_output=True, text=True) for name in ("demo", "test")}
    assert "fastadvisor train --amp --approx-meta" in dry["demo"].stdout
    for tool in ("ruff check", "mypy", "pytest"):
        assert tool in dry["test"].stdout


def test_the_commands_run_in_order(workplace, short, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    listed = commands(("fastadvisor", "torchrun"))
    assert len(listed) >= 10
    for command in listed:
        if command.startswith("torchrun"):
            done = torchrun(2, *command.split("-m ")[1].split(), "--no-progress")
            assert done.returncode == 0, done.stderr[-2000:]
            continue
        status = cli.main(shlex.split(command)[1:])
        captured = capsys.readouterr()
        assert status == 0, f"{command}: {captured.err}"


def test_the_kernels_readme_runs():
    text = (ROOT / "kernels" / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    names = {}
    exec(compile(blocks[0], "kernels/README.md", "exec"), names)
    assert names["loss"].isfinite()
    assert names["v"].grad.isfinite().all()


def test_the_python_blocks_run(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    blocks = [block for kind, block in BLOCKS if kind == "python"]
    assert len(blocks) == 3
    command = "train --dataset imagefolder --data-root photos --batch-size 8 --epochs 1 --output runs/photos --no-progress"
    assert cli.main(command.split()) == 0
    batches = [(torch.randn(4, 3, 64, 64), torch.randint(3, (4,))) for _ in range(2)]
    for block in blocks:
        loaders = {"train_loader": batches, "meta_batches": cycle(batches)}  # the reader's own
        exec(compile(block, "README.md", "exec"), loaders)
    out = capsys.readouterr().out
    assert "mean_last5" in out
    assert "epoch" not in out.split("mean_last5")[0]  # progress=False
