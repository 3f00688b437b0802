"""BySimilarity stops a supervision by its average: published values, resume, recomputation, compiled code."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fused_dino import BySimilarity, CosineLoss, MSELoss, RegionTerm, Schedule, Supervision, Term, TokenTerm, recipes
from similarity import IMAGES, Axis, Model, as_tensor, plane

SIMILARITIES = (0.5, 0.9, 0.9, 0.2, 0.2)  # with decay 0.5 and threshold 0.6, as SimpleTuner's crepa.py printed them


def test_a_permanent_stop_is_simpletuners_and_the_teacher_rests():
    model = Model(BySimilarity(0.6, decay=0.5, every=1))
    assert model.run(*SIMILARITIES) == pytest.approx([0.5, 0, 0, 0, 0], abs=1e-9)
    assert model.average == pytest.approx(0.7, abs=1e-9), "it follows nothing once it has stopped"
    assert model.dino.teacher.calls == 2
    assert model.dino.schedule.step == 5


def test_a_recoverable_stop_is_simpletuners():
    model = Model(BySimilarity(0.6, decay=0.5, mode="recoverable", every=1))
    assert model.run(*SIMILARITIES) == pytest.approx([0.5, 0, 0, 0.5, 0.5], abs=1e-9)
    assert model.average == pytest.approx(0.35, abs=1e-9)
    assert model.dino.teacher.calls == 5


def test_a_permanent_stop_stays_where_a_resumed_run_has_a_higher_threshold():
    model, resumed = (Model(BySimilarity(threshold, decay=0.5, every=1)) for threshold in (0.6, 0.95))
    model.run(0.9)
    resumed.load_state_dict(model.state_dict())
    watch = resumed.dino.schedule.watch
    watch.follow(torch.tensor(0.1), torch.tensor(True))  # as compiled code does, which skips nothing
    assert watch.stopped == 1
    assert resumed.average == pytest.approx(0.9)
    assert resumed.run(0.1) == [0]


def test_the_threshold_itself_stops():
    watch = Model(BySimilarity(0.5, every=1)).dino.schedule.watch
    watch.follow(torch.tensor(0.5), due=True)
    assert watch.is_stopped()


def test_it_decides_every_so_many_steps():
    """The steps are those of the counter. Between decisions the teacher runs only while the loss counts."""
    for mode, calls, weights in (
        ("permanent", 3, [0.5, 0.5, 0, 0, 0, 0, 0, 0, 0]),
        ("recoverable", 5, [0.5, 0.5, 0, 0, 0, 0, 0, 0, 0.5]),
    ):
        model = Model(BySimilarity(0.6, decay=0.5, every=3, mode=mode))
        assert model.run(*[0.9] * 5, 0.4, *[0.2] * 3) == pytest.approx(weights, abs=1e-9)
        assert model.dino.teacher.calls == calls
    assert model.average == pytest.approx(((0.9 + 0.4) / 2 + 0.2) / 2, abs=1e-9)


def test_the_logs_say_what_a_paper_plots():
    model = Model(BySimilarity(0.6, decay=0.5, every=1))
    outs = [model(as_tensor(c)) for c in (0.5, 0.9, 0.9)]
    assert list(outs[0]) == ["loss_dino", "dino_global", "dino_alpha", "dino_similarity"]
    assert list(outs[2]) == ["loss_dino", "dino_alpha", "dino_similarity"]
    assert [float(out["dino_similarity"]) for out in outs] == pytest.approx([0.5, 0.7, 0.7], abs=1e-6)
    assert [float(out["dino_alpha"]) for out in outs] == [0.5, 0, 0]
    assert not any(out[key].requires_grad for out in outs for key in ("dino_alpha", "dino_similarity"))


def test_the_host_waits_only_after_a_decision(monkeypatch):
    model = Model(BySimilarity(2.0, every=4))
    model.run(0.5)
    asked = []
    for name in ("__int__", "__bool__"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, read=read: asked.append(1) or read(x))
    counts = []
    for _ in range(9):
        model(as_tensor(0.5))
        counts.append(len(asked))
    assert counts == [0, 0, 0, 1, 1, 1, 1, 2, 2], "the call after a decision reads it"


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("mode", ["permanent", "recoverable"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(mode, calls, tmp_path):
    values = [0.5, 0.61, 0.75, 0.9, 0.31, 0.2, 0.1, 0.7, 0.33, 0.8]
    whole, part, resumed = (Model(BySimilarity(0.6, decay=0.7, every=3, mode=mode)) for _ in range(3))
    resumed.run(0.9)
    part.run(*values[:calls])
    torch.save(part.state_dict(), tmp_path / "x")
    resumed.load_state_dict(torch.load(tmp_path / "x", weights_only=True))
    assert resumed.run(*values[calls:]) == whole.run(*values)[calls:]
    assert torch.equal(resumed.dino.schedule.watch.average, whole.dino.schedule.watch.average)


def test_a_checkpoint_without_it_is_refused_by_what_it_lacks():
    plain, model = Model(None), Model(BySimilarity(0.6, every=1))
    assert set(plain.dino.schedule.state_dict()) == {"step"}
    assert set(model.dino.schedule.state_dict()) == {"step", "watch.average", "watch.stopped"}
    plain.run(0.5)
    with pytest.raises(RuntimeError, match=r"Missing key.*schedule\.watch\.average"):
        model.load_state_dict(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=False)
    assert model.run(0.5, 0.9) == pytest.approx([0.5, 0.5])
    assert model.dino.schedule.step == 3


@pytest.mark.parametrize("change", [lambda m: m.bfloat16().double(), copy.deepcopy, lambda m: m.half().double()])
def test_casts_and_copies_keep_the_average(change):
    model = Model(BySimilarity(0.6, decay=0.99, every=1))
    model.run(0.123456789)
    twin = change(copy.deepcopy(model))
    assert twin.average == model.average
    twin.run(0.3)
    assert model.average == pytest.approx(0.123456789, abs=1e-9), "a copy has its own"


def test_half_precision_students_move_it():
    model = Model(BySimilarity(2.0, decay=0.99, every=1))
    model.run(0.0)
    model.bfloat16()
    for _ in range(300):
        model.dino.loss_dict(IMAGES, {"global": torch.tensor([1.0, 0]).bfloat16().expand(3, 2)})
    assert model.average == pytest.approx(1 - 0.99**300, abs=1e-9)


def test_an_evaluation_follows_nothing():
    model = Model(BySimilarity(0.6, every=1))
    model.run(0.5)
    model.eval()
    model(as_tensor(0.9))
    model.train()
    with torch.no_grad():
        model(as_tensor(0.9))
    assert model.average == pytest.approx(0.5)
    assert model.run(0.9) == pytest.approx([0.5]), "0.504 with decay 0.99"
    model.dino.schedule.watch.stopped.fill_(1)
    model.eval()
    assert model(as_tensor(0.2))["loss_dino"] == 0


def test_an_evaluation_after_a_recoverable_stop_looks_at_nothing():
    model = Model(BySimilarity(0.6, decay=0.5, every=10, mode="recoverable"))
    assert model.weight_of(0.9, step=10) == 0
    model.eval()
    assert model(as_tensor(0.1), step=20)["loss_dino"] == 0
    assert model.dino.teacher.calls == 1


def test_a_step_that_is_given_decides():
    model = Model(BySimilarity(0.6, decay=0.5, every=10, mode="recoverable"))
    weights = [model.weight_of(c, step) for c, step in ((0.9, 1), (0.9, 10), (0.1, 11), (0.1, 20), (0.1, 21))]
    assert weights == pytest.approx([0.5, 0, 0, 0.5, 0.5], abs=1e-9)
    assert model.dino.schedule.step == 0
    assert model.dino.teacher.calls == 4


def test_a_stop_comes_with_the_first_micro_batch():
    """An optimizer step has the loss of all of its micro-batches, or of none."""
    model = Model(BySimilarity(0.6, decay=0.5, every=2, mode="recoverable"), accumulate=3)
    assert model.run(*[0.9] * 9) == pytest.approx([0.5] * 3 + [0] * 6, abs=1e-9)
    assert model.run(*[0.1] * 4) == pytest.approx([0.5] * 4, abs=1e-9)
    assert model.dino.schedule.step == 5
    assert model.dino.teacher.calls == 4 + 4


def test_rows_without_weight_and_nan_say_nothing():
    model = Model(BySimilarity(2.0, decay=0.5, every=1))
    z = torch.tensor([[0.6, 0.8], [0.8, 0.6], [torch.nan, 0.0]], dtype=torch.float64)

    def call(*weight):
        model.dino.loss_dict(IMAGES, {"global": z}, weight=torch.tensor(weight, dtype=torch.float64))

    call(0, 0, 0)
    assert str(model.average) == "nan"
    call(1, 0, 0)
    call(0, 0, 0)
    call(0, 0, 1)
    assert model.average == pytest.approx(0.6, abs=1e-9)
    call(1, 3, 0)
    assert model.average == pytest.approx((0.6 + 0.75) / 2, abs=1e-9)


def test_one_term_is_followed_or_the_mean_of_all():
    for term, expected in ((None, 0.7), ("near", 0.6), ("far", 0.8)):
        model = Model(BySimilarity(2.0, every=1, term=term), {"near": plane(weight=3.0), "far": plane(weight=0.1)})
        near, far = (torch.tensor([[c, (1 - c * c) ** 0.5]] * 3, dtype=torch.float64) for c in (0.6, 0.8))
        model.dino.loss_dict(IMAGES, {"near": near, "far": far})
        assert model.average == pytest.approx(expected, abs=1e-9)


def test_repas_loss_is_minus_the_similarity():
    teacher = Axis()
    term = recipes.repa(2, teacher=teacher).terms["token"]
    assert term.similarity(torch.tensor(-0.25)) == 0.25
    assert TokenTerm(2).similarity(torch.tensor(0.75)) == 0.25
    assert RegionTerm((4, 4, 4)).similarity(torch.tensor(0.75)) == 0.25


@pytest.mark.parametrize(
    ("mode", "use_reentrant", "how"),
    [
        *[(mode, use_reentrant, "eager") for mode in ("permanent", "recoverable") for use_reentrant in (False, True)],
        ("permanent", False, "compiled"),
        ("recoverable", True, "compiled"),
    ],
)
def test_a_recomputation_follows_nothing_twice(fresh_compiler, mode, use_reentrant, how):
    plain = Model(BySimilarity(0.6, decay=0.5, every=2, mode=mode), accumulate=2)
    twin = copy.deepcopy(plain)
    forward = torch.compile(twin, backend="aot_eager") if how == "compiled" else twin
    for cosine in (0.5, 0.55, 0.9, 0.9, 0.9, 0.8, 0.2, 0.1, 0.15, 0.3, 0.2, 0.1):
        c = as_tensor(cosine).requires_grad_()
        loss = plain(c)["loss_dino"]
        grads = torch.autograd.grad(loss, plain.length)
        with set_checkpoint_early_stop(mode == "permanent"):  # or it runs to its end, where steps are counted
            again = checkpoint(lambda c: forward(c)["loss_dino"], c, use_reentrant=use_reentrant)
        twin.zero_grad()
        again.backward()
        assert_close(twin.length.grad, grads[0], rtol=1e-9, atol=1e-12)
        assert use_reentrant or again.item() == pytest.approx(loss.item(), abs=1e-12)
        assert_close(dict(twin.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=0)
    assert plain.dino.teacher.calls < 12
    if how == "eager" and not use_reentrant:
        assert twin.dino.teacher.calls == 2 * plain.dino.teacher.calls, "a recomputation does what its forward did"


@pytest.mark.parametrize(("mode", "told"), [("permanent", False), ("recoverable", True), ("recoverable", False)])
def test_compiled_it_is_the_same_without_a_compilation_a_step(fresh_compiler, mode, told):
    plain = Model(BySimilarity(0.6, decay=0.5, every=3, mode=mode), accumulate=2)
    twin = copy.deepcopy(plain)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    stopped, counts = [], []
    for number, cosine in enumerate([0.5, 0.55, 0.9, 0.9, 0.9, 0.8] * 2 + [0.2] * 12):
        step = (number // 2 + 1,) if told else ()
        outs = plain(as_tensor(cosine), *step), compiled(as_tensor(cosine), *step)
        pairs = zip(outs, (plain, twin), strict=True)
        grads = [torch.autograd.grad(out["loss_dino"], m.length)[0] for out, m in pairs]
        assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)
        for key in ("loss_dino", "dino_alpha", "dino_similarity"):
            assert_close(outs[1][key].double(), outs[0][key].double(), rtol=1e-6, atol=0)
        assert_close(dict(twin.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=0)
        stopped.append(int(plain.dino.schedule.watch.stopped))
        counts.append(counter.frame_count)
    assert stopped[4:8] == [1] * 4
    assert stopped[-1] == (mode == "permanent")
    assert counts[-1] == counts[2], "a step that is given is compiled for one value, then for any"
    assert told or counts[0] == counts[2]


def test_a_function_of_parameters_and_buffers_follows_in_what_it_is_given():
    model = Model(BySimilarity(0.6, decay=0.5, every=1))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    given = {name: x.detach().clone() for name, x in state.items()}
    functional_call(model, given, (as_tensor(0.5),))
    functional_call(model, given, (as_tensor(0.9),))
    assert str(model.average) == "nan"
    assert given["dino.schedule.watch.average"].view(torch.float64) == pytest.approx(0.7)
    assert given["dino.schedule.watch.stopped"] == 1
    gradient = torch.func.grad(lambda p: functional_call(model, p, (as_tensor(0.5),))["loss_dino"])
    assert_close(gradient({"length": torch.ones((), dtype=torch.float64)})["length"], as_tensor(-0.5 * 0.375))
    assert model.average == pytest.approx(0.5)


def test_a_call_that_raises_counts_and_follows_nothing():
    model = Model(BySimilarity(0.6, every=1), {"token": TokenTerm(2, projector=nn.Identity())})
    features = {"global": torch.ones(3, 2), "patch": torch.ones(3, 16, 2), "grid": (4, 4)}
    for _ in range(2):
        with pytest.raises(ValueError, match="15"):  # tokens fit no grid, which the features alone say
            model.dino.loss_dict(students={"token": torch.ones(3, 15, 2)}, features=features)
    assert model.dino.schedule.step == 0
    model.dino.loss_dict(students={"token": torch.ones(3, 16, 2)}, features=features)
    assert model.dino.schedule.step == 1


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("threshold must be a finite number", lambda: BySimilarity("high")),
        ("decay must be below 1, got 1", lambda: BySimilarity(0.5, decay=1)),
        ("decay must be a finite number of at least 0", lambda: BySimilarity(0.5, decay=-0.1)),
        ("mode is 'once'; use one of permanent, recoverable", lambda: BySimilarity(0.5, mode="once")),
        ("every must be a positive int", lambda: BySimilarity(0.5, every=0)),
        ("term must be None or a term's name, got int", lambda: BySimilarity(0.5, term=1)),
        ("group is 'all'; use 'auto'", lambda: BySimilarity(0.5, group="all")),
        ("BySimilarity's term must be one of global, got 'token'", lambda: Model(BySimilarity(0.5, term="token"))),
        ("BySimilarity cannot follow the term 'a': MSELoss has no cosine", lambda: made(loss=MSELoss())),
        ("BySimilarity cannot follow the term 'a': VICRegLoss has no cosine", lambda: made(loss="vicreg")),
        ("BySimilarity cannot follow the term 'a': normalize_weight=False", lambda: made(normalize_weight=False)),
        ("BySimilarity cannot follow the term 'a': a CosineLoss with a scale", lambda: made(loss=CosineLoss(scale=2))),
        ("BySimilarity cannot follow the term 'a': a CosineLoss .* another reduction",
         lambda: made(loss=CosineLoss(reduction="sum"))),
        ("BySimilarity cannot follow the term 'a': Distance defines no similarity", lambda: made(Distance())),
        ("terms must not have the names of the schedule's logs: alpha, similarity",
         lambda: Model(BySimilarity(0.5), {"alpha": plane(), "similarity": plane()})),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(message, make):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        make()


class Distance(Term):
    """A stranger's term."""

    def forward(self, student, features):
        return (student - features["global"]).square().mean(), {}


def made(term=None, **options):
    return Model(BySimilarity(0.5), {"a": plane(**options) if term is None else term})


def test_a_strangers_term_may_say_its_similarity():
    class Near(Distance):
        def similarity(self, value):
            return 1 - value / 2

    model = Model(BySimilarity(2.0, every=1), {"near": Near()})
    model(as_tensor(0.5))
    assert model.average == pytest.approx(1 - 0.5 / 2, abs=1e-9)


def test_a_schedule_that_is_set_later_is_refused_by_name(teacher, batch):
    module = Supervision(Axis(), {"a": plane(loss=MSELoss())}, img_size=14)
    module.schedule = Schedule(0.5, 0, stop=BySimilarity(0.5))
    with pytest.raises(ValueError, match="^MSELoss has no cosine similarity"):
        module.loss_dict(IMAGES, {"a": torch.ones(3, 2)})
    assert module.schedule.step == 0
