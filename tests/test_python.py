"""The Python API: each name does what it says."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastadvisor
from fastadvisor import Config, DryRun, TrainResult, UserError

SHORT = {"epochs": 1, "method": "ce", "device": "cpu", "tensorboard": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fastadvisor.train(**SHORT, progress=False, output=tmp_path_factory.mktemp("python") / "run").folder


def test_dir_lists_what_there_is_before_it_is_imported():
    code = "import sys, fastadvisor; print(set(fastadvisor.__all__) <= set(dir(fastadvisor)), 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["True", "False"]
    for name in fastadvisor.__all__:
        assert getattr(fastadvisor, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = fastadvisor.trian


def test_a_whole_configuration(tmp_path):
    config = Config(
        epochs=1, method="ce", device="cpu", model="resnet8", tensorboard=False, progress=False, output=tmp_path / "a"
    )
    result = fastadvisor.train(config)
    assert isinstance(result, TrainResult)
    assert result.folder == tmp_path / "a"
    assert result.summary["imbalance_factor"] == 1  # Config's own defaults, not those of the recipe of digits
    again = fastadvisor.train(config, output=str(tmp_path / "b"), seed=3)
    assert (again.folder, again.summary["seed"], config.seed) == (tmp_path / "b", 3, 0)
    with pytest.raises(UserError, match="Unknown key 'epoch'"):
        fastadvisor.train(config, epoch=3)
    with pytest.raises(UserError, match="lr = -1"):
        fastadvisor.train(Config(lr=-1))


def test_a_recipe_and_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 1\nmethod: ce\n")
    for path in (tmp_path / "mine.yaml", str(tmp_path / "mine.yaml")):
        found = fastadvisor.train(path, device="cpu", tensorboard=False, progress=False, dry_run=True)
        assert found.epochs == 1


def test_a_dry_run_says_what_a_run_would_take(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = fastadvisor.train(**{**SHORT, "epochs": 50}, dry_run=True)
    assert isinstance(found, DryRun)
    assert found.epochs == 50
    assert found.iterations % 50 == 0
    assert 0 < found.step_ms < 10_000
    assert found.hours * 3600 == pytest.approx(found.iterations * found.step_ms / 1000 + 50 * found.test_seconds)
    assert found.images_per_second == pytest.approx(64 * 1000 / found.step_ms, rel=1)
    assert list(tmp_path.iterdir()) == []
    assert found.sentence() in capsys.readouterr().out


def test_a_dry_run_that_meets_bad_numbers_says_so():
    with pytest.raises(UserError, match=r"Iteration \d+ of the dry run: .* is not finite; lower --lr"):
        fastadvisor.train(**{**SHORT, "lr": 1e30}, dry_run=True)


def test_without_progress_nothing_is_printed(tmp_path, capfd):
    """Not a line: neither of a run, nor of a dry one, nor of a comparison."""
    fastadvisor.train(**SHORT, progress=False, output=tmp_path / "run")
    fastadvisor.train(**SHORT, progress=False, dry_run=True)
    settings = {key: value for key, value in SHORT.items() if key != "method"}
    fastadvisor.compare(methods="ce", **settings, progress=False, output=tmp_path / "runs")
    fastadvisor.evaluate(tmp_path / "run")
    assert capfd.readouterr() == ("", "")
    fastadvisor.train(**SHORT, output=tmp_path / "again")
    assert "epoch   1/1" in capfd.readouterr().out


def test_the_command_line_without_progress_gives_the_result_alone(tmp_path, capfd):
    from fastadvisor import cli

    flags = ["--epochs", "1", "--device", "cpu", "--no-tensorboard", "--no-progress"]
    assert cli.main(["train", "--method", "ce", *flags, "--output", str(tmp_path / "run")]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("Finished: test accuracy ")
    assert (out.count("\n"), err) == (1, "")
    assert cli.main(["train", "--method", "ce", *flags, "--dry-run"]) == 0
    assert capfd.readouterr().out.startswith("Dry run: ")
    assert cli.main(["compare", "--methods", "ce", *flags, "--output", str(tmp_path / "runs")]) == 0
    assert capfd.readouterr().out.lstrip().startswith("| method |")


@pytest.mark.parametrize("kind", [str, Path])
def test_evaluate(run, kind):
    found = fastadvisor.evaluate(kind(run))
    assert found["top1"] == json.loads((run / "summary.json").read_text())["test_top1"]["last"]
    assert found["notes"] == []
    assert fastadvisor.evaluate(kind(run), checkpoint="last")["top1"] == found["top1"]
    with pytest.raises(UserError, match="There is no checkpoint 'newest': take model, best, last"):
        fastadvisor.evaluate(kind(run), checkpoint="newest")
    with pytest.raises(UserError, match="is not a run folder"):
        fastadvisor.evaluate(kind(run / "nothing"))


@pytest.mark.parametrize("kind", [str, Path])
def test_export(run, tmp_path, kind):
    about = fastadvisor.export(kind(run), output=kind(tmp_path / "out"), formats=["state-dict"])
    assert about["files"]["state-dict"]["same_top1"]
    assert (
        torch.load(tmp_path / "out/classifier.pt", weights_only=True).keys()
        == fastadvisor.train(str(run / "config.yaml"), output=str(run), resume=True, progress=False).model.state_dict().keys()
    )


def test_signatures_say_what_they_take():
    for name in ("train", "compare", "evaluate", "export"):
        parameters = inspect.signature(getattr(fastadvisor, name)).parameters.values()
        assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters)
        assert getattr(fastadvisor, name).__doc__


def test_no_module_takes_the_place_of_a_function():
    """Importing fastadvisor.export, were there such a module, would put it where the function is."""
    files = {path.stem for path in Path(fastadvisor.__file__).parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not files & set(fastadvisor.__all__)
