"""The weight of a schedule at each step: the published schedules, and the logs of the weight in effect."""

import copy
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from conftest import make_supervision
from fused_dino import AtStep, Schedule, Weight

# Of SimpleTuner's crepa.py, base 0.5, warm-up 4, decay until 12; the values were printed by it.
SIMPLETUNER = [
    ({"decay": "linear"}, {0: 0, 2: 0.25, 4: 0.5, 8: 0.25, 12: 0, 99: 0}, 1e-9),
    ({"decay": "cosine", "end": 0.1}, {4: 0.5, 6: 0.441421, 8: 0.3, 12: 0.1, 99: 0.1}, 5e-7),
    ({"decay": "polynomial", "power": 2}, {4: 0.5, 6: 0.28125, 8: 0.125, 12: 0}, 1e-9),
]


@pytest.mark.parametrize(("options", "expected", "atol"), SIMPLETUNER, ids=lambda x: str(x)[:30])
def test_it_is_simpletuners(options, expected, atol):
    weight = Weight(0.5, 4, end_step=12, **options)
    steps, values = list(expected), torch.tensor(list(expected.values()), dtype=torch.float64)
    assert_close(torch.tensor([weight(s) for s in steps], dtype=torch.float64), values, rtol=0, atol=atol)
    assert_close(weight(torch.tensor(steps)), values, rtol=0, atol=atol)


def test_it_is_dinov3s_gram_schedule():
    """Start 0, peak 1, end 0.2, 4 steps of warm-up, 10 steps in all, 4 of them of a cosine with both of its ends."""
    weight = Weight(1.0, 4, decay="cosine", end_step=4 + 4 - 1, end=0.2)
    expected = [0, 0.25, 0.5, 0.75, 1, 0.8, 0.4, 0.2, 0.2, 0.2]
    assert [weight(s) for s in range(10)] == pytest.approx(expected, abs=1e-12)
    anchor = Weight(0.0, 1_000_000, decay="cosine", end_step=1_001_000, end=2.0)
    assert [anchor(s) for s in (0, 999_999, 1_000_500, 1_001_000, 2_000_000)] == pytest.approx([0, 0, 1, 2, 2])


def test_it_is_sras_weight_from_epoch_150_on():
    """The code's 2 * 0.1 ** ((epoch - 149) / 1000 + 1), here of steps, of which an epoch has 5."""
    weight = Weight(0.2, decay="exponential", start_step=149 * 5, end_step=1149 * 5, end=0.02)
    for epoch in (0, 149, 150, 400, 799):
        expected = 2 * 0.1 ** ((epoch - 149) / 1000 + 1 if epoch > 149 else 1)
        assert weight(5 * epoch) == pytest.approx(expected, abs=1e-12)
        assert float(weight(torch.tensor(5 * epoch))) == pytest.approx(expected, abs=1e-12)
    assert weight(10**6) == 0.02
    rising = Weight(0.5, 2, decay="exponential", end_step=4, end=2.0)
    assert [rising(s) for s in range(6)] == pytest.approx([0, 0.25, 0.5, 1, 2, 2], abs=1e-12)


@pytest.mark.parametrize("start", [None, 3, 5])
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "polynomial"])
def test_the_host_and_the_device_agree_with_the_formula(decay, warmup, start):
    options = {} if decay == "constant" else {"end_step": 11, "end": -0.3, "start_step": start}
    options |= {"power": 1.7} if decay == "polynomial" else {}
    weight = Weight(0.7, warmup, decay=decay, **options)
    begin = warmup if start is None else start
    for step in range(14):
        x = min(1, max(0, (step - begin) / (11 - begin)))
        shape = {
            "constant": 1,
            "linear": 1 - x,
            "cosine": (1 + math.cos(math.pi * x)) / 2,
            "polynomial": (1 - x) ** 1.7,
        }
        expected = (-0.3 + 1.0 * shape[decay]) * min(1, step / warmup if warmup else 1)
        assert weight(step) == pytest.approx(expected, abs=1e-12)
        assert float(weight(torch.tensor(step))) == pytest.approx(expected, abs=1e-12)


def test_the_loss_has_it_and_the_logs_say_it(teacher, batch):
    module = make_supervision(teacher).double()
    module.schedule = Schedule(weight=Weight(0.5, 2, decay="linear", end_step=6), stop=AtStep(5))
    z, x = (v.double() for v in batch)
    outs = [module.loss_dict(z, x) for _ in range(6)]
    expected = [0.25, 0.5, 0.375, 0.25, 0, 0]
    assert [float(out["dino_alpha"]) for out in outs] == pytest.approx(expected, abs=1e-12)
    losses = torch.stack([out["loss_dino"].detach().double() for out in outs])
    assert (losses / outs[0]["dino_global"]).tolist() == pytest.approx(expected, abs=1e-12)
    assert list(outs[0]) == ["loss_dino", "dino_global", "dino_alpha"]
    assert list(outs[5]) == ["loss_dino", "dino_alpha"], "the teacher no longer runs"
    told = module.loss_dict(z, x, step=3)
    assert_close(told, outs[2])
    assert not told["dino_alpha"].requires_grad
    zero = module.loss_dict(z, x, step=0)
    assert list(zero) == list(outs[0]), "the zero of a warm-up skips nothing"
    assert zero["loss_dino"] == zero["dino_alpha"] == 0


@pytest.mark.parametrize("told", [False, True])
def test_compiled_it_is_the_same_without_a_compilation_a_step(fresh_compiler, teacher, batch, told):
    module = make_supervision(teacher).double()
    module.schedule = Schedule(weight=Weight(0.5, 3, decay="cosine", end_step=20, end=0.1), stop=AtStep(23))
    twin, (z, x) = copy.deepcopy(module), (v.double() for v in batch)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin.loss_dict, fullgraph=True, backend=counter)
    for step in range(1, 26):
        outs = [run(z, x, **({"step": step} if told else {})) for run in (module.loss_dict, compiled)]
        for key in ("loss_dino", "dino_alpha"):  # the zero of a skipped call is float32
            assert_close(outs[1][key], outs[0][key], rtol=1e-12, atol=0, check_dtype=False)
        grads = [
            torch.autograd.grad(o["loss_dino"], list(m.parameters())) for o, m in zip(outs, (module, twin), strict=True)
        ]
        assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-15)
        assert not told or outs[1].keys() == outs[0].keys(), "compiled code skips the teacher where step is given"
    # One program for the counter; with step one for its first value, and one each before, in and after the decay.
    assert counter.frame_count <= (5 if told else 1)


def test_steps_are_the_optimizers_where_micro_batches_accumulate(teacher, batch):
    module = make_supervision(teacher)
    module.schedule = Schedule(weight=Weight(1.0, 4), stop=AtStep(5), accumulate=3)
    alphas = [float(module.loss_dict(*batch)["dino_alpha"]) for _ in range(13)]
    assert alphas == [0.25] * 3 + [0.5] * 3 + [0.75] * 3 + [1.0] * 3 + [0.0]
    assert module.schedule.step == 5
    assert set(module.schedule.state_dict()) == {"step"}


@pytest.mark.parametrize("calls", [6, 7])
def test_a_resumed_run_begins_with_the_first_micro_batch(teacher, batch, calls):
    """Its gradients are in no checkpoint, so that those of a broken window are gone."""
    module = make_supervision(teacher)
    module.schedule = Schedule(weight=Weight(1.0, 8), stop=AtStep(7), accumulate=3)
    other = copy.deepcopy(module)
    other.loss_dict(*batch)
    for _ in range(calls):
        module.loss_dict(*batch)
    other.load_state_dict(module.state_dict())
    steps = -(-calls // 3)
    assert [float(other.loss_dict(*batch)["dino_alpha"]) * 8 for _ in range(4)] == [steps + 1] * 3 + [steps + 2]


def test_a_checkpoint_of_before_is_loaded(teacher, batch):
    plain = make_supervision(teacher, warmup_steps=10)
    plain.loss_dict(*batch)
    module = make_supervision(teacher)
    module.schedule = Schedule(weight=Weight(1.0, 4, decay="linear", end_step=9), stop=AtStep(5), accumulate=2)
    module.load_state_dict(plain.state_dict())
    assert module.loss_dict(*batch)["dino_alpha"] == 0.5


def test_a_meta_schedule_is_loaded_whole(teacher, batch):
    source = make_supervision(teacher)
    source.schedule = Schedule(weight=Weight(1.0, 4), accumulate=2)
    with torch.device("meta"):
        module = make_supervision(teacher)
        module.schedule = Schedule(weight=Weight(1.0, 4), accumulate=2)
    module.load_state_dict(source.state_dict(), assign=True)
    assert [float(module.loss_dict(*batch)["dino_alpha"]) for _ in range(3)] == [0.25, 0.25, 0.5]


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("alpha must be a finite number", lambda: Weight(math.inf)),
        ("warmup_steps must be an int", lambda: Weight(1.0, -1)),
        ("decay is 'exp'; use one of constant", lambda: Weight(1.0, decay="exp", end_step=3)),
        ("end_step must be an int above warmup_steps=4, got None", lambda: Weight(1.0, 4, decay="cosine")),
        ("end_step must be an int above warmup_steps=4, got 4", lambda: Weight(1.0, 4, decay="cosine", end_step=4)),
        ("end_step must be a positive int", lambda: Weight(1.0, decay="cosine", end_step=2.5)),
        ("start_step, end_step and end must be left out of a constant", lambda: Weight(1.0, end_step=4)),
        ("start_step, end_step and end must be left out of a constant", lambda: Weight(1.0, end=0.5)),
        ("start_step, end_step and end must be left out of a constant", lambda: Weight(1.0, start_step=0)),
        ("start_step must be an int of at least 4, got 3",
         lambda: Weight(1.0, 4, decay="linear", start_step=3, end_step=9)),
        ("end_step must be an int above start_step=6, got 6",
         lambda: Weight(1.0, 4, decay="linear", start_step=6, end_step=6)),
        ("alpha and end must be above 0 to decay exp.*, got 1.0, 0.0",
         lambda: Weight(1.0, decay="exponential", end_step=9)),
        ("alpha and end must be above 0", lambda: Weight(-1.0, decay="exponential", end_step=9, end=1.0)),
        ("end must be a finite number", lambda: Weight(1.0, decay="linear", end_step=4, end="x")),
        ("power must be above 0, and left out", lambda: Weight(1.0, decay="linear", end_step=4, power=2.0)),
        ("power must be above 0", lambda: Weight(1.0, decay="polynomial", end_step=4, power=0)),
        ("alpha and warmup_steps must be left out", lambda: Schedule(0.5, weight=Weight(1.0))),
        ("alpha and warmup_steps must be left out", lambda: Schedule(warmup_steps=5, weight=Weight(1.0))),
        ("stop_step must be left out", lambda: Schedule(stop_step=5, stop=AtStep(5))),
        ("stop_step must be an int", lambda: Schedule(stop_step=-1)),
        ("step must be an int", lambda: AtStep(1.5)),
        ("accumulate must be a positive int", lambda: Schedule(accumulate=0)),
        ("weight must be None or a Weight, got float", lambda: Schedule(weight=0.5)),
        ("stop must be None, AtStep or BySimilarity, got int", lambda: Schedule(stop=5)),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(message, make):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        make()
