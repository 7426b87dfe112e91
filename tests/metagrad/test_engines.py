"""The gradient-check suite: the exact engine against double backward, and double backward against finite differences."""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.functional import cosine_similarity

import fastadvisor.metagrad.head_tangent as head_tangent
import fastadvisor.methods.base as base
from fastadvisor.errors import UserError
from fastadvisor.iterations import build_iteration
from fastadvisor.metagrad import ForwardEngine, ReferenceEngine, VirtualStep
from fastadvisor.methods import Advice
from fastadvisor.methods.l2rw import L2RW
from fastadvisor.methods.mfrw_mes import MFRWMES
from fastadvisor.models import cut_at
from fastadvisor.runtime.execution import Execution
from tests.metagrad.problem import CLASSES, HEADS, NETWORKS, SIZE, flat, hooked, plain, problem, relative

NETWORKS_OF_ADVISORS = ["mfrw", "mes", "mfrw-mes", "mw-net"]
METHODS = [*NETWORKS_OF_ADVISORS, "l2rw"]
SETTINGS = [
    ("mes", {"beta_draw": "sample"}),
    ("mes", {"beta_draw": "batch"}),
    ("mes", {"beta_draw": "expected"}),
    ("mfrw-mes", {"beta_draw": "expected"}),
    ("mw-net", {"weight_normalization": "sum"}),
]
old_hooks = pytest.mark.filterwarnings("ignore:.*nn.utils.weight_norm:FutureWarning")


@pytest.mark.parametrize("attached", [False, True], ids=["detached", "attached"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_forward_equals_double_backward(method, network, attached):
    task = problem(method, network)
    expected, got = (task.gradient(engine, attached=attached) for engine in (ReferenceEngine(plain), ForwardEngine(plain)))
    assert flat(expected.gradients).norm() > 1e-6, "the problem is degenerate: any answer would pass"
    assert relative(got.gradients, expected.gradients) <= 1e-12
    assert float(got.loss) == pytest.approx(float(expected.loss), rel=1e-12)


@old_hooks
@pytest.mark.parametrize("attached", [False, True], ids=["detached", "attached"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", METHODS)
def test_forward_equals_double_backward_with_any_head(method, head, attached):
    # Each engine from the start: a spectral normalisation has moved on by the second call.
    engines = (ReferenceEngine(plain), ForwardEngine(plain))
    expected, got = (problem(method, head).gradient(engine, attached=attached) for engine in engines)
    assert flat(expected.gradients).norm() > 1e-6, "the problem is degenerate: any answer would pass"
    assert relative(got.gradients, expected.gradients) <= 1e-12
    assert float(got.loss) == pytest.approx(float(expected.loss), rel=1e-12)


@pytest.mark.parametrize("head", [head for head in HEADS if not head.endswith("norm-hook")])  # which cannot be copied
def test_double_backward_equals_finite_differences_with_any_head(head):
    task = problem("mfrw-mes", head)
    engine = ReferenceEngine(plain)
    gradient = flat(task.gradient(engine).gradients)
    generator = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in task.method.advisor.parameters()]
    expected = pytest.approx(float(gradient @ flat(direction)), rel=1e-4)
    assert task.central_difference(engine, direction) == expected


@pytest.mark.parametrize(("method", "settings"), [("focal", {}), *SETTINGS])
@pytest.mark.parametrize("head", ["cosine", "weight-norm", "spectral-norm", "tied"])
def test_any_head_in_every_setting(method, settings, head):
    made = [
        problem(network=head, method_class=Focal) if method == "focal" else problem(method, head, **settings) for _ in range(2)
    ]
    expected, got = (
        task.gradient(engine) for task, engine in zip(made, (ReferenceEngine(plain), ForwardEngine(plain)), strict=True)
    )
    assert relative(got.gradients, expected.gradients) <= 1e-12


@pytest.mark.parametrize("attached", [False, True], ids=["detached", "attached"])
@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_forward_equals_double_backward_in_every_setting(method, settings, attached):
    task = problem(method, **settings)
    expected, got = (task.gradient(engine, attached=attached) for engine in (ReferenceEngine(plain), ForwardEngine(plain)))
    assert relative(got.gradients, expected.gradients) <= 1e-12


@pytest.mark.parametrize("method", NETWORKS_OF_ADVISORS)
def test_attached_inputs_are_another_gradient(method):
    task = problem(method)
    detached, attached = (task.gradient(ForwardEngine(plain), attached=value).gradients for value in (False, True))
    assert relative(attached, detached) > 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_a_virtual_step_with_momentum_and_weight_decay_is_exact_too(method):
    task = problem(method)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-2)
    task.model(task.train.images).sum().backward()
    optimizer.step()  # fills the momentum buffers
    step = VirtualStep(0.1, optimizer)
    expected, got = task.gradient(ReferenceEngine(plain), step), task.gradient(ForwardEngine(plain), step)
    assert relative(got.gradients, expected.gradients) <= 1e-10
    if method != "l2rw":  # whose virtual step is decay and momentum alone
        assert float(got.loss) != pytest.approx(float(task.gradient(ForwardEngine(plain)).loss), rel=1e-6)


def test_the_virtual_step_with_the_optimizer_is_the_optimizers_own_step():
    task = problem()
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-2)
    engine = ForwardEngine(plain)
    task.model(task.train.images).sum().backward()
    optimizer.step()
    posed = task.posed(engine, VirtualStep(0.1, optimizer))
    virtual = engine.virtual_train(posed)
    optimizer.zero_grad()
    task.method.loss(posed.shared.features, task.train, task.model.head, posed.advice.detach()).backward()
    optimizer.step()
    for name, parameter in task.model.named_parameters():
        torch.testing.assert_close(virtual[name], parameter.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("attached", [False, True], ids=["detached", "attached"])
@pytest.mark.parametrize("method", NETWORKS_OF_ADVISORS)
def test_double_backward_equals_finite_differences(method, attached):
    task = problem(method, "batchnorm")
    engine = ReferenceEngine(plain)
    gradient = flat(task.gradient(engine, attached=attached).gradients)
    parameters = list(task.method.advisor.parameters())
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        expected = pytest.approx(float(gradient @ flat(direction)), rel=1e-4)
        assert task.central_difference(engine, direction, attached=attached) == expected


class Shifted(L2RW):
    """L2RW from weights other than 0, so that Lmeta can be looked at on both sides of 0."""

    of_one_batch = False
    shift = 0.0

    def advise(self, seen):
        self._weight_B = torch.as_tensor(self.shift).to(seen.losses).expand(len(seen.losses)).clone().requires_grad_()
        return Advice(weight=self._weight_B)


def test_l2rws_gradient_equals_finite_differences():
    task = problem(method_class=Shifted)
    engine = ReferenceEngine(plain)
    gradient = flat(task.gradient(engine).gradients)
    assert relative([gradient], problem("l2rw").gradient(ForwardEngine(plain)).gradients) <= 1e-12
    for index in (0, 5, 11):
        losses = []
        for sign in (1, -1):
            task.method.shift = sign * 1e-6 * torch.eye(16, dtype=torch.float64)[index]
            losses.append(float(task.gradient(engine).loss))
        assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(float(gradient[index]), rel=1e-4)


class Focal(MFRWMES):
    """A method with a loss of its own, for which no closed form has been written."""

    def loss(self, f_BD, batch, head, advice):
        z_BC = head(base.reweight_features(f_BD, advice.get("mask")))
        loss_B = base.mes_cross_entropy(z_BC, advice.get("equalisation"), batch.labels, advice.beta)
        return ((1 - torch.exp(-loss_B)) ** 2 * loss_B).mean()


@pytest.mark.parametrize("attached", [False, True], ids=["detached", "attached"])
def test_a_method_with_its_own_loss_is_exact_without_a_closed_form(attached):
    task = problem(method_class=Focal)
    expected, got = (task.gradient(engine, attached=attached) for engine in (ReferenceEngine(plain), ForwardEngine(plain)))
    assert relative(got.gradients, expected.gradients) <= 1e-12


@pytest.mark.parametrize("attached", [False, True], ids=["detached", "attached"])
@pytest.mark.parametrize("method", METHODS)
def test_the_closed_form_equals_a_double_backward_behind_the_features(method, attached, monkeypatch):
    task = problem(method)
    closed = task.gradient(ForwardEngine(plain), attached=attached)
    monkeypatch.setattr(head_tangent, "closed_form_tangent", head_tangent.double_backward_tangent)
    assert relative(closed.gradients, task.gradient(ForwardEngine(plain), attached=attached).gradients) <= 1e-12


@pytest.mark.parametrize(
    ("engine", "cut"),
    [(ReferenceEngine(plain), False), (ForwardEngine(plain), False), (ForwardEngine(plain), True)],
    ids=["reference", "forward", "cut"],
)
def test_running_statistics_and_random_state_are_untouched(engine, cut):
    task = problem(network="batchnorm" if cut else "dropout")
    if cut:
        engine = ForwardEngine(plain, cut_at(task.model, (SIZE, SIZE), 1))
    posed = task.posed(engine)  # its pass on the train batch is the one that may touch them
    buffers = [buffer.clone() for buffer in task.model.buffers()]
    assert buffers
    weights = [parameter.detach().clone() for parameter in task.model.parameters()]
    virtual = engine.virtual_train(posed)
    posed.shared.features.sum().backward(retain_graph=True)  # the graph must survive for the actual step
    before = torch.get_rng_state()
    engine.meta_gradient(posed, virtual, task.meta)
    if cut:  # a network without dropout draws nothing at all
        assert torch.equal(torch.get_rng_state(), before)
    for buffer, untouched in zip(task.model.buffers(), buffers, strict=True):
        assert torch.equal(buffer, untouched)
    for parameter, untouched in zip(task.model.parameters(), weights, strict=True):
        assert torch.equal(parameter.detach(), untouched)
    posed.shared.features.sum().backward()


def test_the_shared_forward_updates_running_statistics_once():
    task = problem()
    tracked = [m for m in task.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    task.gradient(ForwardEngine(plain))
    assert [int(module.num_batches_tracked) for module in tracked] == [1] * len(tracked)


@pytest.mark.parametrize("method", ["mfrw-mes", "l2rw"])
def test_a_graph_computed_again_leaves_running_statistics_alone(method):
    task, engine = problem(method), ForwardEngine(plain)
    posed = task.posed(engine, lean=True)
    buffers = [buffer.clone() for buffer in task.model.buffers()]
    engine.meta_gradient(posed, engine.virtual_train(posed), task.meta)
    assert posed.shared.restorations == 1
    for buffer, untouched in zip(task.model.buffers(), buffers, strict=True):
        assert torch.equal(buffer, untouched)


def test_no_operation_of_the_kernels_package_sees_a_dual_number(monkeypatch):
    def guarded(operation):
        def call(*tensors):
            for tensor in tensors:
                if isinstance(tensor, torch.Tensor):
                    assert forward_ad._current_level < 0 or forward_ad.unpack_dual(tensor).tangent is None
            calls.append(operation.__name__)
            return operation(*tensors)

        return call

    calls = []
    names = {"mes_cross_entropy": base, "reweight_features": base, "reweight_dual": head_tangent, "tangent_loss": head_tangent}
    for name, module in names.items():
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))
    problem("mfrw-mes").gradient(ForwardEngine(plain))
    assert set(calls) == set(names)


@pytest.mark.parametrize("attached", [False, True], ids=["detached", "attached"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_autocast_keeps_the_direction(method, network, attached):
    task = problem(method, network, dtype=torch.float32)
    exact = task.gradient(ForwardEngine(plain), attached=attached)
    mixed = task.gradient(ForwardEngine(Execution(dtype=torch.bfloat16)), attached=attached)
    assert all(g.dtype == torch.float32 for g in mixed.gradients)
    assert cosine_similarity(flat(mixed.gradients), flat(exact.gradients), dim=0) >= 0.98


@pytest.mark.parametrize("network", ["batchnorm", "groupnorm"])
def test_channels_last_changes_nothing(network):
    task = problem(network=network)
    expected = task.gradient(ReferenceEngine(plain)).gradients
    task.model.to(memory_format=torch.channels_last)
    task.train, task.meta = (
        batch._replace(images=batch.images.contiguous(memory_format=torch.channels_last)) for batch in (task.train, task.meta)
    )
    for engine in (ReferenceEngine(plain), ForwardEngine(plain)):
        assert relative(task.gradient(engine).gradients, expected) <= 1e-12


@pytest.mark.parametrize("stages", [1, 2])
def test_a_cut_differentiates_through_the_top_stages_only(stages):
    """With everything below the cut frozen, double backward gives the same: the approximation is exactly that."""
    task = problem()
    cut = cut_at(task.model, (SIZE, SIZE), stages)
    assert cut is not None
    got = task.gradient(ForwardEngine(plain, cut))
    whole = task.gradient(ForwardEngine(plain))
    above = task.model.part_parameters(cut)
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(name in above)
    expected = task.gradient(ReferenceEngine(plain))
    assert relative(got.gradients, expected.gradients) <= 1e-10
    assert relative(got.gradients, whole.gradients) > 1e-6, "the cut changed nothing: was it there?"
    assert cosine_similarity(flat(got.gradients), flat(whole.gradients), dim=0) > 0.5


def test_the_same_units_are_dropped_in_the_tangent_pass_above_a_cut():
    """Dropout both below and above the cut: the tangent pass starts from the random state at the cut."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Dropout(0.5), *list(NETWORKS["dropout"]())[:-1], torch.nn.Dropout(0.5), torch.nn.Linear(8, CLASSES)
    )
    NETWORKS["both"] = lambda: model
    try:
        task = problem(network="both")
    finally:
        del NETWORKS["both"]
    cut = cut_at(task.model, (SIZE, SIZE), 1)
    assert cut is not None
    assert "model.0" not in task.model.part_parameters(cut)
    got = task.gradient(ForwardEngine(plain, cut))
    above = task.model.part_parameters(cut)
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(name in above)
    assert relative(got.gradients, task.gradient(ReferenceEngine(plain)).gradients) <= 1e-10


def test_attention_has_a_tangent():
    """Fused attention kernels have no forward-mode formula; the engine must use the plain one."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    NETWORKS["attention"] = lambda: torchvision.models.VisionTransformer(SIZE, 4, 2, 2, 16, 32, num_classes=CLASSES)
    try:
        task = problem("mfrw", "attention")
    finally:
        del NETWORKS["attention"]
    torch.nn.init.normal_(task.model.head.weight)  # zero at the start, which would hide everything before it
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the oracle's double backward needs it too
        expected = task.gradient(ReferenceEngine(plain))
    assert relative(task.gradient(ForwardEngine(plain)).gradients, expected.gradients) <= 1e-10


FROZEN = [
    ("batchnorm", ["weight"]),
    ("batchnorm", ["bias"]),
    ("batchnorm", ["weight", "bias"]),
    ("cosine", ["weight"]),
    ("weight-norm", ["parametrizations.weight.original0"]),
    ("spectral-norm", ["parametrizations.weight.original", "bias"]),
    ("tied", ["weight"]),
]


@pytest.mark.parametrize("method_class", [None, Focal], ids=["closed", "focal"])
@pytest.mark.parametrize(("head", "frozen"), FROZEN)
def test_a_frozen_head(head, frozen, method_class):
    found = []
    for engine in (ReferenceEngine(plain), ForwardEngine(plain)):
        task = problem(network=head, method_class=method_class)
        for name in frozen:
            task.model.head.get_parameter(name).requires_grad_(False)
        found.append(task.gradient(engine).gradients)
    assert relative(found[1], found[0]) <= 1e-12


def test_the_optimizers_virtual_step_where_a_parameter_never_has_a_gradient():
    task = problem()
    task.model.model.unused = torch.nn.Linear(2, 2).double()
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-2)
    task.model(task.train.images).sum().backward()
    optimizer.step()
    posed = task.posed(ForwardEngine(plain), VirtualStep(0.1, optimizer))
    virtual = ForwardEngine(plain).virtual_train(posed)
    optimizer.zero_grad()
    task.method.loss(posed.shared.features, task.train, task.model.head, posed.advice.detach()).backward()
    optimizer.step()
    for name, parameter in task.model.named_parameters():
        if "unused" not in name:
            torch.testing.assert_close(virtual[name], parameter.detach(), rtol=1e-12, atol=1e-14)


def test_a_trainable_parameter_of_the_head_without_a_direction_is_an_error():
    task = problem()
    engine = ForwardEngine(plain)
    posed = task.posed(engine)
    _, gradient = engine.differentiate_meta_loss(task.model, engine.virtual_train(posed), task.meta)
    del gradient["model.fc.weight"]
    with pytest.raises(KeyError, match=r"model\.fc\.weight"):
        engine.propagate_to_advisor(posed, gradient)


@torch.library.custom_op("fastadvisor_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


twice.register_autograd(lambda context, gradient: 2 * gradient)


class Custom(torch.nn.Linear):
    def forward(self, x):
        return twice(super().forward(x))


@pytest.mark.parametrize("kind", ["custom operation", "backward hook"])
def test_a_head_without_a_forward_mode_derivative_is_refused(kind):
    """An operation of torch.library drops tangents without a word; a backward hook has a gradient of its own making."""
    head = Custom(8, CLASSES) if kind == "custom operation" else hooked("backward")
    NETWORKS["odd"] = lambda: torch.nn.Sequential(*list(NETWORKS["no-norm"]())[:-1], head)
    try:
        task = problem(network="odd")
    finally:
        del NETWORKS["odd"]
    with pytest.raises(UserError, match=r"The head, \w+, has an operation without .* --meta-engine reference"):
        task.gradient(ForwardEngine(plain))


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@pytest.mark.parametrize("operation", [twice, OwnFunction.apply], ids=["torch.library", "autograd.Function"])
def test_a_backbone_without_a_forward_mode_derivative_is_refused(operation):
    class Branch(torch.nn.Module):
        """Beside a path that keeps its tangent: the sum has one, and it would be the wrong one."""

        def forward(self, x):
            return x + operation(x)

    NETWORKS["odd"] = lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), Branch(), *list(NETWORKS["no-norm"]()))
    try:
        task = problem(network="odd")
    finally:
        del NETWORKS["odd"]
    with pytest.raises(UserError, match=r"The backbone of odd has an operation without .* --meta-engine reference"):
        task.gradient(ForwardEngine(plain))


@pytest.mark.parametrize("kind", [{}, {"behind": True}, {"lean": True}], ids=["own", "behind", "lean"])
@pytest.mark.parametrize("head", ["spectral-norm", "spectral-norm-hook"])
def test_a_spectral_normalisation_iterates_once_an_iteration(head, kind):
    """As often as in plain training, wherever it is; all passes of the iteration see the same vectors."""
    task = problem(network=head)
    alone = copy.deepcopy(task.model)
    alone.train()
    alone(task.train.images)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    step = build_iteration(task.model, task.method, optimizer, None, ForwardEngine(plain), plain, **kind)
    step(task.train, task.meta)
    vectors = [name for name, _ in alone.named_buffers() if name.endswith(("_u", "_v"))]
    assert len(vectors) == 2
    for name in vectors:
        torch.testing.assert_close(task.model.get_buffer(name), alone.get_buffer(name), rtol=1e-12, atol=1e-14)
