"""The plugin matrix_unit.py computes what its rules say: the numbers here are worked out from them by hand."""

import numpy as np
import pytest

pytest.importorskip("triton")
import matrix_unit

ULP = np.float32(2**-23)  # of float32 from 1 to 2


def f32(*values):
    return np.array(values, np.float32)


def test_a_sum_is_cut_toward_zero():
    for sign in (1, -1):
        acc = sign * f32([1.0])
        got = matrix_unit.multiply(f32([0.75 * ULP, 0]), sign * f32([1.0], [0]), acc, 16)
        assert got == acc, "rounded it would be one unit more"


def test_terms_keep_two_bits_below_the_last():
    for quarters, ulps in ((4, 1), (3, 0), (5, 1)):
        a, b = f32([ULP / 4] * quarters), f32([1.0]).repeat(quarters)[:, None]
        assert matrix_unit.multiply(a, b, f32([1.0]), 16) == 1 + ulps * ULP
    eighths = f32([ULP / 8] * 8), f32([1.0]).repeat(8)[:, None]
    assert matrix_unit.multiply(*eighths, f32([1.0]), 16) == 1, "each is cut before they meet"
    assert matrix_unit.multiply(*eighths, f32([0.0]), 16) == ULP, "none is cut where nothing is larger"


def test_one_addition_takes_so_many_products():
    a = f32([ULP / 8] * 8 + [1] + [0] * 7)
    for terms, expected in ((8, 1 + ULP), (16, 1)):
        assert matrix_unit.multiply(a, np.ones((16, 1), np.float32), f32([0.0]), terms) == expected


def test_float32_is_read_as_tf32():
    x = f32([1 + 2**-10 + 2**-11 + ULP])
    assert matrix_unit.dot(x, f32([1.0]), f32([0.0]), "TF32") == 1 + 2**-10
    assert matrix_unit.round_to_tf32(x) == 1 + 2**-9
    assert matrix_unit.round_to_tf32(f32([1 + 2**-11])) == 1 + 2**-10, "a tie goes away from zero"
    odd = np.array([[np.inf, -np.inf, np.nan]], np.float32)
    assert np.array_equal(matrix_unit.round_to_tf32(odd), odd, equal_nan=True)


def test_three_products_are_nearly_as_good_as_float32():
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((32, 32)).astype(np.float32) for _ in range(2))
    true, size = a.astype(np.float64) @ b, np.abs(a).astype(np.float64) @ np.abs(b)
    zero = np.zeros((32, 32), np.float32)
    errors = {p: (np.abs(matrix_unit.dot(a, b, zero, p) - true) / size).max() / ULP for p in ("TF32", "TF32X3")}
    assert errors["TF32X3"] < 2 < 500 < errors["TF32"] < 2**13


def test_infinity_and_nan_come_through():
    for value in (np.inf, np.nan):
        for precision in ("TF32", "TF32X3"):
            got = matrix_unit.dot(f32([value, 1.5]), f32([1.0], [1.0]), f32([0.0]), precision)
            assert np.array_equal(got, f32([value]), equal_nan=True)


def test_divisions_are_off_by_a_last_digit_here_and_there():
    x = np.linspace(1.1, 1.9, 1000, dtype=np.float32)
    off = (matrix_unit.off_by_a_digit(x).astype(np.float64) - x) / ULP
    assert set(off) == {-1, 0, 1}
    assert 0.4 < (off == 0).mean() < 0.6
    odd = f32(0, -0.0, np.inf, np.nan, 1e-42)
    assert np.array_equal(matrix_unit.off_by_a_digit(odd), odd, equal_nan=True)
    assert matrix_unit.off_by_a_digit(x.astype(np.float64)).dtype == np.float64
