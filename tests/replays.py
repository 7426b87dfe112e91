"""What replayed iterations have to do, on a CPU's stand-in as on a GPU."""

import pytest
import torch

from fastadvisor.runtime.watch import NonFiniteError


def check_bad_numbers_reach_no_weight(run):
    """Take six iterations and one on a bad image, which the next one has to report."""
    for _ in range(6):
        run.iterate(*run.batches(run.stages[0]))
    assert run.take.replays > 0
    train, meta = run.batches(run.stages[0])
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    train.images[0] = float("nan")
    run.iterate(train, meta)
    with pytest.raises(NonFiniteError, match="advisor's mask") as found:
        run.iterate(*run.batches(run.stages[0]))
    assert found.value.iteration == 7
    for old, new in zip(before, run.model.parameters(), strict=True):
        assert torch.equal(old, new)
