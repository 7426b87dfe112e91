"""The benchmarks of optimizers and of the watch time all there is, and nothing where one is wrong."""

import copy
import itertools
import json

import pytest

from benchmarks import optimizers as benchmark
from benchmarks import watch
from fastadvisor.runtime.watch import Watch

ARGUMENTS = ["--model", "resnet8", "--device", "cpu", "--steps", "1", "--rounds", "1"]


def test_the_benchmark_times_all_implementations(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: None)
    benchmark.main([*ARGUMENTS, "--json", str(tmp_path / "o.json")])
    result = json.loads((tmp_path / "o.json").read_text())
    cases = {f"{name} {one}" for name, one in itertools.product(("sgd", "adamw"), ("for-loop", "foreach", "fused"))}
    assert result["ms"].keys() == result["difference"].keys() == cases
    assert all(ms > 0 for ms in result["ms"].values())
    assert "python -m benchmarks.optimizers --model resnet8" in capsys.readouterr().out


def test_the_benchmark_times_nothing_that_is_off(monkeypatch, capsys):
    off = copy.deepcopy(benchmark.IMPLEMENTATIONS)
    off["fused"]["nesterov"] = True
    monkeypatch.setattr(benchmark, "IMPLEMENTATIONS", off)
    with pytest.raises(SystemExit, match=r"sgd fused is off by .* so nothing is timed"):
        benchmark.main(ARGUMENTS)
    assert not capsys.readouterr().out


def test_the_watch_is_timed_under_each_policy(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(watch, "keep_freed_memory", lambda: None)
    arguments = ["--model", "resnet8", "--device", "cpu", "--batch-size", "4", "--rounds", "1"]
    watch.main([*arguments, "--json", str(tmp_path / "w.json")])
    assert json.loads((tmp_path / "w.json").read_text())["ms"].keys() == {"ignore", "skip", "stop"}
    assert "python -m benchmarks.watch --model resnet8" in capsys.readouterr().out
    monkeypatch.setattr(Watch, "passes", lambda self, *_: not self.skip)
    with pytest.raises(SystemExit, match="skip leaves other weights"):
        watch.main(arguments)
