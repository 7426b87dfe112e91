import gc
import itertools
import json
import math
import weakref

import pytest
import torch

import fastadvisor
from fastadvisor.commands import train as train_command
from fastadvisor.commands.train import train_config
from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.errors import UserError
from fastadvisor.iterations import Iteration
from fastadvisor.loading.backends import dali
from fastadvisor.models.cifar_resnet import CifarResNet
from fastadvisor.training.epoch import step_ms
from fastadvisor.training.messages import describe_meta_gradient
from fastadvisor.training.trainer import Trainer

needs_dali = pytest.mark.skipif(not dali.available(), reason="NVIDIA DALI is not installed")
QUIET = {"progress": False, "tensorboard": False, "device": "cpu"}
TIMES = ("images_per_second", "waiting_share", "step_ms_median", "seconds")


def settings(output, **changes):
    return resolve(Config, **{**QUIET, "epochs": 3, "output": str(output), **changes})


def trainer(**changes):
    config = resolve(Config, **{**QUIET, "epochs": 2, **changes})
    return Trainer(config, prepare(load_source(config), config, config.seed), torch.device("cpu"))


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def test_the_run_folder_and_every_key_of_the_summary(tmp_path):
    result = train_config(settings(tmp_path / "run", amp=True, tensorboard=True))
    names = {entry.name for entry in result.folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "last.pt", "best.pt", "model.pt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert (summary["method"], summary["dataset"], summary["seed"], summary["epochs"]) == ("mfrw-mes", "digits", 0, 3)
    assert (summary["train_size"], summary["meta_size"], summary["test_size"]) == (486, 100, 497)
    assert summary["train_size"] == sum(summary["class_counts"])
    assert 0.3 < summary["noise_rate"] < 0.5
    lines = metrics(result.folder)
    top1 = [line["test_top1"] for line in lines]
    assert summary["test_top1"] == {"last": top1[-1], "peak": max(top1), "mean_last5": pytest.approx(sum(top1) / 3)}
    assert summary["test_top5"] >= summary["test_top1"]["last"]
    assert list(summary["per_class_top1"]) == [str(digit) for digit in range(10)]
    assert set(summary["many_medium_few"]) == {"many", "medium", "few"}
    for key in ("images_per_second", "step_ms_median", "peak_memory_mb", "train_seconds"):
        assert summary[key] > 0
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["device"] == "cpu"


@pytest.mark.parametrize("ema_decay", [None, 0.8])
def test_model_pt_is_the_plain_classifier(tmp_path, ema_decay):
    result = train_config(settings(tmp_path / "run", ema_decay=ema_decay))
    model = CifarResNet(8, 10)
    model.load_state_dict(torch.load(result.folder / "model.pt", weights_only=True))
    for ours, theirs in zip(result.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    evaluated = fastadvisor.evaluate(result.folder, device="cpu")
    assert evaluated["top1"] == pytest.approx(result.summary["test_top1"]["last"])
    assert fastadvisor.evaluate(result.folder, checkpoint="best", device="cpu")["top1"] == pytest.approx(
        result.summary["test_top1"]["peak"]
    )


@pytest.mark.parametrize("file", ["model.pt", "last.pt"])
def test_a_run_starts_from_the_weights_of_another(tmp_path, file):
    first = train_config(settings(tmp_path / "run", epochs=1))
    started = trainer(weights=str(first.folder / file), seed=7)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(started.model.model.state_dict()[name], tensor), name
    assert started.epoch == 0
    with pytest.raises(UserError, match=file.replace(".", r"\.")):
        trainer(weights=str(first.folder / file), model="resnet14")


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    runs = [train_config(settings(tmp_path / name, epochs=1, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert metrics(runs[0].folder) == metrics(runs[1].folder)
    assert metrics(runs[0].folder) != metrics(runs[2].folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "mfrw-mes"},
        {"method": "finetune", "finetune_fraction": 0.5},
        {"virtual_step": "optimizer", "schedule": "step"},
        {"method": "l2rw"},
        {"approx_meta": True, "validate_meta_every": 2},
        {"approx_meta": True, "approx_layers": "learned", "approx_budget": 2, "meta_interval": 1, "validate_meta_every": 3},
        {"approx_meta": True, "approx_layers": "random", "approx_budget": 2, "virtual_gradient": "own"},
        {"lean": True, "advisor_inputs": "attached"},
        {"auto_augment": "cifar10", "cutout": 2},
        {"loader": "torch", "workers": 1, "cutout": 2},
        pytest.param({"loader": "dali", "workers": 1}, marks=needs_dali),
        pytest.param({"loader": "dali", "workers": 1, "crop": "random", "auto_augment": "cifar10"}, marks=needs_dali),
    ],
    ids=str,
)
def test_resume_continues_exactly(tmp_path, monkeypatch, changes):
    whole = train_config(settings(tmp_path / "whole", epochs=4, **changes))
    epoch = Trainer._train_epoch

    def killed(self):
        if self.epoch == 2:
            for _ in range(2):  # part of an epoch is lost, and so must be all it did
                self.step(*self.batches(self.stages[0]))
            raise KeyboardInterrupt
        return epoch(self)

    monkeypatch.setattr(Trainer, "_train_epoch", killed)
    part = settings(tmp_path / "part", epochs=4, **changes)
    with pytest.raises(KeyboardInterrupt):
        train_config(part)
    monkeypatch.undo()
    assert len(metrics(tmp_path / "part")) == 2
    torch.manual_seed(999)  # another process: whatever state it is in must not matter
    resumed = train_config(settings(tmp_path / "part", epochs=4, resume=True, **changes))
    assert metrics(resumed.folder) == metrics(whole.folder)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    ends = [torch.load(run.folder / "last.pt", weights_only=True) for run in (whole, resumed)]
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0].keys() - {"history"}:  # whose times differ; compared above
        assert same(ends[0][name], ends[1][name]), name


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = train_config(settings(tmp_path / "run", epochs=2))
    weights = (first.folder / "model.pt").read_bytes()
    again = train_config(settings(tmp_path / "run", epochs=2, resume=True))
    assert (first.folder / "model.pt").read_bytes() == weights
    assert again.summary["test_top1"] == first.summary["test_top1"]
    assert len(metrics(first.folder)) == 2


def seen_ids(run, monkeypatch):
    """Train and return, per epoch, the ids of its train batches and of its meta batches."""
    seen = []
    step = type(run.step).__call__

    def spy(self, train, meta):
        seen.append((set(train.ids.tolist()), None if meta is None else set(meta.ids.tolist())))
        return step(self, train, meta)

    monkeypatch.setattr(type(run.step), "__call__", spy)
    while run.epoch < run.config.epochs:
        run._train_epoch()
        run.epoch += 1
    return seen


@pytest.mark.parametrize("method", ["ce", "meta-only", "finetune", "mfrw"])
def test_each_method_sees_the_images_it_should(method, monkeypatch):
    run = trainer(method=method, finetune_fraction=0.5)
    steps = len(run.train_loader)
    train, meta = set(run.data.train_ids.tolist()), set(run.data.meta_ids.tolist())
    seen = seen_ids(run, monkeypatch)
    assert len(seen) == 2 * steps
    sources = {"ce": [train, train], "meta-only": [meta, meta], "finetune": [train, meta], "mfrw": [train, train]}[method]
    for index, (ids, meta_ids) in enumerate(seen):
        assert ids <= sources[index // steps]
        assert (meta_ids is None) if method != "mfrw" else (meta_ids <= meta)


@pytest.mark.parametrize(("method", "size"), [("ce", 100), ("meta-only", 20)])
def test_the_rate_counts_the_images_that_were_trained_on(tmp_path, method, size):
    result = train_config(settings(tmp_path / "run", epochs=1, method=method, meta_batch_size=20))
    [line] = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert line["images_per_second"] * line["seconds"] == pytest.approx(4 * size)


def test_the_advisor_learns_and_the_floors_have_none(monkeypatch):
    run = trainer(method="mfrw-mes", epochs=1)
    before = [parameter.detach().clone() for parameter in run.method.advisor.parameters()]
    seen_ids(run, monkeypatch)
    for parameter, old in zip(run.method.advisor.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)
    assert trainer(method="ce").method.advisor is None


def test_labels_change_in_training_and_nowhere_else():
    run = trainer(noise="flip", noise_rate=1.0, method="ce")
    data = run.data
    assert (data.labels[data.train_ids] != data.true_labels[data.train_ids]).all()
    assert torch.equal(data.labels[data.meta_ids], data.true_labels[data.meta_ids])
    batch = run.train_loader.next_batch()
    assert torch.equal(batch.labels, data.labels[batch.ids])


def test_approx_meta_is_a_set_of_settings_and_each_can_be_had_alone(capsys):
    run = trainer(approx_meta=True)
    chosen = "through the layers from layer2 up, tangents by differences; every 2 iterations; the advisor one step behind"
    assert describe_meta_gradient(run.step) == chosen
    every = trainer(approx_meta=True, approx_layers="all", meta_interval=1)
    assert describe_meta_gradient(every.step) == "all layers, tangents by differences; the advisor one step behind"
    assert describe_meta_gradient(trainer().step) == "exact"
    assert describe_meta_gradient(trainer(meta_interval=4).step) == "exact; every 4 iterations"
    assert describe_meta_gradient(trainer(virtual_gradient="actual").step) == "exact; the advisor one step behind"
    top = trainer(approx_meta=True, approx_stages=1, approx_tangent="forward", meta_interval=1)
    assert describe_meta_gradient(top.step) == "through the layers from layer3 up; the advisor one step behind"
    few = trainer(approx_meta=True, approx_layers="learned", approx_budget=2, virtual_gradient="own", meta_interval=1)
    assert describe_meta_gradient(few.step) == "through 2 of 4 layers, chosen by learned samplers"
    assert describe_meta_gradient(trainer(method="ce").step) is None
    assert capsys.readouterr().out == ""


def test_mixed_precision_takes_no_differences_and_l2rw_no_interval():
    assert (
        describe_meta_gradient(trainer(approx_meta=True, method="l2rw").step)
        == "through the layers from layer2 up, tangents by differences"
    )
    assert "differences" not in describe_meta_gradient(trainer(approx_meta=True, amp=True).step)


def test_a_meta_step_every_third_iteration(monkeypatch):
    run = trainer(meta_interval=3)
    advisors, drawn = [], []
    next_meta = run.meta_loader.next_batch
    monkeypatch.setattr(run.meta_loader, "next_batch", lambda: drawn.append(1) or next_meta())
    for _ in range(7):
        result = run.step(*run.batches(run.stages[0]))
        advisors.append(torch.cat([p.detach().flatten() for p in run.method.advisor.parameters()]))
        assert (result.meta_loss is not None) == (len(advisors) % 3 == 1)
    assert [not torch.equal(*pair) for pair in itertools.pairwise(advisors)] == [False, False, True] * 2
    assert len(drawn) == 3


def test_the_approximation_is_watched_and_the_figures_are_kept(tmp_path):
    result = train_config(settings(tmp_path / "run", approx_meta=True, meta_interval=1, validate_meta_every=2))
    for line in metrics(result.folder):
        assert -1 <= line["meta_cosine_min"] <= line["meta_cosine"] <= 1
        assert line["meta_norm_ratio"] > 0
        assert line["meta_fallback"] in (True, False)
    assert result.summary["meta_cosine"] == pytest.approx(sum(m["meta_cosine"] for m in metrics(result.folder)) / 3)
    unwatched = train_config(settings(tmp_path / "unwatched", approx_meta=True, validate_meta_every=0))
    assert "meta_cosine" not in metrics(unwatched.folder)[0]
    assert unwatched.summary["meta_cosine"] is None


def test_watching_alone_does_not_change_a_run(tmp_path):
    runs = [
        train_config(settings(tmp_path / str(every), approx_meta=True, validate_meta_every=every, min_meta_cosine=-1))
        for every in (0, 1)
    ]
    for one, other in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "changes", [{"approx_layers": "top", "approx_stages": 9}, {"approx_layers": "random", "approx_budget": 4}]
)
def test_a_model_that_cannot_be_cut_says_so_and_counts_all_layers(changes, caplog):
    run = trainer(approx_meta=True, **changes)
    assert describe_meta_gradient(run.step).startswith("all layers")
    assert "layers" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta_engine": "reference", "approx_meta": True}, "--meta-engine reference"),
        ({"meta_engine": "reference", "lean": True}, "--meta-engine reference"),
        ({"meta_engine": "reference", "virtual_gradient": "actual"}, "--virtual-gradient actual"),
        ({"method": "l2rw", "meta_interval": 2}, "--meta-interval"),
        ({"method": "l2rw", "virtual_gradient": "actual"}, "--virtual-gradient actual"),
        ({"amp": True, "approx_meta": True, "approx_tangent": "difference"}, "--no-amp"),
    ],
)
def test_settings_that_exclude_each_other_are_found_before_any_data_is_read(changes, message, monkeypatch, tmp_path):
    monkeypatch.setattr(train_command, "load_source", lambda config: pytest.fail("data was read"))
    with pytest.raises(UserError, match=message):
        train_config(settings(tmp_path / "run", **changes))


def weights_after(steps, **changes):
    run = trainer(**changes)
    for _ in range(steps):
        run.step(*run.batches(run.stages[0]))
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


def test_lean_changes_memory_and_not_the_weights():
    assert torch.equal(weights_after(3), weights_after(3, lean=True))
    attached = {"advisor_inputs": "attached"}
    assert torch.equal(weights_after(3, **attached), weights_after(3, lean=True, **attached))
    assert not torch.equal(weights_after(3), weights_after(3, **attached))


@pytest.mark.parametrize("changes", [{}, {"lean": True}, {"virtual_gradient": "actual"}, {"approx_meta": True}])
def test_a_step_leaves_nothing_for_the_collector(changes):
    """A cycle would hold the graph of a step through the next one."""
    run = trainer(**changes)
    held = []
    calculate = run.step.shared_pass.run
    run.step.shared_pass.run = lambda *a, **k: held.append(weakref.ref(shared := calculate(*a, **k))) or shared
    gc.collect()
    gc.disable()
    try:
        run.step(*run.batches(run.stages[0]))
    finally:
        gc.enable()
    assert held[0]() is None


def first_step(learns=True, **changes):
    run = trainer(**changes)
    if not learns:
        run.method.learn = lambda *_: None
    result = run.step(*run.batches(run.stages[0]))
    advisor, model = (
        torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
        for module in (run.method.advisor, run.model)
    )
    return float(result.meta_loss), advisor, model


def test_one_step_behind_differs_from_algorithm_1_by_one_update_of_the_advisor():
    meta_loss, advisor, model = first_step(virtual_gradient="actual")
    expected_loss, expected_advisor, _ = first_step()
    assert meta_loss == pytest.approx(expected_loss, rel=1e-6)
    torch.testing.assert_close(advisor, expected_advisor, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model, first_step(learns=False)[2], rtol=1e-5, atol=1e-7)


def test_the_time_of_a_step_is_an_average_over_meta_intervals():
    times = [30.0, 10.0, 10.0, 30.0, 10.0, 10.0]
    assert step_ms(times, 1) == 10.0
    assert step_ms(times, 3) == pytest.approx(50 / 3)
    assert step_ms(times[:2], 3) == 20.0


def test_training_that_diverges_stops_with_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"diverged.*--lr"):
        train_config(settings(tmp_path / "run", method="ce", lr=1e20, schedule="constant", nan_policy="ignore"))


def test_weights_that_end_as_nan_do_not_pass_as_trained(tmp_path, monkeypatch):
    step = Iteration.actual_train

    def poisoned(self, shared):
        loss = step(self, shared)
        next(self.model.parameters()).data.fill_(float("nan"))
        return loss

    monkeypatch.setattr(Iteration, "actual_train", poisoned)
    with pytest.raises(UserError, match="weights not finite"):
        train_config(settings(tmp_path / "run", method="ce", batch_size=486))  # one step an epoch: its loss was fine
    assert not (tmp_path / "run" / "model.pt").exists()


def test_saturated_equalisation_stays_finite():
    """Trap 1: once s = σ(v) rounds to 1, log(1 − s) is −inf; from v it is not."""
    run = trainer(method="mfrw-mes")
    with torch.no_grad():
        run.method.advisor.to_equalisation.bias.fill_(1e4)
    for _ in range(3):
        result = run.step(*run.batches(run.stages[0]))
        assert math.isfinite(float(result.loss))
        assert math.isfinite(float(result.meta_loss))
    assert all(parameter.isfinite().all() for parameter in run.method.advisor.parameters())
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_python_in_five_lines(tmp_path):
    result = fastadvisor.train(dataset="digits", method="ce", epochs=1, output=str(tmp_path / "run"), **QUIET)
    assert result.summary["method"] == "ce"
    with pytest.raises(UserError, match="noise_rate"):
        fastadvisor.train(noise_rat=0.4)


def test_flipped_digits_the_advisor_beats_cross_entropy(tmp_path):
    """The claim of the README in small: 40 % single-target flips, no long tail, a third of the default epochs."""
    last = {}
    for method in ("ce", "mfrw-mes"):
        config = settings(tmp_path / method, method=method, epochs=30, imbalance_factor=1, seed=1)
        last[method] = train_config(config).summary["test_top1"]["last"]
    assert last["mfrw-mes"] >= 88
    assert last["mfrw-mes"] >= last["ce"] + 12
