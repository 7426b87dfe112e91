"""``fastadvisor`` with one rank that fails in the middle of an iteration.

FAULT=kill|raise|refuse|nan|memory FAULT_RANK=1 FAULT_ITERATION=6 [FAULT_RESTART=0]: where, when, and in which life.
"""

import os
import signal
import sys

import torch

from fastadvisor.cli import main
from fastadvisor.errors import UserError
from fastadvisor.iterations import Iteration
from fastadvisor.training.trainer import Trainer

call = Iteration.__call__
batches = Trainer.batches


def faulty(self, train, meta):
    here = os.environ["RANK"] == os.environ["FAULT_RANK"]
    now = self.iteration + 1 == int(os.environ["FAULT_ITERATION"])
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == os.environ.get("FAULT_RESTART", "0")
    if os.environ["FAULT"] == "memory":
        if here and len(train.labels) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
    elif here and now and life:
        if os.environ["FAULT"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["FAULT"] == "refuse":
            raise UserError("This rank has a photo it cannot read: replace it.")
        if os.environ["FAULT"] != "nan":
            raise ArithmeticError("a mistake of ours")
    return call(self, train, meta)


def spoilt(self, phase):
    train, meta = batches(self, phase)
    here = os.environ["RANK"] == os.environ["FAULT_RANK"]
    if os.environ["FAULT"] == "nan" and here and self.step.iteration + 1 == int(os.environ["FAULT_ITERATION"]):
        train = train._replace(images=train.images * float("inf"))
    return train, meta


Iteration.__call__ = faulty
Trainer.batches = spoilt

if __name__ == "__main__":
    sys.exit(main())
