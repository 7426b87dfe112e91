"""The losses against their formulas written out, against each other, and their gradients against finite differences."""

import math

import pytest
import torch
from scipy.special import lambertw
from torch.autograd import gradcheck
from torch.nn.functional import cross_entropy

from fastadvisor import losses
from fastadvisor.losses.superloss import lambert_w

B, C = 6, 4
COUNTS = torch.tensor([500, 50, 5, 0])
Y = torch.tensor([0, 1, 2, 3, 0, 2])


def logits(scale=2.0):
    return scale * torch.randn(B, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


TARGETS = torch.softmax(logits(1.0).flip(0), 1)
LOSSES = {
    "focal": lambda z: losses.focal(z, Y, 2.0),
    "focal, a power below 1": lambda z: losses.focal(z, Y, 0.5),
    "balanced softmax": lambda z: losses.balanced_softmax(z, Y, COUNTS),
    "logit adjustment": lambda z: losses.logit_adjustment(z, Y, COUNTS, 1.5),
    "ldam": lambda z: losses.ldam(torch.tanh(z), Y, COUNTS),
    "early learning": lambda z: losses.early_learning(z, Y, TARGETS.to(z.dtype), 3.0),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss):
    assert gradcheck(LOSSES[loss], (logits().requires_grad_(),))


@pytest.mark.parametrize("loss", LOSSES)
def test_one_loss_a_sample_in_float32_and_finite_at_extremes(loss):
    for z in (logits().bfloat16(), logits(1e4).float()):
        z = z.requires_grad_()
        found = LOSSES[loss](z)
        assert found.shape == (B,)
        assert found.dtype == torch.float32
        found.sum().backward()
        assert found.isfinite().all()
        assert z.grad.isfinite().all()


def test_focal_is_its_formula():
    z = logits()
    p = torch.softmax(z, 1).gather(1, Y[:, None]).squeeze(1)
    for gamma in (0.5, 1.0, 2.0):
        torch.testing.assert_close(losses.focal(z, Y, gamma), -((1 - p) ** gamma) * p.log())
    torch.testing.assert_close(losses.focal(z, Y, 0.0), cross_entropy(z, Y, reduction="none"))


def test_class_balanced_weights():
    counts = torch.tensor([5000, 500, 50])
    effective = [(1 - 0.999**n) / (1 - 0.999) for n in (5000, 500, 50)]
    total = sum(1 / e for e in effective)
    assert losses.class_balanced_weights(counts, 0.999).tolist() == pytest.approx([3 / e / total for e in effective])
    assert losses.class_balanced_weights(counts, 0.0).tolist() == [1, 1, 1]
    nearly = losses.class_balanced_weights(counts, 1 - 1e-9)
    assert (nearly[2] / nearly[0]).item() == pytest.approx(100, rel=1e-4)
    assert losses.class_balanced_weights(COUNTS).isfinite().all()


def test_balanced_softmax_is_logit_adjustment_at_1_and_equal_counts_change_nothing():
    z = logits()
    torch.testing.assert_close(losses.balanced_softmax(z, Y, COUNTS), losses.logit_adjustment(z, Y, COUNTS, 1.0))
    expected = -(z + COUNTS.clamp_min(1).log()).log_softmax(1).gather(1, Y[:, None]).squeeze(1)
    torch.testing.assert_close(losses.balanced_softmax(z, Y, COUNTS), expected)
    plain = cross_entropy(z, Y, reduction="none")
    torch.testing.assert_close(losses.balanced_softmax(z, Y, torch.full((C,), 7)), plain)
    adjusted = losses.post_hoc(z + torch.tensor([0.9, 0.09, 0.009, 0.001]).double().log(), torch.tensor([900, 90, 9, 1]))
    torch.testing.assert_close(adjusted, z)


@pytest.mark.parametrize("tau", [0.0, 0.5, 2.0])
def test_logit_adjustment_by_tau_in_training_and_after_it(tau):
    z, log = logits(), (COUNTS.clamp_min(1) / COUNTS.clamp_min(1).sum()).double().log()
    expected = cross_entropy(z + tau * log, Y, reduction="none")
    torch.testing.assert_close(losses.logit_adjustment(z, Y, COUNTS, tau), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(losses.post_hoc(z, COUNTS, tau), z - tau * log, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_lamberts_function(dtype, tolerance):
    x = torch.cat([torch.linspace(-1 / math.e + 1e-3, 1, 500), torch.logspace(0, 4, 200)]).to(dtype)
    expected = torch.from_numpy(lambertw(x.double().numpy()).real)
    torch.testing.assert_close(lambert_w(x).double(), expected, rtol=tolerance, atol=tolerance)
    edge = lambert_w(torch.tensor([-1 / math.e, -1 / math.e + 1e-9], dtype=dtype))
    assert edge.isfinite().all()
    assert edge.tolist() == pytest.approx([-1, -1], abs=1e-3)


def test_superloss():
    loss = torch.tensor([0.0, 0.5, math.log(10), 5.0, 50.0], dtype=torch.float64, requires_grad=True)
    tau, lam = math.log(10), 4.0
    inner = (loss.detach().numpy() - tau) / lam
    sigma = torch.from_numpy(lambertw(0.5 * inner.clip(-2 / math.e)).real).neg().exp()
    found = losses.superloss(loss, tau, lam)
    torch.testing.assert_close(found, (loss - tau) * sigma + lam * sigma.log() ** 2)
    assert found[2] == 0
    found.sum().backward()
    torch.testing.assert_close(loss.grad, sigma)  # the confidence is a constant
    assert (loss.grad.diff() < 0).all()
    assert losses.superloss(torch.tensor([-100.0]), tau, lam).isfinite()
    half = loss.detach().bfloat16()
    assert losses.superloss(half, tau, lam).dtype == torch.float32
    torch.testing.assert_close(losses.superloss(half, tau, lam), losses.superloss(half.float(), tau, lam))


def test_ldam_takes_the_margin_off_the_label():
    cosine = torch.tanh(logits())
    m = losses.margins(COUNTS)
    assert m.tolist() == pytest.approx([0.5 * 500**-0.25, 0.5 * 50**-0.25, 0.5 * 5**-0.25, 0.5])
    expected = cosine.clone()
    expected[range(B), Y] -= m[Y]
    torch.testing.assert_close(losses.ldam(cosine, Y, COUNTS), cross_entropy(30 * expected, Y, reduction="none"))


def test_early_learning():
    z = logits()
    p = torch.softmax(z, 1)
    plain = cross_entropy(z, Y, reduction="none")
    torch.testing.assert_close(losses.early_learning(z, Y, TARGETS), plain + 3 * (1 - (TARGETS * p).sum(1)).log())
    torch.testing.assert_close(losses.early_learning(z, Y, torch.zeros(B, C)), plain)
    moved = losses.updated_targets(TARGETS, z, 0.9)
    torch.testing.assert_close(moved, 0.9 * TARGETS + 0.1 * p, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moved.sum(1), torch.ones(B, dtype=torch.float64))
    # Of sure predictions the clamped probabilities add up to more than 1.
    moved = losses.updated_targets(TARGETS, logits(100.0), 0.9)
    torch.testing.assert_close(moved.sum(1), torch.ones(B, dtype=torch.float64))


def test_the_targets_of_early_learning_are_constants():
    z, targets = logits().requires_grad_(), TARGETS.clone().requires_grad_()
    losses.early_learning(z, Y, targets).sum().backward()
    assert z.grad.any()
    assert targets.grad is None
