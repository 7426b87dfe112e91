import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from fastadvisor import cli, config
from fastadvisor.errors import UserError


@pytest.fixture
def calls(monkeypatch):
    """Replace the modules that a command imports when it runs; return what they were called with."""
    seen = []
    result = {
        "top1": 81.25,
        "top5": 99.0,
        "per_class_top1": [50.0, None],
        "many_medium_few": {"many": 90.0, "medium": None, "few": 12.5},
        "notes": [],
    }

    def evaluate_run(run, **flags):
        seen.append((run, flags))
        return result

    fakes = {
        "commands.train": SimpleNamespace(train_config=seen.append),
        "commands.compare": SimpleNamespace(compare_config=seen.append),
        "commands.evaluate": SimpleNamespace(evaluate_run=evaluate_run),
    }
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, f"fastadvisor.{name}", module)
    return seen


def refused(capsys, *args):
    """Run a command that must fail the user's way; return its one sentence."""
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastadvisor: error: ")
    assert err.count("\n") == 1
    return err


def test_train_without_flags_takes_the_recipe_of_the_default_data_set(calls):
    assert cli.main(["train"]) == 0
    assert calls == [config.resolve(config.Config)]
    assert calls[0].model == "resnet8"


def test_flags_of_every_type(calls):
    args = "train --amp --no-horizontal-flip --epochs 3 --lr=1e-3 --noise uniform --flip-map 1 2 0 --milestones 0.2 0.4"
    assert cli.main([*args.split(), "--output", "a b", "--advisor-lr", "None"]) == 0
    [got] = calls
    assert (got.amp, got.horizontal_flip, got.epochs, got.lr, got.noise) == (True, False, 3, 1e-3, "uniform")
    assert (got.flip_map, got.milestones, got.output, got.advisor_lr) == ((1, 2, 0), (0.2, 0.4), "a b", None)


def test_flags_beat_the_file_and_the_file_beats_the_recipe(calls, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("amp: true\nepochs: 7\nlr: 0.3\n")
    assert cli.main(["train", "--lr", "0.2", f"--config={path}", "--no-amp"]) == 0
    [got] = calls
    assert (got.lr, got.epochs, got.batch_size, got.amp) == (0.2, 7, 100, False)


def test_dataset_flag_brings_its_own_recipe(calls):
    assert cli.main(["train", "--dataset=cifar100", "--config", "cifar-flip"]) == 0
    assert (calls[0].dataset, calls[0].meta_per_class, calls[0].epochs) == ("cifar100", 10, 100)


def test_underscores_are_accepted(calls):
    assert cli.main(["train", "--noise_rate", "0.25"]) == 0
    assert calls[0].noise_rate == 0.25


def test_compare_has_its_own_flags(calls):
    assert cli.main(["compare", "--methods", "ce,mes", "--seeds", "2", "--epochs", "1"]) == 0
    assert isinstance(calls[0], config.CompareConfig)
    assert (calls[0].methods, calls[0].seeds, calls[0].epochs) == ("ce,mes", 2, 1)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ("trian", "Unknown command 'trian'. Did you mean 'train'?"),
        ("--epochs 3", "The command comes before the flags, as in 'fastadvisor train --epochs'."),
        ("train --noise-rat 0.3", "Unknown flag --noise-rat. Did you mean '--noise-rate'?"),
        ("train --noise-rat=0.3", "Unknown flag --noise-rat. Did you mean '--noise-rate'?"),
        ("train --no-noise-rate", "Unknown flag --no-noise-rate. Did you mean '--noise-rate'?"),
        ("train --methods ce", "Unknown flag --methods. Did you mean '--method'?"),
        ("train --noise flipp", "noise = 'flipp': input should be 'none', 'flip',"),
        ("train --noise flipp", "Did you mean 'flip'?"),
        ("train --epochs ten", "--epochs: 'ten' is not a whole number."),
        ("train --lr high", "--lr: 'high' is not a number."),
        ("train --advisor-lr high", "--advisor-lr: 'high' is not of the form {None}|FLOAT."),
        ("train --epochs", "Missing value for argument '--epochs'."),
        ("train --epochs 0", "epochs = 0: input should be greater than 0."),
        ("train --lr inf", "lr = inf: input should be a finite number."),
        ("train --noise-rate 1.5", "noise_rate = 1.5: input should be less than or equal to 1."),
        ("train --amp=true", "--amp takes no value; write --amp or --no-amp."),
        ("train stray", "Unrecognized options: stray."),
        ("train --config", "Argument --config: expected one argument"),
        ("train --config cifar-fli", "No recipe or file 'cifar-fli'. Did you mean 'cifar-flip'?"),
        ("train --dataset digit", "dataset = 'digit': input should be 'digits', 'cifar10'"),
        ("train --dataset digit", "Did you mean 'digits'?"),
        ("evaluate", "The following arguments are required: RUN"),
        ("evaluate a b", "Unexpected argument 'b'"),
        ("evaluate a --jsn", "Unknown flag --jsn. Did you mean '--json'?"),
        ("evaluate a --checkpoint first", "invalid choice: 'first'"),
        ("recipes --all", "Unknown flag --all."),
        ("env x", "Unexpected argument 'x'"),
    ],
)
def test_mistakes_become_one_sentence(capsys, calls, args, text):
    assert text in refused(capsys, *args.split())
    assert calls == []


def test_a_user_error_while_training_is_one_sentence(capsys, calls, monkeypatch):
    def fail(settings):
        raise UserError("No folder x; name one.")

    monkeypatch.setattr(sys.modules["fastadvisor.commands.train"], "train_config", fail)
    assert refused(capsys, "train") == "fastadvisor: error: No folder x; name one.\n"


def test_our_own_mistakes_keep_their_traceback(calls, monkeypatch):
    def fail(settings):
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["fastadvisor.commands.train"], "train_config", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_interrupt(capsys, calls, monkeypatch):
    def interrupt(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["fastadvisor.commands.train"], "train_config", interrupt)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "fastadvisor: interrupted.\n"


def test_evaluate_prints_a_table_without_what_is_missing(capsys, calls):
    assert cli.main(["evaluate", "runs/a", "--checkpoint", "best", "--data-root", "d", "--device", "cpu"]) == 0
    assert calls == [("runs/a", {"checkpoint": "best", "data_root": "d", "device": "cpu"})]
    out = capsys.readouterr().out
    assert [line.split()[-1] for line in out.splitlines()] == ["81.25", "99.00", "50.00", "90.00", "12.50"]
    assert "medium" not in out.replace("many_medium_few", "")


def test_evaluate_json(capsys, calls):
    assert cli.main(["evaluate", "runs/a", "--json"]) == 0
    assert calls == [("runs/a", {"checkpoint": "model", "data_root": None, "device": "auto"})]
    assert json.loads(capsys.readouterr().out)["many_medium_few"]["medium"] is None


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_of_a_command(capsys, calls, command):
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    for text in ["--config", "cifar-lt-flip", "--noise-rate", "--no-amp", "(default: resnet8)"]:
        assert text in out
    assert ("--methods" in out) == (command == "compare")
    assert calls == []


def test_help_without_a_command(capsys):
    for args in ([], ["--help"], ["-h"]):
        assert cli.main(args) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in ("train", "compare", "evaluate", "recipes", "env"))


def test_recipes_lists_each_with_its_comment(capsys):
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(cli.recipes.names())
    assert "Table 5: Flip CIFAR-10" in next(line for line in out.splitlines() if line.startswith("cifar-flip "))


def test_env_is_printed(capsys, monkeypatch):
    fake = SimpleNamespace(environment=lambda: {"torch": "9.9", "cuda": None}, optional_parts=lambda: [("x", False, "no")])
    monkeypatch.setitem(sys.modules, "fastadvisor.runtime.environment", fake)
    assert cli.main(["env"]) == 0
    assert capsys.readouterr().out == "torch  9.9\ncuda   none\n\noptional parts\nx  inactive  no\n"


def test_sentence_reads_a_framed_and_a_coloured_box():
    lines = ["\x1b[31m╭─ Parsing error ───╮\x1b[0m", "│ Error parsing --a: │", "│ bad [b].           │", "│ ──────────── │"]
    box = "\n".join([*lines, "│ For more │", "╰────╯"])
    assert cli.sentence(box) == "--a: bad [b]."


def test_help_and_version_without_torch():
    code = "import sys; from fastadvisor.cli import main; main(['--version']); main(['train', '--help']); "
    code += "assert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fastadvisor 0.")


def test_module_runs_with_exit_status():
    done = subprocess.run([sys.executable, "-m", "fastadvisor", "trian"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Unknown command 'trian'" in done.stderr


def test_a_runs_own_config_is_a_valid_config(calls, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(config.resolve(config.Config, "cifar-lt", seed=3))))
    assert cli.main(["train", "--config", str(path)]) == 0
    assert calls == [config.resolve(config.Config, "cifar-lt", seed=3)]
