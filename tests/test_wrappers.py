"""Trainers' wrappers over two processes: each rank's gradients are those of one process on the whole batch."""

import copy
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from conftest import TinyTeacher, make_supervision
from test_distributed import spawn

PAGE = (Path(__file__).parent.parent / "docs/distributed.md").read_text()
PATTERNS = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)


def supervision(**options):
    torch.manual_seed(0)
    return make_supervision(TinyTeacher(), warmup_steps=0, **{"group": "auto", **options})


def whole_batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 64, generator=generator), torch.rand(6, 3, 56, 56, generator=generator) * 2 - 1


def part_of_rank(rank):
    return tuple(x[3 * rank : 3 * rank + 3] for x in whole_batch())


def gradients(module):
    return [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in module.parameters()]


def the_pages_patterns_train(rank, world):
    for name, value in {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0,
        "MASTER_ADDR": "localhost", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "one", "ACCELERATE_USE_CPU": "true",
    }.items():  # fmt: skip
        os.environ[name] = str(value)
    expected = supervision(group=None)
    expected.loss_dict(*whole_batch())["loss_dino"].backward()
    loader = DataLoader(TensorDataset(*whole_batch()), batch_size=3)
    assert len(PATTERNS) == 4
    for pattern in PATTERNS:
        dino = supervision()
        z_text, images = part_of_rank(rank)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "loss_dict runs")
            exec(pattern, {"dino": dino, "z_text": z_text, "images": images, "loader": loader, "__name__": "page"})
        assert_close(gradients(dino), gradients(expected), msg=lambda error, pattern=pattern: f"{pattern}{error}")


class Model(nn.Module):
    """A model with the supervision inside."""

    def __init__(self, dino):
        super().__init__()
        self.dino = dino

    def forward(self, *batch):
        return self.dino.loss_dict(*batch)["loss_dino"]


def an_unsynchronised_loss_warns_once(rank, world):
    batch = part_of_rank(rank)
    dino = supervision()
    with pytest.warns(UserWarning, match="as_dict=True") as caught:
        for _ in range(2):
            dino.loss_dict(*batch)
    assert len(caught) == 1
    sharded, compiled = Model(supervision()), torch.compile(supervision().loss_dict, backend="eager", fullgraph=True)
    fully_shard(sharded)
    silent = {
        "in DDP's forward": DistributedDataParallel(Model(supervision())),
        "a wrapped supervision": lambda *batch: DistributedDataParallel(supervision())(*batch, as_dict=True),
        "sharded": sharded,
        "group=None": supervision(group=None).loss_dict,
        "in eval mode": supervision().eval().loss_dict,
        "without gradients": torch.no_grad()(supervision().loss_dict),
        "compiled": compiled,
    }
    for call in silent.values():
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "loss_dict runs")
            call(*batch)


def a_rank_in_eval_mode_keeps_nobody_waiting(rank, world):
    dino = supervision(loss_type="vicreg")
    batch = part_of_rank(rank)
    if rank == 0:
        local = copy.deepcopy(dino).eval()
        alone = supervision(loss_type="vicreg", group=None)
        assert_close(local(*batch)[0], alone(*batch)[0])
        with torch.no_grad():
            assert_close(dino(*batch)[0], alone(*batch)[0])
    dist.barrier()
    expected = supervision(loss_type="vicreg", group=None)(*whole_batch())[0]
    assert_close(dino(*batch)[0], expected)


@pytest.mark.parametrize(
    "check",
    [the_pages_patterns_train, an_unsynchronised_loss_warns_once, a_rank_in_eval_mode_keeps_nobody_waiting],
    ids=lambda check: check.__name__,
)
def test_two_processes(check, tmp_path):
    spawn(check, 2, tmp_path)


def test_one_process_never_warns(batch, recwarn):
    supervision().loss_dict(*batch)
    assert not [w for w in recwarn if "as_dict" in str(w.message)]


def test_as_dict_is_loss_dict(batch):
    one, other = supervision(), supervision()
    for step in (None, 3):
        assert_close(one(*batch, as_dict=True, step=step), other.loss_dict(*batch, step))
    assert one.schedule.step == other.schedule.step == 1


def test_as_dict_takes_the_schedules_weight_alone(batch):
    with pytest.raises(ValueError, match="^alpha must be left out"):
        supervision()(*batch, as_dict=True, alpha=1.0)
    with pytest.raises(ValueError, match="^step must be left out"):
        supervision()(*batch, step=1)


def test_features_come_to_the_students_device(batch):
    """The meta device stands for a second device: no op takes tensors of both."""
    dino = supervision(use_patch=True, latent_shape=(4, 4, 4), token_dim=8)
    images = batch[1]
    for features in (None, dino.encode(images)):
        elsewhere = copy.deepcopy(dino)
        elsewhere.to("meta").teacher = copy.deepcopy(dino).teacher
        given = {"x_img": images} if features is None else {"features": features}
        loss, logs = elsewhere(batch[0].to("meta"), tokens=torch.ones(6, 16, 8, device="meta"), **given)
        assert loss.device.type == "meta"
        assert all(x.device.type == "meta" for x in logs.values())
