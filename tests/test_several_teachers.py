"""Several teachers by name, of which each term picks one, or none at all."""

import copy
import pickle

import pytest
import torch
from einops import rearrange
from torch import nn
from torch.testing import assert_close

from conftest import TinyTeacher
from fused_dino import DINOv2Backbone, GlobalTerm, Preprocess, Schedule, Supervision, Term, TokenTerm
from fused_dino.recipes.repa import NegativeCosine

C = 10


class Wide(nn.Module):
    """A teacher of another width, patch, size and statistics, which counts its calls."""

    embed_dim, patch_size, img_size, mean, std = 16, 7, 28, (0.5, 0.25, 0.125), (0.5, 1.0, 2.0)

    def __init__(self):
        super().__init__()
        self.embed, self.calls = nn.Conv2d(3, 16, 7, 7), 0

    def forward(self, x):
        self.calls += 1
        tokens = rearrange(self.embed(x), "b d h w -> b (h w) d")
        return {"global": tokens.mean(1), "patch": tokens}


def terms():
    return {
        "far": TokenTerm(C, teacher="wide", weight=0.5),
        "near": TokenTerm(C, teacher="tiny"),
        "all": GlobalTerm(8, hidden_dim=16, teacher="wide", weight=2.0),
    }


def students(seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {
        "far": torch.randn(6, 16, C, generator=generator),
        "near": torch.randn(6, 16, C, generator=generator),
        "all": torch.randn(6, 8, generator=generator),
    }


@pytest.fixture
def both(teacher):
    torch.manual_seed(1)
    wide = Wide()
    torch.manual_seed(2)
    return Supervision({"tiny": teacher, "wide": wide}, terms(), Schedule(0.5, 0), img_size={"tiny": 56})


def test_it_is_the_sum_of_supervisions_of_one_teacher(both, teacher, batch):
    loss, logs = both(batch[1], students())
    total = 0
    for name, term in both.terms.items():
        alone = copy.deepcopy(term)
        alone.teacher, size = None, {"wide": 28, "tiny": 56}[term.teacher]
        module = Supervision(both.teachers[term.teacher].teacher, {name: alone}, img_size=size)
        one, its = module(batch[1], {name: students()[name]})
        assert_close(logs[f"dino_{name}"], its[f"dino_{name}"], rtol=0, atol=0)
        total = total + one
    assert_close(loss, total)
    assert_close(both.loss_dict(batch[1], students())["loss_dino"], 0.5 * total)


def test_each_has_its_own_size_statistics_and_patch(both, batch):
    found = both.encode(batch[1])
    assert found.keys() == {"tiny", "wide"}
    assert found["tiny"]["patch"].shape == (6, 16, 24)
    assert found["wide"]["patch"].shape == (6, 16, 16)
    wide = both.teachers["wide"]
    x = Preprocess(28, mean=Wide.mean, std=Wide.std)(batch[1])
    with torch.no_grad():
        assert_close(found["wide"]["patch"], wide.teacher(x)["patch"])
    assert wide.img_size == (28, 28)
    assert both.teachers["tiny"].img_size == (56, 56)


def test_options_are_one_for_all_or_by_name(teacher, batch):
    own = Preprocess(28, antialias=True)
    options = {"preprocess": {"wide": own}, "input_range": (0, 1), "img_size": {"tiny": 56}}
    with pytest.raises(ValueError, match=r"^input_range belongs to preprocess"):
        Supervision({"tiny": teacher, "wide": Wide()}, terms(), **options)
    module = Supervision({"tiny": teacher, "wide": Wide()}, terms(), **options | {"input_range": {"tiny": (0, 1)}})
    assert module.teachers["wide"].preprocess is own
    low = module.encode(batch[1].clamp(0, 1))
    one = Supervision(teacher, {"near": TokenTerm(C)}, img_size=56, input_range=(0, 1))
    assert_close(low["tiny"], one.encode(batch[1].clamp(0, 1)))


def test_cached_features_are_dicts_by_name(both, batch):
    found = both.encode(batch[1])
    assert not any(x.requires_grad for its in found.values() for x in its.values() if isinstance(x, torch.Tensor))
    assert_close(both(features=found, students=students()), both(batch[1], students()), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"^give images or features, not both"):
        both(batch[1], students(), features=found)
    for wrong in (found["tiny"], {"tiny": found["tiny"]}, {**found, "more": found["tiny"]}, [found]):
        with pytest.raises(ValueError, match=r"^features must be a dict with those of each of the teachers"):
            both(features=wrong, students=students())
    few = {"tiny": {key: x[:2] if isinstance(x, torch.Tensor) else x for key, x in found["tiny"].items()}}
    with pytest.raises(ValueError, match=r"^features must be of the same images, got"):
        both(features={**found, **few}, students=students())
    with pytest.raises(ValueError, match=r"^give images, the images, or features"):
        both(students=students())


def test_a_teacher_that_no_term_needs_does_not_run(teacher, batch):
    module = Supervision({"tiny": teacher, "wide": Wide()}, {"near": TokenTerm(C, teacher="tiny")}, img_size=28)
    wide = module.teachers["wide"].teacher
    near = {"near": torch.randn(6, 4, C)}
    module(batch[1], near)
    assert wide.calls == 0
    found = module.encode(batch[1])
    assert wide.calls == 1
    module(features={"tiny": found["tiny"]}, students=near)  # those of the other may be left out
    stopped = Supervision({"wide": wide}, {"far": TokenTerm(C, teacher="wide")}, Schedule(1.0, 0, stop_step=0))
    assert stopped.loss_dict(batch[1], {"far": students()["far"]})["loss_dino"] == 0
    assert wide.calls == 1


def test_they_are_invisible_and_go_where_the_module_goes(both, batch):
    assert {name.split(".")[0] for name, _ in both.named_parameters()} == {"terms"}
    assert {name.split(".")[0] for name in both.state_dict()} == {"terms", "schedule"}
    assert not any(isinstance(part, (TinyTeacher, Wide)) for part in both.modules())
    expected = both(batch[1], students())
    for twin in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert_close(twin(batch[1], students()), expected, rtol=0, atol=0)
    shared = copy.deepcopy(both)
    for name, one in both.teachers.items():
        theirs = shared.teachers[name].teacher
        assert theirs is not one.teacher
        assert theirs.embed.weight.data_ptr() == one.teacher.embed.weight.data_ptr()
    both.double()
    assert {p.dtype for one in both.teachers.values() for p in one.teacher.parameters()} == {torch.float64}
    assert {p.dtype for one in shared.teachers.values() for p in one.teacher.parameters()} == {torch.float32}
    assert not any(p.requires_grad for one in both.teachers.values() for p in one.teacher.parameters())
    both.train()
    assert not any(one.teacher.training for one in both.teachers.values())


def test_they_survive_meta(both, teacher, batch):
    wide = copy.deepcopy(both.teachers["wide"].teacher)
    with torch.device("meta"):
        module = Supervision({"tiny": teacher, "wide": wide}, terms(), Schedule(0.5, 0), img_size={"tiny": 56})
    module.to_empty(device="cpu")
    module.load_state_dict(both.state_dict())
    assert_close(module(batch[1], students()), both(batch[1], students()), rtol=0, atol=0)


def test_checkpoints_do_not_know_whether_there_are_several(both, batch):
    state = both.state_dict()
    other = Supervision({"tiny": TinyTeacher(), "wide": Wide()}, terms(), img_size={"tiny": 56})
    other.load_state_dict(state)
    assert_close(dict(other.named_parameters()), dict(both.named_parameters()), rtol=0, atol=0)


def test_a_compiler_takes_both(both, batch, fresh_compiler):
    compiled = torch.compile(both.loss_dict, fullgraph=True, backend="eager")
    assert_close(compiled(batch[1], students(), step=1), both.loss_dict(batch[1], students(), step=1))
    cached = {"students": students(), "features": both.encode(batch[1]), "step": 2}
    assert_close(compiled(**cached), both.loss_dict(**cached))


def test_the_gradient_passes_through_each_to_the_images(teacher):
    images = (torch.rand(6, 3, 60, 60) * 2 - 1).requires_grad_()
    module = Supervision({"tiny": teacher, "wide": Wide()}, terms(), img_size={"tiny": 56}, stopgrad_image=False)
    for name in students():
        weight = {other: torch.full((6,), float(other == name)) for other in students()}
        (grad,) = torch.autograd.grad(module(images, students(), weight=weight)[0], images)
        assert grad.abs().sum() > 0


def test_check_says_each(both, teacher, batch):
    assert both.check(batch[1]).startswith("tiny: x_img has values from -1 to 1 and input_range is (-1, 1): 0.0% of ")
    assert "; wide: x_img has values" in both.check(batch[1])
    with pytest.raises(ValueError, match="all of them lie in one half"):
        both.check(batch[1].abs())


def test_layers_are_asked_of_the_teacher_that_is_named(monkeypatch):
    timm = pytest.importorskip("timm")
    made = []

    def make(name, size, pretrained):
        made.append(name)
        return timm.create_model(name, depth=4, embed_dim=24, num_heads=2, num_classes=0)

    monkeypatch.setattr("fused_dino.teacher.backbone.create_timm", make)
    names = {"a": "vit_tiny_patch16_224", "b": "vit_small_patch16_224"}
    several = {"one": TokenTerm(C, teacher="a", layer=1), "two": TokenTerm(C, teacher="b", layer=(-1, -2))}
    module = Supervision(names, several)
    assert made == list(names.values())
    assert list(module.teachers["a"].teacher.layers.blocks) == [1]
    assert list(module.teachers["b"].teacher.layers.blocks) == [-1, -2]
    assert isinstance(module.teachers["a"].teacher, DINOv2Backbone)


def test_strangers_terms_pick_a_teacher_too(teacher, batch):
    class Near(Term):
        def forward(self, student, features):
            return (student - features["global"]).square().mean(), {}

    module = Supervision({"tiny": teacher, "wide": Wide()}, {"near": Near(teacher="wide")}, img_size=28)
    student = torch.randn(6, 16)
    assert_close(
        module(batch[1], {"near": student})[0],
        (student - module.encode(batch[1])["wide"]["global"]).square().mean(),
    )


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"terms\['token'\] must name its teacher, or have out_dim.*the teachers are \['tiny', 'wide'\]",
         {"terms": {"token": TokenTerm(C)}}),
        (r"terms\['token'\] has teacher='none', and the teachers are \['tiny', 'wide'\]",
         {"terms": {"token": TokenTerm(C, teacher="none")}}),
        ("teacher must have names that are identifiers", {"teacher": {"a.b": TinyTeacher()}}),
        ("teacher must have names that are identifiers, and no dict's", {"teacher": {"keys": TinyTeacher()}}),
        ("teacher must be a model's name, a module, a dict of at least one by name, or None", {"teacher": {}}),
        ("teacher must be a model's name or a module, got int", {"teacher": {"tiny": 3}}),
        ("img_size must have the names of the teachers, tiny, wide, got", {"img_size": {"tin": 56}}),
        (r"terms\['token'\] has teacher='tiny', and the one teacher has no name",
         {"teacher": TinyTeacher(), "terms": {"token": TokenTerm(C, teacher="tiny")}}),
        ("preprocess must have one value, for one teacher",
         {"teacher": TinyTeacher(), "terms": {"token": TokenTerm(C)}, "preprocess": {"tiny": "bicubic"}}),
        ("img_size must be left out with teacher=None", {"teacher": None, "img_size": 56}),
    ],
)  # fmt: skip
def test_bad_constructions_are_named(teacher, message, options):
    options = {"teacher": {"tiny": teacher, "wide": Wide()}, "terms": {"token": TokenTerm(C, teacher="tiny")}} | options
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        Supervision(**options)


def test_a_name_that_is_none_is_named():
    with pytest.raises(TypeError, match=r"^teacher must be None or the name of a teacher, got TinyTeacher"):
        TokenTerm(C, teacher=TinyTeacher())


class Unused(nn.Module):
    """A teacher of width 2 that never runs."""

    embed_dim, patch_size, img_size = 2, 7, 14


def test_repas_mean_over_two_encoders():
    """The value that REPA's own code gives for two encoders: each term has half of the weight."""
    half = {"projector": nn.Identity(), "loss": NegativeCosine(detach_teacher=False), "weight": 0.5}
    supervision = Supervision(
        {"first": Unused(), "second": Unused()},
        {"a": TokenTerm(2, teacher="first", **half), "b": TokenTerm(2, teacher="second", **half)},
    )
    s, t = (torch.tensor([rows], dtype=torch.float64) for rows in (
        [[1, 0], [1, 1], [0, 2], [-1, 1]], [[2, 1], [0, 1], [1, 1], [1, -1]]))  # fmt: skip
    known = {"global": t.mean(1), "patch": t, "grid": (2, 2)}
    loss, _ = supervision(students={"a": s, "b": 2 * s.flip(-1)}, features={"first": known, "second": known})
    assert loss.item() == pytest.approx(-0.521258489, abs=1e-9)
