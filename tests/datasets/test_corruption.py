"""Counts and maps are method.md's numbers, written out here."""

import numpy as np
import pytest

from fastadvisor.datasets import corruption
from fastadvisor.datasets.readers import cifar
from fastadvisor.errors import UserError

NAMES = list(cifar.CIFAR10)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_long_tail_counts_of_cifar10_are_the_published_ones():
    assert corruption.long_tail_counts(4900, 10, 200) == [4900, 2719, 1509, 837, 465, 258, 143, 79, 44, 24]
    assert corruption.long_tail_counts(4900, 10, 100) == [4900, 2937, 1760, 1055, 632, 379, 227, 136, 81, 49]


@pytest.mark.parametrize(
    ("n_max", "classes", "totals"),
    [
        (4900, 10, {200: 10978, 100: 12156, 50: 13717, 20: 16683, 10: 20021}),
        (4990, 10, {200: 11177, 100: 12380, 50: 13967, 20: 16989, 10: 20391}),
        (490, 100, {200: 9304, 100: 10626, 50: 12354, 20: 15594, 10: 19183}),
    ],
)
def test_long_tail_totals_are_the_published_ones(n_max, classes, totals):
    assert {factor: sum(corruption.long_tail_counts(n_max, classes, factor)) for factor in totals} == totals


def test_one_class_has_no_tail():
    assert corruption.long_tail_counts(7, 1, 100) == [7]
    assert corruption.long_tail_profile([7], 100) == [7]


@pytest.mark.parametrize(
    ("available", "counts"),
    [
        ([100, 100, 100], [100, 31, 10]),
        ([90, 110, 100], [100, 31, 10]),  # a tenth too few is let pass
        ([89, 111, 100], [89, 28, 8]),  # more is not: the profile shrinks as a whole
        ([200, 20, 80], [63, 19, 6]),  # until class 1 can fill its place: 20 · √10 = 63
        ([150, 145, 8], [80, 25, 8]),  # until the last one can: 8 · 10 = 80
    ],
)
def test_the_profile_shrinks_until_all_classes_can_fill_it(available, counts):
    assert corruption.long_tail_profile(available, 10) == counts


def test_customary_flip_maps():
    assert corruption.flip_map(10) == [6, 9, 6, 0, 0, 1, 8, 6, 2, 4]
    pairs = [(9, 3), (4, 8), (1, 8), (8, 4), (2, 5), (7, 4), (9, 2), (8, 5), (6, 5), (5, 4)]
    assert corruption.flip2_map(10) == pairs
    assert corruption.flip_map(100)[:10] == [38, 13, 73, 10, 76, 6, 80, 65, 17, 1]


def test_flip_maps_leave_the_global_generator_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    corruption.flip_map(10)
    corruption.flip2_map(10)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_flip_sends_a_class_to_one_other(rate):
    labels = np.repeat(np.arange(10), 2000)
    noisy = corruption.corrupt(labels, corruption.noise_targets("flip", NAMES), rate, rng())
    changed = noisy != labels
    assert abs(changed.mean() - rate) < 0.012
    np.testing.assert_array_equal(noisy[changed], np.array(corruption.flip_map(10))[labels[changed]])


def test_flip_takes_a_map_of_ones_own():
    own = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    noisy = corruption.corrupt(np.arange(10), corruption.noise_targets("flip", NAMES, own), 1.0, rng())
    np.testing.assert_array_equal(noisy, own)


def test_flip2_splits_the_rate_in_halves():
    labels = np.repeat(np.arange(10), 4000)
    noisy = corruption.corrupt(labels, corruption.noise_targets("flip2", NAMES), 0.4, rng())
    for label, targets in enumerate(corruption.flip2_map(10)):
        shares = np.bincount(noisy[labels == label], minlength=10) / 4000
        assert shares[label] == pytest.approx(0.6, abs=0.03)
        assert shares[list(targets)] == pytest.approx([0.2, 0.2], abs=0.03)
        assert np.count_nonzero(shares) == 3


def test_uniform_draws_over_all_classes_the_own_one_included():
    labels = np.repeat(np.arange(10), 4000)
    noisy = corruption.corrupt(labels, corruption.noise_targets("uniform", NAMES), 0.5, rng())
    assert (noisy != labels).mean() == pytest.approx(0.45, abs=0.01)
    shares = np.bincount(noisy[labels == 3], minlength=10) / 4000
    assert np.delete(shares, 3) == pytest.approx(np.full(9, 0.05), abs=0.015)


def test_semantic_swaps_look_alikes_by_name():
    names = NAMES[::-1]  # the order of the classes must not matter
    noisy = corruption.corrupt(np.arange(10), corruption.noise_targets("semantic", names), 1.0, rng())
    became = {names[i]: names[target] for i, target in enumerate(noisy) if i != target}
    assert became == {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}


def test_hierarchical_stays_in_the_superclass():
    names = list(cifar.CLASSES["cifar100"])
    groups = cifar.superclasses(names)
    labels = np.repeat(np.arange(100), 1000)
    targets = corruption.noise_targets("hierarchical", names, superclasses=groups)
    noisy = corruption.corrupt(labels, targets, 0.6, rng())
    coarse = np.empty(100, dtype=int)
    for number, group in enumerate(groups):
        coarse[group] = number
    np.testing.assert_array_equal(coarse[noisy], coarse[labels])
    assert (noisy != labels).mean() == pytest.approx(0.6, abs=0.01)
    shares = np.bincount(noisy[labels == 0], minlength=100)[[i for i in groups[coarse[0]] if i != 0]] / 1000
    assert shares == pytest.approx(np.full(4, 0.15), abs=0.05)


def test_a_sample_corrupted_at_a_low_rate_is_corrupted_alike_at_a_high_one():
    labels = np.repeat(np.arange(10), 500)
    targets = corruption.noise_targets("flip2", NAMES)
    low, high = (corruption.corrupt(labels, targets, rate, rng(5)) for rate in (0.2, 0.6))
    changed = low != labels
    np.testing.assert_array_equal(high[changed], low[changed])


@pytest.mark.parametrize(
    ("kind", "names", "own_map", "message"),
    [
        ("semantic", ["cat", "dog"], None, "no 'airplane'.*--noise"),
        ("hierarchical", NAMES, None, "needs superclasses"),
        ("flip", ["a"], None, "needs 2 classes or more, the data set has 1"),
        ("flip2", ["a", "b"], None, "needs 3 classes or more"),
        ("flip", NAMES, [1, 2], "2 entries, the data set 10 classes"),
        ("flip", NAMES, [10] * 10, "sends class 0 to 10.*0 to 9"),
        ("flip", NAMES, [0, -1] + [0] * 8, "sends class 1 to -1"),
        ("salt", NAMES, None, "No noise 'salt'"),
    ],
)
def test_noise_that_does_not_suit_the_data_is_refused(kind, names, own_map, message):
    with pytest.raises(UserError, match=message):
        corruption.noise_targets(kind, names, own_map)


def test_a_longer_tail_is_a_subset_of_a_shorter_one():
    labels = np.repeat(np.arange(4), 50)
    ids = np.arange(200)
    short, long = (
        corruption.cut_long_tail(labels, ids, corruption.long_tail_counts(50, 4, factor), rng()) for factor in (5, 25)
    )
    assert set(long) < set(short)
    assert np.bincount(labels[long]).tolist() == corruption.long_tail_counts(50, 4, 25)


@pytest.mark.parametrize("leave", [0, 1, 3])
def test_a_class_may_be_left_with_just_as_many_as_asked_for(leave):
    labels = np.repeat(np.arange(3), 4 + leave)
    every = np.ones(len(labels), dtype=np.bool_)
    drawn = corruption.draw_meta_set(labels, 4, "abc", every, rng(), leave)
    assert np.bincount(labels[drawn]).tolist() == [4, 4, 4]
    with pytest.raises(UserError, match="--meta-per-class 5"):
        corruption.draw_meta_set(labels, 5, "abc", every, rng(), leave)
