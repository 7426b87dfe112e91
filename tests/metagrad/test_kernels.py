"""The engines with Triton's kernels in them: interpreted on the CPU, on the device where there is one."""

import pytest
import torch

from fastadvisor.metagrad import ForwardEngine, ReferenceEngine
from fastadvisor.runtime.execution import Execution
from fastadvisor_kernels import Bernoulli, backend
from tests.kernels.cases import DEVICE
from tests.metagrad.problem import Problem, flat, plain, problem, relative

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def on_device(task):
    task.method.to(DEVICE)
    train, meta = (type(batch)(*(part.to(DEVICE) for part in batch)) for batch in (task.train, task.meta))
    return Problem(task.model.to(DEVICE), task.method, train, meta)


@pytest.mark.parametrize("attached", [False, True], ids=["detached", "attached"])
@pytest.mark.parametrize("settings", [{}, {"beta_draw": "expected"}, {"beta_draw": "sample"}], ids=str)
@pytest.mark.parametrize("method", ["mfrw", "mes", "mfrw-mes", "mw-net", "l2rw"])
def test_forward_equals_double_backward(method, settings, attached):
    task = on_device(problem(method, **settings))
    with backend("triton"):
        got = task.gradient(ForwardEngine(plain), attached=attached)
        by_kernels = task.gradient(ReferenceEngine(plain), attached=attached)
        draw = task.method.draw(len(task.train.labels), task.train.labels.device)
    assert relative(got.gradients, by_kernels.gradients) <= 1e-10
    assert float(got.loss) == pytest.approx(float(by_kernels.loss), rel=1e-10)
    if isinstance(draw, Bernoulli):
        return  # plain torch would have drawn another β
    with backend("reference"):
        expected = task.gradient(ReferenceEngine(plain), attached=attached)
    assert relative(got.gradients, expected.gradients) <= 1e-10


def test_it_is_a_seed_that_is_drawn():
    task = on_device(problem("mes"))
    with backend("triton"):
        assert isinstance(task.method.draw(16, torch.device(DEVICE)), Bernoulli)
    with backend("reference"):
        assert task.method.draw(16, torch.device(DEVICE)).shape == (16, 5)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_kernels_and_plain_torch_give_one_meta_gradient(amp):
    gradients = {}
    for name in ("triton", "reference"):
        task = on_device(problem("mfrw-mes", dtype=torch.float32, beta_draw="expected"))
        execution = Execution(torch.device(DEVICE), torch.bfloat16 if amp else None)
        with backend(name):
            gradients[name] = flat(task.gradient(ForwardEngine(execution)).gradients)
    error = (gradients["triton"] - gradients["reference"]).norm() / gradients["reference"].norm()
    assert error <= (1e-2 if amp else 1e-4)
