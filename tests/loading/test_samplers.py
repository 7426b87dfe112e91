"""How the samples of an epoch are drawn, and what a resumed stream draws."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch

from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.loading import build_loaders
from fastadvisor.loading.order import Order
from fastadvisor.loading.samplers import SAMPLERS

IDS = np.arange(100, 160)
LABELS = np.array([0] * 40 + [3] * 15 + [7] * 5)


def epoch(name, seed=0):
    return SAMPLERS[name].epoch(IDS, LABELS, np.random.default_rng(seed))


def test_shuffled_is_every_sample_once():
    assert sorted(epoch("shuffled")) == list(IDS)


def test_class_aware_is_every_class_equally_often_and_evenly_within_it():
    drawn = epoch("class-aware")
    counts, of_class = Counter(drawn.tolist()), dict(zip(IDS.tolist(), LABELS.tolist(), strict=True))
    assert Counter(of_class[one] for one in drawn.tolist()) == {0: 20, 3: 20, 7: 20}
    assert {counts[one] for one in range(155, 160)} == {4}
    assert {counts[one] for one in range(140, 155)} == {1, 2}
    assert max(counts[one] for one in range(100, 140)) == 1
    for turn in drawn.reshape(-1, 3):
        assert sorted(of_class[one] for one in turn.tolist()) == [0, 3, 7]
    assert np.array_equal(drawn, epoch("class-aware"))
    assert not np.array_equal(drawn, epoch("class-aware", 1))


def test_ranks_share_the_batches_of_a_sampler():
    orders = [Order(IDS, 12 // ranks, 5, rank, ranks, LABELS) for rank, ranks in ((0, 1), (0, 2), (1, 2))]
    for order in orders:
        order.spec(0)
        order.use(SAMPLERS["class-aware"])
    for number in range(12):
        whole, *parts = (order.spec(number).ids for order in orders)
        assert np.array_equal(whole, np.concatenate(parts))
        assert len({*LABELS[whole - 100]}) == 3


def streams(loader):
    config = resolve(Config, dataset="digits", batch_size=50, imbalance_factor=20, loader=loader, workers=0, device="cpu")
    return build_loaders(config, prepare(load_source(config), config, 0), torch.device("cpu"))


@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_a_stream_goes_on_by_its_sampler_after_a_resume(loader):
    first, second = streams(loader).train, streams(loader).train
    steps = len(first)
    for _ in range(steps):
        first.next_batch()
    first.use(SAMPLERS["class-aware"], anew=True)
    batches = [first.next_batch() for _ in range(steps)]
    counts = torch.bincount(torch.cat([batch.labels for batch in batches]), minlength=10)
    assert counts.max() - counts.min() <= 5
    state = copy.deepcopy(first.state_dict())
    wanted = [first.next_batch() for _ in range(steps + 2)]
    second.load_state_dict(state)
    second.use(SAMPLERS["class-aware"], anew=False)
    for one in wanted:
        assert all(torch.equal(a, b) for a, b in zip(one, second.next_batch(), strict=True))
