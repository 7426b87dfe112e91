"""The loader benchmarks measure the loaders, and nothing is reported of one whose batches are wrong."""

import json

import pytest

from benchmarks import decoding, loaders, soak
from fastadvisor.loading.backends import dali, dataloader

SMALL = ["--sides", "64", "--workers", "1", "--images", "30", "--batch-size", "4", "--batches", "2", "--rounds", "1"]


@pytest.fixture(autouse=True)
def leave_the_allocator_alone(monkeypatch):
    for module in (loaders, soak):
        monkeypatch.setattr(module, "keep_freed_memory", lambda: None)


def test_a_measurement_has_every_loader_and_says_where_it_is_from(tmp_path, capsys):
    loaders.main([*SMALL, "--train", "resnet8", "--train-batch-size", "4", "--steps", "2", "--json", str(tmp_path / "l.json")])
    out = capsys.readouterr().out
    assert "python -m benchmarks.loaders --sides 64" in out
    assert "l.json" not in out
    result = json.loads((tmp_path / "l.json").read_text())
    names = {"torch", "synthetic", "pillow"} | ({"dali"} if dali.available() else set())
    assert {row["loader"] for row in result["rows"]} == names
    assert all(row["images_per_second"] > 0 for row in result["rows"])
    assert {row["loader"] for row in result["training"]} == names - {"pillow"}
    assert all(0 <= row["waiting_share"] <= 1 for row in result["training"])


@pytest.mark.skipif(not dali.available(), reason="NVIDIA DALI is not installed")
def test_a_loader_with_other_pixels_is_not_timed(monkeypatch, capsys):
    sample = dataloader.Batches._make_sample
    monkeypatch.setattr(dataloader.Batches, "_make_sample", lambda self, *args: sample(self, *args).flip(-1))
    with pytest.raises(SystemExit, match="check is red"):
        loaders.main(SMALL)
    out = capsys.readouterr().out
    assert "grey levels off" in out
    assert "| dali |" not in out


def test_unknown_loaders_are_refused():
    with pytest.raises(SystemExit, match="unknown tensorflow"):
        loaders.main(["--only", "torch,tensorflow"])
    with pytest.raises(SystemExit, match="whole numbers"):
        loaders.main(["--workers", "all"])


def test_the_soak_sees_every_image_and_the_memory_of_all_processes(tmp_path, capsys):
    soak.main(["--images", "450", "--side", "40", "--loader", "torch", "--workers", "1", "--json", str(tmp_path / "s.json")])
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["seen"] == 448
    assert len(result["memory"]) >= 3
    assert all(value > 100 for _, value in result["memory"])
    assert "images/s" in capsys.readouterr().out


def test_decoding_is_measured_step_by_step(monkeypatch, capsys):
    monkeypatch.setattr(decoding, "IMAGES", 4)
    monkeypatch.setattr(decoding, "BATCH", 2)
    decoding.main(["--side", "64", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "| torchvision | resize |" in out
    assert ("| DALI | normalise |" in out) == dali.available()
