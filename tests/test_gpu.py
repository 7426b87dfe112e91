"""What only a GPU can show. Skipped, saying so, where there is none."""

import pytest
import torch

from fastadvisor.config import Config, resolve
from fastadvisor.data import load_source, prepare
from fastadvisor.metagrad import ForwardEngine, ReferenceEngine
from fastadvisor.trainer import Trainer, train_config
from tests.metagrad.problem import Problem, plain, problem, relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")
QUIET = {"progress": False, "tensorboard": False, "device": "cuda"}


@pytest.mark.parametrize("method", ["mfrw", "mes", "mfrw-mes", "mw-net", "l2rw"])
def test_forward_equals_double_backward(method):
    task = problem(method)
    if task.method.advisor is not None:
        task.method.advisor.to("cuda")
    task = Problem(
        task.model.to("cuda"),
        task.method,
        type(task.train)(*(part.to("cuda") for part in task.train)),
        type(task.meta)(*(part.to("cuda") for part in task.meta)),
    )
    expected, got = task.gradient(ReferenceEngine(plain)), task.gradient(ForwardEngine(plain))
    assert relative(got.gradients, expected.gradients) <= 1e-10
    near = task.gradient(ForwardEngine(plain, tangent="difference"))
    assert relative(near.gradients, expected.gradients) <= 0.05


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"amp": True},
        {"approx_meta": True, "validate_meta_every": 0},
        {"amp": True, "approx_meta": True, "validate_meta_every": 0},
    ],
    ids=["exact", "exact-amp", "approx", "approx-amp"],
)
def test_a_step_never_waits_for_the_device(changes):
    config = resolve(Config, **changes, **QUIET)
    run = Trainer(config, prepare(load_source(config), config, 0), torch.device("cuda"))
    run.step(*run._batches(run.phases[0]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run.step(*run._batches(run.phases[0]))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_and_its_memory(tmp_path):
    result = train_config(resolve(Config, epochs=2, amp=True, approx_meta=True, output=str(tmp_path / "run"), **QUIET))
    assert result.summary["device"].startswith("cuda")
    assert 1 < result.summary["peak_memory_mb"] < 2000
    resumed = train_config(
        resolve(Config, epochs=2, amp=True, approx_meta=True, output=str(result.folder), resume=True, **QUIET)
    )
    assert resumed.summary["test_top1"] == result.summary["test_top1"]
