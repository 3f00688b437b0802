"""Warm-up and stop: the counter, what overrides it, and the exact zero."""

import copy

import pytest
import torch
from torch.testing import assert_close

from conftest import grads
from conftest import make_supervision as make
from fused_dino import AtStep, Schedule


def ratio(losses):
    return (losses["loss_dino"] / losses["dino_global"]).item()


def test_rises_linearly_to_alpha(teacher, batch):
    module = make(teacher, alpha=0.5, warmup_steps=4)
    assert [ratio(module.loss_dict(*batch)) for _ in range(6)] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert module.schedule.step == 6
    assert module.schedule.step.dtype == torch.int64


def test_the_default_is_the_recipes(teacher, batch):
    assert ratio(make(teacher).loss_dict(*batch)) == pytest.approx(0.2 / 5000)
    assert ratio(make(teacher, warmup_steps=0).loss_dict(*batch)) == pytest.approx(0.2)


def test_an_explicit_step_wins_and_leaves_the_counter(teacher, batch):
    module = make(teacher, alpha=1.0, warmup_steps=10)
    assert [ratio(module.loss_dict(*batch, step=s)) for s in (0, 5, 10, 99)] == pytest.approx([0, 0.5, 1, 1])
    assert module.schedule.step == 0


def test_advances_only_where_a_step_is_trained(teacher, batch):
    module = make(teacher, warmup_steps=10)
    module.eval().loss_dict(*batch)
    module.train()
    with torch.no_grad():
        module.loss_dict(*batch)
    module(*batch)  # the bare loss has no schedule
    assert module.schedule.step == 0
    module.loss_dict(*batch)
    assert module.schedule.step == 1


def test_stops_with_an_exact_zero_that_reaches_every_parameter(teacher, batch):
    module = make(teacher, warmup_steps=0, stop_step=3, use_patch=True, latent_shape=(4, 4, 4))
    calls = []
    module.teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    values = [module.loss_dict(*batch)["loss_dino"] for _ in range(5)]
    assert [v.item() > 0 for v in values] == [True, True, False, False, False]
    assert len(calls) == 2, "a stopped loss needs no teacher"
    with torch.no_grad():
        module.projector[0].weight.fill_(float("nan"))
    last = module.loss_dict(*batch)
    assert last.keys() == {"loss_dino"}
    assert last["loss_dino"] == 0
    assert last["loss_dino"].dtype == torch.float32
    assert copy.deepcopy(module).double().loss_dict(*batch)["loss_dino"].dtype == torch.float64, "as before the stop"
    last["loss_dino"].backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert torch.equal(p.grad, torch.zeros_like(p)), name
    assert module.loss_dict(*batch, step=2)["loss_dino"].isnan(), "an explicit step wins here too"


def test_the_host_follows_a_counter_that_others_write(teacher, batch):
    module = make(teacher, stop_step=100)
    module.loss_dict(*batch)
    module.schedule.step.fill_(99)
    assert module.loss_dict(*batch)["loss_dino"] == 0
    other = make(teacher, stop_step=100)
    other.load_state_dict(module.state_dict())
    assert other.loss_dict(*batch).keys() == {"loss_dino"}
    other.load_state_dict(make(teacher).state_dict(), assign=True)
    assert other.loss_dict(*batch)["loss_dino"] > 0


def test_the_host_asks_the_device_once(teacher, batch, monkeypatch):
    module = make(teacher, stop_step=100)
    module.loss_dict(*batch)
    asked = []
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: asked.append(1) or self.item())
    for _ in range(3):
        module.loss_dict(*batch)
    assert not asked
    assert module.schedule.count() == 4


@pytest.mark.parametrize("stop", [None, AtStep(9)])
@pytest.mark.parametrize(("accumulate", "steps"), [(1, [1, 1, 2, 2, 3]), (2, [1, 1, 1, 1, 2])])
def test_tokens_that_fit_no_grid_count_no_step(teacher, batch, accumulate, steps, stop):
    """Only the teacher's features show that the tokens fit no grid."""
    module = make(teacher, in_dim=None, token_dim=10)
    module.schedule = Schedule(1.0, 4, stop=stop, accumulate=accumulate)
    for count, step in zip((16, 15, 16, 15, 16), steps, strict=True):
        call = {"x_img": batch[1], "tokens": torch.ones(6, count, 10)}
        if count == 15:
            with pytest.raises(ValueError, match="15"):
                module.loss_dict(**call)
        else:
            assert_close(module.loss_dict(**call)["loss_dino"], module(**call)[0] * (step / 4))
        assert module.schedule.step == module.schedule.count() == step


def test_resume_goes_on(teacher, batch):
    module = make(teacher, alpha=1.0, warmup_steps=10)
    for _ in range(4):
        module.loss_dict(*batch)
    resumed = make(teacher, alpha=1.0, warmup_steps=10)
    resumed.load_state_dict(module.state_dict())
    assert ratio(resumed.loss_dict(*batch)) == pytest.approx(0.5)


def test_half_precision_models_count_right(teacher, batch):
    module = make(teacher, warmup_steps=5000).bfloat16()
    module.schedule.step.fill_(2500)
    assert_close(torch.tensor(ratio(module.loss_dict(*batch))), torch.tensor(0.2 * 2501 / 5000), rtol=1e-6, atol=0)


@pytest.mark.parametrize("stop_step", [None, 3])
def test_compiled_gradients_are_of_the_same_step_as_their_loss(fresh_compiler, teacher, batch, stop_step):
    """The counter advances within the graph, and the backward must not look at it again."""
    module = make(teacher, warmup_steps=4, stop_step=stop_step, w_global=2.0, use_patch=True, latent_shape=(4, 4, 4))
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin.loss_dict, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        for m, run in ((module, module.loss_dict), (twin, compiled)):
            m.zero_grad()
            run(*batch)["loss_dino"].backward()
        assert_close(grads(twin), grads(module), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss_type", ["cosine", "mse", "vicreg"])
def test_the_weight_goes_into_the_ops_and_the_logs_stay_without(teacher, batch, loss_type):
    options = {"loss_type": loss_type, "use_patch": True, "latent_shape": (4, 4, 4), "w_patch": 0.3, "w_global": 2.0}
    module = make(teacher, alpha=0.5, warmup_steps=4, **options).double()
    z, x = (v.double() for v in batch)
    loss, logs = module(z, x)
    expected = torch.autograd.grad(0.25 * loss, list(module.parameters()))
    for step in (2, None):
        module.schedule.step.fill_(1)
        out = module.loss_dict(z, x, step=step)
        assert_close(out["loss_dino"], 0.25 * loss, rtol=1e-12, atol=0)
        assert all(torch.equal(out[name], logs[name]) for name in logs)
        actual = torch.autograd.grad(out["loss_dino"], list(module.parameters()))
        assert_close(actual, expected, rtol=1e-10, atol=1e-15)
