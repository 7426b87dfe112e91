"""A checkpoint is the dict of a run's parts."""

from dataclasses import dataclass

import pytest
import torch

from fastadvisor.errors import UserError
from fastadvisor.runtime.ranks import ALONE
from fastadvisor.runtime.state import Fixed, Module, RandomStates, Value, load_parts, save_parts


@dataclass
class Owner:
    number: int = 3


def parts(owner, module, classes=("a", "b")):
    return {
        "number": Value(owner, "number", int),
        "classes": Fixed(list(classes), "was trained on other classes."),
        "module": Module(module, "is of another method."),
    }


def test_all_parts_come_back_under_their_names(tmp_path):
    torch.manual_seed(0)
    owner, module = Owner(5), torch.nn.Linear(2, 1)
    state = save_parts(parts(owner, module), {"random": RandomStates()}, ALONE)
    assert set(state) == {"number", "classes", "module", "ranks"}
    drawn = torch.rand(3)
    other, again = Owner(), torch.nn.Linear(2, 1)
    load_parts(state, tmp_path, parts(other, again), {"random": RandomStates()}, ALONE)
    assert other.number == 5
    assert torch.equal(module.weight, again.weight)
    assert torch.equal(drawn, torch.rand(3))


def test_what_begins_anew_with_another_number_of_ranks(tmp_path):
    state = save_parts({}, {"random": RandomStates(), "number": Value(Owner(7), "number", int)}, ALONE)
    state["ranks"] = state["ranks"] * 2
    before, owner = torch.get_rng_state(), Owner()
    torch.rand(1)
    moved = torch.get_rng_state()
    own = {"random": RandomStates(), "number": Value(owner, "number", int)}
    load_parts(state, tmp_path, {}, own, ALONE, drawn_alone=("random",))
    assert owner.number == 7
    assert torch.equal(torch.get_rng_state(), moved)
    assert not torch.equal(before, moved)


def test_what_does_not_fit_is_refused(tmp_path):
    module = torch.nn.Linear(2, 1)
    state = save_parts(parts(Owner(), module), {}, ALONE)
    with pytest.raises(UserError, match="was trained on other classes"):
        load_parts(state, tmp_path, parts(Owner(), module, classes=("a",)))
    with pytest.raises(UserError, match="is of another method"):
        load_parts(state, tmp_path, parts(Owner(), torch.nn.Linear(2, 1, bias=False)))
    with pytest.raises(UserError, match="first differing key weight"):
        load_parts(state, tmp_path, parts(Owner(), torch.nn.Linear(3, 1)))
    with pytest.raises(TypeError, match="number is str"):
        load_parts({**state, "number": "5"}, tmp_path, parts(Owner(), module))
    with pytest.raises(KeyError, match="module"):
        load_parts({name: value for name, value in state.items() if name != "module"}, tmp_path, parts(Owner(), module))
