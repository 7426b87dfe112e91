"""The gate of ``benchmarks.precision``: the meta-gradient of mixed precision on trained weights."""

import math

from benchmarks import precision
from fastadvisor.config import Config, resolve


def test_the_gate_is_open_on_the_digits():
    config = resolve(Config, epochs=8, progress=False, tensorboard=False, device="cpu")
    found = list(precision.cosines(precision.trained(config), 1))
    assert {(method, dtype) for method, dtype, _ in found} == {
        (method, dtype) for method in ("l2rw", "mw-net", "mfrw", "mes", "mfrw-mes") for dtype in ("bfloat16", "float16")
    }
    assert [row for row in found if not row[2] >= precision.GATE] == []
    assert all(not math.isclose(cosine, 1.0, abs_tol=1e-9) for _, dtype, cosine in found if dtype == "bfloat16")  # it is mixed
