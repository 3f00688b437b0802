"""The same tests for every term, with its formula in float64. A new term is one row of TERMS."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from conftest import check_slope
from fused_dino import CosineLoss, GlobalTerm, MSELoss, RegionTerm, Term, TokenTerm, VICRegLoss, use_backend
from proving import DEVICE, IMPLEMENTATIONS

B, N, D, C = 5, 16, 6, 8


class Row(NamedTuple):
    """A term with its projector built, its student's shape without B, and for an Alignment the shape of its rows."""

    make: Callable[..., Term]
    student: tuple[int, ...]
    rows: tuple[int, ...] | None = None  # without B


TERMS = {
    "global": Row(lambda **options: GlobalTerm(C, hidden_dim=7, out_dim=D, **options), (C,), ()),
    "region": Row(lambda **options: RegionTerm((2, 4, 4), hidden_dim=7, out_dim=D, **options), (32,), (4,)),
    "map": Row(lambda **options: RegionTerm((2, 4, 4), hidden_dim=7, out_dim=D, **options), (2, 4, 4), (4,)),
    "token": Row(lambda **options: TokenTerm(C, out_dim=D, **options), (N, C), (N,)),
    "conv": Row(lambda **options: TokenTerm(C, projector="conv", out_dim=D, **options), (N, C), (N,)),
    "token map": Row(lambda **options: TokenTerm(C, out_dim=D, **options), (C, 4, 4), (N,)),
}
each = pytest.mark.parametrize("name", TERMS)
each_alignment = pytest.mark.parametrize("name", [name for name, row in TERMS.items() if row.rows is not None])


def make(name, **options):
    torch.manual_seed(3)
    return TERMS[name].make(**options).to(DEVICE, torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def features(batch=B, grid=(4, 4)):
    count = grid[0] * grid[1]
    return {"global": randn(batch, D, seed=1), "patch": randn(batch, count, D, seed=2), "grid": grid}


@each
@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_its_gradient_is_the_slope(name, backend):
    term = make(name)
    with use_backend(backend):
        check_slope(lambda x: term(x, features())[0], randn(B, *TERMS[name].student).requires_grad_())


@each
def test_logs_are_detached_scalars_without_loss_in_their_names(name):
    term = make(name)
    loss, logs = term(randn(B, *TERMS[name].student).requires_grad_(), features())
    assert loss.ndim == 0
    assert loss.requires_grad
    if "scale" in term.takes:  # a supervision logs the loss of the others
        assert_close(logs["value"], loss.detach())
    for key, value in logs.items():
        assert "loss" not in key
        assert value.ndim == 0
        assert not value.requires_grad


def some(found, kept):
    """Return the features of the images that are kept."""
    return {key: value if key == "grid" else value[kept] for key, value in found.items()}


def check_left_out(term, name):
    student, kept = randn(B, *TERMS[name].student), [0, 2, 3]
    expected = term(student[kept], some(features(), kept))[0]
    poisoned = student.clone()
    poisoned[[1, 4]] = float("nan")
    poisoned.requires_grad_()
    weight = torch.tensor([1, 0, 1, 1, 0], dtype=torch.bool, device=DEVICE)
    found, _ = term(poisoned, features(), weight)
    assert_close(found, expected, rtol=1e-12, atol=1e-14)
    return term(student, features(), weight.new_zeros(B))[0]


@each
def test_an_image_of_weight_zero_is_left_out_whatever_it_holds(name):
    assert check_left_out(make(name), name) == 0


@each_alignment
def test_an_image_of_weight_zero_is_left_out_of_mse(name):
    check_left_out(make(name, loss="mse"), name)


@each
def test_images_count_by_their_weights(name):
    term, student, weight = make(name), randn(B, *TERMS[name].student), randn(B, seed=4).abs()
    losses = torch.stack([term(student[[i]], some(features(), [i]))[0] for i in range(B)])
    found, _ = term(student, features(), weight)
    assert_close(found, (weight * losses).sum() / weight.sum(), rtol=1e-12, atol=1e-14)


@each_alignment
def test_weights_of_rows_are_those_of_the_formula(name):
    term, rows = make(name), TERMS[name].rows
    student, weight = randn(B, *TERMS[name].student), randn(B, *rows, seed=4).abs()
    each_row = make(name, loss=Rows())
    each_row(student, features())
    losses = each_row.loss.found
    for normalize, divisor in ((True, weight.sum()), (False, weight.numel())):
        term.normalize_weight = normalize
        loss, logs = term(student, features(), weight, scale=0.3)
        assert_close(loss, 0.3 * (weight * losses).sum() / divisor, rtol=1e-12, atol=1e-14)
        assert_close(logs["value"], loss / 0.3, rtol=1e-12, atol=1e-14)


class Rows(nn.Module):
    """Keeps the losses of the rows."""

    def forward(self, student, target):
        self.found = 1 - F.cosine_similarity(student, target, dim=-1)
        return self.found.mean()


@each_alignment
def test_any_loss_of_rows_will_do(name):
    student = randn(B, *TERMS[name].student)
    cosine = make(name)(student, features())[0]
    for loss in (CosineLoss(), Rows(), CosineLoss(scale=1.0)):
        assert_close(make(name, loss=loss)(student, features())[0], cosine, rtol=1e-12, atol=1e-14)
    assert (make(name, loss=MSELoss(normalize=False))(student, features())[0] - cosine).abs() > 1e-6
    vicreg = make(name, loss=VICRegLoss(group=None))(student, features())[1]
    assert list(vicreg) == ["value", "vic_inv", "vic_var", "vic_cov"]


@each_alignment
def test_losses_whose_rows_count_together_refuse_weights(name):
    for loss in ("vicreg", Rows()):
        term = make(name, loss=loss)
        with pytest.raises(ValueError, match=r"^weight must be left out for (VICRegLoss|Rows)"):
            term.check("student", randn(B, *TERMS[name].student), B, weight=torch.ones(B))


@each
def test_what_does_not_fit_is_named(name):
    term, student = make(name), randn(B, *TERMS[name].student)
    term.check("z", student, B, weight=torch.ones(B))
    for wrong in (student.long(), student[0], student.numpy() if DEVICE == "cpu" else [1.0]):
        with pytest.raises((ValueError, TypeError), match=r"^z must"):
            term.check("z", wrong, B)
    with pytest.raises(ValueError, match=r"^z must (have|be)"):
        term.check("z", student, B + 1)
    for weight in (torch.ones(B + 1), torch.ones(B, 3), torch.ones(1)):
        with pytest.raises(ValueError, match=r"^weight must be of shape"):
            term.check("z", student, B, weight=weight)


@each_alignment
def test_a_student_of_another_width_is_named(name):
    student = randn(B, *TERMS[name].student)
    with pytest.raises(ValueError, match=r"^z must"):
        make(name).check("z", torch.cat([student, student], 1 if "map" in name else -1), B)


def test_a_term_without_a_width_says_what_to_do():
    with pytest.raises(RuntimeError, match="give out_dim, or put it into a supervision"):
        GlobalTerm(C)(randn(B, C), features())
    with pytest.raises(NotImplementedError, match=r"Term must define forward"):
        Term()(randn(B, C), features())
    with pytest.raises(ValueError, match=r"^eps belongs to the loss"):
        GlobalTerm(C, loss=CosineLoss(), eps=1e-3)
    with pytest.raises(TypeError, match=r"^projector must be"):
        GlobalTerm(C, projector="mlp")
    with pytest.raises(ValueError, match=r"^unbiased is of the deviation"):
        TokenTerm(C, unbiased=True)
    with pytest.raises(ValueError, match=r"^compare is 'both'"):
        TokenTerm(C, compare="both")


def test_any_module_may_be_a_projector():
    for name, term in {
        "global": GlobalTerm(C, projector=nn.Linear(C, D)),
        "region": RegionTerm((2, 4, 4), projector=nn.Linear(2, D)),
        "token": TokenTerm(C, projector=nn.Identity(), loss=nn.MSELoss()),
    }.items():
        student, wide = randn(B, *TERMS[name].student), {**features(), "patch": randn(B, N, C), "global": randn(B, C)}
        loss, _ = term.double().to(DEVICE)(student, wide if name == "token" else features())
        assert loss.ndim == 0
    assert_close(loss, F.mse_loss(student, wide["patch"]))
    with pytest.raises(ValueError, match=r"^projector must make \[5, 16, 6\]"):
        TokenTerm(C, projector=nn.Identity())(randn(B, N, C), features())


def test_a_projector_that_starts_at_zero_learns_with_a_larger_eps():
    """A norm of 1e-12 divides the first gradient, and Adam's second moments remember so large a gradient for ever."""
    x, target = randn(64, C), F.normalize(randn(64, D, seed=1), dim=1)
    target[:, :3] += x[:, :3]

    def learn(eps):
        torch.manual_seed(0)
        head = nn.Linear(C, D).double().to(DEVICE)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        term = GlobalTerm(C, projector=head, eps=eps)
        optimizer = torch.optim.Adam(term.parameters(), lr=1e-2)
        for _ in range(300):
            optimizer.zero_grad()
            loss, _ = term(x, {"global": target})
            loss.backward()
            optimizer.step()
        return loss.item()

    assert learn(None) > 0.5
    assert learn(1e-3) < 0.2
