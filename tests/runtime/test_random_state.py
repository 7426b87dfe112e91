import pytest
import torch
from torch.nn.functional import dropout

from fastadvisor.runtime.random_state import CommonRandomness, RandomState
from fastadvisor.runtime.share import Share

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


def several(count):
    """The common streams of so many ranks that stand where torch's own does."""
    found = [CommonRandomness(CPU, Share(rank, count)) for rank in range(count)]
    for one in found:
        one.split_off()
    return found


def test_ranks_draw_together_what_one_process_draws():
    torch.manual_seed(0)
    alone, ranks = CommonRandomness(CPU), several(3)
    with alone.drawing():
        whole = torch.rand(12)
    torch.rand(3)
    more = torch.rand(4)
    for number, rank in enumerate(ranks):
        torch.manual_seed(number + 1)
        with rank.drawing():
            assert torch.equal(torch.rand(12)[rank.share.part(4)], whole[4 * number : 4 * number + 4])
        torch.rand(number)  # of its own
        with rank.drawing():
            torch.rand(3)
            assert torch.equal(torch.rand(4), more)


def test_the_common_stream_leaves_a_ranks_own_alone():
    torch.manual_seed(0)
    (rank,) = several(1)
    torch.manual_seed(1)
    with rank.drawing():
        torch.rand(9)
    got = torch.rand(5)
    torch.manual_seed(1)
    assert torch.equal(got, torch.rand(5))


def test_one_process_has_one_stream():
    torch.manual_seed(0)
    want = torch.rand(5)
    torch.manual_seed(0)
    with CommonRandomness(CPU).drawing():
        assert torch.equal(torch.rand(5), want)


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("after", [1, 3])
def test_the_common_stream_goes_on_with_any_number_of_ranks(before, after):
    torch.manual_seed(0)
    saved = CommonRandomness(CPU) if before == 1 else several(before)[1]
    with saved.drawing():
        torch.rand(9)
    state = saved.state_dict()
    with saved.drawing():
        want = torch.rand(5)
    torch.manual_seed(77)
    resumed = CommonRandomness(CPU, Share(after - 1, after))
    resumed.load_state_dict(state)
    with resumed.drawing():
        assert torch.equal(torch.rand(5), want)


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
