"""The classifier leaves the house: each file is read back and gives the original's logits on real images."""

import json

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from fastadvisor import cli
from fastadvisor.commands import export
from fastadvisor.commands.export import FORMATS, _compare, export_run
from fastadvisor.commands.train import train_config
from fastadvisor.config import Config, resolve
from fastadvisor.errors import UserError

QUIET = {"progress": False, "tensorboard": False, "device": "cpu"}
HAS_ONNX = all(export.find_spec(package) is not None for package in export.ONNX_PACKAGES)
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript or onnxruntime is not installed")


def train(folder, **changes):
    return train_config(resolve(Config, **{**QUIET, "epochs": 1, "method": "ce", "output": str(folder), **changes})).folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("export") / "run", ema_decay=0.5, epochs=2)


@needs_onnx
def test_every_format_gives_the_logits_of_the_run(run, capfd):
    assert cli.main(["export", str(run)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()] == ["file", *FORMATS.values(), "Compared"]
    folder = run / "export"
    assert {path.name for path in folder.iterdir()} == {*FORMATS.values(), "export.json"}
    about = json.loads((folder / "export.json").read_text())
    assert about["classes"] == [str(digit) for digit in range(10)]
    assert all(one["same_top1"] and one["largest_difference"] <= 1e-4 for one in about["files"].values())
    # By other means than the product's own comparison: another batch size, and the run's own model.pt.
    images = torch.randn(7, 3, about["image_size"], about["image_size"])
    from fastadvisor.models.cifar_resnet import CifarResNet

    model = CifarResNet(8, 10).eval()
    model.load_state_dict(torch.load(run / "model.pt", weights_only=True))
    wanted = model(images).detach()
    again = CifarResNet(8, 10).eval()
    again.load_state_dict(torch.load(folder / "classifier.pt", weights_only=True))
    assert torch.equal(again(images), wanted)
    program = torch.export.load(folder / "classifier.pt2").module()
    torch.testing.assert_close(program(images), wanted, rtol=1e-4, atol=1e-4)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "classifier.onnx"))
    np.testing.assert_allclose(session.run(["logits"], {"images": images.numpy()})[0], wanted, rtol=1e-4, atol=1e-4)


def test_a_torchvision_model_and_another_folder(tmp_path):
    run = train(tmp_path / "run", model="resnet18")
    about = export_run(run, output=tmp_path / "out", formats=["torch-export"], checkpoint="last", images=4)
    assert about["compared_on"] == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["classifier.pt2", "export.json"]
    program = torch.export.load(tmp_path / "out" / "classifier.pt2").module()
    model = resnet18(num_classes=10).eval()
    model.load_state_dict(torch.load(run / "model.pt", weights_only=True))
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-4)


def test_a_file_that_differs_is_not_left_behind(run, tmp_path, monkeypatch):
    write = export.checkpoints.write

    def spoilt(path, state):
        first = next(iter(state))
        write(path, {**state, first: state[first] + 0.1})

    monkeypatch.setattr(export.checkpoints, "write", spoilt)
    with pytest.raises(UserError, match=r"classifier.pt does not give the logits of the original"):
        export_run(run, output=tmp_path / "out", formats=["state-dict"])
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_refused(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"Unknown format 'onx'. Did you mean 'onnx'\?"):
        export_run(run, formats=["onx"])
    with pytest.raises(UserError, match="--formats names none"):
        export_run(run, formats=[])
    with pytest.raises(UserError, match="is not a run folder"):
        export_run(tmp_path, formats=["state-dict"])
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    with pytest.raises(UserError, match=r"holds no model.pt"):
        export_run(tmp_path, formats=["state-dict"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --output"):
        export_run(run, output=tmp_path / "file" / "under", formats=["state-dict"])
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match=r"needs onnxscript: pip install 'fastadvisor\[export\]', or leave it out"):
        export_run(run)


def test_a_model_that_cannot_be_traced_is_said_in_a_sentence(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("data-dependent\ncontrol flow")

    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(UserError, match=r"resnet8 cannot be exported as torch-export \(data-dependent control flow\); leave"):
        export_run(run, formats=["torch-export"])


def test_logits_that_are_not_numbers_are_not_the_originals(tmp_path):
    wanted = [(torch.zeros(2, 3), torch.zeros(2, 3))]
    _compare("onnx", tmp_path / "model.onnx", wanted, lambda x: x)
    with pytest.raises(UserError, match="does not give the logits of the original"):
        _compare("onnx", tmp_path / "model.onnx", wanted, lambda x: x + float("nan"))
