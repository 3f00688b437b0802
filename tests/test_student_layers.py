"""Several layers of a student, with a projector each, and a class token among the tokens, as REG has it."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.testing import assert_close

from conftest import check_slope
from fused_dino import GlobalTerm, Schedule, Supervision, TokenTerm, VICRegLoss
from fused_dino.terms.token_grids import TokenGrids
from fused_dino.terms.token_projectors import TokenConv
from proving import DEVICE
from test_terms import B, C, D, N, Rows, features, randn


def make(in_dim=C, **options):
    torch.manual_seed(3)
    return TokenTerm(in_dim, out_dim=D, **options).to(DEVICE, torch.float64)


def cosine(a, b):
    return 1 - F.cosine_similarity(a, b, dim=-1)


# --- several layers ---------------------------------------------------------------------------------------------------

WIDTHS = (C, 5, C)


def layers(count=N, batch=B):
    return [randn(batch, count, width, seed=20 + n) for n, width in enumerate(WIDTHS)]


@pytest.mark.parametrize("projector", ["mlp", "conv"])
@pytest.mark.parametrize("options", [{}, {"standardize": 0.6}, {"loss": "vicreg"}])
def test_the_loss_is_the_mean_over_layers_of_one_projector_each(projector, options):
    term, several = make(WIDTHS, projector=projector, **options), layers()
    losses = []
    for n, (width, student) in enumerate(zip(WIDTHS, several, strict=True)):
        one = make(width, projector=projector, **options)
        one.projector = term.projector[n]
        losses.append(one(student, features()))
    loss, logs = term(several, features())
    assert_close(loss, torch.stack([x for x, _ in losses]).mean(), rtol=1e-12, atol=1e-14)
    for key, value in logs.items():
        assert_close(value, torch.stack([x[key] for _, x in losses]).mean(), rtol=1e-12, atol=1e-14)
    scaled, its = term(tuple(several), features(), scale=torch.tensor(0.3, device=DEVICE, dtype=torch.float64))
    assert_close(scaled, 0.3 * loss, rtol=1e-12, atol=1e-14)
    assert_close(its, logs, rtol=1e-12, atol=1e-14)


def test_layers_share_the_targets_of_a_grid(monkeypatch):
    brought, bring = [], TokenGrids.teacher
    term, its = make(WIDTHS, standardize=True), {**features(), "grid": (4, 4)}
    maps = [randn(B, C, 2, 4, seed=1), randn(B, 5, 8, 4, seed=2), randn(B, C, 2, 4, seed=3)]
    losses = []
    for width, x, projector in zip(WIDTHS, maps, term.projector, strict=True):
        one = make(width, standardize=True)
        one.projector = projector
        losses.append(one(x, its)[0])

    def count(self, tokens, onto, teacher_grid):
        brought.append(onto)
        return bring(self, tokens, onto, teacher_grid)

    monkeypatch.setattr(TokenGrids, "teacher", count)
    assert_close(term(maps, its)[0], torch.stack(losses).mean(), rtol=1e-12, atol=1e-14)
    assert brought == [(4, 4), (8, 4)]
    term(layers(4), its, index=torch.arange(4, device=DEVICE).expand(B, 4))
    assert brought[2:] == [(4, 4)]


def test_parameters_are_named_by_the_layer():
    term = make(WIDTHS)
    assert {name.split(".")[1] for name, _ in term.named_parameters()} == {"0", "1", "2"}
    assert "projector.0.0.weight" in term.state_dict()
    assert isinstance(make(WIDTHS, projector="conv").projector[1], TokenConv)
    own = [nn.Linear(width, D) for width in WIDTHS]
    assert make(WIDTHS, projector=own).projector[1] is own[1]


def test_its_gradient_reaches_every_layer():
    term, several = make(WIDTHS), layers()
    for n in range(3):
        x = several[n].clone().requires_grad_()
        check_slope(lambda x, n=n: term([*several[:n], x, *several[n + 1 :]], features())[0], x)


def test_weights_and_positions_are_those_of_each():
    term, weight = make(WIDTHS), randn(B, 4, seed=4).abs()
    index = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i))[:4] for i in range(B)]).to(
        DEVICE
    )
    target = features()["patch"].take_along_dim(index[..., None], 1)
    several = layers(4)
    losses = [cosine(p(x), target) for p, x in zip(term.projector, several, strict=True)]
    expected = torch.stack([(weight * x).sum() / weight.sum() for x in losses]).mean()
    assert_close(term(several, features(), weight, index=index)[0], expected, rtol=1e-12, atol=1e-14)


def test_a_supervision_takes_lists(teacher, batch):
    module = Supervision(teacher, {"token": TokenTerm([C, 5]), "all": GlobalTerm(8, hidden_dim=4)}, img_size=56)
    students = {"token": [torch.randn(6, N, C), torch.randn(6, N, 5, requires_grad=True)], "all": torch.randn(6, 8)}
    found = module.encode(batch[1])
    loss, logs = module(batch[1], students)
    assert_close(logs["dino_token"], module.terms["token"](students["token"], found)[0].detach())
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())
    assert students["token"][1].grad.abs().sum() > 0
    stopped = Supervision(None, {"token": TokenTerm([C, 5], out_dim=D)}, Schedule(1.0, 0, stop_step=0))
    students["token"][1].grad = None
    stopped.loss_dict(students={"token": students["token"]}, targets={"token": torch.randn(6, N, D)})[
        "loss_dino"
    ].backward()
    assert torch.equal(students["token"][1].grad, torch.zeros(6, N, 5))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in stopped.parameters())


def test_bad_layers_are_named():
    term = make(WIDTHS)
    for wrong, got in ((layers()[0], "Tensor"), (layers()[:2], "2 of them"), ({"a": 1}, "dict")):
        with pytest.raises(TypeError, match=rf"^z must be a list of 3 tensors, one for each of in_dim, got {got}"):
            term.check("z", wrong, B)
    with pytest.raises(ValueError, match=r"^z\[1\] must be floats of shape \[B, N, 5\]"):
        term.check("z", [layers()[0]] * 3, B)
    with pytest.raises(TypeError, match=r"^z must be floats of shape .* got list"):
        make().check("z", layers(), B)
    for dims in ((), (C, 0), (C, True), "8"):
        with pytest.raises(ValueError, match=r"^in_dim must be a positive int"):
            TokenTerm(dims)
    for projector in (nn.Linear(C, D), [nn.Linear(C, D)], [nn.Linear(C, D), "mlp"], 3):
        with pytest.raises(TypeError, match=r"^projector must be 'mlp', 'conv' or 2 modules"):
            TokenTerm((C, C), projector=projector)
    with pytest.raises(ValueError, match=r"^projector must have convolutions for all of in_dim, or for none"):
        TokenTerm((C, C), projector=[nn.Linear(C, D), TokenConv(C, D)])


# --- a class token ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardize", [False, 0.6])
def test_a_class_token_is_one_more_token_in_the_mean(standardize):
    """REG's code averages the cosine of the concatenation [class, patches] over 1 + N tokens."""
    term, student, found = make(class_token=True, standardize=standardize), randn(B, 1 + N, C), features()
    assert term.needs == {"global", "patch"}
    projected = term.projector(student)
    losses = [cosine(projected[:, 0], found["global"])]
    patch = term.grids.prepare(found["patch"])
    losses += [cosine(projected[:, 1 + n], patch[:, n]) for n in range(N)]
    losses = torch.stack(losses, 1)
    assert_close(term(student, found)[0], losses.mean(), rtol=1e-12, atol=1e-14)
    weight = randn(B, 1 + N, seed=4).abs()
    assert_close(term(student, found, weight)[0], (weight * losses).sum() / weight.sum(), rtol=1e-12, atol=1e-14)
    gate = randn(B, seed=5).abs()
    expected = (gate[:, None] * losses).sum() / (gate.sum() * (1 + N))
    assert_close(term(student, found, gate)[0], expected, rtol=1e-12, atol=1e-14)


def test_the_gradient_of_a_class_token_is_the_slope():
    check_slope(lambda x: make(class_token=True)(x, features())[0], randn(B, 1 + N, C).requires_grad_())


def test_the_class_token_is_on_no_grid():
    term, student, found = make(class_token=True, token_grid=(2, 4)), randn(B, 9, C), features()
    projected = term.projector(student)
    maps = rearrange(projected[:, 1:], "b (h w) d -> b d h w", h=2)
    brought = F.interpolate(maps, (4, 4), mode="bilinear", align_corners=False).flatten(2).mT
    losses = torch.cat([cosine(projected[:, :1], found["global"][:, None]), cosine(brought, found["patch"])], 1)
    assert_close(term(student, found)[0], losses.mean(), rtol=1e-11, atol=1e-12)
    weight = randn(B, 9, seed=4).abs()
    spread = F.interpolate(weight[:, 1:].unflatten(1, (1, 2, 4)), (4, 4), mode="bilinear", align_corners=False).flatten(
        1
    )
    rows = torch.cat([weight[:, :1], spread], 1)
    assert_close(term(student, found, weight)[0], (rows * losses).sum() / rows.sum(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("loss", ["cosine", "mse", "rows"])
def test_positions_are_those_of_the_other_tokens(loss):
    term, student, found = make(class_token=True, loss=Rows() if loss == "rows" else loss), randn(B, 5, C), features()
    index = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i))[:4] for i in range(B)]).to(
        DEVICE
    )
    term.check("z", student, B, index=index)
    chosen = {**found, "patch": found["patch"].take_along_dim(index[..., None], 1), "grid": (2, 2)}
    weight = None if loss == "rows" else randn(B, 5, seed=6).abs()
    assert_close(
        term(student, found, weight, index=index)[0],
        make(class_token=True, loss=Rows() if loss == "rows" else loss, token_grid=(2, 2))(student, chosen, weight)[0],
    )
    if DEVICE == "cpu":
        for wrong in (-1, N):
            index[1, 2] = wrong
            with pytest.raises(ValueError, match=rf"^index must be from 0 to {N - 1}.*got {wrong}$"):
                term(student, found, index=index)


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_a_position_that_is_none_is_left_out_by_the_weight_of_its_own_token(loss):
    term, student, index = make(class_token=True, loss=loss), randn(B, 4, C), torch.full((B, 3), 2, device=DEVICE)
    index[:, 0] = N
    weight = torch.tensor([1.0, 0, 1, 1], dtype=torch.float64, device=DEVICE).expand(B, -1)
    expected = term(student[:, [0, 2, 3]], features(), index=index[:, 1:])[0]
    assert_close(term(student, features(), weight, index=index)[0], expected, rtol=1e-12, atol=1e-14)


def test_a_class_token_of_a_layer_of_a_target_and_of_several_layers():
    found, student = features(), randn(B, 1 + N, C)
    found["layers"] = {1: {"global": randn(B, D, seed=31), "patch": randn(B, N, D, seed=32)}}
    expected = make(class_token=True)(student, {**found, **found["layers"][1]})
    assert_close(make(class_token=True, layer=1)(student, found), expected, rtol=0, atol=0)
    target = torch.cat([found["global"].unsqueeze(1), found["patch"]], 1)
    module = Supervision(None, {"token": make(class_token=True)})
    for given in (target, {"global": found["global"], "patch": found["patch"]}):
        assert_close(
            module(students={"token": student}, targets={"token": given})[0], make(class_token=True)(student, found)[0]
        )
    both = make((C, C), class_token=True)
    expected = torch.stack([cosine(projector(student), target).mean() for projector in both.projector]).mean()
    assert_close(both([student, student], found)[0], expected, rtol=1e-12, atol=1e-14)


def test_without_patches_all_tokens_meet_the_global_token():
    term, student, found = make(class_token=True), randn(B, 1 + N, C), {**features(), "patch": None}
    loss, logs = term(student, found)
    assert_close(loss, cosine(term.projector(student), found["global"][:, None]).mean(), rtol=1e-12, atol=1e-14)
    assert logs["is_global"] == 1


def test_what_has_no_class_token_is_named():
    term = make(class_token=True)
    for wrong in (randn(B, C, 4, 4), randn(B, 1, C)):
        with pytest.raises(ValueError, match=rf"^z must be tokens \[B, 1 \+ N, {C}\], the class token first, got"):
            term.check("z", wrong, B)
    with pytest.raises(ValueError, match=r"^index must have a position for each of the tokens \[5, 16\]"):
        term.check("z", randn(B, 1 + N, C), B, index=torch.zeros(B, 1 + N, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^tokens must be 3 x 4, by token_grid, and N is 16"):
        term.check("z", randn(B, 1 + N, C), B, token_grid=(3, 4))
    with pytest.raises(ValueError, match=r"^class_token needs a projector of single tokens"):
        TokenTerm(C, projector="conv", class_token=True)
    with pytest.raises(TypeError, match=r"^class_token must be True or False"):
        TokenTerm(C, class_token=1)


def test_vicreg_takes_the_class_token_for_a_row():
    term, student, found = make(class_token=True, loss=VICRegLoss(group=None)), randn(B, 1 + N, C), features()
    target = torch.cat([found["global"].unsqueeze(1), found["patch"]], 1)
    expected = VICRegLoss(group=None)(term.projector(student), target)
    assert_close(term(student, found)[0], expected.loss, rtol=1e-11, atol=1e-12)
