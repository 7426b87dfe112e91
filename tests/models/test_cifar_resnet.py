import pytest
import torch
from torch import nn

from fastadvisor.models.build import OURS, resnet10, resnet18_cifar
from fastadvisor.models.cifar_resnet import BasicBlock, CifarResNet


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def expected_parameters(depth, classes):
    """He et al. 2016: 3×3 convolutions without bias, two BatchNorm numbers a channel, shortcuts for nothing."""
    blocks, total, channels_in = (depth - 2) // 6, 3 * 9 * 16 + 2 * 16, 16
    for channels in (16, 32, 64):
        for _ in range(blocks):
            total += 9 * channels_in * channels + 9 * channels * channels + 4 * channels
            channels_in = channels
    return total + 64 * classes + classes


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 56])
def test_parameters_by_formula(depth, classes):
    assert count(OURS[f"resnet{depth}"](classes)) == expected_parameters(depth, classes)


def test_parameters_as_published():
    assert count(CifarResNet(32, 10)) == 464_154
    assert [round(count(CifarResNet(depth, 10)) / 1e6, 2) for depth in (20, 32, 44, 56)] == [0.27, 0.46, 0.66, 0.85]


@pytest.mark.parametrize("depth", [8, 20, 32, 44, 56])
def test_depth_counts_convolutions_and_the_head(depth):
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in CifarResNet(depth, 10).modules()) == depth


@pytest.mark.parametrize("size", [32, 33, 64])
def test_shapes(size):
    model, seen = CifarResNet(20, 7).eval(), {}
    for name in ("conv1", "layer1", "layer2", "layer3", "fc"):
        model.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: seen.update({name: tuple(y.shape)}))
    with torch.no_grad():
        assert model(torch.randn(2, 3, size, size)).shape == (2, 7)
    half, quarter = (size + 1) // 2, (size + 3) // 4
    assert seen == {
        "conv1": (2, 16, size, size),
        "layer1": (2, 16, size, size),
        "layer2": (2, 32, half, half),
        "layer3": (2, 64, quarter, quarter),
        "fc": (2, 7),
    }


def test_shortcut_subsamples_and_pads_with_zeros():
    block = BasicBlock(4, 8, 2).eval()
    assert {name for name, _ in block.named_parameters()} == {
        *(f"conv{i}.weight" for i in (1, 2)),
        *(f"bn{i}.{part}" for i in (1, 2) for part in ("weight", "bias")),
    }
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(2, 4, 6, 6) + 0.5
    with torch.no_grad():
        y = block(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


def test_shortcut_of_a_plain_block_is_the_input():
    block = BasicBlock(4, 4, 1).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 5, 5)
    with torch.no_grad():
        assert torch.equal(block(x), x)


def test_kaiming_initialisation():
    torch.manual_seed(0)
    weight = CifarResNet(32, 10).layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_resnet18_for_cifar():
    model = resnet18_cifar(10)
    assert count(model) == 11_173_962
    assert model.fc.in_features == 512
    seen = []
    model.layer1.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape)))
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert seen == [(1, 64, 32, 32)]  # neither stride nor pooling before the first stage


def test_resnet10():
    model = resnet10(5)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
    assert len(convolutions) + 1 == 10
    assert model.fc.in_features == 512
