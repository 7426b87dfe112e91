"""A step for a loop of one's own is the trainer's own step."""

import copy

import pytest
import torch
from torch import nn

import fastadvisor
from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.errors import UserError
from fastadvisor.training.trainer import Trainer

QUIET = {"progress": False, "tensorboard": False, "device": "cpu", "model": "resnet8"}


def parts(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 12, 12, generator=generator), torch.randint(5, (8,), generator=generator)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "mfrw-mes"},
        {"method": "mw-net", "weight_normalization": "sum", "clip_grad_norm": 0.5},
        {"method": "l2rw"},
        {"method": "mfrw-mes", "approx_meta": True, "approx_stages": 1},
        {"method": "mes", "lean": True, "amp": True},
        {"method": "focal"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_bit_for_bit_the_trainers_step(settings):
    # Without the recipe of the digits, which sets rates of its own.
    config = resolve(Config, **QUIET, lr=0.05, schedule="constant", advisor_lr=1e-4, advisor_weight_decay=0.0, **settings)
    run = Trainer(config, prepare(load_source(config), config, 0), torch.device("cpu"))
    model = copy.deepcopy(run.model.model)
    known = {} if settings["method"] in ("l2rw", "focal") else {"advisor_lr": 1e-4, "advisor_weight_decay": 0.0}
    step = fastadvisor.MetaStep(model, parts(model), image_size=run.loaders.size, **{**known, **settings})
    step.method.load_state_dict(run.method.state_dict())
    run.model.train()
    model.train()
    for _ in range(4):
        train, meta = run.batches(run.stages[0])
        assert step.meta_is_due == (meta is not None)
        before = torch.get_rng_state()
        wanted = run.step(train, meta)
        torch.set_rng_state(before)
        got = step(train.images, train.labels, *((None, None) if meta is None else (meta.images, meta.labels)))
        assert torch.equal(got.loss, wanted.loss)
        assert (got.meta_loss is None) == (wanted.meta_loss is None)
    for mine, theirs in ((model, run.model.model), (step.method, run.method)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(value, mine.state_dict()[name]), name


def test_any_classifier_and_a_state_that_goes_on():
    ends = []
    for interrupted in (False, True):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step = fastadvisor.MetaStep(model, optimizer, image_size=12)
        for number in range(4):
            if interrupted and number == 2:
                model_state, state = copy.deepcopy(model.state_dict()), copy.deepcopy(step.state_dict())
                model = small()
                model.load_state_dict(model_state)
                step = fastadvisor.MetaStep(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), image_size=12)
                step.load_state_dict(state)
            torch.manual_seed(number)
            step(*batch(number), *batch(100 + number))
        ends.append(torch.cat([p.detach().flatten() for p in (*model.parameters(), *step.method.parameters())]))
    assert torch.equal(*ends)
    with pytest.raises(UserError, match="The state is of another method"):
        fastadvisor.MetaStep(small(), parts(small()), "mfrw", image_size=12).load_state_dict(step.state_dict())


def test_methods_that_need_to_know_more():
    model = small()
    with pytest.raises(UserError, match="The method elr needs samples"):
        fastadvisor.MetaStep(model, parts(model), "elr", image_size=12)
    with pytest.raises(UserError, match="The method balanced-softmax needs label_counts"):
        fastadvisor.MetaStep(model, parts(model), "balanced-softmax", image_size=12)
    with pytest.raises(UserError, match="label_counts has 2 entries, and the model 5 classes"):
        fastadvisor.MetaStep(model, parts(model), "balanced-softmax", image_size=12, label_counts=torch.ones(2))
    with pytest.raises(UserError, match="The method crt trains in stages"):
        fastadvisor.MetaStep(model, parts(model), "crt", image_size=12)
    step = fastadvisor.MetaStep(model, parts(model), "elr", image_size=12, samples=50)
    with pytest.raises(UserError, match="hand over their ids"):
        step(*batch())
    step(*batch(), ids=torch.arange(30, 38))
    assert step.method.targets.any(1).nonzero().flatten().tolist() == list(range(30, 38))


def test_what_is_refused():
    model = small()
    with pytest.raises(UserError, match=r"MetaStep has no setting 'advisor_lrr'. Did you mean 'advisor_lr'\?"):
        fastadvisor.MetaStep(model, parts(model), image_size=12, advisor_lrr=1)
    with pytest.raises(UserError, match="MetaStep has no setting 'epochs'"):
        fastadvisor.MetaStep(model, parts(model), image_size=12, epochs=1)
    with pytest.raises(UserError, match="Unknown method 'mfrv'"):
        fastadvisor.MetaStep(model, parts(model), "mfrv", image_size=12)
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(UserError, match=r"knows torch\.optim\.SGD alone"):
        fastadvisor.MetaStep(model, adam, image_size=12, virtual_step="optimizer")
    step = fastadvisor.MetaStep(model, adam, image_size=12)
    with pytest.raises(UserError, match="needs meta_images and meta_labels"):
        step(*batch())
    images, labels = batch()
    with pytest.raises(UserError, match="Step 1: the advisor's mask is not finite"):
        step(images * float("nan"), labels, *batch())
