from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastadvisor.datasets import ArrayImages, Split, TrainingData
from fastadvisor.errors import UserError
from fastadvisor.loading.backends.resident import ResidentEvaluation
from fastadvisor.training.evaluation import accuracy, many_medium_few

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


class Table(nn.Module):
    """Gives row i of a table of logits for the image whose pixels are all i."""

    def __init__(self, table):
        super().__init__()
        self.table = table
        self.dropped = nn.Dropout()
        self.batches, self.modes = [], []

    def forward(self, x):
        assert x.shape[1:] == (3, 2, 4)
        assert x.dtype is torch.float32
        self.batches.append(len(x))
        self.modes.append((self.training, self.dropped.training, torch.is_grad_enabled()))
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        rows = (x * std + mean) * 255
        assert torch.allclose(rows, rows[:, :1, :1, :1].expand_as(rows), atol=1e-3)
        return self.table[rows[:, 0, 0, 0].round().long()]


def training_data(classes, counts):
    true = torch.repeat_interleave(torch.arange(classes), torch.tensor(counts))
    labels = torch.zeros_like(true)  # noise: true_class_counts goes by the true labels
    rows = torch.arange(len(true))
    none = torch.empty(0, 2, 4, 3, dtype=torch.uint8)
    images, test = ArrayImages(none), Split(ArrayImages(none), rows[:0])
    return TrainingData("t", [str(c) for c in range(classes)], images, labels, true, rows, rows[:0], test, MEAN, STD)


@contextmanager
def exact():
    yield


def evaluate(ranks, labels, classes, counts=None, batch_size=3, model=None):
    """``ranks``: for each image the classes from best to worst."""
    table = torch.zeros(len(ranks), classes)
    for row, order in enumerate(ranks):
        table[row, order] = torch.arange(classes, 0, -1).float()
    model = model or Table(table)
    images = torch.arange(len(ranks), dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 4, 3)
    data = training_data(classes, counts or [1] * classes)
    test = ResidentEvaluation(images, torch.tensor(labels), batch_size, MEAN, STD)
    return accuracy(model, test, data, precision=exact), model


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 100])
def test_more_than_five_classes(batch_size):
    # The label's place in the ranking: 0, 4, 5, 0, 6, 1, 0, 0.
    ranks = [
        [0, 1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 0, 5, 6],
        [0, 2, 3, 4, 5, 1, 6],
        [1, 0, 2, 3, 4, 5, 6],
        [0, 1, 3, 4, 5, 6, 2],
        [0, 2, 1, 3, 4, 5, 6],
        [2, 0, 1, 3, 4, 5, 6],
        [5, 0, 1, 3, 4, 2, 6],
    ]
    got, model = evaluate(ranks, [0, 0, 1, 1, 2, 2, 2, 5], 7, batch_size=batch_size)
    assert got.top1 == pytest.approx(100 * 4 / 8)
    assert got.top5 == pytest.approx(100 * 6 / 8)
    assert got.per_class_top1 == [50, 50, pytest.approx(100 / 3), None, None, 100, None]
    assert sum(model.batches) == 8
    assert max(model.batches) == min(batch_size, 8)


def test_fewer_than_five_classes():
    got, _ = evaluate([[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]], [0, 0, 1, 2], 3)
    assert (got.top1, got.top5, got.per_class_top1) == (50, 100, [100, 0, 0])


def test_many_medium_and_few_follow_the_training_counts():
    # Class 0 and 1 right, 2 half right, 3 wrong; class 4 has no test images.
    ranks = [[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [2, 0, 1, 3, 4], [0, 2, 1, 3, 4], [0, 1, 2, 3, 4]]
    got, _ = evaluate(ranks, [0, 1, 2, 2, 3], 5, counts=[101, 100, 20, 19, 5])
    assert got.per_class_top1 == [100, 100, 50, 0, None]
    assert got.many_medium_few == {"many": 100, "medium": 75, "few": 0}


@pytest.mark.parametrize("training", [True, False])
def test_evaluates_in_evaluation_mode_and_leaves_the_mode(training):
    model = Table(torch.eye(3)).train(training)
    evaluate([[0, 1, 2]] * 3, [0, 1, 2], 3, model=model)
    assert model.modes == [(False, False, False)]
    assert (model.training, model.dropped.training) == (training, training)


def test_the_precision_context_is_entered_for_every_batch():
    inside = []

    @contextmanager
    def precision():
        inside.append(True)
        yield

    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 4, 3)
    labels, data = torch.arange(3), training_data(3, [1, 1, 1])
    accuracy(Table(torch.eye(3)), ResidentEvaluation(images, labels, 2, MEAN, STD), data, precision=precision)
    assert len(inside) == 2


def test_all_ranks_get_the_accuracy_on_all_images():
    """The other rank has seven images of class 0, of which it has six right (and one among five), and two of class 2."""
    others = torch.tensor([[7, 0, 2], [6, 0, 0], [7, 0, 1]])
    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 4, 3)
    test = ResidentEvaluation(images, torch.tensor([0, 1, 1]), 2, MEAN, STD)
    ranks = SimpleNamespace(total=lambda counts: counts + others)
    got = accuracy(Table(torch.eye(3)), test, training_data(3, [1, 1, 1]), precision=exact, ranks=ranks)
    assert got.top1 == pytest.approx(100 * (2 + 6) / 12)
    assert got.top5 == pytest.approx(100 * (3 + 8) / 12)
    assert got.per_class_top1 == pytest.approx([100 * 7 / 8, 50, 0])


def test_no_readable_image_at_all_is_an_error():
    with pytest.raises(UserError, match="None of the images to test on can be read"):
        accuracy(Table(torch.eye(3)), [], training_data(3, [1, 1, 1]), precision=exact)


def test_half_precision_logits():
    got, _ = evaluate([[0, 1, 2]] * 3, [0, 1, 0], 3, model=Table(torch.eye(3).to(torch.bfloat16)))
    assert got.per_class_top1 == [50, 100, None]


def test_borders():
    def group(count):
        return [name for name, value in many_medium_few([50.0], torch.tensor([count])).items() if value is not None]

    assert [group(count) for count in (0, 19, 20, 100, 101, 5000)] == [
        ["few"],
        ["few"],
        ["medium"],
        ["medium"],
        ["many"],
        ["many"],
    ]


def test_empty_groups_are_none():
    assert many_medium_few([], torch.tensor([], dtype=torch.int64)) == {"many": None, "medium": None, "few": None}
    assert many_medium_few([10.0, None], torch.tensor([200, 50])) == {"many": 10, "medium": None, "few": None}
    assert many_medium_few([0.0, 50.0], torch.tensor([200, 300])) == {"many": 25, "medium": None, "few": None}
