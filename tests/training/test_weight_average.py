"""The average of the weights against a loop by hand, through a checkpoint, and without waiting for the device."""

import io

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastadvisor.training.weight_average import WeightAverage


def moving(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))


def move(model, step):
    """Change weights and, by a forward pass, running statistics."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.cos(torch.arange(parameter.numel()) + step).view_as(parameter))
    model.train()(torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(step)))


def test_the_average_is_that_of_a_loop_by_hand_running_statistics_too():
    model = moving(0)
    average, expected = WeightAverage(model, 0.4), {}
    for step in range(6):
        move(model, step)
        average.update(model)
        decay = min(0.4, (1 + step) / (10 + step)) if step else 0.0
        for name, value in model.state_dict().items():
            fresh = decay * expected[name] + (1 - decay) * value if step and value.is_floating_point() else value.clone()
            expected[name] = fresh
    assert decay == 0.4  # the warm-up was passed
    found = average.model.state_dict()
    assert found["1.num_batches_tracked"] == 6
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_average_goes_on_where_it_was_saved():
    model = moving(0)
    whole = WeightAverage(model, 0.99)
    for step in range(3):
        move(model, step)
        whole.update(model)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = WeightAverage(moving(1), 0.99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        move(model, step)
        whole.update(model)
        resumed.update(model)
    for one, other in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_the_average_never_waits_for_the_device():
    """A tensor on the device meta has no values to wait for, and copies between devices show as operations."""
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.overloadpacket.__name__)
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            assert all(tensor.device.type == "meta" for tensor in tensors)
            return function(*args, **(kwargs or {}))

    model = moving(0).to("meta")
    average = WeightAverage(model, 0.9)
    with Watching():
        for _ in range(3):
            average.update(model)
    assert "_foreach_lerp_" in seen
    assert not {"_to_copy", "_local_scalar_dense", "item"} & set(seen)
