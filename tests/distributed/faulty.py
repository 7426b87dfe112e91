"""``fastadvisor`` with one rank that fails in the middle of an iteration.

FAULT=kill|raise|refuse FAULT_RANK=1 FAULT_ITERATION=6 [FAULT_RESTART=0]: where, when, and in which life.
"""

import os
import signal
import sys

from fastadvisor.cli import main
from fastadvisor.errors import UserError
from fastadvisor.step import Step

call = Step.__call__


def faulty(self, train, meta):
    here = os.environ["RANK"] == os.environ["FAULT_RANK"]
    now = self.iteration + 1 == int(os.environ["FAULT_ITERATION"])
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == os.environ.get("FAULT_RESTART", "0")
    if here and now and life:
        if os.environ["FAULT"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["FAULT"] == "refuse":
            raise UserError("This rank has a photo it cannot read: replace it.")
        raise ArithmeticError("a mistake of ours")
    return call(self, train, meta)


Step.__call__ = faulty

if __name__ == "__main__":
    sys.exit(main())
