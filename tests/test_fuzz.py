"""Whatever stands on the command line or in a config file: it runs, or it is refused in one sentence. Never a traceback."""

import dataclasses
import os
import typing

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastadvisor import cli
from fastadvisor.commands import dry_run
from fastadvisor.commands import train as train_command
from fastadvisor.config import Config, add_method_settings
from fastadvisor.training import trainer

FIELDS = {field.name: field for field in dataclasses.fields(add_method_settings(Config))}
HINTS = typing.get_type_hints(add_method_settings(Config))
TIMES = int(os.environ.get("FASTADVISOR_FUZZ", "1"))
"""Examples, in units of what the suite tries; from 2 on other ones each time."""
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture], "derandomize": TIMES == 1}
AWKWARD = st.sampled_from(
    [
        "",
        "0",
        "-1",
        "1",
        "2",
        "1e9",
        "9" * 30,
        "nan",
        "inf",
        "-inf",
        "0.5",
        "None",
        "true",
        "x",
        "--",
        "-",
        "a b",
        "é",
        "\x00",
        "[1, 2]",
    ]
)


def choices(hint):
    """The strings of a Literal, wherever it stands in a type."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [value for part in typing.get_args(hint) for value in choices(part)]


@st.composite
def flags(draw):
    """Flags of the command line, most of them real, with values that fit or do not."""
    line = []
    for name in draw(
        st.lists(st.sampled_from([*FIELDS, "epoch", "learning_rate", "patience", "methods", "help_all", "h"]), max_size=6)
    ):
        flag = "--" + draw(st.sampled_from(["", "", "", "no-"])) + name.replace("_", "-")
        known = choices(HINTS.get(name, str))
        value = draw(st.one_of(AWKWARD, st.sampled_from(known)) if known else AWKWARD)
        line += draw(st.sampled_from([[flag], [flag, value], [flag, value], [f"{flag}={value}"], [value]]))
    return line


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Check settings as ever, but train nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_command, "_train", lambda *_: None)


def answer(capsys, args):
    """Run a command; what must hold of every answer is checked here."""
    capsys.readouterr()
    status = cli.main(args)
    err = capsys.readouterr().err
    assert status in (0, 2), (args, status)
    if status == 2:
        assert err.startswith("fastadvisor: error: "), (args, err)
        assert err.count("\n") == 1, (args, err)
    return status


@settings(max_examples=150 * TIMES, **COMMON)
@given(line=flags())
def test_command_lines(quick, capsys, line):
    answer(capsys, ["train", *line])


@settings(max_examples=60 * TIMES, **COMMON)
@given(
    command=st.sampled_from(["evaluate", "replay", "export", "recipes", "env", "data", "compare"]),
    rest=st.lists(AWKWARD, max_size=3),
)
def test_other_commands(quick, capsys, command, rest):
    if command == "env" and not rest:
        return
    if command == "compare":
        rest = ["--methods", *rest[:1], "--dry-run"]
    answer(capsys, [command, *rest])


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=3)
)


@settings(max_examples=80 * TIMES, **COMMON)
@given(layer=st.dictionaries(st.sampled_from([*FIELDS, "epoch"]), PLAIN, max_size=5))
def test_config_files(quick, capsys, tmp_path, layer):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(layer, allow_unicode=False), encoding="utf-8")
    answer(capsys, ["train", "--config", str(path)])


@settings(max_examples=60 * TIMES, **COMMON)
@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))))
def test_bytes_that_are_no_config(quick, capsys, tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    answer(capsys, ["train", "--config", str(path)])


VALID = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(["ce", "meta-only", "finetune", "mw-net", "l2rw", "mfrw", "mes", "mfrw-mes"]),
        "optimizer": st.sampled_from(["sgd", "nesterov", "adam", "adamw", "lars", "lamb", "apex-sgd"]),
        "batch_size": st.integers(1, 600),
        "meta_batch_size": st.integers(1, 120),
        "accumulate": st.integers(1, 4),
        "lr": st.floats(1e-6, 10),
        "momentum": st.sampled_from([0.0, 0.9]),
        "warmup_epochs": st.floats(0, 3),
        "layer_decay": st.floats(0.1, 1),
        "clip_grad_norm": st.floats(1e-3, 10),
        "ema_decay": st.floats(0, 0.999),
        "meta_interval": st.integers(1, 5),
        "virtual_gradient": st.sampled_from(["auto", "own", "actual"]),
        "virtual_step": st.sampled_from(["sgd", "optimizer"]),
        "advisor_inputs": st.sampled_from(["detached", "attached"]),
        "approx_layers": st.sampled_from(["all", "top", "random", "learned"]),
        "approx_budget": st.integers(1, 9),
        "approx_stages": st.integers(1, 9),
        "meta_engine": st.sampled_from(["forward", "reference"]),
        "imbalance_factor": st.floats(1, 500),
        "noise_rate": st.floats(0, 1),
        "meta_per_class": st.integers(1, 200),
        "nan_policy": st.sampled_from(["stop", "skip", "ignore"]),
        **dict.fromkeys(("approx_meta", "lean", "amp", "deterministic", "sync_bn"), st.booleans()),
    },
)


@settings(max_examples=40 * TIMES, **COMMON)
@given(values=VALID)
def test_settings_that_go_together_or_are_refused(monkeypatch, capsys, tmp_path, values):
    """Ten iterations are one here; everything else is what a run does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "ITERATIONS", 1)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))  # as flags, many would be refused for having no effect
    answer(capsys, ["train", "--dry-run", "--device", "cpu", "--config", "mine.yaml"])


def test_the_fuzzed_settings_are_settings():
    assert set(FIELDS) >= {"method", "optimizer", "ema_decay"}
    assert trainer.Trainer is dry_run.Trainer
    assert choices(HINTS["optimizer"])[0] == "sgd"
