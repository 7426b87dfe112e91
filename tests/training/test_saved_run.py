"""A finished run on its data again: the classes are matched by their names, in whatever order they come."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import fastadvisor
from fastadvisor.errors import UserError
from fastadvisor.methods import METHODS
from fastadvisor.training.saved_run import SavedRun

CLASSES = ["ant", "bee", "cat", "dog"]
COLOURS = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (240, 240, 240)]
QUIET = {"progress": False, "tensorboard": False, "device": "cpu", "image_size": 8, "crop_padding": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A list data set of four colours, which a short run learns to tell apart, and the run."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 10), ("val", 5)):
        rows = []
        for label, colour in enumerate(COLOURS):
            for number in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 25, (8, 8, 3)), 0, 255).astype(np.uint8)
                file = f"{part}/{label}-{number}.png"
                (root / part).mkdir(exist_ok=True)
                Image.fromarray(pixels).save(root / file)
                if label < 3 or number < count // 2:  # the last class has half as many
                    rows.append(f"{file} {label}")
        (root / f"{part}.txt").write_text("\n".join(rows))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    settings = {"model": "resnet8", "method": "ce", "epochs": 6, "batch_size": 16, "lr": 0.05, "meta_per_class": 2}
    result = fastadvisor.train(dataset="list", data_root=root, output=root / "run", **settings, **QUIET)
    assert result.summary["test_top1"]["last"] > 90
    return root


@pytest.fixture
def reordered(trained, tmp_path):
    """The same images and names, whose numbers are others."""
    root = tmp_path / "colours"
    shutil.copytree(trained, root, ignore=shutil.ignore_patterns("run"))
    order = [2, 0, 3, 1]  # new number -> old
    (root / "classes.txt").write_text("\n".join(CLASSES[old] for old in order))
    for part in ("train", "test", "val"):
        rows = [line.split() for line in (root / f"{part}.txt").read_text().splitlines()]
        (root / f"{part}.txt").write_text("\n".join(f"{path} {order.index(int(label))}" for path, label in rows))
    return root


@pytest.mark.parametrize("checkpoint", ["model", "best", "last"])
def test_classes_in_another_order_are_matched_by_name(trained, reordered, checkpoint):
    before = fastadvisor.evaluate(trained / "run", checkpoint=checkpoint, device="cpu")
    after = fastadvisor.evaluate(trained / "run", checkpoint=checkpoint, data_root=str(reordered), device="cpu")
    assert after["top1"] == before["top1"] > 80
    assert after["per_class_top1"] == before["per_class_top1"]
    assert list(after["per_class_top1"]) == CLASSES
    assert after["many_medium_few"] == before["many_medium_few"]


def test_the_method_adjusts_the_logits_as_it_does_in_training(trained, reordered, monkeypatch):
    plain = fastadvisor.evaluate(trained / "run", device="cpu")
    # Every image is taken for one of the rarest class by the labels as given, "dog".
    monkeypatch.setattr(METHODS["ce"], "adjust", lambda self, z: z - 1e6 * self.facts.label_counts)
    for root in (trained, reordered):
        adjusted = fastadvisor.evaluate(trained / "run", data_root=str(root), device="cpu")
        assert adjusted["per_class_top1"] == {"ant": 0, "bee": 0, "cat": 0, "dog": 100}
        assert adjusted["top1"] < plain["top1"]


@pytest.mark.parametrize("checkpoint", ["model", "best", "last"])
def test_an_export_names_the_classes_of_the_logits(trained, reordered, tmp_path, checkpoint):
    usual = {"formats": ["state-dict"], "checkpoint": checkpoint, "data_root": str(reordered)}
    about = fastadvisor.export(trained / "run", output=tmp_path / "out", **usual)
    assert about["classes"] == CLASSES
    assert json.loads((tmp_path / "out/export.json").read_text())["classes"] == CLASSES


def test_every_checkpoint_keeps_names_and_order_from_the_first_save_on(trained):
    run = trained / "run"
    assert json.loads((run / "run.json").read_text())["classes"] == CLASSES
    for name in ("last.pt", "best.pt"):
        assert torch.load(run / name, weights_only=True)["classes"] == CLASSES
    assert SavedRun.open(run).classes == CLASSES


def test_a_run_of_an_earlier_version_has_them_in_its_summary(trained, reordered, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    (run / "run.json").unlink()
    assert SavedRun.open(run).classes == CLASSES
    assert fastadvisor.evaluate(run, data_root=str(reordered), device="cpu")["top1"] > 80


def test_what_cannot_be_matched_is_refused(trained, reordered):
    (reordered / "classes.txt").write_text("\n".join(["cat", "ant", "dog", "wasp"]))
    for checkpoint in ("model", "last"):
        with pytest.raises(UserError, match=r"was trained on other classes than the data set has \('bee' is in one only\)"):
            fastadvisor.evaluate(trained / "run", checkpoint=checkpoint, data_root=str(reordered), device="cpu")
        with pytest.raises(UserError, match="was trained on other classes"):
            fastadvisor.export(trained / "run", checkpoint=checkpoint, data_root=str(reordered), formats=["state-dict"])


def test_val_images_choose_the_best_checkpoint(trained):
    summary = json.loads((trained / "run/summary.json").read_text())
    records = [json.loads(line) for line in (trained / "run/metrics.jsonl").read_text().splitlines()]
    assert all({"val_top1", "val_top5", "test_top1"} <= record.keys() for record in records)
    best = max(reversed(records), key=lambda record: record["val_top1"])
    chosen = {"epoch": best["epoch"], "chosen_by": "val", "test_top1": best["test_top1"], "val_top1": best["val_top1"]}
    assert summary["best"] == chosen
    assert summary["val_size"] == 5 * 3 + 2
    assert torch.load(trained / "run/best.pt", weights_only=True)["epoch"] == best["epoch"]


def test_the_choice_is_by_val_and_not_by_test(tmp_path, trained, monkeypatch):
    """The accuracies of the two parts are made to disagree."""
    from fastadvisor.training.trainer import Trainer

    test, said = Trainer.test, {"test": iter([50.0, 90.0, 60.0]), "val": iter([40.0, 70.0, 75.0])}

    def made_up(self, images):
        found = test(self, images)
        found.top1 = next(said["val" if images is self.loaders.val else "test"])
        return found

    monkeypatch.setattr(Trainer, "test", made_up)
    settings = {"model": "resnet8", "method": "ce", "epochs": 3, "batch_size": 16, "meta_per_class": 2}
    result = fastadvisor.train(dataset="list", data_root=trained, output=tmp_path / "run", **settings, **QUIET)
    assert result.summary["best"] == {"epoch": 3, "chosen_by": "val", "test_top1": 60.0, "val_top1": 75.0}
    assert torch.load(tmp_path / "run/best.pt", weights_only=True)["epoch"] == 3


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_val_images_by_the_other_loaders(tmp_path, trained, loader):
    from fastadvisor.loading.backends import dali

    if loader == "dali" and not dali.available():
        pytest.skip("NVIDIA DALI is not installed")
    settings = {
        "model": "resnet8",
        "method": "ce",
        "epochs": 1,
        "batch_size": 16,
        "meta_per_class": 2,
        "loader": loader,
        "workers": 1,
    }
    result = fastadvisor.train(dataset="list", data_root=trained, output=tmp_path / "run", **settings, **QUIET)
    assert result.summary["best"]["chosen_by"] == "val"


def test_a_finished_run_gives_its_classifier_without_its_data(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    saved = SavedRun.open(run, data_root=str(tmp_path / "gone"))
    assert (saved.image_size(), saved.classes) == (8, CLASSES)
    for checkpoint in ("model", "best", "last"):
        model = saved.model(checkpoint)
        assert not model.training
        state = torch.load(run / f"{checkpoint}.pt", weights_only=True)
        expected = state if checkpoint == "model" else state["model"]
        for name, tensor in model.model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    with pytest.raises(UserError):
        saved.data()


def test_history_and_summary(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    saved = SavedRun.open(str(run))
    summary = json.loads((run / "summary.json").read_text())
    assert saved.summary() == summary
    assert [record["epoch"] for record in saved.history()] == [1, 2, 3, 4, 5, 6]
    assert saved.history()[-1]["test_top1"] == summary["test_top1"]["last"]
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines[:-20])  # half of the last line, of a run that is under way
    assert [record["epoch"] for record in saved.history()] == [1, 2, 3, 4, 5]
    (run / "metrics.jsonl").write_text("{]\n")
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged; last.pt"):
        saved.history()
    (run / "metrics.jsonl").unlink()
    assert saved.history() == []
    (run / "summary.json").write_text("[")
    with pytest.raises(UserError, match=r"summary.json is damaged; delete it"):
        saved.summary()
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match=r"holds no summary.json; let the run finish \(fastadvisor train "):
        saved.summary()


def test_a_run_that_has_not_finished(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    for name in ("summary.json", "run.json", "model.pt"):
        (run / name).unlink()
    saved = SavedRun.open(run)
    assert saved.classes == CLASSES  # those of last.pt
    assert saved.image_size() == 8
    assert saved.data() is saved.data()
    assert not saved.model("last").training
    with pytest.raises(UserError, match=r"holds no model.pt; let the run finish .* or try --checkpoint best"):
        saved.model()
