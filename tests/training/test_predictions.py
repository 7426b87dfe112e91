"""Logits and features of a classifier, image by image."""

import torch
from torch import nn

from fastadvisor.loading import Batch
from fastadvisor.models.split import split
from fastadvisor.runtime.execution import Execution
from fastadvisor.training.predictions import predictions


def classifier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    return split(model, "small", (6, 6), 5)


def batches(*sizes):
    start = 0
    for size in sizes:
        yield Batch(torch.randn(size, 3, 6, 6), torch.arange(size) % 5, torch.arange(start, start + size))
        start += size


def test_logits_features_ids_and_labels_of_every_image():
    model = classifier()
    given = list(batches(4, 3))
    found = list(predictions(model, given, Execution()))
    assert [len(one.ids) for one in found] == [4, 3]
    model.eval()
    for batch, one in zip(given, found, strict=True):
        assert torch.equal(one.ids, batch.ids)
        assert torch.equal(one.labels, batch.labels)
        assert torch.equal(one.logits, model(batch.images))
        assert torch.equal(one.features, model(batch.images, features=True))
        assert not one.logits.requires_grad
        assert (one.logits.shape[1], one.features.shape[1]) == (5, 4)


def test_the_model_is_left_as_it_was_also_by_who_takes_one_batch_only():
    model = classifier().train()
    statistics = model.model[1].running_mean.clone()
    found = predictions(model, batches(4, 3), Execution())
    next(found)
    assert not model.training
    assert torch.is_grad_enabled()  # for whoever works with the batch
    found.close()
    assert model.training
    assert torch.equal(model.model[1].running_mean, statistics)
    assert not model.head._forward_pre_hooks


def test_logits_are_float32_under_autocast_and_can_be_differentiated_on():
    model = classifier()
    (one,) = predictions(model, batches(4), Execution(dtype=torch.bfloat16))
    assert (one.logits.dtype, one.features.dtype) == (torch.float32, torch.float32)
    head = nn.Linear(4, 5)
    head(one.features).sum().backward()  # as a probe of the features is trained
    assert head.weight.grad is not None


def test_a_model_without_a_known_head_has_no_features():
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))
    (one,) = predictions(model, batches(2), Execution())
    assert one.features is None
    assert one.logits.shape == (2, 5)
