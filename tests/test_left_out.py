"""Rows of weight 0 reach no parameter of a term, whatever they hold: projectors, queries and grids share them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from fused_dino import CosineLoss, GlobalTerm, MSELoss, RegionTerm, Supervision, TokenTerm

FILLERS = [math.nan, math.inf, 1e300]
WIDTH, ROWS = 6, 16
IMAGES = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
TOKENS = torch.tensor([[0, 1, 2, 0.5] * 4, [1, 1, 0, 0] * 4, [0] * 12 + [1, 2, 3, 4]], dtype=torch.float64)
REGIONS = torch.tensor([[0, 1, 2, 0.5], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)


class OwnLoss(nn.Module):
    """A loss as a user writes it, which knows nothing of masks but their product."""

    def forward(self, student, target, weight):
        rows = 1 - (student / student.norm(dim=-1, keepdim=True) * F.normalize(target, dim=-1)).sum(-1)
        weight = weight.expand(rows.shape)
        return (rows * weight).sum() / weight.sum()


LOSSES = {"cosine": CosineLoss, "mse": MSELoss, "a user's": OwnLoss}


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows_of(loss, student, target):
    """The loss of each row, by its formula."""
    cos = F.cosine_similarity(student, target, dim=-1)
    return 2 * (1 - cos) / WIDTH if loss == "mse" else 1 - cos


def mean_of(rows, weight, normalize):
    weight = weight.reshape(*weight.shape, *(1,) * (rows.ndim - weight.ndim)).expand(rows.shape)
    return (rows * weight).sum() / (weight.sum() if normalize else weight.numel())


def filled(x, weight, filler):
    return torch.where((weight == 0).reshape(*weight.shape, *(1,) * (x.ndim - weight.ndim)), filler, x)


def derivatives(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def features(patch, grid=(4, 4)):
    return {"global": patch.mean(1), "patch": patch, "grid": grid}


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weight", [IMAGES, TOKENS], ids=["images", "tokens"])
def test_tokens(weight, loss, normalize, filler):
    term = TokenTerm(5, projector=nn.Linear(5, WIDTH), out_dim=WIDTH, loss=LOSSES[loss](), normalize_weight=normalize)
    hidden, patch = torch.randn(3, ROWS, 5, requires_grad=True), torch.randn(3, ROWS, WIDTH)
    expected = mean_of(rows_of(loss, term.projector(hidden), patch), weight, normalize)
    student = filled(hidden, weight, filler).detach().requires_grad_()
    found, _ = term(student, features(filled(patch, weight, filler)), weight)
    assert_close(found, expected)
    assert_close(derivatives(found, student, *term.parameters()), derivatives(expected, hidden, *term.parameters()))


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_tokens_at_positions(loss, filler):
    term = TokenTerm(5, projector=nn.Linear(5, WIDTH), out_dim=WIDTH, loss=LOSSES[loss]())
    hidden, patch, weight = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, ROWS, WIDTH), REGIONS
    index = torch.stack([torch.randperm(ROWS)[:4] for _ in range(3)])
    target = patch.gather(1, index.unsqueeze(2).expand(-1, -1, WIDTH))
    expected = mean_of(rows_of(loss, term.projector(hidden), target), weight, True)
    read = torch.zeros(3, ROWS).scatter(1, index, weight)
    student = filled(hidden, weight, filler).detach().requires_grad_()
    found, _ = term(student, features(filled(patch, read, filler)), weight, index=index.where(weight != 0, -9))
    assert_close(found, expected)
    assert_close(derivatives(found, student, *term.parameters()), derivatives(expected, hidden, *term.parameters()))


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("compare", ["larger", "smaller", "teacher"])
@pytest.mark.parametrize("side", [2, 8])
@pytest.mark.parametrize("class_token", [False, True])
def test_tokens_of_another_grid(class_token, side, compare, filler):
    """A row between two, of which one is left out, is the other."""
    loss = MSELoss(normalize=False)
    options = {"compare": compare, "token_grid": (side, side), "class_token": class_token, "loss": loss}
    term = TokenTerm(5, projector=nn.Linear(5, WIDTH), out_dim=WIDTH, **options)
    hidden, patch = torch.randn(2, class_token + side**2, 5), torch.randn(2, ROWS, WIDTH)
    weight = torch.rand(2, class_token + side**2).where(torch.rand(2, class_token + side**2) > 0.4, 0)

    def resample(x, size):
        maps = F.interpolate(x.mT.unflatten(2, (math.isqrt(x.shape[1]),) * 2), size=size, mode="bilinear")
        return maps.flatten(2).mT

    meeting = {"larger": max(side, 4), "smaller": min(side, 4), "teacher": 4}[compare]
    kept = (weight != 0).double().unsqueeze(2)
    x, w, k = term.projector(hidden) * kept, weight.unsqueeze(2), kept
    first, x, w, k = x[:, :class_token], *(resample(y[:, class_token:], meeting) for y in (x, w, k))
    x, w = torch.cat([first, x / k.where(k != 0, 1)], 1), torch.cat([weight[:, :class_token], w.squeeze(2)], 1)
    token = patch.mean(1, keepdim=True)[:, :class_token]
    expected = mean_of((x - torch.cat([token, resample(patch, meeting)], 1)).square().mean(2), w, True)
    found, _ = term(filled(hidden, weight, filler), features(patch), weight)
    assert_close(found, expected)
    parameters = list(term.parameters())
    assert_close(derivatives(found, *parameters), derivatives(expected, *parameters))


def test_a_mask_of_ones_changes_nothing_on_another_grid():
    term = TokenTerm(5, projector=nn.Linear(5, WIDTH), out_dim=WIDTH, token_grid=(3, 3))
    hidden, patch = torch.randn(2, 9, 5), torch.randn(2, ROWS, WIDTH)
    assert_close(term(hidden, features(patch), torch.ones(2, 9))[0], term(hidden, features(patch))[0])


def test_a_convolution_sees_zeros_where_tokens_are_left_out():
    term = TokenTerm(5, projector="conv", out_dim=WIDTH)
    hidden, patch, weight = torch.randn(3, ROWS, 5), torch.randn(3, ROWS, WIDTH), TOKENS
    expected = mean_of(rows_of("cosine", term.projector(filled(hidden, weight, 0.0), (4, 4)), patch), weight, True)
    assert_close(term(filled(hidden, weight, math.nan), features(patch), weight)[0], expected)


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_latents(loss, filler):
    term = GlobalTerm(5, hidden_dim=4, out_dim=WIDTH, loss=LOSSES[loss]())
    z, token = torch.randn(3, 5, requires_grad=True), torch.randn(3, WIDTH)
    expected = mean_of(rows_of(loss, term.projector(z), token), IMAGES, True)
    student = filled(z, IMAGES, filler).detach().requires_grad_()
    found, _ = term(student, {"global": filled(token, IMAGES, filler)}, IMAGES)
    assert_close(found, expected)
    assert_close(derivatives(found, student, *term.parameters()), derivatives(expected, z, *term.parameters()))


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("target", ["region", "mean", "nearest", "attention"])
def test_regions_of_images(target, filler):
    term = RegionTerm((4, 8, 8), target=target, projector=nn.Linear(4, WIDTH), out_dim=WIDTH)
    z, patch = torch.randn(3, 256, requires_grad=True), torch.randn(3, ROWS, WIDTH)
    expected, _ = term(z[1:], features(patch[1:]), IMAGES[1:])  # the images that are left
    student = filled(z, IMAGES, filler).detach().requires_grad_()
    found, _ = term(student, features(filled(patch, IMAGES, filler)), IMAGES)
    assert_close(found, expected)
    assert_close(derivatives(found, student, *term.parameters()), derivatives(expected, z, *term.parameters()))


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("teacher_grid", [(4, 4), (3, 5)])
@pytest.mark.parametrize("onto", [(2, 2), (4, 1)])
def test_regions(onto, teacher_grid, filler):
    """Regions may overlap: a cell that one of them reads stays."""
    projector = nn.Linear(4, WIDTH)
    term = RegionTerm((4, 5, 6), grid=onto, projector=projector, out_dim=WIDTH)
    maps = torch.randn(3, 4, 5, 6, requires_grad=True)
    patch, weight = torch.randn(3, WIDTH, *teacher_grid), REGIONS

    def unread(size):
        """Where no region that counts reads, [3, 1, *size]."""
        probe = torch.zeros(3, 1, *size, requires_grad=True)
        (F.adaptive_avg_pool2d(probe, onto).flatten(1) * (weight != 0)).sum().backward()
        return probe.grad == 0

    regions, targets = (F.adaptive_avg_pool2d(x, onto).flatten(2).mT for x in (maps, patch))
    expected = mean_of(rows_of("cosine", projector(regions), targets), weight, True)
    student = maps.masked_fill(unread((5, 6)), filler).detach().requires_grad_()
    tokens = patch.masked_fill(unread(teacher_grid), filler).flatten(2).mT
    found, _ = term(student, features(tokens, teacher_grid), weight)
    assert_close(found, expected)
    assert_close(derivatives(found, student, *term.parameters()), derivatives(expected, maps, *term.parameters()))


def test_a_supervision_compiles_with_rows_left_out(fresh_compiler):
    terms = {
        "global": GlobalTerm(5, hidden_dim=4, out_dim=WIDTH),
        "region": RegionTerm((4, 8, 8), out_dim=WIDTH, hidden_dim=4),
        "token": TokenTerm(5, projector=nn.Linear(5, WIDTH), out_dim=WIDTH, token_grid=(2, 2)),
    }
    supervision = Supervision(None, terms)
    students = {"global": torch.randn(3, 5), "region": torch.randn(3, 256), "token": torch.randn(3, 4, 5)}
    patch = {"patch": torch.randn(3, ROWS, WIDTH), "grid": (4, 4)}
    targets = {"global": torch.randn(3, WIDTH), "region": patch, "token": patch}
    weight = {"global": IMAGES, "region": REGIONS, "token": REGIONS}
    expected = supervision(students=students, targets=targets, weight=weight)
    broken = {**students, "global": filled(students["global"], IMAGES, math.nan)}
    broken["token"] = filled(students["token"], REGIONS, math.nan)
    compiled = torch.compile(supervision, backend="eager", fullgraph=True)
    assert_close(compiled(students=broken, targets=targets, weight=weight), expected)
