"""Exactness on models that nobody wrote for us: torchvision's and timm's, dropout and stochastic depth included."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastadvisor.config import MethodConfig, ModelConfig
from fastadvisor.loading.batch import Batch
from fastadvisor.metagrad import ForwardEngine, ReferenceEngine
from fastadvisor.methods import build_method
from fastadvisor.models import build_model
from tests.metagrad.problem import FACTS, Problem, flat, plain, relative

SIDE, CLASSES = 32, 5


def stock(name):
    torch.manual_seed(0)
    model = build_model(ModelConfig(name), CLASSES, (SIDE, SIDE)).double()
    method = build_method(MethodConfig(method="mfrw-mes"), model.head.in_features, FACTS)
    method.double()
    torch.nn.init.normal_(model.head.weight, std=0.1)  # some start at zero, which would hide everything before it
    generator = torch.Generator().manual_seed(3)

    def batch():
        images = torch.randn(4, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
        return Batch(images, torch.randint(CLASSES, (4,), generator=generator), torch.arange(4))

    return Problem(model, method, batch(), batch())


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenet_v2",
        "efficientnet_b0",
        "convnext_tiny",
        "densenet121",
        "shufflenet_v2_x0_5",
        "swin_t",
        "timm/resnet18",
    ],
)
def test_forward_equals_double_backward(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    task = stock(name)
    with sdpa_kernel(SDPBackend.MATH):  # double backward through attention needs the plain kernel
        expected = task.gradient(ReferenceEngine(plain))
    assert flat(expected.gradients).norm() > 1e-3
    assert relative(task.gradient(ForwardEngine(plain)).gradients, expected.gradients) <= 1e-10


def test_a_model_that_double_backward_cannot_do():
    """Hard sigmoid has no second derivative in torch; one forward-mode pass needs none. Oracle: central differences."""
    task = stock("mobilenet_v3_small")
    engine = ForwardEngine(plain)
    with pytest.raises(RuntimeError, match="derivative for"):
        task.gradient(ReferenceEngine(plain))
    gradient = task.gradient(engine).gradients
    direction = [g / flat(gradient).norm() for g in gradient]
    assert task.central_difference(engine, direction) == pytest.approx(float(flat(gradient).norm()), rel=1e-4)
