"""Small problems on which engines are compared: a network, a method and two batches, all float64 and seeded."""

import copy
import dataclasses
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import dropout, linear, normalize

from fastadvisor.iterations import build_iteration
from fastadvisor.loading.batch import Batch
from fastadvisor.methods import METHODS, DataFacts, Method
from fastadvisor.models import SplitClassifier, split
from fastadvisor.models.cifar_resnet import CifarResNet
from fastadvisor.runtime.execution import Execution

CLASSES, SIZE = 5, 12
FACTS = DataFacts(CLASSES, 16, torch.tensor([5, 4, 3, 2, 2]))
plain = Execution()


def small(*middle):
    """A convolutional network with ``middle`` after its first convolution."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        *middle,
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


NETWORKS = {
    "batchnorm": lambda: CifarResNet(8, CLASSES),
    "groupnorm": lambda: small(nn.GroupNorm(2, 8)),
    "no-norm": lambda: small(),
    "dropout": lambda: small(nn.BatchNorm2d(8), nn.Dropout(0.3)),
    "no-head-bias": lambda: nn.Sequential(*list(small(nn.BatchNorm2d(8)))[:-1], nn.Linear(8, CLASSES, bias=False)),
}


class Cosine(nn.Linear):
    """A cosine classifier: a subclass of nn.Linear that computes something else."""

    def forward(self, x):
        return 4 * linear(normalize(x), normalize(self.weight), self.bias)


class Embedding(nn.Module):
    """Class embeddings in the backbone that are the rows of the head's weight, too."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, features):
        return features + (features @ self.weight.T).softmax(1) @ self.weight


def headed(head):
    return nn.Sequential(*small(nn.BatchNorm2d(8))[:-1], head)


class HeadFirst(nn.Module):
    """The head is registered before the backbone, so a parameter that both have goes by the head's name for it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, CLASSES)
        self.body = nn.Sequential(*small(nn.BatchNorm2d(8))[:-1], Embedding(self.head.weight))

    def forward(self, images):
        return self.head(self.body(images))


def tied():
    head = nn.Linear(8, CLASSES)
    return nn.Sequential(*small(nn.BatchNorm2d(8))[:-1], Embedding(head.weight), head)


def hooked(kind):
    head = nn.Linear(8, CLASSES)
    if kind == "dropout":  # each call of the head draws
        head.register_forward_pre_hook(lambda module, inputs: (dropout(inputs[0], 0.3, module.training),))
    elif kind == "forward":
        head.register_forward_hook(lambda module, inputs, output: output * output.norm(dim=1, keepdim=True))
    elif kind == "backward":
        head.register_full_backward_hook(lambda module, into, out: tuple(2 * g for g in into))
    return head


parametrizations = nn.utils.parametrizations
HEADS = {
    "cosine": lambda: headed(Cosine(8, CLASSES)),
    "weight-norm": lambda: headed(parametrizations.weight_norm(nn.Linear(8, CLASSES))),
    "spectral-norm": lambda: headed(parametrizations.spectral_norm(nn.Linear(8, CLASSES))),
    "orthogonal": lambda: headed(parametrizations.orthogonal(nn.Linear(8, CLASSES))),
    "weight-norm-hook": lambda: headed(nn.utils.weight_norm(nn.Linear(8, CLASSES))),
    "spectral-norm-hook": lambda: headed(nn.utils.spectral_norm(nn.Linear(8, CLASSES))),
    "forward-hook": lambda: headed(hooked("forward")),
    "dropout-hook": lambda: headed(hooked("dropout")),
    "tied": tied,
    "tied-head-first": HeadFirst,
    "normed-backbone": lambda: small(
        parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))
    ),
}
"""Heads that are no plain linear layer, or share their weight; and the same in the backbone."""


def batch(size, generator, dtype=torch.float64):
    images = torch.randn(size, 3, SIZE, SIZE, generator=generator, dtype=dtype)
    return Batch(images, torch.randint(CLASSES, (size,), generator=generator), torch.arange(size))


@dataclass
class Problem:
    model: SplitClassifier
    method: Method
    train: Batch
    meta: Batch

    def gradient(self, engine, step=None, **settings):
        """Lmeta and ∇θ Lmeta by ``engine``, from the same random state for every engine."""
        posed = self.posed(engine, step, **settings)
        return engine.meta_gradient(posed, engine.virtual_train(posed), self.meta)

    def posed(self, engine, step=None, **settings):
        """What a meta step starts from, as the training step puts it; ``settings`` are the training step's."""
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        whole = build_iteration(self.model, self.method, optimizer, None, engine, plain, **settings)
        shared = whole.forward_pass(self.train, whole.draw(self.train), engine.plan())
        torch.manual_seed(2)
        posed = whole.meta_train.problem([shared], optimizer)
        return posed if step is None else dataclasses.replace(posed, step=step)

    def central_difference(self, engine, direction, step=1e-6, **settings):
        """The derivative of Lmeta along ``direction`` in the advisor's parameters, from two values of Lmeta alone."""
        losses = []
        for sign in (1, -1):
            moved = copy.deepcopy(self)
            for parameter, d in zip(moved.method.advisor.parameters(), direction, strict=True):
                parameter.data += sign * step * d
            losses.append(float(moved.gradient(engine, **settings).loss))
        return (losses[0] - losses[1]) / (2 * step)


def problem(method="mfrw-mes", network="batchnorm", dtype=torch.float64, method_class=None, **settings):
    torch.manual_seed(0)
    model = split({**NETWORKS, **HEADS}[network](), network, (SIZE, SIZE), CLASSES).to(dtype)
    features = model.head.in_features
    kind = METHODS[method] if method_class is None else method_class
    known = {field.name for field in dataclasses.fields(kind.Settings)}  # a method without β has none of its settings
    own = kind.Settings(**{name: value for name, value in settings.items() if name in known})
    built = kind(own, features, FACTS).to(dtype)
    generator = torch.Generator().manual_seed(3)
    return Problem(model, built, batch(16, generator, dtype), batch(10, generator, dtype))


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def relative(got, expected):
    """‖got − expected‖ / ‖expected‖."""
    return float((flat(got) - flat(expected)).norm() / flat(expected).norm())
