import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from fastadvisor import cli, config
from fastadvisor.cli import flags
from fastadvisor.errors import UserError
from fastadvisor.methods import METHODS


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
    importlib.import_module("fastadvisor.training.trainer")  # with the real modules, before the others take their place
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
    args += " --schedule step"
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
        (
            "train --methods ce",
            "--methods is a flag of 'fastadvisor compare', and 'fastadvisor train' does not have it. Did you mean '--method'?",
        ),
        ("train --noise flipp", "noise = 'flipp': input should be 'none', 'flip',"),
        ("train --noise flipp", "Did you mean 'flip'?"),
        ("train --epochs ten", "epochs = 'ten': input should be a valid integer, unable to parse string as an integer."),
        ("train --lr high", "lr = 'high': input should be a valid number"),
        ("train --advisor-lr high", "advisor_lr = 'high': input should be a valid number"),
        ("train --epochs", "--epochs needs a value; see 'fastadvisor train --help'."),
        ("train --epochs 0", "epochs = 0: input should be greater than 0."),
        ("train --lr inf", "lr = inf: input should be a finite number."),
        ("train --noise-rate 1.5", "noise_rate = 1.5: input should be less than or equal to 1."),
        ("train --amp=true", "--amp takes no value; write --amp or --no-amp."),
        ("train --amp true", "--amp takes no value; write --amp or --no-amp."),
        ("train --no-amp=1", "--no-amp takes no value; write --amp or --no-amp."),
        ("train --resume maybe", "resume = 'maybe': input should be a valid boolean"),
        ("train --epochs 3 --iterations 4", "--epochs and --iterations both say how long the run is: drop one of the two."),
        ("train --milestones 0.5 2 --schedule step", "milestones = (0.5, 2): input should be less than or equal to 1."),
        ("train --min-meta-cosine -1.5 --approx-meta", "min_meta_cosine = -1.5: input should be greater than or equal to -1."),
        ("train --lr -1e-3", "lr = -0.001: input should be greater than 0."),
        ("train --", "Unexpected argument '--'"),
        # What others call it, and what there is not
        ("train --learning-rate 0.1", "Unknown flag --learning-rate: it is called --lr here."),
        ("train --learning_rate=0.1", "Unknown flag --learning_rate: it is called --lr here."),
        ("train --bs 64", "Unknown flag --bs: it is called --batch-size here."),
        ("train -b 64", "Unknown flag -b: it is called --batch-size here."),
        ("train --wd 0", "Unknown flag --wd: it is called --weight-decay here."),
        (
            "train --gpu 1",
            "Unknown flag --gpu: --device cuda takes the GPU, CUDA_VISIBLE_DEVICES=1 before the command says which",
        ),
        ("train --gpus 2", "'torchrun --nproc-per-node 2 -m fastadvisor train' takes two of them."),
        ("train --local_rank=0", "several processes are started by torchrun"),
        ("train --patience 5", "Unknown flag --patience: there is no early stopping; best.pt keeps the best epoch"),
        ("train --early-stopping", "there is no early stopping; best.pt keeps the best epoch"),
        ("train --wandb", "there is no such logger; metrics.jsonl in the run folder has a line an epoch"),
        ("train --mixup 0.2", "there is no mixing of images; --auto-augment and --cutout vary them."),
        ("compare --patience 5", "there is no early stopping"),
        # What belongs to another command
        ("compare --method ce", "--method is a flag of 'fastadvisor train', and 'fastadvisor compare' does not have it. Did"),
        ("compare --method ce", "Did you mean '--methods'?"),
        ("data check --lr 1", "--lr is a flag of 'fastadvisor train', and 'fastadvisor data check' does not have it."),
        (
            "evaluate a --batch-size 3",
            "--batch-size is a flag of 'fastadvisor train', and 'fastadvisor evaluate' does not have",
        ),
        # What nothing would read
        (
            "train --method ce --beta-probability 0.5",
            "--beta-probability belongs to mes, mfrw-mes; --method is ce: drop the flag",
        ),
        ("train --method l2rw --advisor-width 9", "--advisor-width belongs to mw-net, mfrw, mes, mfrw-mes; --method is l2rw"),
        ("train --method finetune --lean", "--lean belongs to l2rw, mw-net, mfrw, mes, mfrw-mes; --method is finetune"),
        ("compare --methods ce,mfrw --beta-draw batch", "--beta-draw belongs to mes, mfrw-mes; --methods is ce,mfrw: drop"),
        (
            "train --approx-stages 2",
            "--approx-stages is for --approx-meta, which is off: add --approx-meta, or drop --approx-stages.",
        ),
        ("train --approx-meta --approx-budget 2", "--approx-budget is for --approx-layers random or learned, and"),
        (
            "train --approx-meta --approx-budget 2",
            "--approx-layers is top: add --approx-layers random, or drop --approx-budget.",
        ),
        ("train --amp-dtype float16", "--amp-dtype is for --amp, which is off"),
        (
            "train --milestones 0.5",
            "--milestones is for --schedule step, and --schedule is cosine: add --schedule step, or drop",
        ),
        ("train --cache-dir x", "--cache-dir is for --cache-size, which is not given: add it, or drop --cache-dir."),
        ("train --crop resized --crop-padding 2", "--crop-padding is for --crop pad, and --crop is resized"),
        ("train --optimizer adam --momentum 0.5", "--momentum is for --optimizer sgd, nesterov, lars or apex-sgd, and"),
        ("train --loader resident --workers 2", "--workers is for --loader auto, torch or dali, and --loader is resident"),
        ("train --download", "--download is for --dataset cifar10 or cifar100, and --dataset is digits"),
        ("train stray", "Unexpected argument 'stray'; see 'fastadvisor train --help'."),
        ("train --config", "--config needs a value; see"),
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


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("raise --max-bad-fraction", "raise max_bad_fraction in a/config.yaml"),
        ("check --labels.", "check labels in a/config.yaml."),  # at the end of a sentence
        ("--labels, --noise; (--lr)", "labels in a/config.yaml, noise in a/config.yaml; (lr in a/config.yaml)"),
        ("name it with --data-root, or --device cpu.", "name it with --data-root, or --device cpu."),  # its own
        ("there is no runs--lr/x, x/--lr or --lr.txt", "there is no runs--lr/x, x/--lr or --lr.txt"),
        ("go on: 'fastadvisor train --resume'.", "go on: 'fastadvisor train --resume'."),
        ("add --strange", "add --strange"),
    ],
)
def test_a_command_names_settings_of_its_run_by_their_line_in_the_file(capsys, calls, monkeypatch, said, heard):
    def fail(run, **flags):
        raise UserError(said)

    monkeypatch.setattr(sys.modules["fastadvisor.commands.evaluate"], "evaluate_run", fail)
    assert refused(capsys, "evaluate", "a") == f"fastadvisor: error: {heard}\n"


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


@pytest.mark.parametrize(
    "args",
    [
        "train --method ce --no-approx-meta --no-lean",  # what is off asks for nothing
        "train --method ce --config mine.yaml",
        "compare --methods ce,mes --beta-probability 0.5 --approx-meta",
        "compare --methods ce,mes --config mine.yaml",
        "train --method ce --advisor-lr None",
        "train --method ce --epochs 3 --iterations None",
    ],
)
def test_what_is_let_pass(calls, args, tmp_path, monkeypatch):
    """A file may hold the settings of several methods, and a comparison those of any that it compares."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("beta_probability: 0.5\napprox_stages: 3\nweight_normalization: sum\nmilestones: [0.5]\n")
    assert cli.main(args.split()) == 0
    assert len(calls) == 1


def test_an_unknown_method_is_said_by_who_knows_them(calls):
    assert cli.main(["train", "--method", "mess", "--beta-draw", "batch"]) == 0
    assert calls[0].method == "mess"


@pytest.mark.parametrize(
    "line", ["--lr -1", "--amp", "--no-progress", "--flip-map 1 0", "--output=--strange", "--lr 0.1 --lr 0.2"]
)
def test_flags_are_what_a_file_and_keywords_say(line, tmp_path):
    """The same value, or the same sentence."""

    def outcome(read):
        try:
            return read()
        except UserError as error:
            return str(error)

    said = {
        "--lr -1": {"lr": -1},
        "--amp": {"amp": True},
        "--no-progress": {"progress": False},
        "--flip-map 1 0": {"flip_map": [1, 0]},
    }
    said |= {"--output=--strange": {"output": "--strange"}, "--lr 0.1 --lr 0.2": {"lr": 0.2}}
    given = outcome(lambda: cli.parse_config(config.Config, "train", "", line.split()))
    assert given == outcome(lambda: config.resolve(config.Config, **said[line]))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(said[line]))
    file = outcome(lambda: config.resolve(config.Config, path))
    assert given == (file.replace(f" (from {path})", "") if isinstance(file, str) else file)


@pytest.mark.parametrize("command", ["train", "compare", "data check"])
@pytest.mark.parametrize("columns", ["80", "200", "70"])
def test_pages_fit_the_terminal(capsys, monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", columns)
    for page in ("--help", "--help-all"):
        assert cli.main([*command.split(), page]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= min(80, int(columns))
        assert not any(line.strip("─-= ") == "" and line for line in lines)


def test_the_essentials_come_first_and_all_flags_under_titles(capsys):
    assert cli.main(["train", "--help"]) == 0
    first = capsys.readouterr().out
    assert cli.main(["train", "--help-all"]) == 0
    whole = capsys.readouterr().out
    assert len(first.splitlines()) < 90 < len(whole.splitlines())
    titles = [line for line in first.splitlines() if line and line[0].isupper() and "." not in line]
    assert [title for title in titles if title in ("Data", "Method", "Length", "Output")] == [
        "Data",
        "Method",
        "Length",
        "Output",
    ]
    assert "--momentum" not in first
    for setting in config.list_settings(config.Config).values():
        assert setting.flag in whole or f"--no-{setting.flag[2:]}" in whole
    assert "Method mes, mfrw-mes\n  --beta-probability X" in whole
    assert "Meta-gradient (l2rw, mw-net, mfrw, mes, mfrw-mes)\n" in whole


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ("--dataset cifar10", "--meta-per-class N      Clean images of each class held out as the meta-set;\n"),
        ("--dataset cifar10", "meta-set of its own.\n                          (default: 100)\n"),
        ("--dataset cifar10", "for --dataset cifar10."),
        ("--config clothing1m", "(default: resnet50)"),
        ("--no-progress", "for --dataset digits."),
    ],
)
def test_help_shows_the_defaults_of_the_data_set(capsys, args, text):
    assert cli.main(["train", "--help", *args.split()]) == 0
    assert text in capsys.readouterr().out


def test_help_and_version_without_torch():
    code = "import sys; from fastadvisor.cli import main; main(['--version']); main(['train', '--help']); "
    code += "assert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fastadvisor 0.")


@pytest.mark.parametrize(
    ("name", "may"), [("beta_draw", True), ("no_beta_draw", True), ("beta_drw", True), ("noise_rat", False), ("zzz", False)]
)
def test_what_may_be_a_setting_of_a_method(monkeypatch, name, may):
    monkeypatch.setattr(flags, "list_settings", lambda kind: [field.name for field in dataclasses.fields(kind)])
    assert flags.may_belong_to_method(name, config.Config) == may


@pytest.mark.parametrize("line", ["train --noise-rat 3", "train --epochs 0", "train --wandb", "compare --method ce", "train x"])
def test_a_mistake_is_told_without_torch(line):
    code = f"import sys; from fastadvisor.cli import main; assert main({line.split()}) == 2; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_is_opened_by_a_process_that_has_trained_nothing(tmp_path):
    """Its config.yaml holds the settings of every method."""
    run = str(tmp_path / "run")
    usual = ["--device", "cpu", "--no-tensorboard", "--no-progress"]
    assert cli.main(["train", "--method", "focal", "--focal-gamma", "2", "--epochs", "1", *usual, "--output", run]) == 0
    assert yaml.safe_load(Path(run, "config.yaml").read_text())["focal_gamma"] == 2
    done = subprocess.run([sys.executable, "-m", "fastadvisor", "evaluate", run], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "top1" in done.stdout


def test_module_runs_with_exit_status():
    done = subprocess.run([sys.executable, "-m", "fastadvisor", "trian"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Unknown command 'trian'" in done.stderr


def test_a_runs_own_config_is_a_valid_config(calls, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict(config.resolve(config.Config, "cifar-lt", seed=3))))
    assert cli.main(["train", "--config", str(path)]) == 0
    assert calls == [config.resolve(config.Config, "cifar-lt", seed=3)]


def test_the_help_of_method_names_every_method():
    text = config.list_settings(config.Config)["method"].help
    assert set(METHODS) <= set(re.findall(r"[\w-]+", text))
