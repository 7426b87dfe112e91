import pytest
import torch
from torch.nn.functional import dropout

from fastadvisor.runtime.random_state import RandomState

CPU = torch.device("cpu")


def test_replays_the_same_numbers():
    torch.manual_seed(0)
    torch.rand(3)
    state = RandomState.now(CPU)
    want = torch.rand(5), dropout(torch.ones(50), 0.5), torch.randperm(9)
    torch.rand(7)
    for _ in range(2):
        with state.replayed():
            got = torch.rand(5), dropout(torch.ones(50), 0.5), torch.randperm(9)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_taking_the_state_draws_nothing():
    torch.manual_seed(0)
    want = torch.rand(5)
    torch.manual_seed(0)
    RandomState.now(CPU)
    assert torch.equal(torch.rand(5), want)


@pytest.mark.parametrize("fails", [False, True])
def test_the_outer_stream_goes_on(fails):
    torch.manual_seed(0)
    state = RandomState.now(CPU)
    torch.rand(3)
    want = torch.rand(5)
    torch.manual_seed(0)
    torch.rand(3)
    try:
        with state.replayed():
            torch.rand(11)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert torch.equal(torch.rand(5), want)


def test_the_recorded_state_does_not_move():
    torch.manual_seed(0)
    state = RandomState.now(CPU)
    kept = state.cpu.clone()
    with state.replayed():
        torch.rand(11)
    torch.rand(11)
    assert torch.equal(state.cpu, kept)
    assert state.cuda == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_replays_on_a_gpu():
    device = torch.device("cuda")
    state = RandomState.now(device)
    want, after = torch.rand(5, device=device), torch.rand(5, device=device)
    with state.replayed():
        assert torch.equal(torch.rand(5, device=device), want)
        torch.rand(100, device=device)
    with state.replayed():
        assert torch.equal(torch.rand(5, device=device), want)
        assert torch.equal(torch.rand(5, device=device), after)
