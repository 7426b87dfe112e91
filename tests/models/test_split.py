from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn

from fastadvisor.config import ModelConfig
from fastadvisor.errors import UserError
from fastadvisor.models import SplitClassifier, build_model, check_model, cut_at, layers_of, split
from fastadvisor.models.cifar_resnet import CifarResNet
from fastadvisor.models.split import swap_modules

CLASSES = 7
NAMES = {  # image size, features
    "resnet20": (32, 64),
    "resnet10": (64, 512),
    "resnet18": (64, 512),
    "mobilenet_v2": (64, 1280),
    "densenet121": (64, 1024),
    "efficientnet_b0": (64, 1280),
    "convnext_tiny": (64, 768),
    "shufflenet_v2_x1_0": (64, 1024),
    "regnet_y_400mf": (64, 440),
    "googlenet": (64, 1024),
    "inception_v3": (96, 2048),
    "timm/mobilenetv3_small_050": (64, 1024),
}
RESNETS = ["resnet20", "resnet10", "resnet18"]
BUILT = {}


def build(name):
    """Every model once, with images for it."""
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    if name not in BUILT:
        torch.manual_seed(0)
        size = NAMES[name][0]
        whole = build_model(ModelConfig(model=name), CLASSES, (size, size))
        BUILT[name] = whole, torch.randn(3, 3, size, size)
    return BUILT[name]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny batches: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    BUILT.clear()


def modules(whole):
    return {name: id(module) for name, module in whole.named_modules()}


def buffers(whole):
    return {name: buffer.clone() for name, buffer in whole.named_buffers()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Any model


@pytest.mark.parametrize("name", NAMES)
def test_head_of_features_is_the_model(name):
    whole, images = build(name)
    before = modules(whole), buffers(whole)
    whole.eval()
    with torch.no_grad():
        logits = whole.model(images)
        features = whole(images, features=True)
        torch.testing.assert_close(whole.head(features), logits, rtol=1e-5, atol=1e-6)
        assert torch.equal(whole(images), logits)
    assert features.shape == (3, NAMES[name][1])
    assert logits.shape == (3, CLASSES)
    assert modules(whole) == before[0]
    assert same(buffers(whole), before[1])


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "convnext_tiny", "shufflenet_v2_x1_0"])
def test_state_dict_is_the_librarys_own(name):
    whole, _ = build(name)
    with torch.device("meta"):
        fresh = torchvision.models.get_model(name, num_classes=CLASSES).state_dict()
    ours = whole.model.state_dict()
    assert list(ours) == list(fresh)
    assert [tensor.shape for tensor in ours.values()] == [tensor.shape for tensor in fresh.values()]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_no_auxiliary_classifiers(name):
    whole, images = build(name)
    assert not [key for key in whole.model.state_dict() if "aux" in key.lower()]
    whole.train()
    with torch.no_grad(), whole.frozen_statistics():
        assert isinstance(whole(images), torch.Tensor)
    whole.eval()


def test_splitting_changes_no_state_and_no_mode():
    model = CifarResNet(8, 5).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = split(model, "mine", (16, 16), 5)
    assert same(model.state_dict(), state)
    assert model.training
    assert whole.model is model
    assert {key.removeprefix("model.") for key in whole.state_dict()} == set(state)
    model.eval()
    split(model, "mine", (16, 16), 5)
    assert not model.training


def test_splitting_leaves_the_random_stream_alone():
    model = CifarResNet(8, 5)
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    whole = split(model, "mine", (16, 16), 5)
    cut_at(whole, (16, 16), 1)
    assert torch.equal(torch.rand(4), want)


def test_modules_come_back_when_forward_raises():
    whole = split(CifarResNet(8, 5), "mine", (16, 16), 5)
    cut = cut_at(whole, (16, 16), 1)
    before = modules(whole)
    for options in ({"features": True}, {"start": cut}, {"start": cut, "features": True}):
        with pytest.raises(RuntimeError):
            whole(torch.randn(2, 5, 16, 16), **options)
        assert modules(whole) == before


def test_modules_come_back_when_a_name_is_wrong():
    model = CifarResNet(8, 5)
    before = modules(model)
    with pytest.raises(AttributeError), swap_modules(model, {"fc": nn.Identity(), "nothing.here": nn.Identity()}):
        raise AssertionError("unreachable")
    assert modules(model) == before


def test_gradients_reach_the_backbone_through_the_features():
    whole = split(CifarResNet(8, 5), "mine", (16, 16), 5)
    whole(torch.randn(2, 3, 16, 16), features=True).sum().backward()
    assert whole.head.weight.grad is None
    assert all(p.grad is not None for name, p in whole.named_parameters() if not name.startswith("model.fc."))


# What a user can get wrong


def test_squeezenet_has_no_features():
    with pytest.raises(UserError, match="squeezenet1_1 does not end in a linear layer"):
        build_model(ModelConfig(model="squeezenet1_1"), CLASSES, (64, 64))


def test_a_linear_layer_that_is_not_the_last_step_is_no_head():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES), nn.ReLU(), nn.Softmax(1))
    with pytest.raises(UserError, match="does not end in a linear layer"):
        split(model, "mine", (2, 2), CLASSES)


def test_a_linear_layer_on_every_pixel_is_no_head():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, CLASSES)

        def forward(self, x):
            return self.linear(x.permute(0, 2, 3, 1)).amax(dim=(1, 2))

    with pytest.raises(UserError, match="does not end in a linear layer"):
        split(Dense(), "mine", (4, 4), CLASSES)


class TwoHeads(nn.Module):
    """The logits are the mean of two heads on features of their own, as of a distilled transformer in testing."""

    def __init__(self, zeros=False, pair=False):
        super().__init__()
        self.one, self.two = nn.Linear(12, 8), nn.Linear(12, 8)
        self.head, self.head_dist = nn.Linear(8, CLASSES), nn.Linear(8, CLASSES)
        self.pair = pair
        if zeros:
            for head in (self.head, self.head_dist):
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)

    def forward(self, x):
        first, second = self.head(self.one(x.flatten(1)).relu()), self.head_dist(self.two(x.flatten(1)).relu())
        return (first, second) if self.pair and self.training else (first + second) / 2


@pytest.mark.parametrize("settings", [{}, {"zeros": True}, {"pair": True}], ids=str)
def test_two_heads_are_refused(settings):
    """Heads that begin with zeros give logits of zero, which any of them would explain."""
    with pytest.raises(UserError, match="mine does not end in a linear layer on a feature vector"):
        split(TwoHeads(**settings), "mine", (2, 2), CLASSES)


def test_a_head_of_zeros_is_still_a_head():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[3].bias)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert split(model, "mine", (2, 2), CLASSES).head_name == "3"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_with_an_output_of_its_own_in_training():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.norm, self.head = nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)

        def forward(self, x):
            features = self.norm(self.body(x.flatten(1)))
            return (self.head(features), features) if self.training else self.head(features)

    model = Auxiliary()
    with pytest.raises(UserError, match="mine returns tuple instead of logits in training; choose another model"):
        split(model, "mine", (2, 2), CLASSES)
    assert model.training
    assert torch.equal(model.norm.running_mean, torch.zeros(8))
    assert int(model.norm.num_batches_tracked) == 0


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("deit_tiny_distilled_patch16_224", 224),
        ("levit_128s", 224),
        ("pit_ti_distilled_224", 224),
        ("efficientformer_l1", 224),
        ("efficientformerv2_s0", 224),
        ("crossvit_9_240", 240),
    ],
)
def test_timms_models_of_several_heads_are_refused(name, size):
    timm = pytest.importorskip("timm")
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    with pytest.raises(UserError, match=f"timm/{name} does not end in a linear layer on a feature vector"):
        build_model(ModelConfig(model=f"timm/{name}"), CLASSES, (size, size))


def test_the_head_may_be_registered_before_the_backbone():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, CLASSES)
            self.body = nn.Linear(12, 8)

        def forward(self, x):
            return self.head(self.body(x.flatten(1)).relu())

    assert split(Reversed(), "mine", (2, 2), CLASSES).head_name == "head"


@pytest.mark.parametrize("name", ["inception_v3", "mine"])
def test_images_of_the_wrong_size(name):
    model = build(name)[0].model if name == "inception_v3" else nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))
    with pytest.raises(UserError, match=rf"{name} does not take images of 20×24 pixels \(.+\); set --image-size"):
        split(model, name, (20, 24), CLASSES)


def test_a_model_that_returns_no_tensor():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(UserError, match="returns tuple instead of logits"):
        split(Two(), "mine", (4, 4), CLASSES)


@pytest.mark.parametrize(
    ("name", "near"), [("resnet322", "resnet32"), ("resnet18_cifar", "resnet18-cifar"), ("convnext_tny", "convnext_tiny")]
)
def test_unknown_model(name, near):
    with pytest.raises(UserError, match=f"Unknown model '{name}'. Did you mean '{near}'"):
        check_model(name)
    with pytest.raises(UserError, match=f"'{near}'"):
        build_model(ModelConfig(model=name), CLASSES, (32, 32))


def test_unknown_timm_model():
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"timm has no model 'resnet10tt'. Did you mean 'resnet10t'"):
        build_model(ModelConfig(model="timm/resnet10tt"), CLASSES, (32, 32))


def test_known_models():
    for name in ("resnet32", "resnet18-cifar", "resnet10", "vit_b_16"):
        check_model(name)


# Pretrained weights


def test_pretrained_without_network(monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"weights of resnet18 cannot be had .*Name or service.*drop --pretrained"):
        build_model(ModelConfig(model="resnet18", pretrained=True), CLASSES, (64, 64))


def test_pretrained_timm_without_network(monkeypatch):
    timm = pytest.importorskip("timm")

    def offline(*args, **kwargs):
        assert kwargs["pretrained"]
        raise FileNotFoundError("no such file in the cache")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"weights of timm/resnet10t cannot be had .*drop --pretrained"):
        build_model(ModelConfig(model="timm/resnet10t", pretrained=True), CLASSES, (64, 64))


def test_no_pretrained_weights_for_ours():
    with pytest.raises(UserError, match="no pretrained weights for resnet32; drop --pretrained"):
        build_model(ModelConfig(pretrained=True), CLASSES, (32, 32))


@pytest.mark.parametrize("classes", [CLASSES, 1000])
@pytest.mark.parametrize(("name", "head"), [("resnet18", "fc"), ("mobilenet_v2", "classifier.1")])
def test_pretrained_keeps_the_backbone_and_the_fitting_head(monkeypatch, name, head, classes):
    stored = torchvision.models.get_model(name).state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *args, **kwargs: stored)
    whole = build_model(ModelConfig(model=name, pretrained=True), classes, (64, 64))
    state = whole.model.state_dict()
    assert list(state) == list(stored)
    changed = {key for key in state if not torch.equal(state[key], stored[key])}
    assert changed == (set() if classes == 1000 else {f"{head}.weight", f"{head}.bias"})
    assert (whole.head_name, whole.head.out_features) == (head, classes)


# Cuts


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("name", RESNETS)
def test_a_cut_gives_the_whole(name, stages, training):
    whole, images = build(name)
    size = NAMES[name][0]
    whole.train(training)
    cut = cut_at(whole, (size, size), stages)
    top = 3 if name == "resnet20" else 4
    assert cut.entry == f"layer{top + 1 - stages}"
    assert cut.below[-1] == f"layer{top - stages}"
    assert whole.training is training
    before = modules(whole)
    with torch.no_grad(), whole.frozen_statistics():
        entering = whole(images, until=cut)
        torch.testing.assert_close(whole(entering, start=cut, features=True), whole(images, features=True))
        torch.testing.assert_close(whole(entering, start=cut), whole(images))
    assert modules(whole) == before
    assert not whole.model.get_submodule(cut.entry)._forward_pre_hooks
    whole.eval()


@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121", "efficientnet_b0", "convnext_tiny", "regnet_y_400mf"])
def test_a_cut_opens_the_trunk(name):
    whole, images = build(name)
    whole.eval()
    cut = cut_at(whole, (64, 64), 2)
    assert "." in cut.entry
    with torch.no_grad():
        features = whole(whole(images, until=cut), start=cut, features=True)
        torch.testing.assert_close(features, whole(images, features=True), rtol=1e-4, atol=1e-5)


def test_below_runs_nothing_above():
    whole, images = build("resnet20")
    whole.eval()
    cut = cut_at(whole, (32, 32), 1)
    ran = []
    handles = [m.register_forward_hook(lambda *_, name=n: ran.append(name)) for n, m in whole.model.named_children()]
    with torch.no_grad():
        whole(images, until=cut)
    for handle in handles:
        handle.remove()
    assert ran == ["conv1", "bn1", "layer1", "layer2"]


def test_captured_sees_every_pass_and_the_random_state():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    whole = SplitClassifier(model, "5").train()
    cut = cut_at(whole, (2, 2), 1)
    assert cut.entry == "3"
    images = torch.randn(4, 3, 2, 2)
    with whole.capture(cut) as seen:
        logits = [whole(images), whole(images)]
    whole(images)
    assert len(seen) == 2
    for entering, expected in zip(seen, logits, strict=True):
        assert not entering.activation.requires_grad
        with entering.random_state.replayed():  # drops what the pass dropped above the cut
            assert torch.equal(whole(entering.activation, start=cut), expected)


class Shifts(nn.Module):
    """Does something to its input before its first child, so the activation at a cut would get it twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = 2 * x.flatten(1) - 0.5
        return self.fc(self.b(self.a(x).relu()))


class AddsAToken(nn.Module):
    """Like a vision transformer: (B, 3, H, W) becomes tokens, and one more joins them."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.stem, self.a, self.b, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return self.fc(self.b(self.a(x).relu())[:, 0])


@pytest.mark.parametrize("kind", [Shifts, AddsAToken])
def test_no_cut_where_the_model_is_no_chain(kind):
    torch.manual_seed(0)
    whole = split(kind(), "mine", (2, 2), 3).train()
    before = modules(whole)
    assert cut_at(whole, (2, 2), 1) is None
    assert modules(whole) == before
    assert whole.training
    assert not any(module._forward_pre_hooks for module in whole.modules())


@pytest.mark.parametrize(("name", "stages"), [("resnet20", 3), ("resnet18", 4), ("resnet18", 50)])
def test_no_cut_below_more_stages_than_there_are(name, stages):
    whole, _ = build(name)
    size = NAMES[name][0]
    assert cut_at(whole, (size, size), stages) is None


def test_part_parameters():
    whole = split(CifarResNet(8, 5), "mine", (16, 16), 5)
    assert list(whole.part_parameters()) == [name for name, _ in whole.named_parameters()]
    top = whole.part_parameters(cut_at(whole, (16, 16), 1))
    assert {name.split(".")[1] for name in top} == {"layer3", "fc"}
    assert all(parameter is whole.get_parameter(name) for name, parameter in top.items())
    whole.model.bn1.weight.requires_grad_(False)
    assert "model.bn1.weight" not in whole.part_parameters()


def test_part_parameters_take_names_whole():
    # "features.1" is below the cut, "features.10" and beyond are not.
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(12, 12) for _ in range(11)), nn.Linear(12, 3))
    whole = split(model, "mine", (2, 2), 3)
    top = whole.part_parameters(cut_at(whole, (2, 2), 2))
    assert {name.split(".")[1] for name in top} == {"10", "11", "12"}


def test_head_parameters():
    whole, _ = build("mobilenet_v2")
    names = whole.head_parameters()
    assert list(names) == ["weight", "bias"]
    assert whole.get_parameter(names["weight"]) is whole.head.weight
    assert whole.get_parameter(names["bias"]) is whole.head.bias
    bare = split(nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False)), "mine", (2, 2), 3)
    assert bare.head_parameters() == {"weight": "model.1.weight"}
    bare.head.requires_grad_(False)
    assert bare.head_parameters() == {}


# Running statistics


def test_frozen_statistics_touch_no_buffer_in_training():
    whole, images = build("resnet20")
    whole.train()
    before = buffers(whole)
    with torch.no_grad(), whole.frozen_statistics():
        frozen = whole(images)
    assert same(buffers(whole), before)
    with torch.no_grad():
        assert torch.equal(whole(images), frozen)  # batch statistics either way
    after = buffers(whole)
    assert all(not torch.equal(after[name], before[name]) for name in before)  # and tracking is on again
    whole.eval()


def test_frozen_statistics_are_restored_after_an_exception():
    whole = split(CifarResNet(8, 5), "mine", (16, 16), 5).train()
    with pytest.raises(ZeroDivisionError), whole.frozen_statistics():
        raise ZeroDivisionError
    assert all(m.track_running_stats for m in whole.modules() if isinstance(m, nn.BatchNorm2d))


def test_frozen_statistics_in_evaluation_still_use_the_running_ones():
    whole = split(CifarResNet(8, 5), "mine", (16, 16), 5)
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        whole.train()(3 * images + 1)  # moves them
        want = whole.eval()(images)
        with whole.frozen_statistics():
            assert torch.equal(whole(images), want)
        whole.train()
        with whole.frozen_statistics():
            assert not torch.allclose(whole(images), want)


def test_frozen_statistics_of_a_layer_that_evaluates_by_itself():
    # A user may freeze single BatchNorms; they keep using their running statistics.
    whole = split(CifarResNet(8, 5), "mine", (16, 16), 5).train()
    whole.model.bn1.eval()
    with torch.no_grad():
        x, images = torch.randn(2, 16, 4, 4), torch.randn(2, 3, 16, 16)
        want = whole.model.bn1(x)
        with whole.frozen_statistics():
            assert torch.equal(whole.model.bn1(x), want)
            whole(images)


def test_frozen_statistics_leave_untracked_layers_alone():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(12, 3))
    whole = split(model, "mine", (2, 2), 3).train()
    with whole.frozen_statistics():
        pass
    assert model[0].track_running_stats is False


def test_forward_ad_passes_through_frozen_statistics():
    from torch.autograd import forward_ad

    whole = split(CifarResNet(8, 5), "mine", (16, 16), 5).train()
    images, tangent = torch.randn(2, 2, 3, 16, 16)
    with whole.frozen_statistics(), forward_ad.dual_level():
        out = forward_ad.unpack_dual(whole(forward_ad.make_dual(images, tangent), features=True))
    assert out.tangent is not None
    assert out.tangent.abs().max() > 0


@pytest.mark.parametrize("inplace", [False, True])
def test_a_cut_under_an_operation_in_place_is_refused(inplace):
    """What enters it is overwritten above it, so that nothing could start from there again."""

    def block():
        return torch.nn.Sequential(torch.nn.SiLU(inplace=inplace), torch.nn.Conv2d(4, 4, 3, padding=1))

    class Preactivated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = torch.nn.Conv2d(3, 4, 3), block(), block()
            self.fc = torch.nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(self.two(self.one(self.stem(x))).mean((2, 3)))

    whole = split(Preactivated(), "preactivated", (8, 8), 5)
    assert (cut_at(whole, (8, 8), 1) is None) == inplace
    assert [layer.cut is None or "1" in layer.cut.entry for layer in layers_of(whole, (8, 8))] == [True] * 3  # convolutions
