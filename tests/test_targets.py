"""Targets of a call: a tensor in the teacher's place, such as an EMA's hidden states, with a teacher or without one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.testing import assert_close

from conftest import grads
from fused_dino import CosineLoss, GlobalTerm, RegionTerm, Schedule, Supervision, Term, TokenTerm
from proving import DEVICE
from test_terms import B, C, D, N, randn

MAKERS = {
    "global": lambda **options: GlobalTerm(C, hidden_dim=7, **options),
    "region": lambda **options: RegionTerm((2, 4, 4), hidden_dim=7, **options),
    "token": lambda **options: TokenTerm(C, **options),
}
STUDENTS = {"global": (C,), "region": (32,), "token": (N, C)}


def make(*names, teacher=None, **options):
    torch.manual_seed(3)
    terms = {name: MAKERS[name](out_dim=D, weight=0.5 + i) for i, name in enumerate(names)}
    return Supervision(teacher, terms, Schedule(0.5, 0), **options).to(DEVICE, torch.float64)


def students(*names):
    return {name: randn(B, *STUDENTS[name], seed=i) for i, name in enumerate(names)}


def onto(x, grid, size):
    maps = rearrange(x, "b (h w) d -> b d h w", h=grid[0])
    return F.interpolate(maps, size, mode="bilinear", align_corners=False).flatten(2).mT


def cosine(a, b):
    return 1 - F.cosine_similarity(a, b, dim=-1)


TARGETS = {
    "global": lambda: randn(B, D, seed=8),
    "region": lambda: {"patch": randn(B, N, D, seed=9), "grid": (4, 4)},
    "token": lambda: randn(B, N, D, seed=9),
}


def test_without_a_teacher_the_loss_is_that_of_the_targets():
    module, names = make("global", "region", "token"), ("global", "region", "token")
    given, its = {name: TARGETS[name]() for name in names}, students(*names)
    loss, logs = module(students=its, targets=given)
    features = {"global": given["global"], **given["region"]}
    for name, term in module.terms.items():
        assert_close(logs[f"dino_{name}"], term(its[name], features)[0].detach(), rtol=0, atol=0)
    assert_close(loss, sum(t.weight * logs[f"dino_{name}"] for name, t in module.terms.items()))
    out = module.loss_dict(students=its, targets=given)
    assert_close(out["loss_dino"], 0.5 * loss)
    assert_close(module(students=its, targets=given, as_dict=True), out)
    assert module.teacher is None
    assert "teacher=None" in repr(module)


def test_the_formula_of_a_tokens_target():
    module, hidden, target = make("token"), randn(B, N, C), randn(B, N, D, seed=9)
    expected = cosine(module.terms["token"].projector(hidden), target).mean()
    assert_close(module(students={"token": hidden}, targets={"token": target})[1]["dino_token"], expected.detach())


def test_it_learns_as_with_a_teacher_and_reaches_no_target():
    module, target = make("token"), randn(B, N, D, seed=9).requires_grad_()
    module(students=students("token"), targets={"token": target})[0].backward()
    assert all(g.abs().sum() > 0 for g in grads(module))
    assert target.grad is None
    passing = make("token", stopgrad_image=False)
    passing(students=students("token"), targets={"token": target})[0].backward()
    assert target.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"^stopgrad_image=False needs a loss of token with detach_teacher=False"):
        Supervision(None, {"token": TokenTerm(C, out_dim=D, loss=CosineLoss())}, stopgrad_image=False)


def test_an_emas_hidden_states_are_a_target():
    """A self-distillation compares an earlier layer of the student with a later layer of the EMA."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, C), nn.Tanh(), nn.Linear(C, D)).to(DEVICE, torch.float64)
    ema, x = copy.deepcopy(student), randn(B, N, 3)
    module = make("token")
    hidden = student[:2](x)
    loss = module.loss_dict(students={"token": hidden}, targets={"token": ema(x)})["loss_dino"]
    loss.backward()
    assert student[0].weight.grad.abs().sum() > 0
    assert ema[0].weight.grad is None


@pytest.mark.parametrize("standardize", [False, 0.6])
def test_as_many_tokens_are_compared_one_by_one_whatever_their_grid(standardize):
    term = TokenTerm(C, out_dim=D, standardize=standardize).to(DEVICE, torch.float64)
    module = Supervision(None, {"token": term})
    hidden, target = randn(B, 7, C), randn(B, 7, D, seed=9)  # 7 tokens have no square grid
    weight = randn(B, 7, seed=4).abs()
    losses = cosine(term.projector(hidden), term.grids.prepare(target))
    found = module(students={"token": hidden}, targets={"token": target}, weight=weight)[0]
    assert_close(found, (weight * losses).sum() / weight.sum())
    told = module(students={"token": hidden}, targets={"token": target}, token_grid=(7, 1))[0]
    assert_close(told, losses.mean())


def test_other_tokens_meet_on_the_targets_grid():
    module, hidden, target = make("token"), randn(B, 8, C), randn(B, 6, D, seed=9)
    projected = module.terms["token"].projector(hidden)
    expected = cosine(onto(projected, (2, 4), (3, 4)), onto(target, (3, 2), (3, 4))).mean()
    maps = rearrange(target, "b (h w) d -> b d h w", h=3)
    for given in (maps, {"patch": target, "grid": (3, 2)}):
        found = module(students={"token": hidden}, targets={"token": given}, token_grid=(2, 4))[1]["dino_token"]
        assert_close(found, expected.detach())
    weight = randn(B, 8, seed=4).abs()
    spread = onto(weight[..., None], (2, 4), (3, 4))[..., 0]
    losses = cosine(onto(projected, (2, 4), (3, 4)), onto(target, (3, 2), (3, 4)))
    found = module(students={"token": hidden}, targets={"token": maps}, token_grid=(2, 4), weight=weight)[1]
    assert_close(found["dino_token"], ((spread * losses).sum() / spread.sum()).detach())


def test_a_target_of_the_shape_of_the_token_grid_needs_no_grid():
    module, hidden, target = make("token"), randn(B, 32, C), randn(B, 8, D, seed=9)
    projected = module.terms["token"].projector(hidden)
    expected = cosine(projected, onto(target, (2, 4), (4, 8))).mean()
    found = module(students={"token": hidden}, targets={"token": target}, token_grid=(4, 8))[1]["dino_token"]
    assert_close(found, expected.detach())


def test_an_index_says_positions_of_the_target():
    module, hidden, target = make("token"), randn(B, 3, C), randn(B, 8, D, seed=9)
    index = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i))[:3] for i in range(B)]).to(
        DEVICE
    )
    chosen = target.take_along_dim(index[..., None], 1)
    expected = cosine(module.terms["token"].projector(hidden), chosen).mean().detach()
    call = {"students": {"token": hidden}, "targets": {"token": target}, "index": index}
    assert_close(module(**call)[1]["dino_token"], expected)
    assert_close(module(**call, token_grid=(2, 4))[1]["dino_token"], expected)


def test_frames_of_videos_have_frames_as_targets():
    module, hidden, target = make("token"), randn(2, 3, N, C), randn(2, 3, N, D, seed=9)
    flat = module(students={"token": hidden.flatten(0, 1)}, targets={"token": target.flatten(0, 1)})
    assert_close(module(students={"token": hidden}, targets={"token": target}), flat, rtol=0, atol=0)


def test_a_convolution_needs_the_grid():
    term = TokenTerm(C, projector="conv", out_dim=D).to(DEVICE, torch.float64)
    module, hidden, target = Supervision(None, {"token": term}), randn(B, 8, C), randn(B, 8, D, seed=9)
    with pytest.raises(
        ValueError, match=r"^targets\['token'\] must say its grid, as a map .* it has 8 tokens, and no token_grid"
    ):
        module(students={"token": hidden}, targets={"token": target})
    expected = cosine(term.projector(hidden, (2, 4)), target).mean()
    maps = rearrange(target, "b (h w) d -> b d h w", h=2)
    assert_close(module(students={"token": hidden}, targets={"token": maps})[0], expected)
    assert_close(module(students={"token": hidden}, targets={"token": target}, token_grid=(2, 4))[0], expected)


@pytest.mark.parametrize("pooled", ["region", "mean", "nearest", "attention"])
def test_regions_need_the_grid_only_where_each_pools_its_own_tokens(pooled):
    term = RegionTerm((2, 4, 4), target=pooled, hidden_dim=7, out_dim=D).to(DEVICE, torch.float64)
    module, its, target = Supervision(None, {"region": term}), {"region": randn(B, 32)}, randn(B, N, D, seed=9)
    on_grid = module(students=its, targets={"region": {"patch": target, "grid": (4, 4)}})[0]
    if pooled == "region":
        with pytest.raises(ValueError, match=r"^targets\['region'\] must say its grid"):
            module.loss_dict(students=its, targets={"region": target})
        assert module.schedule.step == 0
    else:
        assert_close(module(students=its, targets={"region": target})[0], on_grid, rtol=0, atol=0)


@pytest.fixture
def mixed(teacher):
    """A supervision with a teacher, one of whose terms has a width of its own."""
    terms = {"token": TokenTerm(C), "own": TokenTerm(C, out_dim=7)}
    torch.manual_seed(3)
    return Supervision(teacher, terms, img_size=56)


def test_a_target_stands_in_the_teachers_place_for_its_term(mixed, batch):
    hidden, target = torch.randn(6, 16, C), torch.randn(6, 16, 7)
    call = {"students": {"token": hidden, "own": hidden}, "targets": {"own": target}}
    logs = mixed(batch[1], **call)[1]
    assert_close(logs["dino_own"], cosine(mixed.terms["own"].projector(hidden), target).mean().detach())
    found = mixed.encode(batch[1])
    assert_close(logs["dino_token"], mixed.terms["token"](hidden, found)[0].detach())
    assert_close(mixed(features=found, **call)[1], logs)
    both = {**call, "targets": {"own": target, "token": torch.randn(6, 16, 24)}}
    seen = []
    mixed.teacher.register_forward_hook(lambda *_: seen.append(1))
    mixed(**both)
    mixed(batch[1], **both)
    assert seen == []
    mixed(batch[1], **call)
    assert seen == [1]


def test_several_teachers_and_targets(teacher, batch):
    terms = {"token": TokenTerm(C, teacher="tiny"), "own": TokenTerm(C, out_dim=7)}
    module = Supervision({"tiny": teacher}, terms, img_size=56)
    hidden, target = torch.randn(6, 16, C), torch.randn(6, 16, 7)
    both = {"token": hidden, "own": hidden}
    logs = module(batch[1], both, targets={"own": target})[1]
    assert_close(logs["dino_own"], cosine(module.terms["own"].projector(hidden), target).mean().detach())
    with pytest.raises(ValueError, match=r"^targets must have a tensor for 'own', which has no teacher"):
        module(batch[1], both)


def test_strangers_terms_take_targets():
    class Near(Term):
        def forward(self, student, features):
            return (student - features["global"]).square().mean(), {}

    module, target = Supervision(None, {"near": Near()}), randn(B, 3, seed=1)
    assert_close(
        module(students={"near": randn(B, 3)}, targets={"near": target})[0], (randn(B, 3) - target).square().mean()
    )


def test_a_stopped_loss_and_a_copy_need_no_teacher():
    module = make("token")
    module.schedule = Schedule(0.5, 0, stop_step=0)
    out = module.loss_dict(students=students("token"), targets={"token": randn(B, N, D)})
    assert out["loss_dino"] == 0
    out["loss_dino"].backward()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads(module))
    twin = copy.deepcopy(make("token"))
    call = {"students": students("token"), "targets": {"token": randn(B, N, D)}}
    assert_close(twin(**call), make("token")(**call), rtol=0, atol=0)


def test_a_compiler_takes_targets(fresh_compiler):
    module = make("global", "token")
    call = {"students": students("global", "token"), "targets": {name: TARGETS[name]() for name in ("global", "token")}}
    compiled = torch.compile(module.loss_dict, fullgraph=True, backend="eager")
    assert_close(compiled(**call, step=1), module.loss_dict(**call, step=1))


ones = torch.ones


@pytest.mark.parametrize(
    ("message", "targets"),
    [
        ("targets must have a tensor for 'token', which has no teacher", None),
        ("targets must have a tensor for 'token', which has no teacher", {"token": None}),
        (r"targets must be a dict with tensors of some of .*, got \['tok'\]", {"tok": ones(1)}),
        (r"targets must be a dict with tensors of some of .*, got Tensor", ones(B, N, D)),
        (r"targets\['token'\] must be a tensor, or a dict of 'patch' \[B, N, 6\], got list", {"token": [1.0]}),
        (r"targets\['token'\] must be floats of .*, got torch.int64", {"token": ones(B, N, D).long()}),
        (r"targets\['token'\] must be floats of .*, got .* \[5, 16, 5\]", {"token": ones(B, N, 5)}),
        (r"targets\['token'\] must be floats of .*, got .* \[5, 6\]", {"token": ones(B, D)}),
        (r"students\['token'\] must have the images' batch size 4", {"token": ones(4, N, D)}),
        (r"targets\['token'\] must be a dict of 'patch' .* got \['global'\]", {"token": {"global": ones(B, D)}}),
        (r"targets\['token'\] must be a dict of 'patch' .* got \['patch', 'x'\]",
         {"token": {"patch": ones(B, N, D), "x": ones(1)}}),
        (r"targets\['token'\] has 16 tokens on a grid", {"token": {"patch": ones(B, N, D), "grid": (3, 4)}}),
        (r"the grid of targets\['token'\] must be", {"token": {"patch": ones(B, N, D), "grid": "4"}}),
        (r"targets\['token'\] must say its grid, .* it has 9 tokens, and no", {"token": ones(B, 9, D)}),
        ("token_grid must be given, .* 16 tokens have no grid", {"token": ones(B, D, 2, 8)[..., :6]}),
    ],
)  # fmt: skip
def test_bad_targets_are_named_and_count_no_step(message, targets):
    module = make("token").float().cpu()
    call, ran = {"students": {"token": torch.ones(B, N, C)}, "targets": targets}, []
    module.terms["token"].projector.register_forward_pre_hook(lambda *_: ran.append(1))
    for run in (module, module.loss_dict):
        with pytest.raises((ValueError, TypeError), match=f"^{message}"):
            run(**call)
    assert module.schedule.step == 0
    assert not ran, "nothing is computed"


def test_calls_that_do_not_fit_are_named(mixed, batch):
    module, call = make("token"), {"students": students("token"), "targets": {"token": randn(B, N, D)}}
    with pytest.raises(ValueError, match=r"^images must be left out with teacher=None"):
        module(batch[1], **call)
    with pytest.raises(ValueError, match=r"^features must be a dict"):
        module(features={"global": torch.ones(B, D)}, **call)
    for run in (module.encode, module.check):
        with pytest.raises(ValueError, match=r"^images need a teacher, and this supervision has teacher=None"):
            run(batch[1])
    with pytest.raises(
        ValueError, match=r"^terms\['token'\] must name its teacher, or have out_dim.*teachers are \[\]"
    ):
        Supervision(None, {"token": TokenTerm(C)})
    hidden = torch.randn(6, 16, C)
    with pytest.raises(ValueError, match=r"^targets\['own'\] must be of 6 images, as the others are, got 2"):
        mixed(batch[1], {"token": hidden, "own": hidden}, targets={"own": torch.randn(2, 16, 7)})
    layer = TokenTerm(C, out_dim=D, layer=-1)
    with pytest.raises(ValueError, match=r"^terms\['token'\] must name its teacher, whose layers \(-1,\) it reads"):
        Supervision(None, {"token": layer})
    with pytest.raises(ValueError, match=r"^targets\['token'\] must be left out: the term's target is \(-1,\) of"):
        layer.read_target("targets['token']", torch.ones(B, N, D), D)
