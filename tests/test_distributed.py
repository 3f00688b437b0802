"""VICReg over real gloo processes against one process that holds all the rows, in float64."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from conftest import TinyTeacher
from fused_dino import DinoSupervision, VICRegLoss
from fused_dino import functional as FD

OPTIONS = [{}, {"cov_reduction": "sum_over_d", "unbiased": True}]


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 5, generator=generator, dtype=torch.float64) for _ in range(2))


def parts(world):
    """Unequal batches, an empty one among them from three ranks on."""
    sizes = [4, 3, 0, 2][:world]
    return [slice(sum(sizes[:r]), sum(sizes[: r + 1])) for r in range(world)]


def spawn(check, world, tmp_path):
    mp.spawn(enter, args=(check, world, str(tmp_path / "store")), nprocs=world)


def enter(rank, check, world, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        check(rank, world)
    finally:
        dist.destroy_process_group()


def functional_is_one_process(rank, world):
    part = parts(world)[rank]
    total = parts(world)[-1].stop
    for options in OPTIONS:
        y, g = (x.requires_grad_() for x in rows(total, 0))
        whole = FD.vicreg_loss(y, g, **options)
        whole.loss.backward()
        mine = y.detach()[part].requires_grad_(), g.detach()[part].requires_grad_()
        out = FD.vicreg_loss(*mine, group=dist.group.WORLD, **options)
        assert_close(tuple(out), tuple(whole), rtol=1e-12, atol=1e-14)
        out.loss.backward()
        # Each rank's gradient is world times its share: the mean over ranks gives the full batch's.
        assert_close(mine[0].grad / world, y.grad[part], rtol=1e-10, atol=1e-13)
        assert_close(mine[1].grad / world, g.grad[part], rtol=1e-10, atol=1e-13)


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

    alone, shared = module(None), DistributedDataParallel(module("auto"))
    alone(z, x)[0].backward()
    part = slice(4 * rank, 4 * rank + 4)
    loss, _ = shared(z[part], x[part])
    loss.backward()
    for p, q in zip(alone.parameters(), shared.module.parameters(), strict=True):
        assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-13)


def compiles(rank, world):
    y, g = rows(8, 3)
    part = slice(4 * rank, 4 * rank + 4)
    mine = y[part].requires_grad_()
    loss = VICRegLoss()
    compiled = torch.compile(lambda y, g: loss(y, g).loss, fullgraph=True, backend="aot_eager")
    ours, plain = compiled(mine, g[part]), loss(mine, g[part]).loss
    assert_close(ours, plain, rtol=1e-12, atol=0)
    assert_close(torch.autograd.grad(ours, mine), torch.autograd.grad(plain, mine), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_rank_has_the_full_batchs_loss_and_gradient(world, tmp_path):
    spawn(functional_is_one_process, world, tmp_path)


def test_a_group_names_the_ranks(tmp_path):
    spawn(a_group_of_some_ranks, 3, tmp_path)


def test_data_parallel_training_is_the_full_batch(tmp_path):
    spawn(data_parallel_is_the_full_batch, 2, tmp_path)


def test_compiled(tmp_path):
    spawn(compiles, 2, tmp_path)
