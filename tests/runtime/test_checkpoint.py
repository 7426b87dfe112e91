import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch

from fastadvisor.errors import UserError
from fastadvisor.runtime import checkpoint


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last.pt"


def test_round_trip(path):
    weights = torch.arange(6.0).reshape(2, 3).to(torch.bfloat16)
    checkpoint.save(path, {"weights": weights, "epoch": 3, "history": [1.5, None, "a"]})
    got = checkpoint.load(path)
    assert torch.equal(got["weights"], weights)
    assert got["weights"].dtype is torch.bfloat16
    assert (got["epoch"], got["history"], got["format"]) == (3, [1.5, None, "a"], checkpoint.FORMAT)


def test_no_temporary_file_is_left(path):
    checkpoint.save(path, {})
    checkpoint.save(path, {})
    assert os.listdir(path.parent) == ["last.pt"]


def test_a_crash_while_saving_leaves_the_old_checkpoint(path, monkeypatch):
    checkpoint.save(path, {"epoch": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"last.pt cannot be written \(No space left on device\); free some space"):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path)["epoch"] == 1
    assert os.listdir(path.parent) == ["last.pt"]


@pytest.mark.parametrize("keep", [0, 1, 10, 500, -1, -50])
def test_cut_short(path, keep):
    checkpoint.save(path, {"weights": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"last.pt is damaged or cut short.*train again into another --output"):
        checkpoint.load(path)


def test_flipped_bits_in_the_weights(path):
    weights = torch.full((1000,), 7.25)
    checkpoint.save(path, {"weights": weights})
    data = bytearray(path.read_bytes())
    data[data.index(weights.numpy().tobytes()) + 2001] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged or cut short"):
        checkpoint.load(path)


def test_a_tensor_marked_as_a_folder(path):
    """torch.load would give it uninitialised memory."""
    checkpoint.save(path, {"weights": torch.full((1000,), 7.25)})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
        attributes = 38  # of an entry of the directory at the end of the file
    while data[directory : directory + 4] == b"PK\x01\x02":
        data[directory + attributes] |= 0x10
        lengths = [int.from_bytes(data[directory + at : directory + at + 2], "little") for at in (28, 30, 32)]
        directory += 46 + sum(lengths)
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged or cut short"):
        checkpoint.load(path)


def test_foreign_files(path):
    with pytest.raises(UserError, match=r"There is no file .*last.pt"):
        checkpoint.load(path)
    path.write_text("hello, world\n" * 100)
    with pytest.raises(UserError, match="damaged or cut short, or no checkpoint at all"):
        checkpoint.load(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="holds no dict of weights"):
        checkpoint.load(path)
    torch.save({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is not a checkpoint of this version of fastadvisor"):
        checkpoint.load(path)
    assert torch.equal(checkpoint.read(path)["conv.weight"], torch.zeros(1))
    torch.save({"format": "fastadvisor-checkpoint-3"}, path)
    with pytest.raises(
        UserError, match=r"written by another version of fastadvisor .*: go on with that version, or .* --weights"
    ):
        checkpoint.load(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("dump", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what, protocol=2))])
def test_code_in_a_checkpoint_is_not_run(path, monkeypatch, dump):
    monkeypatch.setenv("BOMB", str(path.parent / "exploded"))
    dump({"format": checkpoint.FORMAT, "bomb": Bomb()}, path)
    with pytest.raises(UserError, match="no checkpoint at all"):
        checkpoint.load(path)
    assert os.listdir(path.parent) == ["last.pt"]


def test_model_state_round_trip(path):
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    checkpoint.load_model_state(target, source.state_dict(), path)
    assert torch.equal(target.weight, source.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("bias"), r"another model \(first differing key bias: missing there\)"),
        (lambda state: state.update(fc=torch.zeros(1)), r"first differing key fc: unknown here"),
        (lambda state: state.update(weight=torch.zeros(5, 3)), r"key weight: \(5, 3\) there, \(2, 3\) here\); use the --model"),
        (lambda state: state.update(weight="x"), r"first differing key weight"),
    ],
)
def test_state_of_another_model(path, change, message):
    module = torch.nn.Linear(3, 2)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = torch.nn.Linear(3, 2).state_dict()
    change(state)
    with pytest.raises(UserError, match=message):
        checkpoint.load_model_state(module, state, path)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def draw():
    cuda = torch.rand(2, device="cuda").tolist() if torch.cuda.is_available() else []
    return torch.rand(2).tolist(), np.random.randn(), random.random(), random.gauss(0, 1), cuda


def test_random_states_survive_a_checkpoint(path):
    np.random.randn()  # leaves a second gaussian in numpy's cache
    random.gauss(0, 1)  # and one in Python's
    checkpoint.save(path, {"random": checkpoint.random_states()})
    first, second = draw(), draw()
    assert first != second
    checkpoint.restore_random_states(checkpoint.load(path)["random"])
    assert (draw(), draw()) == (first, second)
