"""VICReg over real gloo processes against one process that holds all the rows, in float64."""

import functools
import itertools
import os
import pickle
import sys
import traceback
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import copies
import costs
import recipe
from conftest import TinyTeacher
from fused_dino import DinoSupervision, VICRegLoss, distributed
from fused_dino import functional as FD
from fused_dino.ops import vicreg_ranks, vicreg_torch
from fused_dino.ops.vicreg_plan import BackwardOptions, make_plan

OPTIONS = [{}, {"cov_reduction": "sum_over_d", "unbiased": True}, {"cov_weight": 0.0}, {"inv_weight": 0.0}]
OPTIONS += [{"var_weight": 0.0, "cov_weight": 0.0}, {"both": True}]


def rows(count, seed, width=5):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(2))


def parts(world):
    """Unequal batches, an empty one among them from three ranks on."""
    sizes = [4, 3, 0, 2][:world]
    return [slice(sum(sizes[:r]), sum(sizes[: r + 1])) for r in range(world)]


def spawn(check, world, tmp_path, backend="gloo"):
    """Run a check on every rank. One process imports the check, and becomes the ranks.

    A process that has looked for GPUs must not become others: under NCCL every rank imports for itself.
    """
    arguments = check, world, str(tmp_path / "store"), backend
    if backend == "nccl":
        return mp.spawn(enter, arguments, nprocs=world)
    (tmp_path / "check").write_bytes(pickle.dumps(arguments))
    path = os.pathsep.join(filter(None, sys.path))
    done = copies.python("-c", BECOME_RANKS, tmp_path / "check", cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr


BECOME_RANKS = """
import pickle, sys
import torch.multiprocessing as mp
from test_distributed import enter

with open(sys.argv[1], "rb") as file:
    arguments = pickle.load(file)
mp.start_processes(enter, arguments, nprocs=arguments[1], start_method="fork")
"""


def enter(rank, check, world, store, backend):
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        check(rank, world)
        dist.barrier()  # who leaves while another is still receiving takes it down
    except Exception:
        traceback.print_exc()  # before others fail because this rank has left, and one of them is reported in its place
        raise
    finally:
        dist.destroy_process_group()
    # Without the interpreter's own end, at which a process has aborted with "terminate called without an active
    # exception": some thread of torch's outlives its owner now and then.
    sys.stdout.flush()
    os._exit(0)


def functional_is_one_process(rank, world):
    part = parts(world)[rank]
    total = parts(world)[-1].stop
    # 5 columns are summed by columns, 40 by rows, unless told otherwise.
    for width, route, options in itertools.product((5, 40), ("auto", "gram", "covariance"), OPTIONS):
        y, g = (x.requires_grad_() for x in rows(total, 0, width))
        whole = FD.vicreg_loss(y, g, **options, backend="reference")
        whole.loss.backward()
        for backend in ("reference", "torch"):
            mine = y.detach()[part].requires_grad_(), g.detach()[part].requires_grad_()
            out = FD.vicreg_loss(*mine, group=dist.group.WORLD, **options, route=route, backend=backend)
            assert_close(tuple(out), tuple(whole), rtol=1e-12, atol=1e-14)
            out.loss.backward()
            # Each rank's gradient is world times its part of the full batch's, which the mean over ranks gives.
            assert_close(mine[0].grad / world, y.grad[part], rtol=1e-12, atol=1e-14)
            assert_close(mine[1].grad / world, g.grad[part], rtol=1e-12, atol=1e-14)


def large_means_do_not_cancel(rank, world):
    """The means are far larger than the deviations in float32. The oracle is float64 over the rounded rows."""
    for mean, (width, route) in itertools.product((1e3, 1e5), ((12, "covariance"), (40, "gram"))):
        y, g = ((x + mean).float() for x in rows(8 * world, 4, width))
        part = slice(8 * rank, 8 * rank + 8)
        mine = y[part].requires_grad_()
        options = {"inv_weight": 0.0, "cov_weight": 10.0}
        out = FD.vicreg_loss(mine, g[part], group=dist.group.WORLD, route=route, **options)
        wide = y.detach().double().requires_grad_()
        true = FD.vicreg_loss(wide, g.double(), backend="reference", **options)
        assert_close(out.loss.double(), true.loss, rtol=1e-6, atol=0)
        ours, exact = torch.autograd.grad(out.loss, mine)[0], torch.autograd.grad(true.loss, wide)[0][part]
        assert (ours.double() / world - exact).abs().max() <= 1e-6 * exact.abs().max()


def the_variance_is_no_product(rank, world):
    """Products may be coarser: bfloat16 on processors that have matrix instructions for it."""
    y, g = (x.float() for x in rows(40 * world, 8, 40))
    part = slice(40 * rank, 40 * rank + 40)
    torch.set_float32_matmul_precision("medium")
    for route in ("gram", "covariance"):
        out = FD.vicreg_loss(y[part], g[part], group=dist.group.WORLD, route=route)
        true = FD.vicreg_loss(y.double(), g.double(), backend="reference")
        assert_close(out.variance.double(), true.variance, rtol=1e-6, atol=0)
    torch.set_float32_matmul_precision("highest")


def half_precision_is_float32_inside(rank, world):
    for dtype, (width, route) in itertools.product(
        (torch.bfloat16, torch.float16), ((5, "auto"), (40, "auto"), (40, "gram"), (12, "covariance"))
    ):
        y, g = (x.to(dtype) for x in rows(8 * world, 5, width))
        part = slice(8 * rank, 8 * rank + 8)
        mine, wide = y[part].requires_grad_(), y.double().requires_grad_()
        out = FD.vicreg_loss(mine, g[part], group=dist.group.WORLD, route=route)
        true = FD.vicreg_loss(wide, g.double(), backend="reference")
        assert out.loss.dtype == torch.float32
        assert_close([x.double() for x in out], list(true), rtol=1e-5, atol=1e-7)
        ours, exact = torch.autograd.grad(out.loss, mine)[0], torch.autograd.grad(true.loss, wide)[0][part] * world
        assert_close(ours, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def a_dominating_column_costs_no_more_than_in_eager(rank, world):
    every = itertools.product(("gram", "covariance"), (100, 10_000), (torch.float32, torch.bfloat16, torch.float16))
    for route, factor, dtype in every:
        y, g = rows(8 * world, 6, 40)
        y[:, 3] *= factor
        y, g = y.to(dtype), g.to(dtype)
        part = slice(8 * rank, 8 * rank + 8)
        true = FD.vicreg_loss(y.double(), g.double(), backend="reference")
        eager = FD.vicreg_loss(y, g, backend="reference")
        out = FD.vicreg_loss(y[part], g[part], group=dist.group.WORLD, route=route)
        for got, plain, exact in zip(out, eager, true, strict=True):
            assert (got - exact).abs() <= 2 * (plain - exact).abs() + 1e-6 * exact.abs()


def nothing_in_all_is_what_one_process_makes_of_nothing(rank, world):
    for route, unbiased in itertools.product(("auto", "gram", "covariance"), (False, True)):
        y, g = (x.requires_grad_() for x in rows(0, 7))
        options = {"unbiased": unbiased, "gamma": 2.0}
        out = FD.vicreg_loss(y, g, group=dist.group.WORLD, route=route, **options)
        assert_close(out, FD.vicreg_loss(y, g, backend="reference", **options), rtol=0, atol=0, equal_nan=True)
        assert torch.autograd.grad(out.loss, y)[0].shape == y.shape


def ranks_that_would_choose_otherwise_set_the_first_ranks_column_apart(rank, world):
    """Machines that sum in another order may choose another one of two similar columns."""
    y, g = rows(8 * world, 6, 40)
    part = slice(8 * rank, 8 * rank + 8)
    chosen, vicreg_torch.largest_of = vicreg_torch.largest_of, lambda squares: torch.tensor(3 + rank)
    out = FD.vicreg_loss(y[part], g[part], group=dist.group.WORLD, route="gram")
    vicreg_torch.largest_of = chosen
    assert_close(out, FD.vicreg_loss(y, g, backend="reference"), rtol=1e-12, atol=0)


def one_row_in_all_is_finite_and_warns_where_it_is_known(rank, world):
    """The route by columns does not exchange the counts. A gradient that is not finite would reach the other ranks."""
    for route, unbiased in itertools.product(("auto", "gram", "covariance"), (False, True)):
        y, g = rows(1 if rank == 1 else 0, 7)
        expected = [] if route == "covariance" else [True]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = FD.vicreg_loss(y.requires_grad_(), g, group=dist.group.WORLD, route=route, unbiased=unbiased)
        assert ["one row" in str(w.message) for w in caught if w.category is UserWarning] == expected
        assert out.covariance == 0
        assert_close(out.variance.item(), 1 - 1e-2, rtol=1e-9, atol=0)
        assert torch.autograd.grad(out.loss, y)[0].isfinite().all()


@contextmanager
def bytes_received(world):
    """Note the bytes that this rank receives in our collectives."""
    received, patch = [], pytest.MonkeyPatch()

    def noting(cost, start):
        return lambda x, group: received.append(cost(x.numel(), world, x.element_size())) or start(x, group)

    for name, cost in (("start_all_reduce", costs.summed), ("start_all_gather", costs.gathered)):
        patch.setattr(distributed, name, noting(cost, getattr(distributed, name)))
    yield received
    patch.undo()


def counting_operations():
    """FlopCounterMode knows no product that is added in place."""
    in_place = {torch.ops.aten.addmm_: lambda _, left, right, **options: 2 * left[0] * left[1] * right[1]}
    return FlopCounterMode(display=False, custom_mapping=in_place)


def costs_are_those_calculated(rank, world):
    def pays(calculated, width, route="auto", var_weight=1, cov_weight=1):
        y, g = (x.float() for x in rows(6, rank, width))
        plan = make_plan(
            6, width, inv_weight=1, var_weight=var_weight, cov_weight=cov_weight, gamma=1.0, eps=1e-4,
            cov_reduction="mean", unbiased=False, route=route,
        )  # fmt: skip
        options = vicreg_ranks.RanksOptions(
            dist.group.WORLD.group_name, route, "torch", BackwardOptions(True, False, plan)
        )
        with bytes_received(world) as received, counting_operations() as counter:
            vicreg_ranks.run_vicreg_ranks(y, g, None, options)
        assert sum(received) == pytest.approx(calculated.received)
        assert counter.get_total_flops() == calculated.operations

    for width, expected in ((8, costs.by_columns), (40, costs.by_rows)):
        route, calculated = costs.ours(6, width, world, 4)
        assert calculated == expected(6, width, world, 4), route
        pays(calculated, width)
    for width, route in itertools.product((8, 40), ("auto", "gram", "covariance")):
        pays(costs.by_moments(6, width, world, 4), width, route, cov_weight=0)
        pays(costs.Cost(costs.summed(2, world, 8), 0), width, route, var_weight=0, cov_weight=0)


class Received(TorchDispatchMode):
    """The bytes that this rank receives in torch's own collectives."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        rank, world = dist.get_rank(), dist.get_world_size()
        name = func._schema.name
        if name == "c10d::allgather_":
            self.bytes += sum(x.nbytes for x in args[0][0]) * (world - 1) / world
        elif name == "c10d::scatter_":  # gloo brings gradients back from each rank in turn
            if args[3] != rank:
                self.bytes += args[0][0].nbytes
        else:
            assert not name.startswith("c10d"), name
        return func(*args, **(kwargs or {}))


def the_recipes_costs_are_those_calculated(rank, world):
    y, g = (x.float() for x in rows(6, rank, 8))
    with Received() as received, FlopCounterMode(display=False) as counter:
        every = [torch.cat(all_gather(x)) for x in (y.requires_grad_(), g)]
        recipe.vicreg(*every)[0].backward()
    calculated = costs.recipe(6, 8, world, 4)
    assert received.bytes == calculated.received
    assert counter.get_total_flops() == calculated.operations


def no_counts_are_exchanged_by_columns_nor_without_products(rank, world):
    def refuse(*args):
        raise AssertionError("the host must not wait")

    vicreg_ranks.all_counts = refuse
    y, g = rows(3, rank)
    FD.vicreg_loss(y, g, group=dist.group.WORLD, route="covariance")
    for route in ("auto", "gram"):
        FD.vicreg_loss(y, g, group=dist.group.WORLD, route=route, cov_weight=0)
    with pytest.raises(AssertionError, match="must not wait"):
        FD.vicreg_loss(y, g, group=dist.group.WORLD)


def what_is_not_there_is_refused(rank, world):
    y, g = rows(3, rank)
    y.requires_grad_()
    loss = FD.vicreg_loss(y, g, group=dist.group.WORLD).loss
    with pytest.raises(NotImplementedError, match="second derivatives on torch; use backend='reference'"):
        torch.autograd.grad(loss, y, create_graph=True)
    loss = FD.vicreg_loss(y, g, group=dist.group.WORLD, backend="reference").loss
    (grad,) = torch.autograd.grad(loss, y, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), y)[0].isfinite().all()
    with pytest.raises(RuntimeError, match="cannot run on triton.*the tensor is on cpu"):
        FD.vicreg_loss(y, g, group=dist.group.WORLD, backend="triton")


def in_order(*checks):
    """Several checks of one set of processes, which take longer to start than a check takes."""
    return functools.partial(run_all, checks)


def run_all(checks, rank, world):
    for check in checks:
        check(rank, world)


def a_group_of_some_ranks(rank, world):
    pair = dist.new_group([0, 1])
    if rank < 2:
        y, g = rows(6, 1)
        out = VICRegLoss(group=pair)(y[3 * rank : 3 * rank + 3], g[3 * rank : 3 * rank + 3])
        assert_close(tuple(out), tuple(FD.vicreg_loss(y, g)), rtol=1e-12, atol=1e-14)
    alone = VICRegLoss(group=None)(*rows(6, rank))
    assert_close(tuple(alone), tuple(FD.vicreg_loss(*rows(6, rank))), rtol=0, atol=0)


def data_parallel_is_the_full_batch(rank, world):
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(8, 64, generator=generator, dtype=torch.float64)
    x = torch.rand(8, 3, 56, 56, generator=generator, dtype=torch.float64) * 2 - 1

    def module(group):
        torch.manual_seed(0)
        return DinoSupervision(
            64, teacher=TinyTeacher(), hidden_dim=16, img_size=56, loss_type="vicreg", group=group
        ).double()

    alone, part = module(None), slice(4 * rank, 4 * rank + 4)
    alone(z, x)[0].backward()
    mesh = init_device_mesh("cpu", (world,))
    for shared in (DistributedDataParallel(module("auto")), fully_shard(module("auto"), mesh=mesh)):
        loss, _ = shared(z[part], x[part])
        loss.backward()
        for p, q in zip(alone.parameters(), shared.parameters(), strict=True):
            grad = q.grad.full_tensor() if isinstance(q.grad, DTensor) else q.grad
            assert_close(grad, p.grad, rtol=1e-10, atol=1e-13)
        assert isinstance(q, DTensor) != isinstance(shared, DistributedDataParallel), "FSDP2 shards"


def compiles(rank, world):
    for width, route in ((5, "auto"), (40, "auto"), (5, "covariance")):
        y, g = rows(8, 3, width)
        part = slice(4 * rank, 4 * rank + 4)
        mine = y[part].requires_grad_()
        loss = VICRegLoss(route=route)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(lambda y, g, loss=loss: loss(y, g).loss, fullgraph=True, backend=counter)
        for loss.options["var_weight"] in (1.0, 2.5, 0.75, 4.0):
            ours, plain = compiled(mine, g[part]), loss(mine, g[part]).loss
            assert_close(ours, plain, rtol=1e-12, atol=0)
            assert_close(torch.autograd.grad(ours, mine), torch.autograd.grad(plain, mine), rtol=1e-12, atol=1e-14)
        assert counter.frame_count <= 2, "one graph for the first weight, and one for every other"


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_rank_has_the_full_batchs_loss_and_gradient(world, tmp_path):
    spawn(functional_is_one_process, world, tmp_path)


def test_a_group_names_the_ranks(tmp_path):
    spawn(a_group_of_some_ranks, 3, tmp_path)


def test_data_parallel_training_is_the_full_batch(tmp_path):
    spawn(data_parallel_is_the_full_batch, 2, tmp_path)


def test_compiled(tmp_path):
    spawn(compiles, 2, tmp_path)


def test_the_numbers_of_a_rank_what_it_pays_and_when_the_host_waits(tmp_path):
    checks = (
        large_means_do_not_cancel,
        the_variance_is_no_product,
        half_precision_is_float32_inside,
        a_dominating_column_costs_no_more_than_in_eager,
        ranks_that_would_choose_otherwise_set_the_first_ranks_column_apart,
        nothing_in_all_is_what_one_process_makes_of_nothing,
        one_row_in_all_is_finite_and_warns_where_it_is_known,
        what_is_not_there_is_refused,
        costs_are_those_calculated,
        the_recipes_costs_are_those_calculated,
        no_counts_are_exchanged_by_columns_nor_without_products,
    )
    spawn(in_order(*checks), 3, tmp_path)


@pytest.mark.parametrize("width", [3, 40])
def test_one_rank_pays_what_is_calculated(width):
    y, g = (x.float().requires_grad_() for x in rows(6, 0, width))
    with counting_operations() as counter:
        FD.vicreg_loss(y, g, backend="torch").loss.backward()
    assert counter.get_total_flops() == costs.ours(6, width, 1, 4)[1].operations


def test_the_page_of_costs_is_the_calculation():
    assert costs.PAGE.read_text().endswith(costs.section()), "write it anew: python tests/costs.py"
