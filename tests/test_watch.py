"""Values that are not finite, an advisor that has collapsed, memory that runs out: noticed, named, and replayed."""

import contextlib
import copy
import json
from dataclasses import replace
from functools import partialmethod

import pytest
import torch

from fastadvisor import cli
from fastadvisor.commands import dry_run
from fastadvisor.commands import train as train_command
from fastadvisor.commands.replay import _listening, replay
from fastadvisor.commands.train import train_config
from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.errors import UserError
from fastadvisor.iterations import Iteration
from fastadvisor.metagrad import LearnedLayers
from fastadvisor.methods import Advice
from fastadvisor.methods.collapse import Collapse
from fastadvisor.runtime import checkpoint
from fastadvisor.runtime import watch as watching
from fastadvisor.runtime.execution import Execution
from fastadvisor.runtime.run_folder import RunFolder
from fastadvisor.runtime.watch import NonFiniteError, Watch
from fastadvisor.training import assembly, replay_record
from fastadvisor.training.trainer import Trainer
from tests.faults import soak
from tests.faults.kills import same

QUIET = {"progress": False, "tensorboard": False, "device": "cpu"}
CPU = torch.device("cpu")


def settings(output, **changes):
    return resolve(Config, **{**QUIET, "epochs": 2, "output": str(output), **changes})


def trainer(**changes):
    config = resolve(Config, **{**QUIET, "epochs": 2, **changes})
    return Trainer(config, prepare(load_source(config), config, config.seed), CPU)


def spoil(monkeypatch, iteration, damage):
    """Let ``damage`` change the batch, the model or the advisor right before that iteration."""
    batches = Trainer.batches

    def spoilt(self, phase):
        train, meta = batches(self, phase)
        if self.step.iteration + 1 == iteration:
            train = damage(self.step, train) or train
        return train, meta

    monkeypatch.setattr(Trainer, "batches", spoilt)


def infinite_image(step, train):
    images = train.images.clone()
    images[3, 0, 2, 2] = float("inf")
    return train._replace(images=images)


def infinite_advice(step, train):
    with torch.no_grad():
        step.method.advisor.to_mask.bias[5] = float("nan")


def infinite_weight(step, train):
    with torch.no_grad():
        next(step.model.parameters()).view(-1)[0] = float("inf")


@pytest.mark.parametrize(
    ("damage", "says", "first"),
    [
        (infinite_image, "the advisor's mask", "classifier conv1 (Conv2d)"),
        (infinite_advice, "the advisor's mask", "advisor to_mask (Linear)"),
        (infinite_weight, "the advisor's mask", "classifier conv1 (Conv2d)"),
    ],
)
def test_the_run_stops_names_the_tensor_and_can_be_replayed(tmp_path, monkeypatch, capsys, damage, says, first):
    spoil(monkeypatch, 6, damage)
    with pytest.raises(
        UserError,
        match=rf"Iteration 6 \(epoch 2\): {says} is not finite. The batch \(ids \d+, .*--nan-policy.* fastadvisor replay ",
    ):
        train_config(settings(tmp_path / "run", method="mfrw-mes", nan_policy="stop"))
    monkeypatch.undo()
    found = replay(tmp_path / "run", device="cpu")
    assert (found["iteration"], found["epoch"], found["said"], found["rank"]) == (6, 2, says, 0)
    assert found["found"] == found["said"]
    assert found["first"] == first
    assert len(found["ids"]) == 100
    capsys.readouterr()
    assert cli.main(["replay", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert f"now: the same.\nThe first output that is not finite is that of {first}." in capsys.readouterr().out
    assert cli.main(["replay", str(tmp_path / "run"), "--device", "cpu", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert (shown["found"], shown["first"]) == (says, first)
    last = checkpoint.load(tmp_path / "run" / "last.pt")
    assert last["iteration"] == 4  # the older checkpoint is left alone


@pytest.mark.parametrize(("changes", "looks"), [({}, 12), ({"approx_meta": True}, 9)], ids=["meta step", "no meta step"])
def test_the_replayed_step_is_the_one_that_was_taken(tmp_path, monkeypatch, changes, looks):
    """Same numbers, not only the same fault: the peaks of all passes, which hang on weights, advisor, batches and β."""
    call, passes, counted, taken = Iteration.__call__, Watch.passes, [], []

    def listened(self, train, meta):
        modules = {"classifier": self.model.model, "advisor": self.method.advisor}
        with _listening(modules, taken) if self.iteration == 5 else contextlib.nullcontext():
            return call(self, train, meta)

    def false_alarm(self, values, gradients):
        counted.append(values)
        if len(counted) == looks:  # before the classifier's step of iteration 6; the advisor's, where there is one, is done
            raise NonFiniteError("the training loss")
        return passes(self, values, gradients)

    monkeypatch.setattr(Iteration, "__call__", listened)
    monkeypatch.setattr(Watch, "passes", false_alarm)
    with pytest.raises(UserError, match="Iteration 6 "):
        train_config(settings(tmp_path / "run", **changes))
    monkeypatch.undo()
    found = replay(tmp_path / "run", device="cpu")
    assert (found["iteration"], found["said"], found["found"]) == (6, "the training loss", None)
    assert found["peaks"] == taken
    state = checkpoint.load(tmp_path / "run" / "replay.pt")
    assert state["batches"][0][0][2].tolist() == found["ids"]


def test_replay_without_a_state(tmp_path):
    with pytest.raises(UserError, match=r"There is no .*replay.pt: a run writes one"):
        replay(tmp_path)
    (tmp_path / "replay.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="damaged"):
        replay(tmp_path)
    checkpoint.save(tmp_path / "replay.pt", {"a": 1})
    with pytest.raises(UserError, match="does not fit this run"):
        replay(tmp_path)


def test_skipped_steps_are_counted_and_change_nothing(tmp_path, monkeypatch):
    run = trainer(method="mfrw-mes", nan_policy="skip")
    run.step(*run.batches(run.stages[0]))
    before = [p.detach().clone() for p in (*run.model.parameters(), *run.method.advisor.parameters())]
    statistics = [buffer.clone() for buffer in run.model.buffers()]
    optimizers = [json.dumps(str(o.state_dict())) for o in (run.step.optimizer, run.step.advisor_optimizer)]
    train, meta = run.batches(run.stages[0])
    run.step(infinite_image(run.step, train), meta)
    assert run.step.watch.skipped == 2  # the advisor's step and the classifier's
    assert all(torch.equal(a, b) for a, b in zip(statistics, run.model.buffers(), strict=True))
    after = [*run.model.parameters(), *run.method.advisor.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert optimizers == [json.dumps(str(o.state_dict())) for o in (run.step.optimizer, run.step.advisor_optimizer)]
    train, meta = run.batches(run.stages[0])
    result = run.step(train, infinite_image(run.step, meta))  # a bad meta batch leaves the classifier its step
    assert (run.step.watch.skipped, result.skipped, result.meta_loss) == (3, False, None)
    assert result.loss.isfinite()
    assert not any(torch.equal(a, b) for a, b in zip(statistics, run.model.buffers(), strict=True))
    run.step(*run.batches(run.stages[0]))
    assert all(p.isfinite().all() for p in run.model.parameters())

    monkeypatch.undo()
    spoil(monkeypatch, 3, infinite_image)
    result = train_config(settings(tmp_path / "run", method="mfrw", nan_policy="skip"))
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [2, 2]
    assert result.summary["skipped_steps"] == 2


def test_the_watch_changes_no_number(tmp_path):
    ends = [
        train_config(settings(tmp_path / policy, nan_policy=policy, method="mfrw-mes")).model.state_dict()
        for policy in ("stop", "skip", "ignore")
    ]
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_what_the_watch_calls_finite():
    watch = Watch()
    big = torch.full((10_000,), 3e38)  # whose squares are not
    assert watch.passes({"big": big, "none": None}, {"gradient": big})
    for value in (float("inf"), float("-inf"), float("nan")):
        with pytest.raises(NonFiniteError) as found:
            watch.passes({"good": torch.zeros(2), "bad": torch.tensor([0.0, value])}, {"worse": torch.tensor([value])})
        assert found.value.name == "bad"
    assert Watch(gradients=False).passes({"good": torch.zeros(2)}, {"worse": torch.tensor([float("nan")])})


def test_collapsed_are_99_percent_of_entries_beyond_99_percent():
    collapse = Collapse()
    mask = torch.tensor([[4.595, 4.605, -4.595, -4.605]])  # σ(4.6) = 0.990
    assert collapse.look(Advice(mask=mask)) == {"mask_saturated": 0.5}
    assert collapse.sentence({"mask_saturated": 0.989}) is None
    assert "99.0 % of its mask" in collapse.sentence({"mask_saturated": 0.99})
    assert "of its equalisation" in collapse.sentence(
        {"mask_saturated": 1.0, "equalisation_saturated": 1.0}
    )  # each is said once


def test_a_collapsed_advisor_is_reported_once(tmp_path, monkeypatch, capsys):
    collapse = Collapse()
    assert collapse.sentence(collapse.look(Advice(mask=torch.randn(4, 8)))) is None
    shares = collapse.look(Advice(mask=torch.full((4, 8), -20.0), equalisation=torch.zeros(4, 3)))
    assert shares == {"mask_saturated": 1.0, "equalisation_saturated": 0.0}
    assert "The advisor has collapsed: 100.0 % of its mask" in collapse.sentence(shares)
    assert collapse.sentence(shares) is None
    assert collapse.look(None) == {}

    def saturate(step, train):
        with torch.no_grad():
            step.method.advisor.to_mask.bias.fill_(30.0)

    spoil(monkeypatch, 1, saturate)
    result = train_config(settings(tmp_path / "run", method="mfrw"))
    assert capsys.readouterr().err.count("The advisor has collapsed") == 1
    [first, _] = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert first["mask_saturated"] == 1.0


@pytest.mark.parametrize(
    "flags", [["--method", "mfrw-mes"], ["--approx-meta"], ["--amp", "--ema-decay", "0.9", "--accumulate", "2"]]
)
def test_a_long_training_holds_no_more_tensors_than_a_short_one(flags):
    """``python -m tests.faults.soak`` watches the memory of ten thousand iterations (docs/reliability.md)."""
    counts = [tensors for _, _, tensors in soak.soak(24, 4, flags, say=lambda _: None)]
    assert max(counts[2:]) <= max(counts[:2])


@contextlib.contextmanager
def memory_for(images, monkeypatch):
    """A machine whose memory ends at a batch of so many images."""
    call = Iteration.__call__

    def limited(self, train, meta):
        if len(train.labels) > images:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, train, meta)

    monkeypatch.setattr(Iteration, "__call__", limited)
    yield
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("images", "says"), [(30, "--batch-size 25 fits"), (50, "--batch-size 50 fits"), (0, "smaller --model.")]
)
def test_out_of_memory_names_the_batch_size_that_fits(tmp_path, monkeypatch, images, says):
    with memory_for(images, monkeypatch), pytest.raises(UserError, match="Out of memory") as error:
        train_config(settings(tmp_path / "run", method="mfrw"))
    assert says in str(error.value)


def test_the_search_for_a_batch_size_respects_micro_batches(tmp_path, monkeypatch):
    tried = []

    def fails(config, data, device):
        tried.append((config.batch_size, config.meta_batch_size))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(dry_run, "Trainer", fails)
    config = settings(tmp_path / "run", batch_size=60, meta_batch_size=18, accumulate=3)
    assert dry_run.find_fitting_batch_size(config, None, CPU) is None
    assert tried == [(30, 18), (15, 15), (6, 6), (3, 3)]
    tried.clear()
    assert dry_run.find_fitting_batch_size(replace(config, accumulate=1), None, CPU, ranks=3) is None
    assert tried == [(10, 6), (5, 5), (2, 2)]  # of one rank


def test_a_dry_run_writes_nothing_and_says_how_long_it_would_take(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--dry-run", "--device", "cpu", "--epochs", "1000", "--approx-meta"]) == 0
    out = capsys.readouterr().out
    assert "mean of 10" in out
    assert "4,000 iterations in 1000 epochs would take about" in out
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert cli.main(["train", "--dry-run", "--device", "cpu", "--output", "file/under"]) == 2
    assert "Output folder file/under cannot be written" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_weights_with_deterministic_operations_too(tmp_path):
    ends = [train_config(settings(tmp_path / name, deterministic=True)).model.state_dict() for name in ("a", "b")]
    assert same(*ends)
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_form_is_named(tmp_path, monkeypatch):
    def refuse(self, train, meta):
        raise RuntimeError("adaptive_max_pool2d_backward_cuda does not have a deterministic implementation, but you set ...")

    monkeypatch.setattr(Iteration, "__call__", refuse)
    with pytest.raises(UserError, match="--deterministic: torch's adaptive_max_pool2d_backward_cuda has no such form"):
        train_config(settings(tmp_path / "run", deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_data_are_noticed_when_a_run_is_resumed(tmp_path):
    labels = tmp_path / "labels.txt"
    count = len(load_source(resolve(Config, **QUIET)).train)
    labels.write_text("\n".join(str(i % 10) for i in range(count)))
    changes = {"method": "ce", "labels": str(labels), "imbalance_factor": 1}
    train_config(settings(tmp_path / "run", **changes))
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["parts"][0]["versions"]["torch"] == torch.__version__
    labels.write_text("\n".join(str((i + 1) % 10) for i in range(count)))
    with pytest.raises(UserError, match=r"The data are not those .*run was trained on.*or delete .*run.json"):
        train_config(settings(tmp_path / "run", resume=True, **changes))
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run.json is damaged; delete it"):
        train_config(settings(tmp_path / "run", resume=True, **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"method": "l2rw", "accumulate": 2}, "--method l2rw needs the batch as a whole"),
        ({"method": "mw-net", "weight_normalization": "sum", "accumulate": 2}, "--weight-normalization sum needs the batch"),
        ({"advisor_inputs": "attached", "accumulate": 2}, "--advisor-inputs attached needs the batch as a whole"),
        ({"virtual_step": "optimizer", "optimizer": "adamw"}, "--virtual-step optimizer knows sgd alone"),
    ],
)
def test_settings_that_exclude_each_other(tmp_path, monkeypatch, changes, says):
    monkeypatch.setattr(train_command, "load_source", lambda config: pytest.fail("data was read"))
    with pytest.raises(UserError, match=says):
        train_config(settings(tmp_path / "run", **changes))


# The watch of a GPU, which waits for nothing


@pytest.fixture
def deferred(monkeypatch):
    """Let runs on the CPU watch as those on a GPU do."""
    monkeypatch.setattr(assembly, "defers", lambda config, execution: config.nan_policy == "stop")


@pytest.mark.parametrize(
    "changes", [{}, {"approx_meta": True}, {"optimizer": "adamw", "lr": 1e-3}, {"method": "l2rw"}], ids=str
)
def test_a_deferred_watch_changes_no_number(tmp_path, monkeypatch, changes):
    usual = {"method": "mfrw-mes", "clip_grad_norm": 1.0, **changes}
    ends = {}
    for kind in ("immediate", "deferred"):
        with monkeypatch.context() as patch:
            if kind == "deferred":
                patch.setattr(assembly, "defers", lambda config, execution: True)
            # Both with a fused Adam for the advisor, whose order of operations is another.
            patch.setattr(torch.optim.Adam, "__init__", partialmethod(torch.optim.Adam.__init__, fused=True))
            patch.setattr(assembly, "_advisor_optimizer", _advisor_optimizer)
            ends[kind] = train_config(settings(tmp_path / kind, **usual)).model.state_dict()
    assert same(ends["immediate"], ends["deferred"])


def _advisor_optimizer(config, method, *, fused):
    return None if method.advisor is None else torch.optim.Adam(method.advisor.parameters(), lr=method.advisor_lr)


@pytest.mark.parametrize(
    ("damage", "says", "first"),
    [
        (infinite_image, "the advisor's mask", "classifier conv1 (Conv2d)"),
        (infinite_advice, "the advisor's mask", "advisor to_mask (Linear)"),
        (infinite_weight, "the advisor's mask", "classifier conv1 (Conv2d)"),
    ],
)
@pytest.mark.parametrize("iteration", [6, 8], ids=["in mid-epoch", "at the end of an epoch"])
def test_a_deferred_watch_stops_an_iteration_later_and_the_weights_are_as_before(
    tmp_path, monkeypatch, deferred, damage, says, first, iteration
):
    """An epoch has four iterations: after the last one nothing is tested or saved before it has been looked at."""
    before, taken = {}, []
    call = Iteration.__call__

    def watched(self, train, meta):
        taken.append(self.iteration + 1)
        if self.iteration + 1 == iteration:
            modules = (self.model.model, self.method.advisor, self.optimizer, self.advisor_optimizer)
            before["state"] = copy.deepcopy([module.state_dict() for module in modules])
            before["step"] = self
        return call(self, train, meta)

    spoil(monkeypatch, iteration, damage)
    monkeypatch.setattr(Iteration, "__call__", watched)
    with pytest.raises(UserError, match=rf"Iteration {iteration} \(epoch 2\): {says} is not finite. The batch \(ids \d+, "):
        train_config(settings(tmp_path / "run", method="mfrw-mes", lr=0.1, schedule="cosine"))
    monkeypatch.undo()
    assert taken[-1] == (iteration + 1 if iteration == 6 else iteration)
    step = before["step"]
    weights, advisor, optimizer, advisor_optimizer = before["state"]
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name, value in step.model.model.state_dict().items():
        if not name.endswith(statistics):
            torch.testing.assert_close(value, weights[name], rtol=0, atol=0, equal_nan=True)
    for module, state in ((step.method.advisor, advisor),):
        for name, value in module.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)
    for now, then in ((step.optimizer, optimizer), (step.advisor_optimizer, advisor_optimizer)):
        torch.testing.assert_close(now.state_dict()["state"], then["state"], rtol=0, atol=0)
    saved = checkpoint.load(tmp_path / "run" / "replay.pt")
    assert saved["iteration"] == iteration
    torch.testing.assert_close(saved["optimizer"], optimizer, rtol=0, atol=0)
    torch.testing.assert_close(saved["model"], weights, rtol=0, atol=0, equal_nan=True)  # running statistics, too
    found = replay(tmp_path / "run", device="cpu")
    assert (found["iteration"], found["said"], found["found"], found["first"]) == (iteration, says, says, first)
    monkeypatch.setattr(assembly, "defers", lambda config, execution: True)  # as a replay on a GPU
    assert replay(tmp_path / "run", device="cpu")["found"] == says
    assert checkpoint.load(tmp_path / "run" / "last.pt")["iteration"] == 4  # the older one is left alone


def test_a_bad_gradient_reaches_no_weight_though_the_advisor_has_stepped(tmp_path, monkeypatch, deferred):
    """The meta step is sound, so the advisor takes it; the classifier's gradient is not. Replay begins before both."""
    call = Iteration.classifier_step

    def spoilt(self, losses):
        if self.iteration == 6:
            next(p for p in self.model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
        return call(self, losses)

    monkeypatch.setattr(Iteration, "classifier_step", spoilt)
    with pytest.raises(UserError, match=r"Iteration 6 \(epoch 2\): the gradient of conv1.weight is not finite"):
        train_config(settings(tmp_path / "run", method="mfrw-mes"))
    monkeypatch.undo()
    found = replay(tmp_path / "run", device="cpu")
    assert (found["iteration"], found["found"]) == (6, None)
    state = checkpoint.load(tmp_path / "run" / "replay.pt")
    steps = {float(entry["step"]) for entry in state["advisor_optimizer"]["state"].values()}
    assert steps == {5.0}


def fuse(learned):
    learned.optimizer = torch.optim.SGD(learned.samplers.parameters(), lr=learned.lr, fused=True)


@pytest.mark.parametrize("watched", ["immediate", "deferred"])
@pytest.mark.parametrize("iteration", [1, 2, 6])
def test_replay_begins_where_the_iteration_did(tmp_path, monkeypatch, request, watched, iteration):
    """Running statistics, momentum (none before the first step), advisor and gradient samplers."""
    if watched == "deferred":
        request.getfixturevalue("deferred")
        monkeypatch.setattr(LearnedLayers, "__post_init__", fuse)  # as on a GPU
    run, before, samplers = Iteration.__call__, {}, []

    def noted(self, train, meta):
        if self.iteration + 1 == iteration:
            parts = {"model": self.model.model, "method": self.method, **self.parts()}
            samplers.append(self.engine.approximate.learned.samplers)
            before.update(copy.deepcopy({name: part.state_dict() for name, part in parts.items()}))
        return run(self, train, meta)

    spoil(monkeypatch, iteration, infinite_image)
    monkeypatch.setattr(Iteration, "__call__", noted)
    learned = {"approx_meta": True, "approx_layers": "learned", "approx_budget": 2, "meta_interval": 1, "model": "resnet8"}
    with pytest.raises(UserError, match=f"Iteration {iteration} "):
        train_config(settings(tmp_path / "run", method="mfrw-mes", **learned))
    assert all(parameter.isfinite().all() for parameter in samplers[-1].parameters())
    saved = checkpoint.load(tmp_path / "run" / "replay.pt")
    assert before["optimizer"]["state"].keys() == (set() if iteration == 1 else saved["optimizer"]["state"].keys())
    for name, state in before.items():
        if name != "iteration":
            torch.testing.assert_close(saved[name], state, rtol=0, atol=0, msg=lambda said, name=name: f"{name}: {said}")


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what a step reads back from its device, and what it copies to be kept."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "_to_copy"):
            self.found.append((name, tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


def test_a_deferred_watch_reads_one_number_and_that_of_the_iteration_before(tmp_path, monkeypatch, deferred):
    run = trainer(method="mfrw-mes", nan_policy="stop")
    run.folder = RunFolder(tmp_path)
    read = []
    monkeypatch.setattr(watching._Pending, "read", lambda self: read.append(self.number) or [0.0])
    for iteration in range(1, 4):
        with Reads() as reads:
            run._watched_step(*run.batches(run.stages[0]))
        assert [kind for kind in reads.found if kind[0] != "_to_copy"] == []
        assert read == list(range(1, iteration))
    run._settle()
    assert read == [1, 2, 3]


def test_what_an_iteration_began_with_is_kept_without_new_tensors(tmp_path):
    run = trainer(method="mfrw-mes", nan_policy="stop")
    run.folder = RunFolder(tmp_path)
    for _ in range(4):
        run._watched_step(*run.batches(run.stages[0]))
    slots = [beginning._moved._copies for beginning in run.recorder._beginnings]
    where = [[tensor.data_ptr() for tensor in slot] for slot in slots]
    assert len(where[0]) > 16
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch,
            "_foreach_copy_",
            lambda to, of: launched.append(len(to)) or [a.copy_(b) for a, b in zip(to, of, strict=True)],
        )
        for _ in range(2):
            run._watched_step(*run.batches(run.stages[0]))
    assert len(launched) == 2
    assert [[tensor.data_ptr() for tensor in slot] for slot in slots] == where


def test_a_snapshot_is_of_then():
    a, b = torch.ones(2), torch.zeros(3, dtype=torch.int64)
    snapshot = replay_record.Snapshot()
    snapshot.take({"a": a, "more": [b, 3, None, "x"]})
    a.fill_(7)
    assert snapshot.state()["more"][1:] == [3, None, "x"]
    assert torch.equal(snapshot.state()["a"], torch.ones(2))
    snapshot.take({"a": a[:1], "more": []})  # of another form
    assert snapshot.state()["more"] == []
    assert torch.equal(snapshot.state()["a"], torch.full((1,), 7.0))


@pytest.mark.parametrize(
    ("device", "changes", "deferred"),
    [
        ("cuda", {}, True),
        ("cuda", {"optimizer": "nesterov"}, True),
        ("cuda", {"nan_policy": "skip"}, False),
        ("cuda", {"nan_policy": "ignore"}, False),
        ("cuda", {"optimizer": "lamb"}, False),
        ("cpu", {}, False),
    ],
)
def test_where_the_watch_is_deferred(device, changes, deferred):
    assert assembly.defers(resolve(Config, **changes), Execution(torch.device(device))) == deferred
