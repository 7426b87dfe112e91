"""What a run meets on other people's machines: other folders, encodings, containers, limits."""

import ast
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastadvisor
from fastadvisor import cli
from fastadvisor.config import CheckConfig, CompareConfig, Config, add_method_settings, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.errors import Interrupted, UserError
from fastadvisor.loading import build_loaders, cache_images
from fastadvisor.loading.backends import dali, dataloader
from fastadvisor.runtime import console, memory
from fastadvisor.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
QUIET = ["--device", "cpu", "--no-tensorboard"]
SMALL = ["--model", "resnet8", "--method", "ce", "--meta-per-class", "2", "--batch-size", "4", "--epochs", "1", *QUIET]


def photos(root, parts=("train", "test"), classes=("ant", "bee"), count=8, side=16):
    for part in parts:
        for number, name in enumerate(classes):
            folder = Path(
                os.fsdecode(os.path.join(os.fsencode(root), part.encode(), name if isinstance(name, bytes) else name.encode()))
            )
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng([len(part), number, index]).integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Work in an empty folder, which is the user's home, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def python(*args, **environment):
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels"))
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run([sys.executable, *args], env=environment, capture_output=True, timeout=300)


# Folders


def test_home_in_every_path(place, capsys):
    """As ``--flag=~/x``, which no shell writes out, and as two words."""
    photos(place / "photos", ("train", "test"))
    (place / "trusted.txt").write_text("train/ant/0.png 0\ntrain/bee/0.png 1\n")
    (place / "labels.csv").write_text("path,label\ntrain/ant/3.png,bee\n")
    (place / "mine.yaml").write_text("epochs: 2\n")
    first = ["train", "--dataset", "imagefolder", *SMALL]
    more = [
        "--data-root=~/photos",
        "--meta-list=~/trusted.txt",
        "--labels=~/labels.csv",
        "--cache-dir=~/copies",
        "--cache-size=32",
    ]
    assert cli.main([*first, *more, "--image-size=16", "--config=~/mine.yaml", "--output=~/run"]) == 0
    assert (place / "run/model.pt").is_file()
    assert list((place / "copies").iterdir())
    assert cli.main([*first, "--data-root", "~/photos", "--weights=~/run/model.pt", "--output", "~/again"]) == 0
    assert cli.main(["evaluate", "~/run", "--data-root=~/photos"]) == 0
    assert cli.main(["export", "~/run", "--formats=state-dict", "--output=~/out"]) == 0
    assert (place / "out/classifier.pt").is_file()
    assert (
        cli.main(
            ["data", "check", "--dataset", "imagefolder", "--data-root=~/photos", "--output=~/report", "--meta-per-class=2"]
        )
        == 0
    )
    assert (place / "report/check.json").is_file()
    assert "There is no ~" not in capsys.readouterr().err
    assert not (place / "~").exists()
    for name in ("train", "test"):
        (place / f"{name}.txt").write_text(
            "".join(f"{name}/{c}/{n}.png {k}\n" for k, c in enumerate(("ant", "bee")) for n in range(8))
        )
    lists = ["--dataset", "list", "--data-root=~/photos", "--train-list=~/train.txt", "--test-list=~/test.txt"]
    assert cli.main(["train", *lists, *SMALL, "--output", "~/listed"]) == 0


def test_paths_from_python(place):
    root = photos(Path("photos"))
    for path in (root, "~/photos", Path("~/photos")):
        settings = resolve(Config, dataset="imagefolder", data_root=path, output=Path("~/run"), weights=None)
        assert settings.data_root in ("photos", str(place / "photos"))
        assert settings.output == str(place / "run")
        assert len(load_source(settings).train) == 16
    (place / "mine.yaml").write_text("epochs: 7\n")
    assert resolve(Config, Path("~/mine.yaml")).epochs == 7


def test_a_run_can_be_used_from_any_folder(place, monkeypatch, capsys):
    photos(Path("work/photos"))
    (place / "work/trusted.txt").write_text("train/ant/0.png 0\ntrain/bee/0.png 1\n")
    (place / "work/labels.csv").write_text("path,label\ntrain/ant/3.png,bee\n")
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "work")
    relative = ["--data-root", "photos", "--meta-list", "trusted.txt", "--labels", "labels.csv", "--output", "../runs/a"]
    assert cli.main(["train", "--dataset", "imagefolder", *SMALL, *relative]) == 0
    monkeypatch.chdir(place / "elsewhere")
    run = "../runs/a"
    assert cli.main(["evaluate", run]) == 0
    assert cli.main(["export", run, "--formats", "state-dict"]) == 0
    assert cli.main(["train", "--config", f"{run}/config.yaml", "--output", run, "--resume"]) == 0
    monkeypatch.chdir(place / "work")  # and with the words it was started with
    assert cli.main(["train", "--dataset", "imagefolder", *SMALL, *relative, "--resume"]) == 0


def test_a_list_named_from_the_root_is_found_again(place, monkeypatch):
    photos(Path("photos"))
    for name in ("train", "test"):
        rows = "".join(f"{name}/{c}/{n}.png {k}\n" for k, c in enumerate(("ant", "bee")) for n in range(8))
        (place / f"photos/{name}-a.txt").write_text(rows)
    lists = ["--train-list", "train-a.txt", "--test-list", "test-a.txt"]
    assert cli.main(["train", "--dataset", "list", "--data-root", "photos", *lists, *SMALL, "--output", "run"]) == 0
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert cli.main(["evaluate", "../run"]) == 0


def test_data_that_have_moved(place, capsys):
    photos(Path("photos"))
    assert cli.main(["train", "--dataset", "imagefolder", *SMALL, "--data-root", "photos", "--output", "run"]) == 0
    Path("photos").rename("moved")
    assert cli.main(["evaluate", "run", "--data-root", "moved"]) == 0
    assert cli.main(["train", "--config", "run/config.yaml", "--data-root", "moved", "--output", "run", "--resume"]) == 0


def test_the_command_that_goes_on_is_one_for_a_shell(place, monkeypatch):
    call = Trainer.set_lr

    def stop(self, *args):
        self.interruption.signal = signal.SIGTERM
        return call(self, *args)

    monkeypatch.setattr(Trainer, "set_lr", stop)
    output = "it's a run; rm -rf $HOME"
    with pytest.raises(Interrupted) as stopped:
        fastadvisor.train(method="ce", epochs=2, output=output, device="cpu", tensorboard=False, progress=False)
    monkeypatch.undo()
    command = shlex.split(str(stopped.value).split("To go on: ")[1])
    assert command[0] == "fastadvisor"
    os.chdir("/")
    assert cli.main(command[1:]) == 0
    assert (place / output / "model.pt").is_file()


# Flags in messages


def strings():
    """All string constants of the package but docstrings, with their file."""
    for file in sorted((ROOT / "fastadvisor").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                yield file.relative_to(ROOT), node.value


def test_every_flag_that_a_message_names_exists():
    known = {
        f"--{field.name.replace('_', '-')}"
        for kind in (Config, CompareConfig, CheckConfig)
        for field in dataclasses.fields(add_method_settings(kind))
    }
    known |= {f"--no-{flag[2:]}" for flag in known}
    known |= {"--config", "--help", "--help-all", "--version", "--formats", "--checkpoint", "--json"}
    others = {"--nproc-per-node", "--max-restarts", "--shm-size", "--ipc", "--porcelain", "--untracked-files"}
    # torchrun's, docker's and git's
    found = {(str(file), flag) for file, text in strings() for flag in re.findall(r"--[a-z][a-z0-9-]+", text)}
    assert len(found) > 100
    assert sorted(pair for pair in found if pair[1] not in known | others and not pair[1].endswith("-")) == []


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_command_names_no_flag_that_it_lacks(place, capsys, command):
    photos(Path("photos"))
    assert cli.main(["train", "--dataset", "imagefolder", *SMALL, "--data-root", "photos", "--output", "a run"]) == 0
    Path("photos/test/ant/3.png").write_bytes(b"no image")
    capsys.readouterr()
    assert cli.main([command, "a run"]) == 2
    err = capsys.readouterr().err
    assert "replace or delete them, or raise max_bad_fraction in a run/config.yaml, which is 0.001" in err
    assert "--" not in err
    settings = Path("a run/config.yaml")
    settings.write_text(settings.read_text().replace("max_bad_fraction: 0.001", "max_bad_fraction: 0.5"))
    assert cli.main([command, "a run", *(["--formats", "state-dict"] if command == "export" else [])]) == 0
    (place / "a run/model.pt").unlink()
    assert cli.main([command, "a run"]) == 2
    err = capsys.readouterr().err
    assert f"fastadvisor train --config '{place}/a run/config.yaml' --output '{place}/a run' --resume" in err
    assert "or try --checkpoint best" in err


def test_a_path_that_looks_like_a_flag_is_a_path(place, capsys):
    assert cli.main(["evaluate", "nosuch--lr/x"]) == 2
    assert "nosuch--lr/x is not a run folder" in capsys.readouterr().err


def test_replay_names_no_flag_that_it_lacks(place, capsys):
    Path("run").mkdir()
    assert cli.main(["replay", "run"]) == 2
    assert "--" not in capsys.readouterr().err


# Encodings


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict"])
def test_a_table_on_an_output_that_lacks_its_characters(place, encoding):
    """By the command, which sees to its output, and by a caller, whose output is not to be changed."""
    words = ["compare", "--methods", "ce", "--seeds", "2", "--epochs", "1", *QUIET, "--output", "runs"]
    code = {
        "ascii": f"from fastadvisor import cli\ncli.main({words})",
        "ascii:strict": "import fastadvisor as f\nf.compare(methods='ce', seeds=2, epochs=1, device='cpu', tensorboard=False)",
    }
    done = python("-c", code[encoding] + "\nprint('done')", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr.decode()
    assert b"| ce | " in done.stdout
    assert b" +- " in done.stdout
    assert done.stdout.rstrip().endswith(b"done")


def test_help_on_an_output_that_lacks_its_characters(place):
    done = python("-m", "fastadvisor", "train", "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr.decode()
    assert b"--batch-size" in done.stdout


@pytest.mark.parametrize(
    ("text", "encoding", "held"),
    [
        ("1 ± 2 → 3", "ascii", "1 +- 2 -> 3"),
        ("é", "ascii", r"\xe9"),
        ("±", "latin-1", "±"),
        ("caf\udce9", "utf-8", r"caf\udce9"),
    ],
)
def test_what_an_output_cannot_hold(text, encoding, held):
    class Stream:
        pass

    stream = Stream()
    stream.encoding = encoding
    assert console.make_printable(text, stream) == held


def test_names_in_no_encoding(place):
    """Names of classes and images as an old camera, or Windows, has written them."""
    try:
        photos("photos", classes=(b"caf\xe9", b"bee"), count=6)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    os.rename(b"photos/train/caf\xe9/1.png", b"photos/train/caf\xe9/\xfc.png")
    data = ["--dataset", "imagefolder", "--data-root", "photos"]
    commands = [
        ["train", *data, *SMALL, "--output", "run", "--loader", "torch", "--workers", "0"],
        ["train", "--config", "run/config.yaml", "--output", "run", "--resume"],
        ["evaluate", "run"],
        ["evaluate", "run", "--json"],
        ["export", "run", "--formats", "state-dict"],
        ["data", "check", *data, "--output", "report", "--meta-per-class", "2"],
        ["compare", *data, *(word for word in SMALL if word not in ("--method", "ce")), "--methods", "ce", "--output", "runs"],
        ["train", *data, *SMALL, "--meta-per-class", "6"],
    ]
    code = (
        "import sys\nfrom fastadvisor import cli\nfor line in sys.argv[1:]:\n    print('status', cli.main(line.split('|')))\n"
    )
    done = python("-c", code, *("|".join(command) for command in commands), PYTHONIOENCODING="ascii")
    text = done.stdout.decode() + done.stderr.decode()
    assert re.findall(r"status (\d)", text) == ["0"] * (len(commands) - 1) + ["2"], text
    assert "Traceback" not in text
    assert r"caf\udce9" in text
    assert json.loads(Path("run/export/export.json").read_text())["classes"] == ["bee", "caf\udce9"]
    assert list(json.loads(Path("run/summary.json").read_text())["per_class_top1"]) == ["bee", "caf\udce9"]


# Shared memory, open files


def loaders(root, **changes):
    usual = {"loader": "torch", "workers": 2, "image_size": 16, "batch_size": 4, "meta_per_class": 2, "meta_batch_size": 2}
    config = resolve(Config, dataset="imagefolder", data_root=str(root), **{**usual, **changes})
    return build_loaders(config, prepare(load_source(config), config, 0), CPU)


def test_too_little_shared_memory_is_found_before_the_first_worker(place, monkeypatch):
    photos(Path("photos"))
    loaders("photos").close()

    class Full:
        f_bavail, f_frsize = 24, 1024

    monkeypatch.setattr(dataloader.os, "statvfs", lambda path: Full)
    monkeypatch.setattr(dataloader.os.path, "isdir", lambda path, isdir=os.path.isdir: path == "/dev/shm" or isdir(path))
    with pytest.raises(UserError) as error:
        loaders("photos")
    image = 16 * 16 * 3
    needed = (2 * dataloader.PREFETCH + 1) * (4 + 2 + 16) * image
    assert f"in /dev/shm, which has 0 MB free, and need {needed / 1e6:.0f}: " in str(error.value)
    assert "docker run --shm-size 2g" in str(error.value)
    assert str(error.value).endswith("or take --workers 0, which needs none.")
    Full.f_bavail = (dataloader.PREFETCH + 1) * (4 + 2 + 16) * image // 1024 + 1
    with pytest.raises(UserError, match="or take --workers 1, which fits"):
        loaders("photos")
    loaders("photos", workers=1).close()
    loaders("photos", workers=0).close()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="take --workers 0"):
        loaders("photos", workers=1)


def first_batch(root):
    with memory.explain_out_of_memory(CPU):
        made = loaders(root)
        try:
            return made.train.next_batch()
        finally:
            made.close()


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
            "The shared memory in /dev/shm",
        ),
        (
            "unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)",
            "Too many files are open",
        ),
    ],
)
def test_shared_memory_that_runs_out_in_a_worker_ends_the_run_at_once(place, monkeypatch, message, says):
    """By one sentence, which holds nothing of the worker's traceback."""
    photos(Path("photos"))

    def fail(self):
        raise RuntimeError(message)

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)  # workers are forked with it
    with pytest.raises(UserError) as error:
        first_batch("photos")
    assert str(error.value).startswith(says)
    assert "Traceback" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [RuntimeError("no space"), OSError(24, "Too many open files")], ids=repr)
def test_a_batch_that_cannot_be_handed_over_ends_the_run_at_once(place, monkeypatch, error):
    """The queue's own thread meets the fault, and the main process would wait for the batch without end."""
    photos(Path("photos"))
    decoded = dataloader.Batches._decode

    class Stuck:
        def __reduce__(self):
            raise error

    monkeypatch.setattr(dataloader.Batches, "_decode", lambda self, spec: decoded(self, spec)._replace(bad=Stuck()))
    with pytest.raises(UserError, match=r"A worker of the data loader has ended, .* memory or /dev/shm .* too many files"):
        first_batch("photos")


def test_too_few_open_files(place, monkeypatch):
    photos(Path("photos"))
    limits = []
    monkeypatch.setattr(dataloader.resource, "setrlimit", lambda kind, values: limits.append(values))
    monkeypatch.setattr(dataloader.resource, "getrlimit", lambda kind: (40, 40))
    with pytest.raises(
        UserError, match=r"Too many files are open at once: raise the limit \(ulimit -n 65536\), or lower --workers"
    ):
        loaders("photos", workers=8)
    assert limits == []
    monkeypatch.setattr(dataloader.resource, "getrlimit", lambda kind: (40, 1_048_576))  # as in most containers
    loaders("photos", workers=8).close()
    assert limits == [(65_536, 1_048_576)]


@pytest.mark.parametrize(
    "loader",
    [
        pytest.param("dali", marks=pytest.mark.skipif(not dali.available(), reason="NVIDIA DALI is not installed")),
        "torch",
        "resident",
    ],
)
def test_a_file_that_cannot_be_opened_for_want_of_handles_is_not_a_bad_image(place, monkeypatch, loader):
    photos(Path("photos"))
    from fastadvisor.datasets.images import FileImages

    def fail(self, row):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(FileImages, "encoded", fail)
    config = resolve(
        Config,
        dataset="imagefolder",
        data_root="photos",
        loader=loader,
        image_size=16,
        batch_size=4,
        meta_per_class=2,
        workers=1,
    )
    with pytest.raises(UserError, match="Too many files are open"):
        build_loaders(config, prepare(cache_images(load_source(config), config, CPU), config, 0), CPU)


# Images that are all broken


@pytest.mark.parametrize("loader", ["resident", "torch"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_of_which_nothing_can_be_read(place, capsys, loader, part):
    photos(Path("photos"))
    for file in Path("photos", part).rglob("*.png"):
        file.write_bytes(file.read_bytes()[:60])
    args = ["--dataset", "imagefolder", "--data-root", "photos", "--image-size", "16", "--loader", loader, "--workers", "0"]
    assert cli.main(["train", *SMALL, *args, "--max-bad-fraction", "1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_test_images_that_break_later(place, capsys):
    photos(Path("photos"))
    args = ["--dataset", "imagefolder", "--data-root", "photos", "--image-size", "16", "--max-bad-fraction", "1"]
    assert cli.main(["train", *SMALL, *args, "--output", "run"]) == 0
    shutil.rmtree("photos/test")
    photos(Path("photos"), ("test",))
    for file in Path("photos/test").rglob("*.png"):
        file.write_bytes(b"no image")
    for command in (["evaluate", "run"], ["export", "run"]):
        capsys.readouterr()
        assert cli.main(command) == 2
        err = capsys.readouterr().err
        assert re.match(r"fastadvisor: error: None of the (images to test on|test images) can be read", err), err
