"""The step benchmark: what it refuses, what it counts, and that the others' iterations are the same iteration."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import approximation, peak_memory, phases, step, tables
from benchmarks.contenders import (
    CONTENDERS,
    PEER_LIMIT,
    REFERENCE,
    Contender,
    Setting,
    Unavailable,
    batches,
    chosen,
    iterate,
    plain,
    require,
)
from fastadvisor.config import Config, resolve

CPU = torch.device("cpu")
DOUBLE = Setting("resnet8", CPU, dtype=torch.float64)
TINY = step.Plan(model="resnet8", batch_size=4, rounds=1, keep_memory=False, memory_batch_size=None, check_batch_size=4)
OURS = "plain,double_backward,shared_double_backward,exact,approx"


def measured(**changes):
    return {**step.measure(replace(TINY, **changes), CPU), "command": "-"}


def one_iteration(name):
    contender = CONTENDERS[name]
    try:
        require(contender)
    except Unavailable as reason:
        pytest.skip(f"{name}: {reason}")
    iteration = contender.build(DOUBLE)
    torch.manual_seed(1)
    iteration(*batches(4, CPU, torch.float64))
    return iteration


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("name", ["double_backward", "higher", "torchopt"])
def test_the_others_take_the_same_step(name):
    """Meta-gradient, weights, running statistics and advisor after one iteration, against the reference engine."""
    got, expected = one_iteration(name), one_iteration(REFERENCE)
    gradients = [[p.grad for p in iteration.method.advisor.parameters()] for iteration in (got, expected)]
    assert (flat(gradients[0]) - flat(gradients[1])).norm() <= PEER_LIMIT * flat(gradients[1]).norm()
    torch.testing.assert_close(got.model.state_dict(), expected.model.state_dict(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(got.method.advisor.state_dict(), expected.method.advisor.state_dict(), rtol=1e-6, atol=1e-8)


def test_keys_and_table():
    result = measured(only=OURS)
    for name in CONTENDERS:
        for key in ("ms", "ms_quartiles", "peak_mb", "peak_raw_mb", "error", "cosine"):
            assert f"{name}_{key}" in result
        assert (result[f"{name}_ms"] is not None) == (name in OURS.split(","))
    assert result["exact_error"] <= 1e-10
    assert 0 < result["approx_cosine"] < 1
    assert not result["amp"]
    assert result["environment"]["torch"] == torch.__version__
    json.dumps(result, allow_nan=False)
    rows = [line for line in tables.report(result).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(OURS.split(","))
    assert len({row.count("|") for row in rows}) == 1


def test_two_precisions_make_two_sets_of_columns():
    result = measured(only="plain", amps=(False, True))
    assert result["plain_ms"] > 0
    assert result["plain_amp_ms"] > 0
    assert "| bfloat16: ms |" in tables.report(result)


def test_bfloat16_alone_is_under_both_names():
    result = measured(only="plain", amps=(True,))
    assert result["amp"]
    assert result["plain_ms"] == result["plain_amp_ms"] > 0
    assert len(result["plain_amp_ms_quartiles"]) == 2


def wrong(monkeypatch, name, factor):
    """Make ``name`` leave ``factor`` times the meta-gradient."""
    contender = CONTENDERS[name]

    def build(setting):
        iteration = contender.build(setting)
        adam = iteration.advisor_optimizer.step

        def spoilt():
            adam()
            for parameter in iteration.method.advisor.parameters():
                parameter.grad = parameter.grad * factor

        iteration.advisor_optimizer.step = spoilt
        return iteration

    monkeypatch.setitem(CONTENDERS, name, replace(contender, build=build))


@pytest.mark.parametrize("factor", [1 + 1e-6, float("nan")])
def test_a_red_exact_engine_stops_everything(monkeypatch, factor):
    wrong(monkeypatch, "exact", factor)
    with pytest.raises(SystemExit, match="nothing is timed"):
        measured(only="exact")


def test_another_red_contender_is_not_timed(monkeypatch):
    wrong(monkeypatch, "double_backward", 1.001)
    result = measured(only="exact,double_backward")
    assert result["double_backward_ms"] is None
    assert result["exact_ms"] > 0
    text = tables.report(result)
    assert "double_backward: the meta-gradient is off by 1.00e-03 (limit 1e-08), so it is not timed." in text
    assert "textbook" not in text


def test_a_missing_library_is_left_out_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "higher", None)
    result = measured(only="higher")
    assert result["higher_ms"] is None
    assert "higher: not installed; pip install 'fastadvisor[peers]'." in tables.report(result)


def test_a_library_that_fails_is_left_out_with_the_reason(monkeypatch):
    def build(setting):
        raise AttributeError("module has no\nattribute")

    monkeypatch.setitem(CONTENDERS, "higher", Contender(build, "higher", PEER_LIMIT, needs="json"))
    reason = measured(only="higher")["left_out"]["higher"]
    assert reason == f"does not work with torch {torch.__version__} (AttributeError: module has no attribute)"


def test_a_cycle_is_divided_by_its_iterations(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(step.time, "perf_counter", lambda: next(clock))
    calls = []
    cycles = {"one": step.Cycle(lambda: calls.append(1)), "four": step.Cycle(lambda: calls.append(4), 4)}
    assert step.interleaved(cycles, 2, CPU) == {"one": [1000.0] * 2, "four": [250.0] * 2}
    assert calls == [1, 4, 4, 4, 4] * 3  # in turn; the first round warms up


def test_contenders_by_name():
    assert chosen("exact, approx") == ["plain", "exact", "approx"]
    with pytest.raises(SystemExit, match="no contender exakt"):
        chosen("exakt")


def test_peak_memory_of_a_child_holds_at_least_the_activations():
    measured = peak_memory.peak_in_child("exact", Setting("resnet8", CPU), 64)
    if measured["peak_mb"] is None:
        pytest.skip("no /proc/self/status: the resident set is not told here")
    # At least the images, and the output of each convolution of a ResNet-8 once: channels × layers at 32 × 32 pixels, then the
    # same for the two smaller sizes.
    assert (
        64 * (3 * 1024 + 16 * 3 * 1024 + 32 * 2 * 256 + 64 * 2 * 64) * 4 / 2**20 < measured["peak_mb"] < measured["peak_raw_mb"]
    )


def test_a_child_that_fails_says_why(monkeypatch):
    monkeypatch.setitem(CONTENDERS, "plainer", Contender(plain, "plainer", advised=False))  # here, not in the child
    left_out = {}
    result = step.memory(["plainer"], Setting("resnet8", CPU), 4, left_out)
    assert result["plainer_peak_mb"] is None
    assert "invalid choice: 'plainer'" in left_out["plainer"]


def test_the_printed_command_leaves_out_where_figures_go():
    shown = tables.command(["--model", "resnet8", "--json", "a b.json", "--markdown=x.md", "--amp"])
    assert shown == "python -m benchmarks.step --model resnet8 --amp"


def test_a_meta_batch_goes_in_where_a_meta_step_is_due():
    class Iteration:
        meta_is_due = True

        def __call__(self, train, meta):
            seen.append(meta)
            self.meta_is_due = not self.meta_is_due

    seen, iteration = [], Iteration()
    for _ in range(3):
        iterate(CONTENDERS["exact"], iteration, "train", "meta")
    iterate(CONTENDERS["plain"], iteration, "train", "meta")
    assert seen == ["meta", None, "meta", None]


def test_the_phases_of_a_step_are_all_there():
    found = phases.measure(Setting("resnet8", CPU), batch_size=4, rounds=1)
    assert list(found) == list(phases.UNITS)
    assert all(ms > 0 for ms in found.values())
    assert "the tangent by a difference" not in phases.measure(Setting("resnet8", CPU, amp=True), batch_size=4, rounds=1)
    assert sum(units for name, units in phases.UNITS.items() if name != "plain step" and not name.startswith("the")) == 10


def test_the_approximations_are_probed_without_touching_the_training(tmp_path):
    config = resolve(Config, model="resnet14", epochs=1, device="cpu", batch_size=60, meta_batch_size=20)
    records = approximation.watch(config, every=4, say=lambda line: None)
    assert [record["iteration"] for record in records] == [0, 4]
    found = approximation.averages(records)
    assert found["differences"]["cosine"] > 0.999
    assert found["random 4"]["cosine"] < 1
    assert found["top block"]["error"] > found["differences"]["error"]
    assert "| top 2 stages |" in approximation.table(records)
    unwatched = approximation.watch(config, every=100, say=lambda line: None)
    assert unwatched[-1]["test_top1"] == records[-1]["test_top1"]
    approximation.draw(records, "a title", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
