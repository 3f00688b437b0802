"""The tests prove something: each kernel that is broken on purpose is caught by the test that is there for it.

The cases are those that `make test` runs in the interpreter, chosen by the plugin covering.
"""

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent

PRELOADED = ["torch._dynamo", "torch._functorch.aot_autograd", "torch._inductor.output_code", "triton", "hypothesis"]
PRELOADED += ["einops", "yapf"]

# What is broken: the line of the kernel that its name begins with, what becomes of it, and the test that catches it.
MUTATIONS = {
    "cosine: a mask": (
        "return tl.load(row + column, mask=column < WIDTH, other=0).to(ACC)",
        "return tl.load(row + column).to(ACC)",
        "test_kernels.py::test_nothing_out_of_bounds_is_touched",
    ),
    "cosine: a stride": (
        "target + row * stride_target",
        "target + row * stride_student",
        "test_ops.py::test_layouts -k cosine",
    ),
    "cosine: an eps": (
        "s_clamped = s_norm < eps",
        "s_clamped = s_norm < 0",
        "test_ops.py::test_is_as_accurate_as_eager -k eps",
    ),
    "cosine: a dtype": (
        "s = load_row(s_row, start, WIDTH, BLOCK, ACC)\n",
        "s = load_row(s_row, start, WIDTH, BLOCK, ACC).to(tl.bfloat16).to(ACC)\n",
        "test_ops.py::test_is_as_accurate_as_eager",
    ),
    "cosine: a row that is left out": (
        "if weight is None or row_weight != 0:",
        "if weight is None or row_weight != -1:",
        "test_masks.py::test_rows_left_out_do_not_count",
    ),
    "cosine: a read of a row that is left out": (
        "row_weight = tl.load(weight + row * stride_weight).to(ACC)",
        "row_weight = tl.load(weight + row * stride_weight).to(ACC) + 0 * tl.load(student + row * stride_student)",
        "test_cosine_kernel.py::test_rows_of_weight_0_are_not_read_and_cost_no_arithmetic",
    ),
    "cosine: memory of a row that is left out": (
        "clear_row(grad_student + row * WIDTH, WIDTH, BLOCK, ACC)",
        "tl.store(grad_student + row * WIDTH, 0.0)",
        "test_kernels.py::test_rows_of_weight_0_are_written -k cosine",
    ),
    "cosine: a position of another image": (
        "batch.to(tl.int64) * stride_batch",
        "batch.to(tl.int64) * stride_target",
        "test_cosine_index.py::test_is_the_loss_of_each_row_and_the_one_it_names",
    ),
    "cosine: an image's offset of 32 bits": (
        "batch.to(tl.int64) * stride_batch",
        "batch * stride_batch",
        "test_kernels.py::test_offsets_past_two_to_the_31st -k index",
    ),
    "cosine: a position of 32 bits": (
        "position = tl.load(index + row).to(tl.int64)",
        "position = tl.load(index + row).to(tl.int32)",
        "test_cosine_index.py::test_a_position_out_of_range_is_nan_where_its_value_is_not_read",
    ),
    "cosine: a position below 0": (
        "inside = (position >= 0) & (position < target_rows)",
        "inside = position < target_rows",
        "test_cosine_kernel.py::test_nothing_out_of_bounds_is_touched",
    ),
    "cosine: a position that target lacks": (
        'row_weight = tl.where(inside, row_weight, float("nan"))',
        "row_weight *= 1",
        "test_cosine_index.py::test_a_position_out_of_range_is_nan_where_its_value_is_not_read",
    ),
    "cosine: a missing row": (
        "tl.store(loss + row, factor * distance)",
        "tl.store(loss + row, factor * distance, mask=row != 2)",
        "test_kernels.py::test_every_element_is_written -k cosine",
    ),
    "cosine: a ticket that is not given back": (
        "tl.store(ticket, 0)",
        "tl.store(ticket, 1)",
        "test_kernels.py::test_a_ticket_is_left_zero",
    ),
    "cosine: a gradient without its scale": (
        "factor *= tl.load(grad_output + row * stride_grad_row).to(ACC)",
        "factor *= 1",
        "test_ops.py::test_is_as_accurate_as_eager",
    ),
    "cosine: rows that are not the program's own": (
        "row = first + i * programs",
        "row = first + i",
        "test_ops.py::test_is_as_accurate_as_eager -k cosine",
    ),
    "cosine: an offset of 32 bits": (
        "first = program.to(tl.int64)",
        "first = program",
        "test_kernels.py::test_offsets_past_two_to_the_31st",
    ),
    "resize: a mask": (
        "value = tl.load(source + at, mask=valid, other=0)",
        "value = tl.load(source + at)",
        "test_kernels.py::test_nothing_out_of_bounds_is_touched -k preprocess",
    ),
    "resize: a stride": (
        "column.to(tl.int64) * stride_x",
        "column.to(tl.int64)",
        "test_ops.py::test_layouts -k preprocess",
    ),
    "resize: a dtype": (
        "g += weight * tl.load(at + stride_c, mask=valid, other=0).to(ACC)",
        "g += weight * tl.load(at + stride_c, mask=valid, other=0).to(tl.bfloat16).to(ACC)",
        "test_ops.py::test_is_as_accurate_as_eager -k preprocess",
    ),
    "resize: an infinity that is not there": (
        "value = weight * value\n    return total + (value if ALL else tl.where(valid, value, 0.0))",
        "return total + (weight if ALL else tl.where(valid, weight, 0.0)) * value",
        "test_resize.py::test_what_is_not_read_does_not_count",
    ),
    "resize: a missing column": (
        "live = (lane % 32 < ACTIVE) & (column < right)",
        "live = (lane % 32 < ACTIVE) & (column < right - 1)",
        "test_kernels.py::test_every_element_is_written -k preprocess",
    ),
    "resize: the last column of a block": (
        "x = tl.minimum(column, right - 1)",
        "x = tl.minimum(column, right - 2)",
        "test_ops.py::test_is_as_accurate_as_eager -k preprocess",
    ),
    "resize: a second tap that is the first": (
        "tl.join(one[0], two[0])",
        "tl.join(one[0], one[0])",
        "test_ops.py::test_is_as_accurate_as_eager -k preprocess",
    ),
    "resize: lanes that own no column": (
        "lane // 32 * ACTIVE",
        "lane // 32 * 32",
        "test_aot.py::test_the_compiled_kernel_that_is_counted_computes_the_op",
    ),
    "resize: a segment that is not the first": (
        "red += more[0]",
        "red = more[0]",
        "test_ops.py::test_is_as_accurate_as_eager -k preprocess",
    ),
    "resize: an offset of 32 bits": (
        "image = (tl.program_id(0) // blocks).to(tl.int64)  # int64: image * stride passes 2**31",
        "image = tl.program_id(0) // blocks",
        "test_kernels.py::test_offsets_past_two_to_the_31st -k preprocess",
    ),
    "resize: a mask of interleaved pixels": (
        "live = (lane < SEGMENT * PIXEL) & (start * PIXEL + lane < width * PIXEL)",
        "live = (lane < SEGMENT * PIXEL) & (start * PIXEL + lane < width * PIXEL + PIXEL - 1)",
        "test_kernels.py::test_no_option_or_layout_of_pixels_reaches_out_of_bounds -k channels",
    ),
    "resize: an offset of interleaved rows of 32 bits": (
        "tl.cast(row, tl.int64) * stride_y + start * 3 + lane",
        "row * stride_y + start * 3 + lane",
        "test_kernels.py::test_offsets_of_bytes_past_two_to_the_31st",
    ),
    "resize: a value of bytes": (
        "return pixel * tl.full((), SCALE, ACC)",
        "return pixel * tl.full((), SCALE * (1 + 1e-6), ACC)",
        "test_resize_properties.py::test_bytes_are_as_accurate_as_in_eager",
    ),
    "taps: a centre that leans": (
        "center = scale * (o + 0.5)",
        "center = scale * (o + 0.5001)",
        "test_resize_properties.py::test_flips_commute_and_images_and_channels_are_independent",
    ),
    "standardize: a mask": (
        "factor = tl.load(factors + read, mask=read < rows, other=0)",
        "factor = tl.load(factors + read, mask=read < rows + 1, other=0)",
        "test_kernels.py::test_nothing_out_of_bounds_is_touched -k standardize",
    ),
    "standardize: an eps": (
        "divisor = deviation(square, dof, 0.0, ACC) + tl.full((), EPS, ACC)",
        "divisor = deviation(square, dof, EPS, ACC)",
        "test_ops.py::test_is_as_accurate_as_eager -k standardize",
    ),
    "standardize: a biased deviation": (
        "sigma = deviation(tl.load(squares + column, mask=inside, other=1), dof, 0.0, ACC)",
        "sigma = deviation(tl.load(squares + column, mask=inside, other=1), rows, 0.0, ACC)",
        "test_ops.py::test_is_as_accurate_as_eager -k standardize",
    ),
    "standardize: a run left out": (
        "for run in range(runs):",
        "for run in range(1, runs):",
        "test_ops.py::test_is_as_accurate_as_eager -k 530x5",
    ),
    "standardize: a gradient of a constant column": (
        "tl.where(sigma == 0, 0, product.to(ACC) / (tl.cast(dof, ACC) * sigma))",
        "product.to(ACC) / (tl.cast(dof, ACC) * sigma)",
        "test_standardize.py::test_a_constant_column_is_as_in_eager",
    ),
    "standardize: a mean that is rounded": (
        "deviations = (value - near[None, :]) - (mean - near.to(tl.float64)).to(ACC)[None, :]",
        "deviations = value - near[None, :]",
        "test_standardize.py::test_a_mean_takes_no_digits",
    ),
    "standardize: a clamped norm with a share in the gradient": (
        "projection = tl.where(clamped, 0, tl.sum(product, 1))",
        "projection = tl.sum(product, 1)",
        "test_standardize.py::test_rows_about_the_smallest_norm",
    ),
    "standardize: a dtype": (
        "unit = load_rows(x, factors, stride, read, column, rows, column < width, ACC)",
        "unit = load_rows(x, factors, stride, read, column, rows, column < width, tl.bfloat16).to(ACC)",
        "test_ops.py::test_is_as_accurate_as_eager -k standardize",
    ),
    "standardize: an offset of 32 bits": (
        "    read = skip_rows(weight, row, rows)\n    if counts",
        "    row = row.to(tl.int32)\n    read = skip_rows(weight, row, rows)\n    if counts",
        "test_kernels.py::test_offsets_past_two_to_the_31st -k standardize",
    ),
    "standardize: a row that is left out": (
        "tl.load(weight + row, mask=row < last, other=0) != 0, row, last)",
        "tl.load(weight + row, mask=row < last, other=0) == 0, row, last)",
        "test_masks.py::test_statistics_count_each_row_once",
    ),
    "standardize: a mean of all rows": (
        "rows = tl.load(counts)\n",
        "",
        "test_masks.py::test_rows_left_out_do_not_count -k whitened",
    ),
    "standardize: a first row that is left out": (
        "first = tl.load(counts + 1)",
        "first = tl.load(counts + 1) * 0",
        "test_masks.py::test_rows_left_out_do_not_count -k whitened",
    ),
    "columns: a factor left out": (
        "pivot *= tl.load(factors)",
        "pivot *= 1",
        "test_standardize.py::test_a_mean_1000_times_the_deviation -k float64",
    ),
    "columns: a first row far from the mean": (
        "near = pivot + tl.sum(",
        "near = pivot + 0 * tl.sum(",
        "test_standardize.py::test_a_mean_takes_no_digits",
    ),
    "taps: a border": (
        "tl.minimum(low + k, size_in - 1))",
        "low + k)",
        "test_ops.py::test_is_as_accurate_as_eager -k preprocess",
    ),
    "taps: a weight of 0": (
        "tl.where(size_in == size_out, low, tl.minimum(low + k, size_in - 1))",
        "tl.minimum(low + k, size_in - 1)",
        "test_resize.py::test_nan_and_infinity_spread_as_in_eager -k bilinear",
    ),
    "taps: a filter that does not widen": (
        "half * tl.maximum(scale, 1.0)",
        "half",
        "test_ops.py::test_is_as_accurate_as_eager -k antialias",
    ),
    "taps: a reader": (
        "first = tl.floor((i + 0.5 - support(scale, CUBIC, ANTIALIAS)) * inverse - 0.5625).to(tl.int32) + 1",
        "first = tl.floor((i + 0.5 - support(scale, CUBIC, ANTIALIAS)) * inverse - 0.5625).to(tl.int32) + 2",
        "test_ops.py::test_is_as_accurate_as_eager -k preprocess",
    ),
    "vicreg_finish: a tile counted once": (
        "tl.where(off_diagonal, 2 * square, square)",
        "square",
        "test_ops.py::test_is_as_accurate_as_eager -k 70x150",
    ),
    "vicreg_finish: a mirror image": (
        "store_planes(product + mirror, tl.trans(value), off_diagonal, PLANES)",
        "store_planes(product + mirror, value, off_diagonal, PLANES)",
        "test_ops.py::test_is_as_accurate_as_eager -k 70x150",
    ),
    "vicreg_finish: a split left out": (
        "mask=live & (split < splits), other=0)",
        "mask=live & (split < splits - 1), other=0)",
        "test_ops.py::test_is_as_accurate_as_eager -k 20x1100",
    ),
    "columns: a merge without its step": (
        "other=0).to(tl.float64) + away * (away * here)",
        "other=0).to(tl.float64)",
        "test_ops.py::test_is_as_accurate_as_eager -k 1100x20",
    ),
    "vicreg: means that come off after the product whatever they are": (
        "LARGE_MEANS = tl.constexpr(1.0)",
        "LARGE_MEANS = tl.constexpr(1e30)",
        "test_vicreg.py::test_numbers_hold_where_little_is_left",
    ),
    "vicreg: a mean without the first row taken off": (
        "return tl.where(live, y - pivot - tl.load(shift + column, mask=live, other=0), 0)",
        "return tl.where(live, y - (pivot + tl.load(shift + column, mask=live, other=0)), 0)",
        "test_vicreg.py::test_numbers_hold_where_little_is_left -k float32",
    ),
    "vicreg_gradient: a hinge at the wrong deviation": (
        "coefficient -= tl.where(sigma < tl.full((), GAMMA, ACC), pull, 0) / sigma",
        "coefficient -= pull / sigma",
        "test_ops.py::test_is_as_accurate_as_eager -k vicreg",
    ),
    "vicreg: the largest column in the product too": (
        "x = tl.where((column == p)[None, :], 0, x)",
        "x = x + 0",
        "test_ops.py::test_is_as_accurate_as_eager -k 70x150",
    ),
    "vicreg: a column that dominates rows of 16 bits as they are": (
        "DOMINANCE = tl.constexpr(4.0)",
        "DOMINANCE = tl.constexpr(1e30)",
        "test_vicreg_limits.py::test_a_dominating_column_costs_no_more_than_in_eager -k bfloat16",
    ),
    "vicreg_gradient: the largest column's covariances left out": (
        "grad += x_p[:, None] * ",
        "grad += 0 * x_p[:, None] * ",
        "test_ops.py::test_is_as_accurate_as_eager -k 70x150",
    ),
    "vicreg_finish: the largest column left out of the gradient's product too": (
        "if GRAM and (i == 0) & (p >= 0):",
        "if GRAM and (i == 0) & (p < -1):",
        "test_ops.py::test_is_as_accurate_as_eager -k 70x150",
    ),
    "vicreg: another column than the largest": (
        "larger = there & (whole > most)",
        "larger = there & (whole < most)",
        "test_vicreg_limits.py::test_a_dominating_column_costs_no_more_than_in_eager -k gram",
    ),
    "vicreg: another term's weight": (
        "weight = tl.load(weights + index).to(ACC)",
        "weight = tl.load(weights).to(ACC)",
        "test_ops.py::test_is_as_accurate_as_eager -k vicreg",
    ),
    "vicreg: a number's place": (
        "weight_of(weights, 1, var_weight, ACC) * var",
        "weight_of(weights, 1, cov_weight, ACC) * var",
        "test_ops.py::test_is_as_accurate_as_eager -k vicreg",
    ),
    "vicreg_product: sums that stay in the matrix unit": (
        "acc += multiply(at_a, live_a, at_b, live_b, OPERAND, A, B) * one",
        "acc = tl.dot(load_operand(at_a, live_a, OPERAND), load_operand(at_b, live_b, OPERAND), acc)",
        "test_vicreg_limits.py::test_a_sum_of_4096_products_is_not_biased -p matrix_unit",
    ),
    "vicreg_product: two planes in place of three": (
        "if B > 2:",
        "if B > 3:",
        "test_ops.py::test_is_as_accurate_as_eager -k 70x150",
    ),
    "vicreg_product: own rows that begin elsewhere": (
        "if PART:\n        low_row += low",
        "if PART:\n        low_row += 0 * low",
        "test_distributed_triton.py",
    ),
    "vicreg_finish: what all ranks subtract, by each": (
        "twice *= tl.cast(own, tl.float64)",
        "twice *= 0 * own + rows.to(tl.float64)",
        "test_distributed_triton.py",
    ),
    "vicreg_finish: a rank's product about its own mean": (
        "acc += a[:, None] * b[None, :] * count",
        "acc += 0 * a[:, None] * b[None, :]",
        "test_distributed_triton.py",
    ),
    "vicreg_gradient: the rest of the product left out where it counts": (
        "if tl.load(largest + 2) > 0:",
        "if tl.load(largest + 2) >= 0:",
        "test_vicreg_planes.py::test_one_plane_would_not_do_for_a_difference",
    ),
    "vicreg_finish: a first plane that is always enough": (
        "<= of_errors - of_variance",
        ">= -1",
        "test_vicreg_planes.py::test_the_second_plane_is_read_only_where_it_counts",
    ),
    "vicreg_product: a product past its rows": (
        "live_b = (lane < high - start)[:, None]",
        "live_b = (lane < high + 1 - start)[:, None]",
        "test_kernels.py::test_aligned_rows_of_16_bits_stay_within_their_pages",
    ),
}


def run_tests(tree: Path, test: str) -> None:
    """Run the tests of a tree on its package and its kernels, in a process of its own."""
    gc.freeze()  # pytest collects garbage, and would look through all that was imported before
    os.chdir(tree)
    sys.path[:0] = [str(tree), str(tree / "tests")]
    with open("output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "covering", *f"tests/{test}".split()])
        sys.stdout.flush()
        os._exit(code)


@pytest.fixture(scope="module")
def start():
    """Starts processes from one that has imported what they all do, which takes longer than most of the tests."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_INTERPRET", "1")
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # plugins that these tests do without take seconds to load
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    multiprocessing.forkserver.ensure_running()
    patch.undo()
    return context.Process


def prove(start: Any, tree: Path, test: str) -> tuple[int, str]:
    process = start(target=run_tests, args=(tree, test))
    process.start()
    process.join()
    return process.exitcode, (tree / "output").read_text()


@pytest.fixture
def tree(tmp_path):
    for name in ("fused_dino", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_caught(name, start, tree):
    right, wrong, test = MUTATIONS[name]
    kernel = tree / f"kernels/{name.partition(':')[0]}.py"
    source = kernel.read_text()
    assert right in source
    kernel.write_text(source.replace(right, wrong))
    code, output = prove(start, tree, test)
    assert code == 1, output
    assert "1 failed" in output, output


def test_the_kernel_as_it_is_passes_them(start, tree):
    code, output = prove(start, tree, "test_kernels.py::test_every_element_is_written -k float32")
    assert code == 0, output
    assert "passed" in output
