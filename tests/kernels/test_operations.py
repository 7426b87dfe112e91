"""Dispatch, and the operations as torch sees them: compiled, exported, in autocast and forward mode, differentiated twice."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck
from torch.library import opcheck

from fastadvisor_kernels import (
    Bernoulli,
    backend,
    dispatch,
    mes_cross_entropy,
    mes_cross_entropy_with_gradients,
    reweight_dual,
    reweight_features,
    tangent_loss,
)
from tests.kernels.cases import DEVICE, assert_same_bits, make, make_beta
from tests.kernels.exercise import exercise

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
OPS = torch.ops.fastadvisor
FLAT = (1.0, None, None, 0, "none", -100, 0.0)
NAMES = pytest.mark.parametrize("name", ["reference", "triton"])


def tensors(dtype=torch.float32):
    """z, ż, v, v̇, y."""
    z, v, y = make(4, 5, dtype, device=DEVICE)
    z_dot, v_dot, _ = make(4, 5, dtype, seed=7, device=DEVICE)
    return z.requires_grad_(), z_dot.requires_grad_(), v.requires_grad_(), v_dot.requires_grad_(), y


def flat_options():
    seed = torch.tensor(5, device=DEVICE)
    mask = make_beta("per class", 4, 5, device=DEVICE)
    return [
        FLAT,
        (0.9, None, None, 0, "mean", -100, 0.1),
        (1.0, mask, None, 0, "sum", 2, 0.0),
        (0.7, None, seed, 3, "none", -100, 0.0),
    ]


@NAMES
@pytest.mark.parametrize("index", range(4))
def test_opcheck_of_the_losses(name, index):
    z, z_dot, v, v_dot, y = tensors()
    flat = flat_options()[index]
    with backend(name):
        opcheck(OPS.mes_cross_entropy, (z, v, y, *flat))
        opcheck(OPS.mes_cross_entropy, (z, None, y, *flat))
        opcheck(OPS.tangent_loss, (z, z_dot, v, v_dot, y, *flat))
        opcheck(OPS.tangent_loss, (z, z_dot, None, None, y, *flat))
        constants = [part.detach() for part in (z, z_dot, v, v_dot)]
        loss, lse, count = OPS.mes_cross_entropy(constants[0], constants[2], y, *flat)
        opcheck(OPS.mes_cross_entropy_backward, (loss, constants[0], constants[2], y, lse, count, *flat, True, True))
        opcheck(OPS.mes_cross_entropy_backward, (loss, constants[0], None, y, lse, count, *flat, True, False))
        opcheck(OPS.mes_cross_entropy_with_gradients, (constants[0], constants[2], y, None, *flat[:4], "none", *flat[5:], True))
        loss, lse, mean, count = OPS.tangent_loss(*constants, y, *flat)
        opcheck(OPS.tangent_loss_backward, (loss, *constants, y, lse, mean, count, *flat, [True, False, True, True]))


@NAMES
def test_opcheck_of_the_reweighting(name):
    f, f_dot, u, g, _ = tensors()
    with backend(name):
        opcheck(OPS.reweight, (f, None, u))
        opcheck(OPS.reweight, (f, f_dot, u))
        given = [part.detach() for part in (g, g, f, f_dot, u)]
        opcheck(OPS.reweight_backward, (*given, True, True, True, False))
        opcheck(OPS.reweight_backward, (*given, False, True, False, False))


def test_opcheck_of_transposed_inputs():
    z, z_dot, v, v_dot, y = (part.t().contiguous().t() if part.dim() == 2 else part for part in tensors())
    for name in ("reference", "triton"):
        with backend(name):
            opcheck(OPS.mes_cross_entropy_with_gradients, (z.detach(), v.detach(), y, None, *FLAT, True))
            opcheck(OPS.reweight, (z, z_dot, v))
            opcheck(OPS.reweight, (z, None, v))
            opcheck(OPS.tangent_loss, (z, z_dot, v, v_dot, y, *FLAT))


@pytest.mark.parametrize("index", range(4))
def test_one_may_begin_and_the_other_end(index):
    """A program may be exported where one computes, and run where the other does: what they hand on is the same."""
    z, z_dot, v, v_dot, y = (part.detach() for part in tensors())
    flat = flat_options()[index]
    for operation, inputs in ((OPS.mes_cross_entropy, (z, v)), (OPS.tangent_loss, (z, z_dot, v, v_dot))):
        handed_on = []
        for name in ("reference", "triton"):
            with backend(name):
                handed_on.append(operation(*inputs, y, *flat))
        torch.testing.assert_close(*handed_on, rtol=1e-5, atol=1e-6)


def everything(z, z_dot, v, v_dot, y, beta):
    h = reweight_features(z, v)
    pair = reweight_dual(z, z_dot, v)
    loss = mes_cross_entropy(h, v, y, beta, label_smoothing=0.1)
    return loss.sum() + tangent_loss(*pair, v, y, beta, v_dot, reduction="mean")


@NAMES
@pytest.mark.parametrize("kind", ["none", 0.9, "per class", "drawn"])
def test_compiled_in_one_graph(name, kind):
    beta = make_beta(kind, 4, 5, device=DEVICE)
    with backend(name):
        inputs = tensors()
        eager = everything(*inputs, beta)
        want = eager.detach(), *grad(eager, inputs[:4])
        torch._dynamo.reset()
        compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")(*inputs, beta)
        got = compiled.detach(), *grad(compiled, inputs[:4])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@NAMES
def test_compiled_with_more_than_one_batch_size_and_in_place(name):
    def masked(f, u, z, y):
        own = f * 1
        reweight_features(own, u, inplace=True)
        return own.sum() + mes_cross_entropy_with_gradients(z, u, y)[0].sum()

    torch._dynamo.reset()
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager", dynamic=True)
    with backend(name):
        for batch in (3, 5):
            z, v, y = make(batch, 4, torch.float32, device=DEVICE)
            torch.testing.assert_close(compiled(z, v, z, y), masked(z, v, z, y), rtol=1e-5, atol=1e-6)


@NAMES
def test_export(name):
    class Loss(torch.nn.Module):
        def forward(self, z, v, y):
            return mes_cross_entropy(reweight_features(z, v), v, y, 0.9, reduction="mean")

    z, _, v, _, y = (part.detach() for part in tensors())
    with backend(name):
        program = torch.export.export(Loss(), (z, v, y))
        torch.testing.assert_close(program.module()(z, v, y), Loss()(z, v, y), rtol=1e-6, atol=1e-7)
    assert ("fastadvisor" in str(program.graph)) == (name == "triton")


@NAMES
def test_autocast_changes_nothing(name):
    z, z_dot, v, v_dot, y = tensors()
    with backend(name):
        want = everything(z, z_dot, v, v_dot, y, 0.9)
        with torch.autocast(DEVICE, torch.bfloat16):
            got = everything(z, z_dot, v, v_dot, y, 0.9)
    assert got.dtype is torch.float32
    if name == "reference":
        assert torch.equal(got, want)
    else:
        assert_same_bits([got], [want])


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "operation",
    [
        lambda z, v, y: mes_cross_entropy(z, v, y),
        lambda z, v, y: mes_cross_entropy_with_gradients(z, v, y),
        lambda z, v, y: reweight_features(z, v),
        lambda z, v, y: reweight_features(v, z),
        lambda z, v, y: reweight_dual(v, z, v),
        lambda z, v, y: tangent_loss(v, z, v, y),
        lambda z, v, y: OPS.mes_cross_entropy(z, v, y, *FLAT),
        lambda z, v, y: OPS.mes_cross_entropy_with_gradients(z, v, y, None, *FLAT, True),
        lambda z, v, y: OPS.reweight(v, None, z),
        lambda z, v, y: OPS.tangent_loss(v, z, v, None, y, *FLAT),
        lambda z, v, y: OPS.reweight_backward(z, v, v, None, v, True, False, True, False),
        lambda z, v, y: OPS.mes_cross_entropy_backward(z[:, 0], v, v, y, v[:, 0], v[0], *FLAT, True, True),
    ],
)
def test_forward_mode_is_refused_rather_than_lost(operation, requires_grad):
    z, z_dot, v, _, y = tensors()
    z, v = z.detach().requires_grad_(requires_grad), v.detach().requires_grad_(requires_grad)
    with backend("triton"), forward_ad.dual_level():
        dual = forward_ad.make_dual(z, z_dot.detach())
        with pytest.raises(NotImplementedError, match=r"forward-mode derivative|must implement the jvp"):
            operation(dual, v, y)
    with backend("triton"), pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda z: mes_cross_entropy(z, v, y), (z.detach(),), (z_dot.detach(),))


def test_plain_torch_takes_forward_mode():
    z, z_dot, v, _, y = (part.detach() for part in tensors())
    with backend("reference"):
        _, tangent = torch.func.jvp(lambda z: mes_cross_entropy(z, v, y), (z,), (z_dot,))
        torch.testing.assert_close(tangent, tangent_loss(z, z_dot, v, y), rtol=1e-5, atol=1e-6)


def test_torch_func_grad():
    z, _, v, _, y = (part.detach() for part in tensors())
    got = {}
    for name in ("reference", "triton"):
        with backend(name):
            got[name] = torch.func.grad(lambda z: mes_cross_entropy(z, v, y).sum() + reweight_features(z, v).sum())(z)
    torch.testing.assert_close(got["triton"], got["reference"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["none", 0.9, "drawn"])
def test_the_kernels_can_be_differentiated_twice(kind):
    z, z_dot, v, v_dot, y = tensors(torch.float64)
    beta = make_beta(kind, 4, 5, device=DEVICE)
    with backend("triton"):
        for function, inputs in (
            (lambda z, v: mes_cross_entropy(z, v, y, beta, label_smoothing=0.1, reduction="mean"), (z, v)),
            (lambda z, z_dot, v, v_dot: tangent_loss(z, z_dot, v, y, beta, v_dot), (z, z_dot, v, v_dot)),
            (reweight_features, (z, v)),
            (reweight_dual, (z, z_dot, v)),
        ):
            assert gradcheck(function, inputs, fast_mode=True)
            assert gradgradcheck(function, inputs, fast_mode=True)


def test_what_the_sanitizer_looks_at_runs():
    with backend("triton"):
        exercise(DEVICE)


def test_the_backend_of_a_block():
    z = torch.zeros(2, 3)
    assert dispatch.uses_triton(z) == z.is_cuda
    with backend("triton"):
        assert dispatch.uses_triton(z.to(DEVICE))
        with backend("reference"):
            assert not dispatch.uses_triton(z)
        assert dispatch.uses_triton(z.to(DEVICE))
    assert dispatch.uses_triton(z) == z.is_cuda
    with pytest.raises(ValueError, match=r"one of auto, reference, triton; got 'cuda'"), backend("cuda"):
        pass


def test_triton_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    z = torch.zeros(2, 3)
    with backend("triton"), pytest.raises(ValueError, match="needs tensors on a GPU"):
        mes_cross_entropy(z, z, torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(("value", "sentence"), [("reference", ""), ("cuda", "one of auto, reference, triton; got 'cuda'")])
def test_the_environment_chooses(value, sentence):
    code = (
        "import torch, fastadvisor_kernels as k\n"
        "z = torch.zeros(2, 3)\n"
        "try: k.mes_cross_entropy(z, z, torch.zeros(2, dtype=torch.long))\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {"FASTADVISOR_KERNELS": value, "PYTHONPATH": "kernels", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert sentence in done.stdout
    assert bool(sentence) == bool(done.stdout.strip())


def test_a_beta_is_drawn_anew_by_a_new_seed_only():
    z, _, v, _, y = (part.detach() for part in tensors())
    first, second = (Bernoulli(0.5, torch.tensor(seed, device=DEVICE)) for seed in (1, 2))
    with backend("triton"):
        losses = [mes_cross_entropy(z, v, y, beta) for beta in (first, first, second)]
    assert_same_bits(losses[:1], losses[1:2])
    assert not torch.equal(losses[0], losses[2])
