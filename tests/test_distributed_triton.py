"""VICReg's kernels over real processes against one process that holds all the rows.

These tests are collected in the interpreter, with gloo, and where there are GPUs, with NCCL.
"""

import itertools
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

import costs
from fused_dino import VICRegLoss, distributed
from fused_dino import functional as FD
from fused_dino.ops import vicreg_ranks_triton, vicreg_triton
from proving import DEVICE, INTERPRETED, check_accuracy
from table import VICREG
from test_distributed import OPTIONS, bytes_received, in_order, parts, spawn

WORLD = 4 if INTERPRETED else min(4, torch.cuda.device_count())
ROUTES = ("gram", "covariance")


def drawn(shape, dtype=torch.float64, seed=0):
    return tuple(x.to(DEVICE) for x in VICREG.draw(shape, dtype, seed))


def groups(world):
    """Return groups of two ranks up to all, and this rank's place in each. Every rank has to make all of them."""
    made = [(size, dist.new_group(list(range(size)))) for size in range(2, world + 1)]
    return [(size, group) for size, group in made if dist.get_rank() < size]


def each_has_a_device(rank, world):
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)


def every_rank_has_the_full_batchs_loss_and_gradient(rank, world):
    for (size, group), width in itertools.product(groups(world), (5, 40)):
        part, total = parts(size)[rank], parts(size)[-1].stop
        y, g = (x.requires_grad_() for x in drawn((total, width)))
        for options in OPTIONS if size == world else OPTIONS[:1]:
            whole = FD.vicreg_loss(y, g, **options, backend="reference")
            expected = torch.autograd.grad(whole.loss, (y, g))
            for route in ROUTES:
                mine = [x.detach()[part].requires_grad_() for x in (y, g)]
                out = FD.vicreg_loss(*mine, group=group, **options, route=route, backend="triton")
                assert_close(tuple(out), tuple(whole), rtol=1e-12, atol=1e-14)
                for ours, true in zip(torch.autograd.grad(out.loss, mine), expected, strict=True):
                    assert_close(ours / size, true[part], rtol=1e-12, atol=1e-14)


class AcrossRanks(torch.autograd.Function):
    """The whole batch: each rank computes a part of its gradient, and gets all of it."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return distributed.all_reduce(grad, dist.group.WORLD)


class MeanOverRanks(torch.autograd.Function):
    """Return the mean of the gradients over the ranks, as DDP does."""

    @staticmethod
    def forward(ctx, loss):
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, grad):
        return grad / dist.get_world_size()


def over(sizes, misaligned=None):
    """Return the op on the whole batch, of which each rank computes so many rows; one rank's are misaligned."""

    def run(student, target, backend, **options):
        if backend == "reference":
            return FD.vicreg_loss(student, target, backend=backend, **options).loss
        rank = dist.get_rank()
        y, g = (AcrossRanks.apply(x).split(sizes)[rank] for x in (student, target))
        if rank == misaligned:
            y = torch.nn.functional.pad(y, (1, 0))[:, 1:]
        return MeanOverRanks.apply(FD.vicreg_loss(y, g, backend=backend, group=dist.group.WORLD, **options).loss)

    return replace(VICREG, run=run)


SIZES = {2: (30, 40), 3: (30, 0, 40), 4: (30, 0, 17, 23)}
FEW = {2: (10, 14), 3: (10, 0, 14), 4: (10, 0, 6, 8)}
HALF = (torch.bfloat16, torch.float16)


def is_as_accurate_as_eager(rank, world):
    """A rank's rows begin within a tile. Rows of 16 bits are multiplied as they are, and on one rank as planes."""
    cases = [(torch.float32, 75, "gram"), (torch.float32, 37, "covariance")]
    cases += [(dtype, *how) for dtype in HALF for how in ((96, "gram"), (80, "covariance"))]
    for dtype, width, route in cases:
        op = over(SIZES[world], misaligned=1 if width == 80 else None)
        check_accuracy(op, drawn((70, width), dtype), "triton", route=route, inv_weight=0.0, var_weight=0.0)


def numbers_hold_where_little_is_left(rank, world):
    y, g = drawn((24, 48))
    row, column = torch.arange(24, device=DEVICE)[:, None], torch.arange(48, device=DEVICE)
    cases = {
        "a large mean": y + 1000,
        "each rank's own mean": y + 10 * row,
        "constant columns": torch.where(column % 3 == 0, 0.1, y),
        "a column that dominates": torch.where(column == 3, 1000 * y, y),
    }
    op = over(FEW[world])
    for x, dtype, route in itertools.product(cases.values(), (torch.float32, torch.bfloat16), ROUTES):
        check_accuracy(op, (x.to(dtype), g.to(dtype)), "triton", route=route, inv_weight=0.0, cov_weight=10.0)


def nothing_in_all_and_one_row_in_all(rank, world):
    for route, unbiased in itertools.product(("auto", *ROUTES), (False, True)):
        options = {"unbiased": unbiased, "gamma": 2.0, "route": route}
        y, g = (x.requires_grad_() for x in drawn((0, 7)))
        out = FD.vicreg_loss(y, g, group=dist.group.WORLD, backend="triton", **options)
        assert_close(out, FD.vicreg_loss(y, g, backend="reference", **options), rtol=0, atol=0, equal_nan=True)
        assert torch.autograd.grad(out.loss, y)[0].shape == y.shape
        y, g = drawn((1 if rank == 1 else 0, 7))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = FD.vicreg_loss(y.requires_grad_(), g, group=dist.group.WORLD, backend="triton", **options)
        assert any("one row" in str(w.message) for w in caught) == (route != "covariance")
        assert out.covariance == 0
        assert torch.autograd.grad(out.loss, y)[0].isfinite().all()


@contextmanager
def noted():
    """Note launches, and collectives where they begin and where they are waited for."""
    seen, patch, launch = [], pytest.MonkeyPatch(), vicreg_triton.launch

    def noting(name, call):
        return lambda *args, **options: seen.append(name or kernel_name(args[0])) or call(*args, **options)

    for module in (vicreg_triton, vicreg_ranks_triton):
        patch.setattr(module, "launch", noting(None, launch))
    for name in ("start_all_reduce", "start_all_gather", "wait"):
        patch.setattr(distributed, name, noting(name.removeprefix("start_all_"), getattr(distributed, name)))
    yield seen
    patch.undo()


def kernel_name(kernel):
    return kernel.__name__.removeprefix("vicreg_").removesuffix("_kernel")


def the_kernels_of_one_process_run_while_ranks_communicate(rank, world):
    """The route by columns has one more launch, which sums the splits before the ranks do. The host never waits."""
    y, g = (x.float().requires_grad_() for x in drawn((4, 16), seed=rank))
    expected = {
        "gram": "gather wait, gather statistics wait, statistics gather wait, planes product finish, reduce wait, bwd",
        "covariance": "statistics, reduce planes product wait, part reduce wait, finish bwd",
    }
    for route, order in expected.items():
        with noted() as seen:
            loss = FD.vicreg_loss(y, g, group=dist.group.WORLD, route=route, backend="triton").loss
            in_all = len(seen)
            loss.backward()
        assert seen == order.replace(",", "").split(), route
        assert len(seen) == in_all, "the backward communicates nothing"
        with noted() as seen, torch.no_grad():
            FD.vicreg_loss(y, g, group=dist.group.WORLD, route=route, backend="triton")
        assert seen == order.replace(",", "").replace(" bwd", "").split()


def ranks_that_would_choose_otherwise_leave_out_the_first_ranks_column(rank, world):
    """Machines that sum in another order may choose another one of two similar columns."""
    y, g = drawn((8 * world, 40))
    part, launch = slice(8 * rank, 8 * rank + 8), vicreg_triton.launch_statistics

    def choose(saved, *args):
        launch(saved, *args)
        saved.largest[0] = 3 + rank

    vicreg_triton.launch_statistics = choose
    out = FD.vicreg_loss(y[part], g[part], group=dist.group.WORLD, route="gram", backend="triton")
    vicreg_triton.launch_statistics = launch
    assert_close(out, FD.vicreg_loss(y, g, backend="reference"), rtol=1e-12, atol=0)


def second_derivatives_are_refused(rank, world):
    y, g = drawn((3, 5), seed=rank)
    loss = FD.vicreg_loss(y.requires_grad_(), g, group=dist.group.WORLD, backend="triton").loss
    with pytest.raises(NotImplementedError, match="second derivatives on triton; use backend='reference'"):
        torch.autograd.grad(loss, y, create_graph=True)


def compiles(rank, world):
    pair = dist.new_group([0, 1])
    for route in ROUTES if rank < 2 else ():
        y, g = (x.requires_grad_() for x in drawn((4, 40), seed=rank))
        loss = VICRegLoss(route=route, group=pair, backend="triton", detach_teacher=False)
        compiled = torch.compile(lambda y, g, loss=loss: loss(y, g).loss, fullgraph=True, backend="aot_eager")
        ours, plain = compiled(y, g), loss(y, g).loss
        assert_close(ours, plain, rtol=1e-12, atol=0)
        assert_close(torch.autograd.grad(ours, (y, g)), torch.autograd.grad(plain, (y, g)), rtol=1e-12, atol=1e-14)


def bytes_are_those_calculated(rank, world):
    for width in (8, 40):
        y, g = (x.float() for x in drawn((6, width), seed=rank))
        with bytes_received(world) as received:
            FD.vicreg_loss(y, g, group=dist.group.WORLD, backend="triton")
        assert sum(received) == pytest.approx(costs.ours(6, width, world, 4)[1].received)
    y, g = (x.bfloat16() for x in drawn((6, 48), seed=rank))
    with bytes_received(world) as received:
        FD.vicreg_loss(y, g, group=dist.group.WORLD, route="gram", backend="triton")
    sums_of_rows = costs.summed(6 * world, world, 4)
    assert sum(received) == pytest.approx(costs.by_rows(6, 48, world, 2).received + sums_of_rows)


CHECKS = (
    each_has_a_device,
    every_rank_has_the_full_batchs_loss_and_gradient,
    is_as_accurate_as_eager,
    numbers_hold_where_little_is_left,
    nothing_in_all_and_one_row_in_all,
    the_kernels_of_one_process_run_while_ranks_communicate,
    ranks_that_would_choose_otherwise_leave_out_the_first_ranks_column,
    second_derivatives_are_refused,
    compiles,
    bytes_are_those_calculated,
)


def test_kernels_over_ranks(tmp_path):
    spawn(in_order(*CHECKS), WORLD, tmp_path, "gloo" if DEVICE == "cpu" else "nccl")
