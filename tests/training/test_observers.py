"""Observers are told of every iteration and epoch, and a run with one more is the same run."""

import json

import torch

from fastadvisor.config import Config, resolve
from fastadvisor.datasets import load_source, prepare
from fastadvisor.runtime.run_folder import RunFolder
from fastadvisor.training.trainer import Trainer


class Counting:
    def __init__(self):
        self.batches, self.losses, self.records = [], [], []

    def step(self, result, batch):
        self.batches.append(batch.ids.tolist())
        self.losses.append(result.loss)

    def epoch(self, record):
        self.records.append(dict(record))


def run(output, *observers):
    config = resolve(Config, epochs=2, method="mfrw-mes", device="cpu", tensorboard=False, progress=False, output=str(output))
    trainer = Trainer(config, prepare(load_source(config), config, config.seed), torch.device("cpu"))
    trainer.observers += observers
    return trainer, trainer.run(RunFolder.create(config.output, config, "run"))


def test_an_observer_sees_every_iteration_and_epoch_and_changes_nothing(tmp_path):
    counting = Counting()
    trainer, result = run(tmp_path / "a", counting)
    assert len(counting.batches) == trainer.step.iteration == 2 * len(trainer.train_loader)
    assert all(len(ids) == trainer.config.batch_size for ids in counting.batches)
    assert [record["epoch"] for record in counting.records] == [1, 2]
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert lines == json.loads(json.dumps(counting.records))
    steps = len(trainer.train_loader)
    mean = float(torch.stack(counting.losses[:steps]).mean())
    assert abs(mean - lines[0]["loss"]) < 1e-5
    _, other = run(tmp_path / "b")
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
