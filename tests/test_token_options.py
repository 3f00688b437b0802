"""Options of tokens: subsets of positions, the grid of the comparison, and standardised teachers, with iREPA's
numbers."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.testing import assert_close

from fused_dino import CosineLoss, MSELoss, TokenTerm
from fused_dino.terms.token_grids import grid_of_aspect
from proving import DEVICE, IMPLEMENTATIONS
from test_terms import B, C, D, N, Rows, features, randn

S = [[1, 0], [1, 1], [0, 2], [-1, 1]]  # students and teachers of the vectors that iREPA's code gave
T = [[2, 1], [0, 1], [1, 1], [1, -1]]


def make(**options):
    torch.manual_seed(3)
    return TokenTerm(C, out_dim=D, **options).to(DEVICE, torch.float64)


def alone(**options):
    """A term whose projector changes nothing, and its test inputs."""
    t = torch.tensor([T], dtype=torch.float64, device=DEVICE)
    s = torch.tensor([S], dtype=torch.float64, device=DEVICE).requires_grad_()
    term = TokenTerm(2, projector=nn.Identity(), out_dim=2, **options)
    return term, s, {"global": t.mean(1), "patch": t, "grid": (2, 2)}


def cosine(a, b):
    return 1 - F.cosine_similarity(a, b, dim=-1).mean()


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({}, -0.327160188),
        ({"standardize": True, "unbiased": True}, -0.207830233),
        ({"standardize": 0.6, "unbiased": True}, -0.202448808),
        ({"standardize": 0.8, "unbiased": True}, -0.199874850),
    ],
)
def test_irepas_values(options, value, backend):
    term, s, found = alone(backend=backend, **options)
    loss, _ = term(s, found)
    assert loss.item() == pytest.approx(1 + value, abs=1e-9)
    if not options:
        (grad,) = torch.autograd.grad(loss, s)
        expected = [[0, -0.111803399], [0.0883883476, -0.0883883476], [-0.0883883476, 0], [0, 0]]
        assert_close(grad[0].cpu(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_position_alone_has_no_deviation():
    term = make(standardize=0.6, unbiased=True)
    found = {"global": randn(B, D), "patch": randn(B, 1, D), "grid": (1, 1)}
    loss, _ = term(randn(B, 1, C), found)
    assert loss.isfinite()


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("loss", ["cosine", "mse", "rows"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_an_index_says_which_positions_the_tokens_are(loss, dtype, backend):
    term = make(loss=Rows() if loss == "rows" else loss, backend=backend, standardize=0.6)
    index = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i))[:5] for i in range(B)])
    index, student = index.to(DEVICE, dtype), randn(B, 5, C)
    weight = None if loss == "rows" else randn(B, 5, seed=6).abs()
    found = term(student, features(), weight, index=index)[0]
    t = term.grids.prepare(features()["patch"])
    chosen = {**features(), "patch": torch.stack([t[b, index[b].long()] for b in range(B)]), "grid": (1, 5)}
    plain = make(loss=Rows() if loss == "rows" else loss, backend=backend, token_grid=(1, 5))
    assert_close(found, plain(student, chosen, weight)[0], rtol=1e-12, atol=1e-14)
    every = torch.arange(N, device=DEVICE, dtype=dtype).expand(B, -1)
    full = randn(B, N, C)
    assert_close(term(full, features(), index=every)[0], term(full, features())[0], rtol=1e-12, atol=1e-14)


def test_an_index_counts_on_the_token_grid_where_that_is_told():
    term, index = make(), torch.tensor([[0, 7], [7, 0], [3, 3], [1, 2], [4, 5]], device=DEVICE)
    student, patch = randn(B, 2, C), rearrange(features()["patch"], "b (h w) d -> b d h w", h=4)
    onto = F.interpolate(patch, (2, 4), mode="bilinear", align_corners=False).flatten(2).mT
    expected = cosine(term.projector(student), onto.take_along_dim(index[..., None], 1))
    assert_close(term(student, features(), index=index, token_grid=(2, 4))[0], expected)
    assert_close(make(token_grid=(2, 4))(student, features(), index=index)[0], expected)


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_an_index_out_of_range_is_named_unless_its_row_is_left_out(loss):
    term, student = make(loss=loss), randn(B, 3, C)
    for position in (-1, N):
        index = torch.full((B, 3), position, device=DEVICE)
        index[:, 1:] = 4
        left = torch.tensor([0.0, 1, 1], dtype=torch.float64, device=DEVICE).expand(B, -1)
        assert_close(
            term(student, features(), left, index=index)[0],
            term(student[:, 1:], features(), index=index[:, 1:])[0],
        )
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match=rf"^index must be from 0 to {N - 1}.*got {position}$"):
                term(student, features(), index=index)
        else:
            assert term(student, features(), index=index)[0].isnan()


def test_a_bad_index_is_named():
    student, index = randn(B, 3, C), torch.zeros(B, 3, dtype=torch.int64)
    for wrong in (index.float(), index.bool(), [[0]]):
        with pytest.raises(TypeError, match=r"^index must be an int32 or int64 tensor"):
            make().check("tokens", student, B, index=wrong)
    with pytest.raises(ValueError, match=r"^index must have a position for each"):
        make().check("tokens", student, B, index=index[:, :2])
    with pytest.raises(ValueError, match="needs every token"):
        make(projector="conv").check("tokens", student, B, index=index)


@pytest.mark.parametrize(("compare", "meeting"), [("larger", (6, 4)), ("smaller", (4, 2)), ("teacher", (4, 4))])
def test_tokens_of_another_grid_meet_the_teachers(compare, meeting):
    term, student = make(compare=compare, token_grid=(6, 2)), randn(B, 12, C)

    def onto(x, rows):
        maps = rearrange(x, "b (h w) d -> b d h w", h=rows)
        return F.interpolate(maps, meeting, mode="bilinear", align_corners=False).flatten(2).mT

    expected = cosine(onto(term.projector(student), 6), onto(features()["patch"], 4))
    assert_close(term(student, features())[0], expected, rtol=1e-11, atol=1e-12)
    weight = randn(B, 12, seed=7).abs()
    rows = 1 - F.cosine_similarity(onto(term.projector(student), 6), onto(features()["patch"], 4), dim=-1)
    spread = onto(weight[..., None], 6)[..., 0]
    expected = (spread * rows).sum() / spread.sum()
    assert_close(term(student, features(), weight)[0], expected, rtol=1e-11, atol=1e-12)


def test_maps_and_frames_are_tokens():
    term, student = make(), randn(B, N, C)
    expected = term(student, features())[0]
    assert_close(term(rearrange(student, "b (h w) c -> b c h w", h=4), features())[0], expected)
    flat = {**features(), "image_size": (30, 120)}  # the map says its grid
    assert_close(term(rearrange(student, "b (h w) c -> b c h w", h=4), flat)[0], expected)
    video = randn(2, 3, N, C)
    assert_close(term(video, features(6))[0], term(video.flatten(0, 1), features(6))[0])
    term.check("tokens", video, 6)
    for wrong in (video, randn(B, 4, 4, C)):  # of two images in place of six, and with channels last
        with pytest.raises(ValueError, match=rf"^tokens must be .*a map \[B, {C}, h, w\] or frames"):
            term.check("tokens", wrong, B)
    with pytest.raises(ValueError, match=r"^token_grid is \(2, 8\) and tokens is a map of \(4, 4\)"):
        term.check("tokens", rearrange(student, "b (h w) c -> b c h w", h=4), B, token_grid=(2, 8))


def test_the_grid_of_an_aspect_holds_exactly_so_many():
    for height, width in ((60, 60), (30, 120), (448, 320), (333, 250)):
        for count in range(1, 700):
            grid = grid_of_aspect(count, height, width)
            if grid is not None:
                assert grid[0] * grid[1] == count
                assert grid[0] * width == grid[1] * height
    assert grid_of_aspect(560, 448, 320) == (28, 20)
    assert grid_of_aspect(64, 448, 320) is None


def test_losses_that_detach_and_that_do_not_are_the_same_here():
    student = randn(B, N, C)
    assert_close(make(loss=CosineLoss())(student, features())[0], make()(student, features())[0])
    assert_close(make(loss=MSELoss())(student, features())[0], make(loss="mse")(student, features())[0])
