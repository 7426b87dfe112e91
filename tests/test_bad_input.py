"""Bad input, end to end: one sentence that names the thing and the way out, exit status 2, nothing overwritten."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastadvisor import cli
from fastadvisor.errors import UserError
from fastadvisor.runtime import memory
from fastadvisor_kernels import dispatch

QUIET = ["--device", "cpu", "--no-progress", "--no-tensorboard"]
SMALL = ["--model", "resnet8", "--method", "ce", "--meta-per-class", "2", "--batch-size", "4", "--epochs", "1", *QUIET]
DIGITS = ["train", "--method", "ce", "--epochs", "1", *QUIET]
CLASSES = ("ant", "bee", "cat")


def images(root, splits=("train", "test"), classes=CLASSES, count=8, side=16):
    """Write random images, all different, as ROOT/<split>/<class>/<number>.png."""
    rng = np.random.default_rng(len(splits))
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def contents(folder):
    """Return every file and folder under ``folder``, with the bytes of the files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).rglob("*"))}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos():
    return images(Path("photos"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of two epochs on digits."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert cli.main([*DIGITS, "--epochs", "2", "--output", str(output)]) == 0
    return output


@pytest.fixture
def run(finished):
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished, "run"))


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused, and leave everything as it was; return its one sentence."""

    def check(args, *texts):
        capsys.readouterr()
        before = contents(".")
        assert cli.main([str(arg) for arg in args]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("fastadvisor: error: ")
        assert err.count("\n") == 1, err
        assert "Traceback" not in out + err
        for text in texts:
            assert text in err
        assert contents(".") == before
        return err

    return check


def folder_args(root="photos", *more):
    return ["train", "--dataset", "imagefolder", "--data-root", str(root), *SMALL, *more]


def test_the_images_of_these_tests_are_good(photos):
    assert cli.main([*folder_args(), "--output", "run"]) == 0
    assert Path("run/model.pt").is_file()


# Folders of images


def test_data_root_is_missing(refused):
    refused(folder_args("nowhere"), "no folder nowhere", "--data-root")
    refused(["train", "--dataset", "imagefolder", *SMALL], "--data-root DIR")
    refused(["train", "--dataset", "cifar10", *SMALL], "--data-root DIR", "--download")
    refused(folder_args("n" * 300), "File name too long", "--data-root")
    refused(folder_args("~nobody-of-that-name/photos"), "no folder ~nobody-of-that-name/photos")


@pytest.mark.parametrize(
    ("damage", "texts"),
    [
        (lambda root: shutil.rmtree(root / "test"), ["photos has no folder test/ (or val/)"]),
        (lambda root: shutil.rmtree(root / "train"), ["photos has no folder train/"]),
        (lambda root: [path.unlink() for path in (root / "train/bee").iterdir()], ["photos/train/bee holds no images"]),
        (lambda root: [path.unlink() for path in (root / "test/bee").iterdir()], ["photos/test/bee holds no images"]),
        (lambda root: shutil.rmtree(root / "test/bee"), ["photos/test has no folder for the class 'bee'"]),
        (lambda root: shutil.rmtree(root / "train/bee"), ["photos/test/bee is a class that train/ does not have"]),
        (lambda root: (root / "train/bee/3.png").write_bytes(b""), ["photos/train/bee/3.png", "replace or delete"]),
        (lambda root: (root / "test/cat/0.jpg").write_text("no JPEG"), ["photos/test/cat/0.jpg", "replace or delete"]),
        (lambda root: (root / "train/a\nb").mkdir(), ["photos/train/a b holds no images"]),
    ],
)
def test_broken_folders(refused, photos, damage, texts):
    damage(photos)
    refused(folder_args(), *texts)


def test_a_jpeg_cut_short(refused, photos):
    path = photos / "train/ant/x.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    refused(folder_args(), "photos/train/ant/x.jpg")


def test_one_class(refused):
    images(Path("photos"), classes=("ant",))
    refused(folder_args(), "photos/train holds one class, 'ant'", "two or more")


def test_an_unreadable_folder(capsys):
    """As another user where the tests run as root, whom no mode bits stop."""
    assert cli.main([*folder_args(images(Path("warm"))), "--output", "out"]) == 0  # what is imported late, now is
    root = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders are closed to the other user as well
    locked = images(root / "photos") / "train/bee"
    user = os.geteuid()
    try:
        locked.chmod(0)
        root.chmod(0o755)
        if user == 0:
            os.seteuid(65534)
        assert not os.access(locked, os.R_OK, effective_ids=True)
        assert cli.main(folder_args(root / "photos")) == 2
    finally:
        os.seteuid(user)
        locked.chmod(0o755)
        shutil.rmtree(root)
    says = f"The folder {locked} cannot be read (Permission denied): check --data-root."
    assert capsys.readouterr().err == f"fastadvisor: error: {says}\n"


# Meta-set and classes


def test_a_class_without_meta_images(refused):
    root = images(Path("photos"), splits=("train", "test", "meta"))
    for path in (root / "meta/cat").iterdir():
        path.unlink()
    refused(folder_args(), "photos/meta/cat holds no images")
    shutil.rmtree(root / "meta/cat")
    refused(folder_args(), "photos/meta has no folder for the class 'cat'")


def test_a_class_left_without_training_images(refused, photos):
    refused(folder_args("photos", "--meta-per-class", "8"), "Class 'ant' has 8 training images", "--meta-per-class 8")
    refused(folder_args("photos", "--imbalance-factor", "1000"), "no training images", "lower --imbalance-factor")


def test_meta_images_among_the_training_images_by_content(refused):
    root = images(Path("photos"), splits=("train", "test", "meta"))
    shutil.copy(root / "train/bee/5.png", root / "meta/bee/another name.png")
    refused(folder_args(), "photos/meta/bee/another name.png", "photos/train/bee/5.png", "remove them")


# Labels


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("few.txt", "0\n1\n", "few.txt holds 2 labels for 24 training images"),
        ("range.txt", "0\n" * 23 + "3\n", "range.txt: the label '3' at position 23"),
        ("negative.txt", "-1\n" + "0\n" * 23, "negative.txt: the label '-1' at position 0"),
        ("words.txt", "0\nant\n" + "0\n" * 22, "words.txt: some labels are names of classes, as 'ant' at position 1"),
        ("words.npy", "no array", "words.npy is not a plain array"),
        ("zip.npy", "PK\x03\x04", "zip.npy is not a plain array"),
        ("tensor.pt", "no tensor", "tensor.pt does not hold an integer tensor"),
        ("long.csv", "x" * 200_000, "long.csv is not readable as CSV"),
        ("labels.xls", "", "labels.xls: name it .npy, .pt, .txt or .csv"),
        ("missing.txt", None, "no file of labels missing.txt"),
        ("~nobody-of-that-name/l.txt", None, "no file of labels ~nobody-of-that-name/l.txt"),
        ("n" * 300 + ".txt", None, "check --labels"),
    ],
)
def test_labels_from_a_file(refused, photos, name, text, says):
    if text is not None:
        Path(name).write_text(text)
    refused(folder_args("photos", "--labels", name), says)


def test_labels_and_noise_at_once(refused, photos):
    Path("l.txt").write_text("0\n" * 24)
    refused(folder_args("photos", "--labels", "l.txt", "--noise", "flip"), "--labels l.txt and --noise flip")


# Settings


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (["--batch-size", "19"], ["--batch-size 19 is larger than the 18 training images"]),
        (["--meta-batch-size", "7"], ["--meta-batch-size 7 is larger than the 6 meta images"]),
        (["--batch-size", "1", "--model", "resnet18"], ["--batch-size is 1", "resnet18", "raise it"]),
        (["--batch-size", "4", "--accumulate", "4", "--model", "resnet18"], ["--batch-size leaves 1 image to each of 4 parts"]),
        (["--batch-size", "6", "--accumulate", "4"], ["--batch-size 6 cannot be shared evenly by 4 micro-batches"]),
        (["--optimizer", "apex-adam"], ["--optimizer apex-adam needs", "adamw"]),
        (["--optimizer", "nesterov", "--momentum", "0"], ["--optimizer nesterov needs --momentum"]),
        (["--meta-batch-size", "1", "--model", "resnet18"], ["--meta-batch-size is 1", "resnet18", "raise it"]),
        (["--image-size", "4"], ["--crop-padding 4 is too large for images of 4 pixels"]),
        (["--model", "vit_b_16"], ["vit_b_16 does not take images of 16×16 pixels", "--image-size"]),
        (["--model", "resnet9"], ["Unknown model 'resnet9'. Did you mean 'resnet"]),
        (["--model", "timm/none"], ["timm"]),
        (["--model", "squeezenet1_0", "--image-size", "64"], ["squeezenet1_0 does not end in a linear layer"]),
        (["--pretrained"], ["no pretrained weights for resnet8", "--pretrained"]),
        (["--method", "mfrw-me"], ["Unknown method 'mfrw-me'. Did you mean 'mfrw-mes'?"]),
        (["--noise", "semantic", "--noise-rate", "0.3"], ["--noise semantic", "no 'airplane'"]),
        (["--noise", "hierarchical", "--noise-rate", "0.3"], ["--noise hierarchical needs superclasses"]),
        (["--noise-rate", "0.3"], ["--noise-rate is 0.3 and --noise is none"]),
        (["--noise", "flip", "--noise-rate", "0.3", "--flip-map", "1", "2"], ["flip_map has 2 entries"]),
        (["--noise", "flip", "--noise-rate", "0.3", "--flip-map"], ["flip_map has 0 entries"]),
        (["--noise", "uniform", "--flip-map", "1", "2", "0"], ["--flip-map is for --noise flip"]),
        (["--weights", "nowhere.pt"], ["There is no file of weights nowhere.pt: check --weights."]),
        (["--epochs", "0"], ["epochs = 0"]),
        (["--epochs", "9" * 30], ["epochs = 999"]),
        (["--seed", "9" * 30], ["seed = 999"]),
        (["--lr", "nan"], ["lr = nan"]),
        (["--epoch", "3"], ["Unknown flag --epoch. Did you mean '--epochs'?"]),
        (["--config", "imagefolders"], ["No recipe or file 'imagefolders'. Did you mean 'imagefolder'?"]),
        (["--config", "n" * 300], ["No recipe or file"]),
        (["--resume"], ["--resume", "--output"]),
        (["--resume", "--output", "nowhere"], ["no last.pt in nowhere"]),
        (["--resume", "--output", "n" * 300], ["File name too long"]),
        (["--output", "photos"], ["Output folder photos is not empty"]),
        (["--output", "photos/train/ant/0.png"], ["--output photos/train/ant/0.png is a file"]),
        (["--output", "photos/train/ant/0.png/under"], ["cannot be written (Not a directory)"]),
        (["--advisor-width", "2000000000", "--method", "mfrw"], ["Out of memory (cpu)", "--advisor-width"]),
    ],
)
def test_settings(refused, photos, args, texts):
    refused(folder_args("photos", *args), *texts)


def test_settings_that_the_data_set_does_not_have(refused, photos):
    refused([*DIGITS, "--data-root", "photos"], "--data-root photos", "--dataset imagefolder")
    refused([*DIGITS, "--image-size", "32"], "--image-size is for data sets of files", "digits")


def test_weights_that_cannot_be_downloaded(photos, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(Path("hub").absolute()))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody answers there
    assert cli.main(folder_args("photos", "--model", "resnet18", "--pretrained")) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]  # torch announces the download on the line before
    assert sentence.startswith("fastadvisor: error: The pretrained weights of resnet18 cannot be had")
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu(refused, photos):
    refused(folder_args("photos", "--device", "cuda"), "No CUDA device", "--device cpu")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"epochs: [", "mine.yaml is not readable as YAML"),
        (b"[" * 20_000, "mine.yaml is not readable as YAML"),
        (b"epochs: 2024-13-45", "mine.yaml is not readable as YAML"),
        (b"\xff\xfe\x00", "mine.yaml cannot be read as text"),
        (b"just words", "mine.yaml must hold lines of 'key: value'"),
        (b"epoch: 3", "Unknown key 'epoch' in mine.yaml. Did you mean 'epochs'?"),
        (b"epochs: many", "epochs = 'many' (from mine.yaml)"),
        (b"epochs: yes", "epochs = True (from mine.yaml): input should be a number"),
        (b"epochs: 3\nepochs: 4", "mine.yaml sets epochs 2 times"),
    ],
)
def test_configuration_files(refused, text, says):
    Path("mine.yaml").write_bytes(text)
    refused([*DIGITS, "--config", "mine.yaml"], says)


# Runs


def test_an_output_with_a_run_in_it(refused, run):
    refused([*DIGITS, "--output", run], "Output folder run already holds a run", "--resume")


@pytest.mark.parametrize(
    ("name", "text"), [("cuda", "one of auto, reference, triton; got 'cuda'"), ("triton", "needs tensors on a GPU")]
)
def test_kernels_that_cannot_run(refused, monkeypatch, name, text):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_chosen", name)  # as FASTADVISOR_KERNELS was when Python started
    refused(folder_args("nowhere", "--device", "cpu"), "FASTADVISOR_KERNELS", text)


def test_an_output_is_looked_at_before_the_data(refused, run):
    refused(folder_args("nowhere", "--output", "run"), "already holds a run")
    refused(folder_args("nowhere", "--output", "run", "--resume"), "in run/config.yaml", "resume with the settings of the run")


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_resume_from_a_checkpoint_cut_short(refused, run, keep):
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:keep])
    says = ["run/last.pt is damaged or cut short", "copy run/best.pt over it", "another --output"]
    refused([*DIGITS, "--epochs", "2", "--resume", "--output", run], *says)


def test_resume_from_a_checkpoint_of_another_model(refused, run):
    assert cli.main([*DIGITS, "--model", "resnet14", "--output", "other"]) == 0
    shutil.copy("other/last.pt", run / "last.pt")
    refused([*DIGITS, "--epochs", "2", "--resume", "--output", run], "run/last.pt is a checkpoint of another model")


def test_resume_from_a_checkpoint_of_another_method(refused, run):
    assert cli.main([*DIGITS, "--method", "mes", "--output", "other"]) == 0
    shutil.copy("other/last.pt", run / "last.pt")
    refused([*DIGITS, "--epochs", "2", "--resume", "--output", run], "run/last.pt is a checkpoint of another method")


def test_resume_with_other_settings(refused, run):
    refused([*DIGITS, "--lr", "0.5", "--resume", "--output", run], "lr is 0.1 in run/config.yaml and 0.5 now")


def test_resume_with_other_classes(refused, photos):
    assert cli.main([*folder_args(), "--output", "run"]) == 0
    for split in ("train", "test"):
        (photos / split / "bee").rename(photos / split / "wasp")
    refused([*folder_args(), "--resume", "--output", "run"], "run/last.pt was trained on other classes")
    refused(["evaluate", "run"], "run was trained on other classes", "--data-root")


def test_resume_on_another_kind_of_device(refused, run):
    state = torch.load(run / "last.pt", weights_only=True)
    state["ranks"][0]["train_loader"]["generator"] = torch.zeros(16, dtype=torch.uint8)  # as CUDA's
    torch.save(state, run / "last.pt")
    refused([*DIGITS, "--epochs", "2", "--resume", "--output", run], "another kind of device", "--device")


def test_resume_of_a_run_cut_off_in_its_first_epoch(run):
    for name in ("last.pt", "best.pt", "model.pt", "summary.json"):
        (run / name).unlink()
    assert cli.main([*DIGITS, "--epochs", "2", "--resume", "--output", str(run)]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_resume_of_a_finished_run_without_its_checkpoint(refused, run):
    (run / "last.pt").unlink()
    refused([*DIGITS, "--epochs", "2", "--resume", "--output", run], "no last.pt in run", "another --output")


def test_evaluate(refused, run, photos):
    refused(["evaluate", "photos"], "photos is not a run folder", "config.yaml")
    refused(["evaluate", "nowhere"], "nowhere is not a run folder")
    refused(["evaluate", "n" * 300], "is not a run folder")
    refused(["evaluate", run, "--data-root", "photos"], "--data-root photos")
    (run / "model.pt").write_bytes((run / "model.pt").read_bytes()[:-1000])
    refused(["evaluate", run], "run/model.pt is damaged or cut short")
    (run / "model.pt").unlink()
    refused(["evaluate", run], "run holds no model.pt", "--resume", "--checkpoint best")
    (run / "best.pt").unlink()
    assert "best" not in refused(["evaluate", run], "run holds no model.pt", "--resume")


def test_evaluate_another_model(refused, run):
    torch.save({"conv1.weight": torch.zeros(1)}, run / "model.pt")
    refused(["evaluate", run], "run/model.pt is a checkpoint of another model")


COMPARE = ["compare", "--methods", "ce", "--epochs", "1", *QUIET]


def test_compare(refused, run):
    refused([*COMPARE, "--methods", "ce,mess", "--output", "new"], "Unknown method 'mess'. Did you mean 'mes'?")
    refused([*COMPARE, "--methods", ","], "--methods names none")
    refused([*COMPARE, "--output", run], "Output folder run is not empty")
    refused([*COMPARE, "--output", run / "config.yaml"], "run/config.yaml is a file")
    refused([*COMPARE, "--output", run / "config.yaml/under"], "cannot be written")
    refused([*COMPARE, "--output", "n" * 300], "File name too long")
    refused([*COMPARE, "--output", "new", "--batch-size", "9999"], "--batch-size 9999 is larger than")
    refused([*COMPARE, "--output", "new", "--dataset", "imagefolder"], "--data-root")
    refused([*COMPARE, "--resume"], "--resume", "--output")
    refused([*COMPARE, "--resume", "--output", "new"], "no comparison in new")
    refused([*COMPARE, "--resume", "--output", run], "no comparison in run")


def test_compare_resumed_with_other_settings_or_a_damaged_summary(refused):
    assert cli.main([*COMPARE, "--output", "new"]) == 0
    refused([*COMPARE, "--resume", "--output", "new", "--epochs", "2"], "epochs is 1 in new/ce-seed0/config.yaml and 2 now")
    summary = Path("new/ce-seed0/summary.json")
    for text in ("{", "[]", "{}"):
        summary.write_text(text)
        refused([*COMPARE, "--resume", "--output", "new"], "new/ce-seed0/summary.json is damaged", "delete it")
    summary.unlink()
    assert cli.main([*COMPARE, "--resume", "--output", "new"]) == 0
    assert json.loads(summary.read_text())["epochs"] == 1


# What happens in training


def limited_files(size):
    """Let writes beyond ``size`` bytes a file fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(("size", "name"), [(300, "config.yaml"), (50_000, "best.pt")])
def test_a_full_disk(refused, capsys, size, name):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        limited_files(size)
        assert cli.main([*DIGITS, "--output", "run"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"fastadvisor: error: run/{name} cannot be written (File too large); free some space or")
    assert {path.name for path in Path("run").iterdir()} <= {"config.yaml", "metrics.jsonl", "run.json"}
    if name == "best.pt":  # with space again
        assert cli.main([*DIGITS, "--output", "run", "--resume"]) == 0


def test_our_own_errors_are_not_called_out_of_memory():
    with pytest.raises(RuntimeError, match="a mistake"), memory.explain_out_of_memory(torch.device("cpu")):
        raise RuntimeError("a mistake")
    with pytest.raises(UserError, match="Out of memory"), memory.explain_out_of_memory(torch.device("cpu")):
        raise torch.OutOfMemoryError


def test_an_interrupted_run_resumes():
    """Ctrl-C once the first epoch is saved."""
    args = ["train", "--method", "ce", "--epochs", "60", "--output", "run", "--no-progress", "--device", "cpu"]
    command = [sys.executable, "-m", "fastadvisor", *args]
    root = Path(__file__).parents[1]
    paths = os.pathsep.join(str(path) for path in (root, root / "kernels"))
    started = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 60
        while not Path("run/last.pt").is_file() and time.monotonic() < until:
            time.sleep(0.02)
        started.send_signal(signal.SIGINT)
        _, err = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 130
    assert re.fullmatch(
        r"fastadvisor: Stopped by SIGINT after iteration \d+ \(epoch \d+ of 60\); everything so far is in run/last.pt. "
        rf"To go on: fastadvisor train --config {Path.cwd()}/run/config.yaml --output {Path.cwd()}/run --resume\n",
        err,
    )
    done = len(Path("run/metrics.jsonl").read_text().splitlines())
    assert 0 < done < 60
    assert not Path("run/summary.json").exists()
    assert cli.main([*args, "--resume"]) == 0
    epochs = [json.loads(line)["epoch"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, 61))
