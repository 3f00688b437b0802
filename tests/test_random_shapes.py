"""Every op of the table on shapes, strides and values that nobody chose; needs hypothesis."""

import pytest
import torch

from proving import DTYPES, IMPLEMENTATIONS, INTERPRETED, check_accuracy
from table import OPS

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", [op for op in OPS if op.rowwise], ids=lambda op: op.name)
@settings(
    deadline=None, max_examples=20 if INTERPRETED else 60, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    width=st.integers(1, 700),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    scale=st.floats(-2, 2),
    transpose=st.booleans(),
    padding=st.integers(0, 3),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_stride_and_value(op, backend, leading, width, dtypes, scale, transpose, padding, reduction, seed):
    shape = (*leading, width)
    pair = [x.to(d) * 10**scale for x, d in zip(op.draw(shape, torch.float64, seed), dtypes, strict=True)]
    pair = [torch.nn.functional.pad(x, (padding, padding))[..., padding : padding + width] for x in pair]
    if transpose:
        pair[0] = pair[0].movedim(-1, 0).contiguous().movedim(0, -1)
    check_accuracy(op, tuple(pair), backend, reduction=reduction, **op.weight(shape))
