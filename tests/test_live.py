"""A forward does not call parameters(): wrappers hide them, quantised layers have integers, users replace modules."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.testing import assert_close

from conftest import TinyTeacher, make_supervision
from fused_dino import DinoSupervision
from fused_dino.live import dtype_of, live_tensors
from test_distributed import spawn

REGIONS = {"use_patch": True, "latent_shape": (4, 4, 4)}
OPTIONS = {
    "global": {},
    "regions": REGIONS,
    "queries": {**REGIONS, "patch_target": "attention"},
    "tokens": {"token_dim": 8},
    "stopped": {"stop_step": 0},
}


class Model(nn.Module):
    """A text encoder of one layer with a supervision inside."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.text = nn.Linear(64, 64)
        self.dino = make_supervision(TinyTeacher(), warmup_steps=0, **options)

    def forward(self, text, images, **more):
        return self.dino.loss_dict(self.text(text), images, **more)["loss_dino"]


def more_inputs(options):
    return {"tokens": torch.ones(6, 16, 8)} if "token_dim" in options else {}


def flat_parameters_have_the_plain_losses(rank, world):
    text, images = torch.ones(6, 64), torch.ones(6, 3, 56, 56)
    for options in OPTIONS.values():
        plain = Model(**options)
        sharded = FullyShardedDataParallel(copy.deepcopy(plain), device_id=torch.device("cpu"))
        loss = sharded(text, images, **more_inputs(options))
        assert_close(loss, plain(text, images, **more_inputs(options)))
        loss.backward()
    dist.barrier()


def test_fsdp_with_flat_parameters(tmp_path):
    spawn(flat_parameters_have_the_plain_losses, 1, tmp_path)


def replica_of(module):
    """Return what nn.DataParallel makes of a module on each device: weights are attributes, and no parameters."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = replica_of(child)
    for name, p in module._parameters.items():
        setattr(replica, name, p if p is None else p.view_as(p))
    return replica


@pytest.mark.parametrize("name", OPTIONS)
def test_a_replica_of_data_parallel(name, batch):
    model = Model(**OPTIONS[name]).double()
    replica = replica_of(model)
    assert not list(replica.parameters())
    inputs = batch[0].double(), batch[1]
    loss = replica(*inputs, **more_inputs(OPTIONS[name]))
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.dino.schedule.step.zero_()
    expected = model(*inputs, **more_inputs(OPTIONS[name]))
    expected.backward()
    assert_close(loss, expected)
    assert_close(gradients, [p.grad for p in model.parameters()])


class Quantised(nn.Module):
    """A linear layer of int8 weights with a scale."""

    def __init__(self, layer):
        super().__init__()
        self.scale = layer.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight * self.scale).T


def test_a_projector_with_quantised_layers(teacher, batch):
    dino = make_supervision(teacher)
    expected = dino(*batch)[0]
    dino.projector[0], dino.projector[3] = Quantised(dino.projector[0]), Quantised(dino.projector[3])
    loss = dino(*batch)[0]
    assert_close(loss, expected, rtol=0.05, atol=0.01)
    loss.backward()
    assert dino.projector[2].weight.grad.count_nonzero()


PROJECTORS = {
    "in float64": lambda: nn.Linear(64, 24, dtype=torch.float64),
    "without weights": lambda: nn.Sequential(nn.Unflatten(1, (8, 8)), nn.AdaptiveAvgPool1d(3), nn.Flatten()),
}


@pytest.mark.parametrize(("name", "dtype"), [("in float64", torch.float64), ("without weights", torch.float32)])
def test_a_projector_that_is_any_module(teacher, batch, name, dtype):
    dino = make_supervision(teacher)
    dino.projector = PROJECTORS[name]()
    loss = dino(*batch)[0]
    assert loss.dtype == dtype
    assert loss.isfinite()


def test_live_tensors_are_parameters_or_stand_in_their_place():
    layer = nn.Linear(3, 2)
    assert [id(x) for x in live_tensors(layer)] == [id(layer.weight), id(layer.bias)]
    assert dtype_of(layer.half()) == torch.float16
    assert dtype_of(nn.ReLU()) is None


@pytest.mark.parametrize("batchwise", [{}, {"token_dim": 8}])
def test_a_stopped_loss_reaches_its_inputs(teacher, batch, batchwise):
    dino = make_supervision(teacher, stop_step=0, **batchwise)
    inputs = [batch[0].requires_grad_(), *more_inputs(batchwise).values()]
    inputs[-1].requires_grad_()
    more = {"tokens": inputs[1]} if batchwise else {}
    loss = dino.loss_dict(batch[0], batch[1], **more)["loss_dino"]
    assert loss == 0
    loss.backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (*inputs, *dino.parameters()))


def test_numpys_integers_are_integers(teacher, batch):
    sizes = {"in_dim": 64, "hidden_dim": 32, "img_size": 56, "warmup_steps": 3, "stop_step": 9, "token_dim": 8}
    pairs = {"patch_grid": (2, 2), "latent_shape": (4, 4, 4), "token_grid": (4, 4)}
    given = {name: np.int64(value) for name, value in sizes.items()}
    given |= {name: tuple(np.int32(x) for x in value) for name, value in pairs.items()}
    torch.manual_seed(0)
    dino = DinoSupervision(teacher=teacher, use_patch=True, group=None, **given)
    torch.manual_seed(0)
    expected = DinoSupervision(teacher=teacher, use_patch=True, group=None, **sizes, **pairs)
    tokens = torch.ones(6, 16, 8)
    assert_close(
        dino.loss_dict(*batch, step=np.int64(2), tokens=tokens), expected.loss_dict(*batch, step=2, tokens=tokens)
    )
    with pytest.raises(ValueError, match="^in_dim must be a positive int"):
        DinoSupervision(np.float64(64), teacher=teacher)
