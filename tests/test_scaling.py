"""The arithmetic of ``benchmarks.scaling``, on cases small enough for paper."""

from dataclasses import dataclass, field

import pytest
import torch
from torchvision.models import resnet18

from benchmarks import scaling
from benchmarks.scaling import Averaging, Engine, Machine, Network
from fastadvisor.iterations import build_iteration
from fastadvisor.metagrad import ForwardEngine
from fastadvisor.models.sync_batch_norm import synchronise
from fastadvisor.runtime.ranks import Ranks
from tests.metagrad.problem import plain, problem

SIMPLE = Machine(tflops=1e-12, utilisation=1.0, node=2, nvlink=100.0, network=10.0, latency=0.0)
NET = Network(parameters=100, upper=60, upper_share=0.5, layer_share=0.4, head=20, advisor=10, flops=1.0, normalisations=3)


def engine(name):
    return next(one for one in scaling.engines(NET) if one.name == name)


def test_a_ring_sends_each_byte_twice_but_for_its_own_part():
    assert SIMPLE.all_reduce(80, 1) == 0
    assert SIMPLE.all_reduce(80, 2) == pytest.approx(80 / 100)
    assert SIMPLE.all_reduce(80, 4) == pytest.approx(1.5 * 80 / 10)
    assert Machine(nvlink=1e30, latency=1.0).all_reduce(1, 8) == pytest.approx(6)
    assert Machine(network=1e30, latency=1.0).averaged(3 * scaling.BUCKET_BYTES, 16) == pytest.approx(3 * 8)


@pytest.mark.parametrize(
    ("name", "parameters", "units"),
    [
        ("plain", 100, 3),
        ("exact", 310, 10),
        ("exact, `--lean`", 310, 11),
        ("exact, one step behind", 210, 9),
        ("`--approx-meta`", 100 + 30 + 5, 4.5),
        ("… learned layers", 100 + 20 + 20 + 10 + 5, 6.5),
    ],
)
def test_what_each_engine_averages_and_computes(name, parameters, units):
    assert scaling.bytes_moved(engine(name), 2) == pytest.approx(4 * parameters)
    assert scaling.compute_seconds(engine(name), NET, SIMPLE, 2) == pytest.approx(2 * units)


@dataclass(frozen=True)
class Counting(Ranks):
    """One process that counts what it would send."""

    sent: list = field(default_factory=list)

    def total(self, tensor):
        self.sent.append(tensor.numel())
        return tensor


@pytest.mark.parametrize(
    ("name", "method", "settings"),
    [
        ("plain", "ce", {}),
        ("exact", "mfrw", {}),
        ("exact, `--lean`", "mfrw", {"lean": True}),
        ("exact, one step behind", "mfrw", {"behind": True}),
    ],
)
def test_the_messages_of_a_synchronised_normalisation(name, method, settings):
    task, ranks = problem(method), Counting()
    norms = synchronise(task.model.model, ranks)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    advisor = None if task.method.advisor is None else torch.optim.SGD(task.method.advisor.parameters(), lr=0.1)
    step = build_iteration(task.model, task.method, optimizer, advisor, ForwardEngine(plain), plain, **settings)
    step(task.train, task.meta)
    assert len(ranks.sent) == norms * engine(name).norm_collectives


def test_a_backward_pass_hides_all_but_the_last_bucket():
    long, short = Engine("", 3, (Averaging(100, 2),), 0), Engine("", 3, (Averaging(100, 0),), 0)
    assert scaling.exposed_seconds(long, NET, SIMPLE, 1000, 2) == pytest.approx(4)  # one bucket is the last one
    assert scaling.exposed_seconds(short, NET, SIMPLE, 1000, 2) == pytest.approx(4)
    large = Engine("", 3, (Averaging(scaling.BUCKET_BYTES, 2),), 0)
    last = scaling.BUCKET_BYTES / 100
    assert scaling.exposed_seconds(large, NET, SIMPLE, 0, 2) == pytest.approx(4 * last)
    assert scaling.exposed_seconds(large, NET, SIMPLE, 1e9, 2) == pytest.approx(last)


def test_a_gradient_every_other_iteration_waits_in_full_half_as_often():
    whole = Engine("", 3, (Averaging(2 * scaling.BUCKET_BYTES, 2),), 0)
    seldom = Engine("", 3, (Averaging(2 * scaling.BUCKET_BYTES, 2, every=2),), 0)
    for batch in (0, 1e9):
        wait = scaling.exposed_seconds(whole, NET, SIMPLE, batch, 2)
        assert scaling.exposed_seconds(seldom, NET, SIMPLE, batch, 2) == pytest.approx(wait / 2)


def test_the_model_is_counted_and_not_guessed():
    net = scaling.count("resnet18", 64, 10)
    model = resnet18(num_classes=10)
    assert net.parameters == sum(parameter.numel() for parameter in model.parameters())
    upper = (model.layer3, model.layer4, model.fc)
    assert net.upper == sum(parameter.numel() for module in upper for parameter in module.parameters())
    assert net.normalisations == sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert 0.3 < net.upper_share < 0.7
    assert scaling.count("resnet18", 128, 10).flops == pytest.approx(4 * net.flops, rel=0.01)


def test_one_gpu_waits_for_nobody_and_the_tables_hold_every_engine():
    for text in (scaling.table(NET, SIMPLE, 8, 0), scaling.table(NET, SIMPLE, None, 512)):
        lines = text.splitlines()
        assert len(lines) == 2 + len(scaling.engines(NET))
        assert all(line.split("|")[2].strip() == "100" for line in lines[2:])
    assert "–" in scaling.table(NET, SIMPLE, None, 512)  # fewer images than GPUs
