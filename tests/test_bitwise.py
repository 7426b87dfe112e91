"""The comparison of a training run before and after a change of the code can tell one from the other."""

import copy
import json

import pytest

from fastadvisor.methods import METHODS
from tests.bitwise import SMALL, cases, differences, main, record

CASE = SMALL | {"method": "mfrw-mes", "epochs": 1}


@pytest.fixture(scope="module")
def recorded():
    return record(CASE)


def test_the_same_run_twice_is_the_same(recorded):
    saved = {name.split("'")[1] for name in recorded["checkpoint"]}
    assert {"model", "optimizer", "method", "advisor_optimizer", "execution", "ranks"} <= saved
    assert differences(recorded, record(CASE)) == []


def test_another_run_is_another_in_all_its_parts(recorded):
    found = differences(recorded, record(CASE | {"advisor_lr": 3e-4}))
    for part in ("model[", "loss of epoch 1", "checkpoint['method']", "checkpoint['advisor_optimizer']"):
        assert any(line.startswith(part) for line in found), part


def test_one_bit_of_one_tensor_is_a_difference_and_its_place_in_the_file_is_not(recorded):
    moved = copy.deepcopy(recorded)
    moved["checkpoint"] = {f"['elsewhere']{name}": digest for name, digest in recorded["checkpoint"].items()} | {"['new']": "x"}
    assert differences(recorded, moved) == []
    name = next(name for name in moved["checkpoint"] if "advisor_optimizer" in name)
    moved["checkpoint"][name] += "0"
    [line] = differences(recorded, moved)
    assert "advisor_optimizer" in line
    assert differences(recorded, {"refused": True}) == ["refused in one of them only"]


def test_the_command_line_says_what_differs(tmp_path, recorded, capsys):
    files = tmp_path / "before.json", tmp_path / "after.json"
    other = copy.deepcopy(recorded)
    other["model"]["['fc.weight']"] = "another"
    files[0].write_text(json.dumps({"a": recorded, "b": recorded}))
    files[1].write_text(json.dumps({"a": recorded, "b": other}))
    assert main(["compare", str(files[0]), str(files[0])]) == 0
    assert "2 of 2 cases are the same bit for bit, 0 of them refused in both." in capsys.readouterr().out
    assert main(["compare", *map(str, files)]) == 1
    assert "b: model['fc.weight']" in capsys.readouterr().out
    files[1].write_text(json.dumps({"a": recorded}))
    assert main(["compare", *map(str, files)]) == 1


def test_every_method_is_tried_with_every_kind_of_step_it_has():
    methods = [name.split(": ")[0] for name in cases()]
    assert set(methods) == set(METHODS)
    assert methods.count("ce") == 8
    assert methods.count("mfrw-mes") == 19
