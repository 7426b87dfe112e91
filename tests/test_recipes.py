"""The papers' recipes run end to end on small data sets in the real layouts, and each says what its table says."""

import json

import pytest

from fastadvisor import recipes, train
from fastadvisor.config import Config, resolve
from tests.datasets.test_layouts import Layout, clothing1m, imagefolder, imagenet_lt, places_lt
from tests.photos import encoded, photo

TABLES = {  # method.md
    "imagenet-lt": {"model": "resnet10", "lr": 0.2, "schedule": "cosine", "epochs": 180, "batch_size": 512},
    "places-lt": {"model": "resnet152", "lr": 0.005, "schedule": "cosine", "epochs": 60, "batch_size": 64},
    "clothing1m": {"model": "resnet50", "lr": 0.01, "weight_decay": 1e-3, "epochs": 20, "batch_size": 32, "resize_size": 256},
    "clothing1m-lt": {"model": "resnet18", "lr": 0.01, "weight_decay": 1e-4, "epochs": 20, "batch_size": 64},
    "cifar-lt-augmented": {
        "model": "resnet32",
        "iterations": 13_000,
        "batch_size": 512,
        "cutout": 16,
        "auto_augment": "cifar10",
    },
}
BUILDERS = {"imagenet-lt": imagenet_lt, "places-lt": places_lt, "clothing1m": clothing1m, "clothing1m-lt": clothing1m}
SMALL = {"model": "resnet8", "pretrained": False, "image_size": 24, "batch_size": 2, "meta_batch_size": 2, "epochs": 2}
SMALL |= {"progress": False, "tensorboard": False, "workers": 1, "device": "cpu"}


@pytest.mark.parametrize("name", TABLES)
def test_a_recipe_has_the_settings_of_its_table(name):
    config = resolve(Config, name)
    assert {key: getattr(config, key) for key in TABLES[name]} == TABLES[name]
    assert config.pretrained == (name in ("places-lt", "clothing1m", "clothing1m-lt"))
    if name.startswith("clothing1m"):
        assert (config.crop, config.milestones, config.momentum) == ("random", (0.5, 0.75), 0.9)


@pytest.mark.parametrize("loader", ["torch", "dali"])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_recipe_runs_end_to_end(tmp_path, name, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    layout = Layout(tmp_path / "root", [encoded(photo(40, 30, seed=n)) for n in range(60)])
    BUILDERS[name](layout)
    more = {"resize_size": 28} if name.startswith("clothing1m") else {}
    more |= {"imbalance_factor": 3} if name == "clothing1m-lt" else {}
    settings = {**SMALL, **layout.settings, **more, "data_root": str(layout.root), "output": str(tmp_path / "run")}
    result = train(name, loader=loader, **settings)
    assert result.summary["epochs"] == 2
    assert result.summary["test_size"] == len(layout.expected["test"])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["waiting_share"] <= 1 and line["bad_images"] == 0 for line in lines)


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_auto_augment_and_cutout_run_end_to_end(tmp_path, crop):
    layout = Layout(tmp_path / "root", [encoded(photo(40, 30, seed=n)) for n in range(30)])
    imagefolder(layout)
    result = train(
        "cifar-lt-augmented",
        dataset="imagefolder",
        data_root=str(layout.root),
        output=str(tmp_path / "run"),
        **{**SMALL, "imbalance_factor": 1, "iterations": 5, "crop": crop, "epochs": 77},
    )
    assert result.summary["epochs"] == 2  # of three steps, to the nearest


def test_iterations_stand_for_the_nearest_number_of_epochs(tmp_path):
    usual = {"progress": False, "tensorboard": False, "model": "resnet8", "device": "cpu"}
    result = train(iterations=9, output=str(tmp_path / "run"), **usual)  # 486 digits, batches of 100: four steps an epoch
    assert result.summary["epochs"] == 2


def test_every_recipe_of_the_paper_is_there():
    wanted = {"cifar-lt", "cifar-lt-augmented", "cifar-lt-resnet18", "cifar-flip", "cifar-lt-flip", *BUILDERS}
    assert wanted <= set(recipes.names())
