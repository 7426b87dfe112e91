"""Layer-wise learning rates: every parameter once, rates that rise to the head."""

import pytest
import torch
import torchvision
from torch import nn

from fastadvisor.models import SplitClassifier
from fastadvisor.models.cifar_resnet import CifarResNet
from fastadvisor.training.parameter_groups import parameter_groups


def models():
    with torch.device("meta"):  # quick
        yield "cifar", CifarResNet(8, 10), "fc", 5
        yield "resnet18", torchvision.models.resnet18(num_classes=7), "fc", 10
        yield "vit", torchvision.models.vit_b_16(num_classes=7), "heads.head", 14
        yield "convnext", torchvision.models.convnext_tiny(num_classes=7), "classifier.2", None


@pytest.mark.parametrize(
    ("name", "model", "head", "count"), list(models()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_groups_have_every_parameter_once_and_rates_that_rise_to_the_head(name, model, head, count):
    whole = SplitClassifier(model, head, name)
    next(model.parameters()).requires_grad_(False)
    groups = parameter_groups(whole, 0.5, 0.2)
    found = [id(p) for group in groups for p in group["params"]]
    assert len(set(found)) == len(found)
    assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}
    scales = [group["lr_scale"] for group in groups]
    assert scales == [0.5**power for power in reversed(range(len(scales)))]
    assert [group["lr"] for group in groups] == [0.2 * scale for scale in scales]
    assert {id(p) for p in groups[-1]["params"]} == {id(p) for p in whole.head.parameters()}
    assert count is None or len(groups) == count
    next(model.parameters()).requires_grad_(True)
    (only,) = parameter_groups(whole, 1.0, 0.2)
    assert [id(p) for p in only["params"]] == [id(p) for p in model.parameters()]
    assert (only["lr"], only["lr_scale"]) == (0.2, 1.0)


def test_the_layers_of_a_transformer():
    with torch.device("meta"):
        model = torchvision.models.vit_b_16(num_classes=7)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [
        {names[id(p)] for p in group["params"]} for group in parameter_groups(SplitClassifier(model, "heads.head"), 0.5, 1.0)
    ]
    assert groups[0] == {"class_token", "conv_proj.weight", "conv_proj.bias", "encoder.pos_embedding"}
    assert {name.split(".")[2] for name in groups[1]} == {"encoder_layer_0"}
    assert "encoder.ln.weight" in groups[12]


def test_tied_parameters_are_in_one_group():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    groups = parameter_groups(SplitClassifier(model, "2"), 0.5, 1.0)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())


def test_a_norm_before_the_first_layer_is_no_layer_of_its_own():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    sizes = [len(group["params"]) for group in parameter_groups(SplitClassifier(model, "3"), 0.5, 1.0)]
    assert sizes == [4, 2, 2]
