"""The kernels' benchmark: what it refuses, what it counts, what it says."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.kernels import __main__ as command
from benchmarks.kernels import epilogue, timing
from benchmarks.kernels.contenders import LOSS, OPERATIONS, Contender
from benchmarks.kernels.report import report
from benchmarks.kernels.tune import launches, neighbours, tune
from fastadvisor_kernels import mes_cross_entropy
from tests.kernels.cases import DEVICE

CPU = torch.device("cpu")
QUICK = ["--sizes", "small", "--rounds", "1", "--repeats", "1", "--dtypes", "float32", "--device", "cpu"]


@pytest.fixture
def uncompiled(monkeypatch):
    """Only what takes no compiler: the loss by plain torch and by ours."""
    few = {name: LOSS[name] for name in ("eager", "ours", "one_launch", "torch_plain", "liger")}
    monkeypatch.setattr(command, "OPERATIONS", {"mes_cross_entropy": replace(OPERATIONS["mes_cross_entropy"], contenders=few)})
    return few


def test_rows_and_report(uncompiled, tmp_path, capsys):
    command.main([*QUICK, "--json", str(tmp_path / "k.json"), "--markdown", str(tmp_path / "k.md")])
    result = json.loads((tmp_path / "k.json").read_text())
    timed = [row for row in result["rows"] if "phase" in row]
    assert {(row["batch"], row["classes"]) for row in timed} == {(128, 10), (128, 1000)}
    assert {row["phase"] for row in timed if row["contender"] == "ours"} == {"forward", "backward", "both"}
    assert {row["phase"] for row in timed if row["contender"] == "one_launch"} == {"both"}
    for row in timed:
        assert row["wall_us"] > 0
        assert row["kernel_us"] is None
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["wall_us"] * 1e6)
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "k.md").read_text().strip()
    assert "these are the torch twins" in text
    assert "liger: needs a GPU." in text
    assert "python -m benchmarks.kernels --sizes small" in text


@pytest.mark.parametrize(
    "spoil", [lambda loss: loss * 1.01, lambda loss: loss * float("nan"), lambda loss: 0.1 * loss.detach() + 0.9 * loss]
)
def test_a_red_contender_is_not_timed(uncompiled, spoil, monkeypatch, capsys):
    wrong = Contender("wrong", lambda: lambda z, v, y: spoil(mes_cross_entropy(z, v, y)))
    monkeypatch.setitem(uncompiled, "ours", wrong)
    with pytest.raises(SystemExit, match="A check is red, or a contender failed"):
        command.main(QUICK)
    text = capsys.readouterr().out
    assert "so it is not timed" in text
    assert "| wrong |" not in text


def test_a_contender_that_fails_does_not_take_the_others_along(uncompiled, monkeypatch, capsys):
    def fail(z, v, y):
        raise NotImplementedError("no\nsuch thing")

    monkeypatch.setitem(uncompiled, "eager", Contender("failing", lambda: fail))
    with pytest.raises(SystemExit, match="a contender failed"):
        command.main(QUICK)
    text = capsys.readouterr().out
    assert "eager: failed and is not timed (NotImplementedError: no such thing)." in text
    assert "| 128 × 1000 | ours |" in text


def test_the_bytes_that_must_move():
    loss = OPERATIONS["mes_cross_entropy"]
    moved = [loss.bytes(phase, 10, 4, contender=LOSS["ours"]) for phase in timing.PHASES]
    assert moved == [80, 160, 240]
    assert loss.bytes("both", 10, 4, contender=LOSS["one_launch"]) == 160
    assert loss.bytes("both", 10, 4, contender=LOSS["liger"]) == 120
    dual = OPERATIONS["reweight_dual"]
    # In bfloat16 (3 · 2 + 2 · 4) forward, and as much with three gradients more backward: what comes out is float32.
    assert [dual.bytes(phase, 10, 2, contender=dual.contenders["ours"]) for phase in timing.PHASES] == [140, 200, 340]


def test_sizes():
    assert command.sizes("all", CPU) == [(128, classes) for classes in (10, 100, 365, 1000, 8142)]
    on_gpu = command.sizes("all", torch.device("cuda"))
    assert {classes for _, classes in on_gpu} == {10, 100, 365, 1000, 8142, 32_768, 131_072}
    assert max(batch * classes for batch, classes in on_gpu) >= 2**24


def test_no_time_left(uncompiled, capsys):
    command.main([*QUICK, "--seconds", "-1"])
    assert (
        "No time was left for: mes_cross_entropy, float32, 128 × 10; mes_cross_entropy, float32, 128 × 1000."
        in capsys.readouterr().out
    )


def test_what_is_slower_than_the_compiler_is_named():
    where = {"device": "H200", "torch": "2", "triton": "3", "commit": "abc"}
    size = {"operation": "tangent_loss", "dtype": "float32", "batch": 128, "classes": 10, "phase": "both"}
    rows = [
        {
            **size,
            "contender": name,
            "wall_us": 30.0,
            "kernel_us": micros,
            "bytes": 8,
            "bytes_per_second": 1.0,
            "share_of_copy": 0.5,
        }
        for name, micros in (("eager", 20.0), ("compiled", 4.0), ("ours", 5.0))
    ]
    shown = {"command": "-", "device": "cuda", "rounds": 3, "environment": where, "copy_bandwidth": 4e12, "rows": rows}
    text = report({**shown, "not_begun": []})
    assert "Slower than compiled: tangent_loss, float32, 128 × 10, both: 5.0 µs against 4.0." in text
    assert "| 128 × 10 | ours | – | – | 5.0 (30) | 0.50 | 1.25 |" in text


def test_names_that_are_not_there():
    with pytest.raises(SystemExit, match="unknown mes, float8"):
        command.parse(["--only", "mes", "--dtypes", "float8"])


def test_tuning_needs_a_gpu():
    with pytest.raises(SystemExit, match="need a GPU"):
        tune(CPU, 1, 1.0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_every_neighbour_of_a_tile_gives_the_same():
    for kernel, launch in launches(9, 100, torch.float32, torch.device(DEVICE)).items():
        outputs = [value for name, value in launch.arguments.items() if name in ("loss_ptr", "z_grad_ptr", "v_grad_ptr")]
        filled = [value for value in outputs if value is not None]
        found = []
        for entry in neighbours(launch, 9):
            for value in filled:
                value.fill_(float("nan"))
            entry.run()
            found.append([value.clone() for value in filled])
        assert len(found) > 3, kernel
        for values in found[1:]:
            torch.testing.assert_close(values, found[0], rtol=1e-5, atol=1e-6)


def test_the_epilogue_is_right():
    e, weight, bias, f = epilogue.make(40, 70, torch.device(DEVICE))
    launch, u, h = epilogue.plan_masked_linear(e, weight, bias, f)
    launch.run()
    expected = torch.nn.functional.linear(e, weight, bias)
    torch.testing.assert_close(u, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(h, f * torch.sigmoid(expected), rtol=1e-4, atol=1e-4)
