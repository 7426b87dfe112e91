"""What only a GPU can show. Skipped, saying so, where there is none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import precision
from fastadvisor.commands.train import train_config
from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.loading import build_loaders
from fastadvisor.loading.backends import dali
from fastadvisor.metagrad import ForwardEngine, ReferenceEngine
from fastadvisor.methods import METHODS
from fastadvisor.training.saved_run import SavedRun
from fastadvisor.training.trainer import Trainer
from fastadvisor_kernels import Bernoulli, backend, mes_cross_entropy, reweight_features, tangent_loss
from tests.checkpoints import loss_scale
from tests.distributed.test_equivalence import torchrun
from tests.kernels.exercise import exercise
from tests.metagrad.problem import Problem, plain, problem, relative
from tests.photos import write_photos
from tests.replays import check_bad_numbers_reach_no_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")
QUIET = {"progress": False, "tensorboard": False, "device": "cuda", "cuda_graph": "auto"}


@pytest.mark.parametrize("method", ["mfrw", "mes", "mfrw-mes", "mw-net", "l2rw"])
def test_forward_equals_double_backward(method):
    task = problem(method)
    task.method.to("cuda")
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
        {"nan_policy": "stop"},
        {"amp": True},
        {"approx_meta": True, "validate_meta_every": 0},
        {"amp": True, "approx_meta": True, "validate_meta_every": 0},
    ],
    ids=["exact", "exact-watched", "exact-amp", "approx", "approx-amp"],
)
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_a_step_never_waits_for_the_device(changes, graph):
    config = resolve(Config, **{"nan_policy": "ignore", "ema_decay": 0.9, "clip_grad_norm": 1.0, **changes}, **QUIET)
    run = Trainer(config, prepare(load_source(config), config, 0), torch.device("cuda"))
    for _ in range(10):  # both kinds of iteration are warm, and recorded
        run.iterate(*run.batches(run.stages[0]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            (run.iterate if graph else run.step)(*run.batches(run.stages[0]))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def in_float64(**settings):
    """A trainer whose numbers do not depend on the order of additions as much as float32's do."""
    config = resolve(Config, **{**QUIET, "batch_size": 32, "meta_batch_size": 32, **settings})
    run = Trainer(config, prepare(load_source(config), config, 0), torch.device("cuda"))
    for module in [run.model, *([] if run.method.advisor is None else [run.method.advisor])]:
        module.double().train()
    return run


def moved(run, steps):
    for index in range(steps):
        run.set_lr(run.stages[0], index)
        train, meta = run.batches(run.stages[0])
        run.iterate(train._replace(images=train.images.double()), meta and meta._replace(images=meta.images.double()))
    run.step.watch and run.step.watch.settle()
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ce"},
        {"method": "mfrw-mes"},
        {"method": "mw-net"},
        {"method": "l2rw"},
        {"schedule": "cosine", "warmup_epochs": 1, "layer_decay": 0.9},
        {"approx_meta": True, "validate_meta_every": 9},
        {"accumulate": 2},
        {"lean": True},
        {"advisor_inputs": "attached"},
        {"model": "mobilenet_v3_small", "meta_interval": 2},
    ],
    ids=lambda settings: " ".join(f"{key}={value}" for key, value in settings.items()),
)
def test_replays_of_a_cuda_graph_are_the_iterations_they_stand_for(settings):
    """After 50 steps; one of the models has dropout, whose units a tangent pass has to drop again."""
    ends, replays = [], []
    for warm_up in (3, 1000):
        run = in_float64(**settings)
        begun = torch.cat([parameter.detach().flatten().clone() for parameter in run.model.parameters()])
        run.take.warm_up = warm_up
        ends.append(moved(run, 50))
        replays.append(run.take.replays)
        assert run.take.reason is None
    assert replays[0] >= 30
    assert replays[1] == 0
    assert float((ends[0] - ends[1]).norm() / (ends[1] - begun).norm()) < 1e-5


def test_what_a_method_prepares_for_an_epoch_is_in_its_replays(tmp_path, monkeypatch):
    class Rising(METHODS["ce"]):
        """Its loss is multiplied by a number on the host, which a graph holds as a constant."""

        def begin_epoch(self, clock):
            self.factor = 1.0 + clock.epoch

        def sample_losses(self, z_BC, batch):
            return self.factor * super().sample_losses(z_BC, batch)

    monkeypatch.setitem(METHODS, "ce", Rising)
    losses = []
    for graph in ("auto", "off"):
        settings = {**QUIET, "method": "ce", "epochs": 3, "lr": 1e-6, "cuda_graph": graph, "output": str(tmp_path / graph)}
        train_config(resolve(Config, **settings))
        losses.append([record["loss"] for record in SavedRun.open(tmp_path / graph).history()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # of weights that hardly move: one, two and three times the first
    assert losses[0][2] > 2 * losses[0][0]


def test_a_replay_is_no_slower_than_an_eager_iteration():
    """Launches are what an eager iteration waits for; nowhere near a tie, or this would not be asked of a test."""
    config = resolve(Config, **QUIET, nan_policy="ignore")
    run = Trainer(config, prepare(load_source(config), config, 0), torch.device("cuda"))
    batches, times = run.batches(run.stages[0]), {}
    for name, take in (("eager", run.step), ("replayed", run.iterate)):
        for _ in range(5):
            take(*batches)
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            take(*batches)
        end.record()
        torch.cuda.synchronize()
        times[name] = start.elapsed_time(end)
    assert times["replayed"] < times["eager"]


def test_bad_numbers_in_a_replay_do_not_reach_the_weights():
    config = resolve(Config, **QUIET)
    check_bad_numbers_reach_no_weight(Trainer(config, prepare(load_source(config), config, 0), torch.device("cuda")))


def test_auto_augment_and_cutout_never_wait_for_the_device():
    config = resolve(Config, auto_augment="cifar10", cutout=4, **QUIET)
    stream = Trainer(config, prepare(load_source(config), config, 0), torch.device("cuda")).train_loader
    for _ in range(20):
        stream.next_batch()  # the constants get to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            stream.next_batch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not dali.available(), reason="NVIDIA DALI is not installed")
@pytest.mark.parametrize("crop", ["pad", "random", "resized"])
def test_dali_on_the_gpu_makes_the_batches_of_the_torch_loader(tmp_path, crop):
    root, batches = write_photos(tmp_path, splits=("train", "test", "meta"), size=(400, 300)), {}
    (root / "train/ant/3.jpg").write_bytes((root / "train/ant/3.jpg").read_bytes()[:4000])
    for name in ("torch", "dali"):
        usual = {"loader": name, "crop": crop, "image_size": 96, "batch_size": 4, "meta_batch_size": 4, "workers": 2}
        config = resolve(Config, dataset="imagefolder", data_root=str(root), max_bad_fraction=0.1, **usual)
        loaders = build_loaders(config, prepare(load_source(config), config, 0), torch.device("cuda"))
        try:
            batches[name] = [loaders.train.next_batch() for _ in range(9)] + list(loaders.test)
            assert loaders.bad_count() == 1
        finally:
            loaders.close()
    for one, two in zip(batches["torch"], batches["dali"], strict=True):
        assert two.images.is_cuda
        assert torch.equal(one.ids, two.ids)
        assert torch.equal(one.labels, two.labels)
        assert float((one.images - two.images).abs().mean()) < 1 / (255 * 0.22)


def test_a_run_and_its_memory(tmp_path):
    result = train_config(resolve(Config, epochs=2, amp=True, approx_meta=True, output=str(tmp_path / "run"), **QUIET))
    assert result.summary["device"].startswith("cuda")
    assert 1 < result.summary["peak_memory_mb"] < 2000
    resumed = train_config(
        resolve(Config, epochs=2, amp=True, approx_meta=True, output=str(result.folder), resume=True, **QUIET)
    )
    assert resumed.summary["test_top1"] == result.summary["test_top1"]


def test_kernels_in_a_cuda_graph_draw_anew_at_each_replay():
    generator = torch.Generator("cuda").manual_seed(0)
    z, z_dot, v, u = (torch.randn(128, 1000, generator=generator, device="cuda").requires_grad_() for _ in range(4))
    y = torch.randint(1000, (128,), generator=generator, device="cuda")

    def step():
        beta = Bernoulli.draw(0.5, "cuda")
        h = reweight_features(z, u)
        loss = mes_cross_entropy(h, v, y, beta, reduction="mean") + tangent_loss(h, z_dot, v, y, beta, reduction="mean")
        return beta.seed, loss, *torch.autograd.grad(loss, (z, z_dot, v, u))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed, *got = step()
    seeds = set()
    for _ in range(3):
        graph.replay()
        seeds.add(int(seed))
        beta = Bernoulli(0.5, seed.clone())
        with backend("reference"):
            h = reweight_features(z, u)
            loss = mes_cross_entropy(h, v, y, beta, reduction="mean") + tangent_loss(h, z_dot, v, y, beta, reduction="mean")
            want = [loss.detach(), *torch.autograd.grad(loss, (z, z_dot, v, u))]
        torch.testing.assert_close([part.detach() for part in got], want, rtol=1e-4, atol=1e-6)
    assert len(seeds) == 3


def test_kernels_never_wait_for_the_device():
    exercise("cuda")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        exercise("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_under_deterministic_algorithms():
    """torch then fills whatever is allocated empty with NaN: an element that is not written shows."""
    z, v = (torch.randn(33, 1023, device="cuda").requires_grad_() for _ in range(2))
    y = torch.randint(1023, (33,), device="cuda")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            loss = mes_cross_entropy(z, v, y, 0.9, reduction="mean")
            results.append([loss.detach(), *torch.autograd.grad(loss, (z, v))])
    finally:
        torch.use_deterministic_algorithms(before)
    for first, second in zip(*results, strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_kernels_on_another_device_than_the_current_one():
    z = torch.randn(5, 7, device="cuda:1")
    loss = mes_cross_entropy(z, z, torch.zeros(5, dtype=torch.long, device="cuda:1"))
    with backend("reference"):
        torch.testing.assert_close(loss, mes_cross_entropy(z, z, torch.zeros(5, dtype=torch.long, device="cuda:1")))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [
        program,
        "--tool",
        tool,
        "--report-api-errors",
        "no",
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "tests.kernels.exercise",
    ]
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else small overruns stay within torch's own blocks
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=300)
    if "not supported" in done.stdout:
        pytest.skip("compute-sanitizer refuses this device")
    assert done.returncode == 0, done.stdout[-2000:]


def test_mixed_precision_keeps_the_meta_gradient():
    """The gate of ``python -m benchmarks.precision``, bfloat16 and float16, every method, on trained weights."""
    config = resolve(Config, **QUIET, epochs=10)
    found = precision.summarised(precision.cosines(precision.trained(config), 8))
    assert {row["dtype"] for row in found} == {"bfloat16", "float16"}
    assert [row for row in found if not row["mean"] >= precision.GATE] == []


def test_float16_trains_with_its_loss_scale(tmp_path):
    result = train_config(resolve(Config, **QUIET, epochs=10, amp=True, amp_dtype="float16", output=str(tmp_path / "run")))
    assert loss_scale(tmp_path / "run" / "last.pt") >= 1
    assert all(value.isfinite().all() for value in result.model.state_dict().values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_by_torchrun(tmp_path):
    """NCCL; on one GPU, and without any, tests/distributed does this with gloo."""
    done = torchrun(2, "fastadvisor", "train", "--epochs", "3", "--sync-bn", "--amp", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "model.pt").is_file()
