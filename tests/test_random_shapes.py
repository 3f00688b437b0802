"""Every op of the table on shapes, strides and values that nobody chose; needs hypothesis."""

import pytest
import torch
from torch.testing import assert_close

from fused_dino import functional as FD
from proving import DTYPES, IMPLEMENTATIONS, INTERPRETED, check_accuracy
from table import OPS, PREPROCESS
from table.resize import MODES

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


sides = st.integers(1, 14) if INTERPRETED else st.one_of(st.integers(1, 40), st.integers(1, 4), st.just(300))
any_resize = settings(
    deadline=None, max_examples=12 if INTERPRETED else 100, suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@any_resize
@given(
    height=st.integers(1, 14 if INTERPRETED else 40),
    width=sides,
    size=st.tuples(st.integers(1, 12), sides),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "channels last", "every second column", "transposed"]),
    clamp=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_size_mode_and_layout(backend, height, width, size, mode, dtype, layout, clamp, seed):
    (x,) = PREPROCESS.draw((1, 3, height, width), dtype, seed)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "every second column":
        x = torch.stack([x, x], -1).flatten(3)[..., ::2]
    elif layout == "transposed":
        x = x.mT.contiguous().mT
    interpolation, antialias = mode
    options = {"size": size, "interpolation": interpolation, "antialias": antialias}
    check_accuracy(PREPROCESS, (x,), backend, **options)
    if clamp:  # the value alone: its gradient jumps where a pixel meets a bound
        assert_close(
            FD.preprocess(x, **options, clamp=True, backend=backend, input_range=(-0.5, 0.5)),
            FD.preprocess(x, **options, clamp=True, backend="reference", input_range=(-0.5, 0.5)),
            rtol=2 * torch.finfo(dtype).eps,
            atol=300 * 2**-23 * 8 / min(FD.IMAGENET_STD) if dtype != torch.float64 else 1e-10,
        )
