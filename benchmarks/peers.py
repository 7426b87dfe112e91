"""The MFRW-MES iteration as others would write it: three forward passes on the train batch and a second-order graph.

`Textbook` is plain torch; `Higher` and `TorchOpt` leave the virtual step to those libraries, called as in their published
examples (higher: maml-omniglot.py; torchopt: L2R/l2r.py). Method, advisor, optimizers and batches are those of every other
contender; each leaves the meta-gradient in the ``grad`` of the advisor's parameters, where the check reads it.

For networks without dropout: three forward passes draw three masks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fastadvisor.iterations import StepResult
from fastadvisor.loading.batch import Batch
from fastadvisor.methods import Method, Seen
from fastadvisor.models import SplitClassifier
from fastadvisor.runtime.execution import Execution
from fastadvisor_kernels import Beta

Classifier = Callable[..., Tensor]
"""(B, 3, H, W) images → (B, C) logits; with ``features=True`` → (B, D) features."""


@dataclass
class Textbook:
    """Algorithm 1 line by line; double backward by ``create_graph=True`` and ``functional_call``."""

    model: SplitClassifier
    method: Method
    optimizer: torch.optim.Optimizer
    advisor_optimizer: torch.optim.Optimizer
    execution: Execution

    def __call__(self, train: Batch, meta: Batch | None) -> StepResult:
        """Take one step on ``train``."""
        assert meta is not None
        assert self.method.advisor is not None
        # Only the actual step moves running statistics, as in the other contenders; costs nothing, and no gradient sees it.
        with self.model.frozen_statistics():
            loss_pre = self.loss_pre_calculation(train)
            draw = self.method.draw(len(train.labels), train.labels.device)
            meta_loss = self.meta_loss(train, meta, loss_pre, draw)
            gradients = torch.autograd.grad(meta_loss, list(self.method.advisor.parameters()))
        for parameter, gradient in zip(self.method.advisor.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self.advisor_optimizer.step()
        return StepResult(self.actual_train(train, loss_pre, draw), meta_loss.detach())

    def loss_pre_calculation(self, train: Batch) -> Tensor:
        """(a) First forward pass: the plain losses (B,)."""
        with torch.no_grad(), self.execution():
            logits = self.model(train.images)
        return cross_entropy(_at_least_float32(logits), train.labels, reduction="none")

    def virtual_loss(self, classifier: Classifier, head: nn.Module, train: Batch, loss_pre: Tensor, draw: Beta) -> Tensor:
        """Second forward pass: L(w; θ), a scalar with a graph to the weights and to the advisor."""
        with self.execution():
            features = classifier(train.images, features=True)
        advice = self.method.advise(Seen(features.detach(), loss_pre, train, draw))
        with self.execution():
            return self.method.loss(features, train, head, advice)

    def meta_loss(self, train: Batch, meta: Batch, loss_pre: Tensor, draw: Beta) -> Tensor:
        """(b) Virtual-Train and (c) Lmeta(w'), a scalar with a second-order graph to the advisor."""
        loss = self.virtual_loss(self.model, self.model.head, train, loss_pre, draw)
        weights = dict(self.model.named_parameters())
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        lr = self._lr()
        virtual = {name: w.detach() - lr * gradient for (name, w), gradient in zip(weights.items(), gradients, strict=True)}
        with self.execution():
            logits = functional_call(self.model, virtual, (meta.images,))
        return cross_entropy(_at_least_float32(logits), meta.labels)

    def actual_train(self, train: Batch, loss_pre: Tensor, draw: Beta) -> Tensor:
        """(d) Third forward pass, with the updated advisor; returns the loss."""
        with self.execution():
            features = self.model(train.images, features=True)
        with torch.no_grad():
            advice = self.method.advise(Seen(features, loss_pre, train, draw))
        with self.execution():
            loss = self.method.loss(features, train, self.model.head, advice)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


class Higher(Textbook):
    """The virtual step by ``higher.innerloop_ctx``: a functional copy of the model and a differentiable SGD."""

    def meta_loss(self, train: Batch, meta: Batch, loss_pre: Tensor, draw: Beta) -> Tensor:
        """(b) and (c) inside the library's context."""
        import higher

        # The virtual step is plain SGD (Algorithm 1): an optimizer of its own, without momentum and decay.
        virtual_sgd = torch.optim.SGD(self.model.parameters(), lr=self._lr())
        with higher.innerloop_ctx(self.model, virtual_sgd) as (functional, differentiable):
            differentiable.step(self.virtual_loss(functional, functional.head, train, loss_pre, draw))
            with self.execution():
                logits = functional(meta.images)
            return cross_entropy(_at_least_float32(logits), meta.labels)


class TorchOpt(Textbook):
    """The virtual step by ``torchopt.MetaSGD``, which swaps the model's parameters for differentiable ones."""

    def meta_loss(self, train: Batch, meta: Batch, loss_pre: Tensor, draw: Beta) -> Tensor:
        """(b) and (c) between taking the model's parameters down and putting them back."""
        import torchopt

        differentiable = torchopt.MetaSGD(self.model, lr=self._lr())
        before = torchopt.extract_state_dict(self.model, by="reference")
        try:
            differentiable.step(self.virtual_loss(self.model, self.model.head, train, loss_pre, draw))
            with self.execution():
                logits = self.model(meta.images)
            return cross_entropy(_at_least_float32(logits), meta.labels)
        finally:
            torchopt.recover_state_dict(self.model, before)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
