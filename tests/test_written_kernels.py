"""The written kernels against the chain of operations; those for GPUs in Triton's interpreter, on the CPU."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import importlib, itertools, math, sys
from functools import partial
import torch
from lightning_qinit.quantizers import LSQ, PACT, APoT, Codebook, LSQPlus, rounding
from lightning_qinit.quantizers.scratch import Scratch

kernels = importlib.import_module("lightning_qinit.quantizers." + sys.argv[1])

torch.manual_seed(0)
scratch = Scratch()
torch.set_grad_enabled(False)
KINDS = {
    "uniform": partial(LSQ, 4), "binary": partial(LSQ, 1), "clip": partial(PACT, 4),
    "offset": partial(LSQPlus, 4, batch_axis=0), "few levels": partial(APoT, 3), "many levels": partial(APoT, 7),
    "codebook": partial(Codebook, 2, levels=(-2.0, -0.5, 0.0, 3.0)),
}
last = torch.channels_last
X = torch.randn(3, 4, 5, 20) * 3
X[0, 0, 0, :4] = torch.tensor([math.nan, math.inf, -math.inf, 0.2])
VALUES = [X, X.to(memory_format=last), X.transpose(0, 2), X[:, :, ::2].half(), X[:1, :1, :1, :1]]  # bfloat16: truncated
VALUES.append(torch.randn(2, 5, 41, 43))  # more than the values of one program, also of a channel
for (name, make), x, axis in itertools.product(KINDS.items(), VALUES, (None, 0, 1)):
    if axis is not None and name not in ("offset", "few levels"):
        continue
    channels = 1 if axis is None else x.shape[axis]
    q = make(channels, axis)
    q.start(torch.rand(channels) + 0.3, q.n_bits, True, torch.rand(channels) - 0.5)
    # within the bounds, at both and beyond, and NaN
    q.relative_step.copy_(torch.tensor([1.1, 2.0**-16, 2.0**16, 2.0**17, math.nan])[torch.arange(channels) % 5])
    if q.has_offset:
        q.relative_offset.copy_(torch.tensor([0.2, math.nan, -(2.0**16), 0.1])[torch.arange(channels) % 4])
    q.kernels = "eager"
    in_units = q.operand(x).how
    assert in_units.units is not None
    for how in (in_units, in_units.without_units(x)):
        what = name, tuple(x.shape), x.dtype, axis
        expected, got = rounding.rounded(x, how), kernels.rounded(x, how, None)
        assert got.dtype == expected.dtype and torch.equal(got.nan_to_num(99), expected.nan_to_num(99)), what
        assert axis is not None or got.stride() == torch.empty_like(x).stride(), what
        finite = x.nan_to_num(0.7, 99, -99)
        for a, b in zip(kernels.changes(finite, how), rounding.changes(finite, how)):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), what
        for like in (finite, finite.contiguous()):
            grad = torch.empty_like(like).copy_(torch.randn(x.shape))
            expected = rounding.gradients(grad, finite, how)
            for a, b in zip(kernels.gradients(grad.clone(), finite, how, True), expected):
                assert (a is None) == (b is None), what
                assert a is None or (a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)), what
            to_x, *_ = kernels.gradients(grad, finite, how, False)
            assert torch.equal(to_x, expected[0]), what
            used, found = kernels.rounded_with_gradients(grad.clone(), finite, how, scratch)
            assert torch.equal(used, rounding.rounded(finite, how)), what
            for a, b in zip(found, kernels.gradients(grad, finite, how, False)):
                assert a is None or torch.equal(a, b), what
kernels.check(torch.device("cpu"))
"""


@pytest.mark.parametrize("kernels", ["cpu", "gpu"])
def test_kernels_are_the_chain(kernels: str) -> None:
    if kernels == "gpu":
        pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", SCRIPT, kernels], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
