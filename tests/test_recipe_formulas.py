"""Each recipe's value and gradients are its source's formula, written anew here, and the authors' own numbers."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from fused_dino import recipes
from fused_dino.terms.token_projectors import TokenConv, TokenMLP

S = torch.tensor([[1, 0], [1, 1], [0, 2], [-1, 1]], dtype=torch.float64)
T = torch.tensor([[2, 1], [0, 1], [1, 1], [1, -1]], dtype=torch.float64)


class Lone(nn.Module):
    """A teacher whose features are given, and that must not run."""

    patch_size = 14

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.embed_dim = width

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        raise AssertionError("the teacher ran")


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(patch: torch.Tensor, grid: tuple[int, int]) -> dict:
    return {"global": patch.mean(1), "patch": patch, "grid": grid}


def drawn(width: int = 6, seed: int = 2) -> dict:
    """Features of three images on a grid of 4 x 2."""
    return features(draw(3, 8, width, seed=seed), (4, 2))


def same(module: nn.Module, given: dict | None, students: dict, expected: torch.Tensor, **call: object) -> None:
    """The loss is the expected one in value, and in the gradients of the student and every parameter."""
    loss = module.loss_dict(features=given, students=students, **call)["loss_dino"]
    leaves = [*students.values(), *module.parameters()]
    assert_close(loss, expected, rtol=1e-9, atol=1e-11)
    ours, theirs = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (loss, expected))
    assert all(x.abs().max() > 0 for x in theirs[:1])
    assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def cosine(a: torch.Tensor, b: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """cos of rows, from its definition."""
    norms = (x.square().sum(-1).sqrt().clamp(min=eps) for x in (a, b))
    return (a * b).sum(-1) / torch.stack(list(norms)).prod(0)


def through(projector: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """REPA's projector, from its weights alone."""
    first, middle, last = (projector[i] for i in (0, 2, 4))
    x = F.silu(x @ first.weight.T + first.bias)
    return F.silu(x @ middle.weight.T + middle.bias) @ last.weight.T + last.bias


def standardised(g: torch.Tensor, share: float) -> torch.Tensor:
    mean = g.sum(1, keepdim=True) / g.shape[1]
    std = ((g - mean).square().sum(1, keepdim=True) / (g.shape[1] - 1)).sqrt()
    return (g - share * mean) / (std + 1e-6)


def token_module(recipe, width: int = 6, **options):
    torch.manual_seed(1)
    return recipe(5, teacher=Lone(width), **options).double()


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_irepa(kernel):
    module = token_module(recipes.irepa, kernel=kernel)
    h, given = draw(3, 8, 5).requires_grad_(), drawn()
    p = module.terms["token"].projector
    maps = F.conv2d(h.transpose(1, 2).reshape(3, 5, 4, 2), p.weight, p.bias, padding=kernel // 2)
    assert p.weight.shape[2:] == (kernel, kernel)
    expected = -cosine(maps.flatten(2).transpose(1, 2), standardised(given["patch"], 0.6)).mean()
    same(module, given, {"token": h}, expected)


@pytest.mark.parametrize(("share", "value"), [(1.0, -0.207830233), (0.6, -0.202448808), (0.8, -0.199874850)])
def test_irepas_own_values(share, value):
    """iREPA's code gave these numbers, with a convolution that changes nothing."""
    module = recipes.irepa(2, teacher=Lone(), standardize=share, alpha=1.0).double()
    conv = module.terms["token"].projector
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.zero_()
        conv.weight[[0, 1], [0, 1], 1, 1] = 1
    out = module.loss_dict(features=features(T[None], (2, 2)), students={"token": S[None]})
    assert out["loss_dino"].item() == pytest.approx(value, abs=1e-9)
    assert out["dino_token"].item() == pytest.approx(value, abs=1e-9)


def test_the_standardised_targets_own_values():
    term = recipes.irepa(2, teacher=Lone()).terms["token"]
    channel = term.grids.prepare(T[None])[0, :, 0].tolist()
    assert channel == pytest.approx([1.71464072, -0.734846023, 0.489897349, 0.489897349], abs=1e-8)


def test_the_projectors_own_values():
    """REPA's three layers with the same weights each."""
    mlp = TokenMLP(2, 2, 2).double()
    with torch.no_grad():
        for layer in (mlp[0], mlp[2], mlp[4]):
            layer.weight.copy_(torch.tensor([[1, 0.5], [-0.5, 1]]))
            layer.bias.copy_(torch.tensor([0.1, -0.1], dtype=torch.float64))
    expected = [[0.550088955, -0.620799415], [1.28192168, -0.935232813], [2.02467326, 0.0175391873],
                [0.826203983, 0.572476340]]  # fmt: skip
    assert_close(mlp(S), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-9)


def test_the_convolutions_own_values():
    conv = TokenConv(2, 1, 3).double()
    with torch.no_grad():
        conv.weight.copy_(torch.arange(18, dtype=torch.float64).reshape(1, 2, 3, 3) / 10)
        conv.bias.fill_(0.5)
    assert_close(conv(S[None], (2, 2)).flatten().tolist(), [6.9, 6.4, 5.4, 4.9], rtol=1e-9, atol=0)


def test_irepa_takes_jits_constants_and_refuses_an_even_kernel():
    module = token_module(recipes.irepa, standardize=0.8, alpha=0.5, kernel=1)
    h, given = draw(3, 8, 5).requires_grad_(), drawn()
    p = module.terms["token"].projector
    projected = h @ p.weight[:, :, 0, 0].T + p.bias
    same(module, given, {"token": h}, -0.5 * cosine(projected, standardised(given["patch"], 0.8)).mean())
    with pytest.raises(ValueError, match="kernel must be odd"):
        recipes.irepa(5, teacher=Lone(), kernel=4)
    with pytest.raises(ValueError, match="index must be left out with a convolution"):
        module.loss_dict(features=given, students={"token": h}, index=torch.zeros(3, 8, dtype=torch.int64))


def test_irepas_checkpoints_load():
    module, other = (token_module(recipes.irepa) for _ in range(2))
    names = {"weight": draw(6, 5, 3, 3), "bias": draw(6)}
    with pytest.warns(UserWarning, match="of iREPA: 2 tensors renamed"):
        module.load_state_dict({f"projectors.0.projection_layer.{name}": x for name, x in names.items()})
    assert_close(dict(module.terms["token"].projector.named_parameters()), names, check_dtype=False)
    assert not torch.equal(module.terms["token"].projector.bias, other.terms["token"].projector.bias)


def test_haste_is_repa_up_to_its_stop():
    module = token_module(recipes.haste)
    h, given = draw(3, 8, 5).requires_grad_(), drawn()
    expected = -0.5 * cosine(through(module.terms["token"].projector, h), given["patch"]).mean()
    same(module, given, {"token": h}, expected, step=0)
    same(module, given, {"token": h}, expected, step=249_999)
    after = module.loss_dict(torch.zeros(3, 3, 256, 256), {"token": h}, step=250_000)  # the teacher would raise
    assert {name: value.item() for name, value in after.items()} == {"loss_dino": 0, "dino_alpha": 0}
    after["loss_dino"].backward()
    assert all(not x.grad.any() for x in (h, *module.parameters()))
    coco = token_module(recipes.haste, stop_step=150_000, alpha=0.25)
    out = coco.loss_dict(features=given, students={"token": h.detach()}, step=149_999)
    assert out["loss_dino"].item() == pytest.approx(0.25 * out["dino_token"].item())
    assert out["dino_alpha"] == 0.25
    assert coco.loss_dict(features=given, students={"token": h.detach()}, step=150_000)["loss_dino"] == 0


def test_repae_weighs_the_denoiser_and_the_autoencoder():
    module = token_module(recipes.repae)
    h, given = draw(3, 8, 5).requires_grad_(), drawn()
    similarity = cosine(through(module.terms["token"].projector, h), given["patch"]).mean()
    same(module, given, {"token": h}, -0.5 * similarity)
    module.requires_grad_(False)  # as the code does for the autoencoder's update
    loss, logs = module(features=given, students={"token": h}, alpha=1.5)
    assert_close(logs["dino_token"], -similarity.detach())
    assert_close(*(torch.autograd.grad(x, h)[0] for x in (loss, -1.5 * similarity)), rtol=1e-9, atol=1e-11)


def test_reg_counts_the_class_token_as_one_of_the_tokens():
    module = token_module(recipes.reg)
    h, given = draw(3, 9, 5).requires_grad_(), {**drawn(), "global": draw(3, 6, seed=9)}
    similar = cosine(
        through(module.terms["token"].projector, h), torch.cat([given["global"][:, None], given["patch"]], 1)
    )
    same(module, given, {"token": h}, -0.5 * similar.sum() / 27)
    assert_close(module.loss_dict(features=given, students={"token": h})["dino_token"], -similar.mean().detach())
    with pytest.raises(ValueError, match="token"):
        module.loss_dict(features=given, students={"token": h[:, 1:]})


def test_regs_first_values_and_checkpoints_are_its_codes():
    module, other = token_module(recipes.reg), token_module(recipes.repa)
    for layer in list(module.terms["token"].projector)[::2]:
        assert layer.weight.abs().max() <= (6 / sum(layer.weight.shape)) ** 0.5
        assert not layer.bias.any()
    own = {f"projectors.0.{k}": 2 * v for k, v in other.terms["token"].projector.state_dict().items()}
    with pytest.warns(UserWarning, match="of REG: 6 tensors renamed"):
        module.load_state_dict(own)
    assert_close(module.terms["token"].projector[0].weight, own["projectors.0.0.weight"])


def test_prx():
    module = token_module(recipes.prx)
    h, given = draw(3, 8, 5).requires_grad_(), drawn()
    given["patch"][0, 0] *= 1e-9  # shorter than the smallest norm that divides
    p = module.terms["token"].projector
    assert [p[i].out_features for i in (0, 2, 4)] == [6, 6, 6]
    similarity = cosine(through(p, h), given["patch"], eps=1e-8)
    assert similarity[0, 0].abs() < 0.2
    same(module, given, {"token": h}, -0.5 * similarity.mean())
    theirs = F.cosine_similarity(through(p, h), given["patch"], dim=2, eps=1e-8).mean()
    assert_close(module.loss_dict(features=given, students={"token": h})["dino_token"], -theirs, rtol=1e-9, atol=0)


def test_prx_aligns_the_tokens_that_routing_leaves():
    module = token_module(recipes.prx)
    h, given = draw(3, 2, 5).requires_grad_(), drawn()
    visible = torch.tensor([[0, 7], [3, 1], [6, 2]])
    chosen = torch.stack([patch[at] for patch, at in zip(given["patch"], visible, strict=True)])
    expected = -0.5 * cosine(through(module.terms["token"].projector, h), chosen, 1e-8).mean()
    same(module, given, {"token": h}, expected, index=visible)


def test_prx_resizes_to_the_grid_of_the_tokens(monkeypatch):
    asked = []

    def make_teacher(*arguments):
        asked.append(arguments)
        return Lone()

    monkeypatch.setattr(sys.modules["fused_dino.recipes.prx"], "make_teacher", make_teacher)
    recipes.prx(5)
    recipes.prx(5, teacher="vitl14_reg", downsampling=32)
    (name, rule, *_), (other, coarse, *_) = asked
    assert (name, other) == ("vit_large_patch16_dinov3", "vitl14_reg")
    assert rule(256, 384, 16) == (256, 384)
    assert rule(256, 384, 14) == (224, 336)
    assert coarse(512, 512, 16) == (256, 256)
    with pytest.raises(ValueError, match="downsampling"):
        recipes.prx(5, teacher=Lone(), downsampling=0)


def test_raev2_sums_layers():
    given = drawn()
    for options, chosen in (({"layers": (-2, 1)}, (-2, 1)), ({}, tuple(range(-7, 0)))):
        module = token_module(recipes.raev2, **options)
        given["layers"] = {n: {"global": draw(3, 6), "patch": draw(3, 8, 6, seed=20 + n)} for n in chosen}
        h, p = draw(3, 8, 5).requires_grad_(), module.terms["token"].projector
        target = sum(given["layers"][n]["patch"] for n in chosen)
        expected = (h @ p.weight.T + p.bias - target).square().sum() / (3 * 8 * 6)
        same(module, given, {"token": h}, 0.5 * expected)


def test_raev2_asks_a_named_teacher_for_its_layers(monkeypatch):
    asked = []

    def make_teacher(*arguments):
        asked.append(arguments)
        return Lone()

    monkeypatch.setattr(sys.modules["fused_dino.recipes.prx"], "make_teacher", make_teacher)
    recipes.raev2(5)
    ((name, rule, pretrained, dtype, layers),) = asked
    assert (name, rule(256, 256, 16), pretrained, dtype) == ("vit_large_patch16_dinov3", (256, 256), True, None)
    assert layers == (-7, -6, -5, -4, -3, -2, -1)


def self_module(recipe, **options):
    torch.manual_seed(1)
    return recipe(5, **options).double()


def headed(module, h):
    """The head of SRA and Self-Flow, from its weights alone."""
    first, _, last = module.terms["token"].projector
    assert first.weight.shape == (10, 5)
    assert last.weight.shape == (5, 10)
    return F.silu(h @ first.weight.T + first.bias) @ last.weight.T + last.bias


def test_sra():
    module = self_module(recipes.sra)
    h = draw(3, 8, 5).requires_grad_()
    off = headed(module, h) - (e := headed(module, h).detach() + 0.1 * draw(3, 8, 5, seed=7))
    assert 0.2 < (off.abs() < 0.05).double().mean() < 0.8, "both pieces are met"
    expected = torch.where(off.abs() < 0.05, off.square() / 0.1, off.abs() - 0.025).mean()
    same(module, None, {"token": h}, 0.2 * expected, targets={"token": e.requires_grad_()})
    out = module.loss_dict(students={"token": h}, targets={"token": e})
    assert_close(out["dino_token"], expected.detach(), rtol=1e-9, atol=0)
    out["loss_dino"].backward()
    assert e.grad is None


def test_sra_by_the_codes_newer_default_and_later_epochs():
    module = self_module(recipes.sra, loss="cosine", alpha=0.5)
    h, e = draw(3, 8, 5).requires_grad_(), draw(3, 8, 5, seed=7)
    expected = 1 - cosine(headed(module, h), e).mean()
    same(module, None, {"token": h}, 0.5 * expected, targets={"token": e})
    later, _ = module(students={"token": h}, targets={"token": e}, alpha=0.02)
    assert_close(later, 0.02 * expected, rtol=1e-9, atol=0)


def test_the_head_of_sra_begins_as_its_codes():
    for layer in list(recipes.sra(64).terms["token"].projector)[::2]:
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


def test_sras_loss_is_float32_for_halves():
    h = torch.randn(2, 8, 16, dtype=torch.bfloat16)
    out = recipes.sra(16).bfloat16().loss_dict(students={"token": h}, targets={"token": h.square()})
    assert out["loss_dino"].dtype == torch.float32


def test_selfflow():
    module = self_module(recipes.selfflow)
    h, e = draw(3, 8, 5).requires_grad_(), draw(3, 8, 5, seed=7)
    expected = 0.5 * (1 - cosine(headed(module, h), e).mean())
    same(module, None, {"token": h}, expected, targets={"token": e})
    some = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0], dtype=torch.float64).expand(3, -1)
    counted = 0.5 * (1 - cosine(headed(module, h), e)[some > 0].mean())
    same(module, None, {"token": h}, counted, targets={"token": e}, weight=some)


def test_layersync():
    module = self_module(recipes.layersync)
    base = draw(3, 8, 5).requires_grad_()
    early, late = base * 2, base.exp()  # of one forward
    loss = module.loss_dict(students={"token": early}, targets={"token": late})
    expected = -0.2 * cosine(base * 2, base.detach().exp()).mean()
    assert_close(loss["loss_dino"], expected, rtol=1e-9, atol=0)
    assert_close(*(torch.autograd.grad(x, base)[0] for x in (loss["loss_dino"], expected)), rtol=1e-9, atol=1e-11)
    assert list(module.parameters()) == []


def test_layersync_has_repas_value_without_a_projector():
    """The number that REPA's code gave for one image."""
    s = S.clone().requires_grad_()
    out = recipes.layersync(2, alpha=1.0).loss_dict(students={"token": s[None]}, targets={"token": T[None]})
    assert out["dino_token"].item() == pytest.approx(-0.327160188, abs=1e-9)
    out["loss_dino"].backward()
    slope = [0, -0.111803399, 0.0883883476, -0.0883883476, -0.0883883476, 0, 0, 0]
    assert s.grad.flatten().tolist() == pytest.approx(slope, abs=1e-9)
    zero = S.clone()
    zero[0] = 0
    out = recipes.layersync(2).loss_dict(students={"token": zero[None]}, targets={"token": T[None]})
    assert out["dino_token"].item() == pytest.approx(-0.103553391, abs=1e-9)


def vicreg_parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the hinge of the deviations, and the squared covariances off the diagonal over D."""
    centred = x - x.mean(0)
    covariance = centred.T @ centred / (len(x) - 1)
    off = covariance - torch.diag(covariance.diagonal())
    return F.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean(), off.square().sum() / x.shape[1]


@pytest.mark.parametrize("preset", ["vicreg", "lightly", "solo"])
@pytest.mark.parametrize("both", [False, True])
def test_vicreg(preset, both):
    torch.manual_seed(1)
    module = recipes.vicreg(7, teacher=Lone(5), preset=preset, both=both).double()
    z, given = 0.3 * draw(6, 7), {"global": 0.3 * draw(6, 5, seed=3)}
    p = module.terms["global"].projector
    z.requires_grad_()
    x = p[3](p[2](F.gelu(p[0](z))))
    var, cov = (a + both * b for a, b in zip(vicreg_parts(x), vicreg_parts(given["global"]), strict=True))
    inv, var = (x - given["global"]).square().mean(), var * (1 if preset == "solo" else 0.5)
    same(module, given, {"global": z}, 25 * inv + 25 * var + cov)
    logs = module.loss_dict(features=given, students={"global": z})
    assert_close(logs["dino_global_vic_inv"], inv.detach(), rtol=1e-9, atol=0)


def test_vicregs_own_values():
    """The numbers that the official code, lightly's and solo-learn's gave, and the student's gradient in all three."""
    x = torch.tensor([[1, 0, 2], [0, 1, -1], [-1, 2, 0], [3, -1, 1]], dtype=torch.float64)
    y = torch.tensor([[0, 1, 1], [1, 0, 0], [-2, 1, 1], [2, -2, 0]], dtype=torch.float64)
    assert recipes.vicreg(3, teacher=Lone(3)).terms["global"].loss.options["var_weight"] == 12.5
    values = {"vicreg": 34.8903094, "lightly": 34.8903094, "solo": 36.6509891, "seed": 25.7839506}
    for preset, value in values.items():
        module = recipes.vicreg(3, teacher=Lone(3), preset=preset, both=preset != "seed")
        module.terms["global"].projector = nn.Identity()
        student = x.clone().requires_grad_()
        loss = module.loss_dict(features={"global": y}, students={"global": student})["loss_dino"]
        assert loss.item() == pytest.approx(value, abs=1e-7)
        if preset != "seed":
            loss.backward()
            assert student.grad[0].tolist() == pytest.approx([5.42592593, -5.07407407, 4.51851852], abs=1e-7)


def test_sra_names_the_losses_that_it_takes():
    with pytest.raises(ValueError, match="^loss is 'l2'; use one of smooth_l1, cosine, mse, vicreg"):
        recipes.sra(5, loss="l2")
