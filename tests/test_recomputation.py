"""A forward that runs again in the backward, or is differentiated as a function, is one training step."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from conftest import make_supervision


class Model(nn.Module):
    """A text encoder of one layer with a supervision inside."""

    def __init__(self, teacher, **options):
        super().__init__()
        self.text = nn.Linear(10, 64)
        self.dino = make_supervision(teacher, warmup_steps=3, group=None, **options)

    def forward(self, text, images):
        return self.dino.loss_dict(self.text(text), images)["loss_dino"]

    @property
    def steps(self):
        return int(self.dino.schedule.step)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def compiled(model):
    return torch.compile(model, backend="aot_eager")


@pytest.mark.parametrize("prepare", [lambda model: model, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("stop_step", [None, 3])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_is_one_step(teacher, batch, use_reentrant, stop_step, prepare, fresh_compiler):
    plain = Model(teacher, stop_step=stop_step)
    again = copy.deepcopy(plain)
    forward = prepare(again)
    text = batch[0][:, :10].clone().requires_grad_()  # a reentrant checkpoint wants an input with a gradient
    for step in range(1, 5):
        plain.zero_grad()
        again.zero_grad()
        loss = plain(text, batch[1])
        loss.backward()
        repeated = checkpoint(forward, text, batch[1], use_reentrant=use_reentrant)
        repeated.backward()
        assert again.steps == plain.steps == step
        assert_close(gradients(again), gradients(plain))
        if not use_reentrant:  # whose first run has no gradients, as an evaluation has none
            assert_close(repeated, loss)


@pytest.mark.parametrize("stop_step", [None, 1])
def test_a_function_of_the_parameters_has_the_modules_gradients(teacher, batch, stop_step):
    model = Model(teacher, stop_step=stop_step)
    text, images = batch[0][:, :10], batch[1]
    parameters = dict(model.named_parameters())
    actual = grad(lambda p: functional_call(model, p, (text, images)))({k: p.detach() for k, p in parameters.items()})
    assert model.steps == 1
    model.dino.schedule.step.zero_()
    model(text, images).backward()
    assert_close(actual, gradients(model))


def test_a_function_of_parameters_and_buffers_counts_in_what_it_is_given(teacher, batch):
    model = Model(teacher)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    given = {name: x.detach().clone() for name, x in state.items()}
    functional_call(model, given, (batch[0][:, :10], batch[1]))
    assert model.steps == 0
    assert int(given["dino.schedule.step"]) == 1
