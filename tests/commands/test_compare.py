import json

import pytest

import fastadvisor
from fastadvisor.commands import grid
from fastadvisor.errors import UserError

QUIET = {"progress": False, "tensorboard": False, "device": "cpu", "epochs": 1}


def test_methods_and_seeds_side_by_side(tmp_path, capsys):
    result = fastadvisor.compare(methods="ce, mfrw", seeds=2, output=str(tmp_path / "out"), **{**QUIET, "progress": True})
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == json.loads(json.dumps(result))
    assert [row["method"] for row in result["rows"]] == ["ce", "mfrw"]
    for row in result["rows"]:
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        last = [run["test_top1"]["last"] for run in row["runs"]]
        assert row["last"]["mean"] == pytest.approx(sum(last) / 2)
        assert row["last"]["std"] == pytest.approx(abs(last[0] - last[1]) / 2**0.5)
    printed = capsys.readouterr().out
    assert "| mfrw | " in printed
    assert " ± " in printed
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {
        "compare.json",
        *(f"{method}-seed{seed}" for method in ("ce", "mfrw") for seed in (0, 1)),
    }


def test_resume_takes_finished_runs_as_they_are(tmp_path, monkeypatch):
    output = str(tmp_path / "out")
    first = fastadvisor.compare(methods="ce", output=output, **QUIET)
    train_config, trained = grid.train_config, []

    def spy(config, source):
        trained.append(config.method)
        return train_config(config, source)

    monkeypatch.setattr(grid, "train_config", spy)
    second = fastadvisor.compare(methods="ce,meta-only", output=output, resume=True, **QUIET)
    assert trained == ["meta-only"]
    assert second["rows"][0] == json.loads(json.dumps(first["rows"][0]))


def test_one_run_has_no_deviation(tmp_path):
    result = fastadvisor.compare(methods="ce", output=str(tmp_path / "out"), **QUIET)
    assert result["rows"][0]["last"]["std"] is None


def test_an_unknown_method_is_found_before_any_training(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'mfrw'"):
        fastadvisor.compare(methods="ce,mfrww", output=str(tmp_path / "out"), **QUIET)
    assert not (tmp_path / "out").exists()
