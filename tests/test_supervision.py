"""DinoSupervision: the recipe's numbers, objects in place of names, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import recipe
from conftest import TinyTeacher, check_slope
from conftest import make_supervision as make
from fused_dino import CosineLoss, DinoSupervision, MSELoss, Preprocess, VICRegLoss

SIZE = 56
LATENT = (4, 4, 4)


def twins(teacher, loss_type, patch, **options):
    """The recipe and ours with the same weights, in float64."""
    torch.manual_seed(3)
    theirs = recipe.Recipe(teacher, 64, 32, SIZE, loss_type, LATENT if patch else None, warmup=50).double()
    ours = make(
        teacher,
        loss_type=loss_type,
        use_patch=patch,
        latent_shape=LATENT,
        patch_target="mean",
        warmup_steps=50,
        **options,
    ).double()
    ours.projector.load_state_dict(theirs.dino_t_head.state_dict())
    if patch:
        ours.local_projector.load_state_dict(theirs.dino_local_head.state_dict())
    return theirs, ours


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("loss_type", ["cosine", "mse", "vicreg"])
def test_is_the_recipe_in_value_logs_and_gradient(teacher, batch, loss_type, patch):
    theirs, ours = twins(teacher, loss_type, patch)
    z, x = (v.double() for v in batch)
    z.requires_grad_()
    (their_loss, their_logs), (our_loss, our_logs) = theirs.compute_dino_loss(z, x), ours(z, x)
    assert_close(our_loss, their_loss, rtol=1e-11, atol=1e-13)
    assert our_logs.keys() == their_logs.keys()
    for name, value in our_logs.items():
        assert_close(value, their_logs[name].detach(), rtol=1e-11, atol=1e-13)
    their_grads = torch.autograd.grad(their_loss, [z, *(p for p in theirs.parameters() if p.requires_grad)])
    our_grads = torch.autograd.grad(our_loss, [z, *ours.parameters()])
    assert_close(our_grads, tuple(their_grads), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("loss_type", ["cosine", "mse", "vicreg"])
def test_two_hundred_steps_side_by_side(teacher, loss_type):
    """The two curves have one random state, batches and AdamW in common, and differ by float64's rounding alone."""
    theirs, ours = twins(teacher, loss_type, True)
    curves = []
    for module in (theirs, ours):
        generator = torch.Generator().manual_seed(11)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
        curve = []
        for _ in range(200):
            z = torch.randn(6, 64, generator=generator, dtype=torch.float64)
            x = torch.rand(6, 3, 64, 64, generator=generator, dtype=torch.float64) * 2 - 1
            optimizer.zero_grad()
            losses = module.loss_dict(z, x)
            losses["loss_dino"].backward()
            optimizer.step()
            curve.append(losses["loss_dino"].item())
        curves.append(torch.tensor(curve))
    assert_close(curves[1], curves[0], rtol=1e-6, atol=1e-12)


def test_features_may_be_computed_ahead(teacher, batch):
    z, x = batch
    module = make(teacher, use_patch=True, latent_shape=LATENT)
    features = module.encode(x)
    assert features["global"].shape == (6, 24)
    assert features["patch"].shape == (6, 16, 24)
    assert not features["global"].requires_grad
    loss, logs = module(z, features=features)
    expected, expected_logs = module(z, x)
    assert torch.equal(loss, expected)
    assert logs == expected_logs
    assert torch.equal(module.loss_dict(z, features=features, step=7)["dino_global"], logs["dino_global"])


def test_loss_dict_is_safe_for_trainers_that_add_up_losses(teacher, batch):
    for loss_type in ("cosine", "mse", "vicreg"):
        losses = make(teacher, loss_type=loss_type, use_patch=True, latent_shape=LATENT).loss_dict(*batch)
        assert [name for name in losses if "loss" in name] == ["loss_dino"]
        assert [name for name, value in losses.items() if value.requires_grad] == ["loss_dino"]
        assert all(value.shape == () for value in losses.values())


def test_the_image_gets_a_real_gradient_when_asked(teacher, batch):
    z, x = batch
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(make(teacher)(z, x)[0], x)
    for loss_type in ("cosine", "mse", "vicreg"):
        module = make(teacher, loss_type=loss_type, stopgrad_image=False, use_patch=True, latent_shape=LATENT).double()
        module.eval()
        check_slope(lambda x: module(z.double(), x)[0], x.detach().double().requires_grad_())  # noqa: B023


def test_bytes_are_refused_where_the_image_gets_a_gradient(teacher, batch):
    z, x = batch
    raw = ((x + 1) * 127.5).to(torch.uint8)
    module = make(teacher, stopgrad_image=False)
    with pytest.raises(ValueError, match="^x_img must be floats where stopgrad_image=False"):
        module(z, raw)
    assert module(z, features=module.encode(raw))[0].isfinite(), "what was computed ahead has no gradient to lose"


def test_objects_may_stand_in_place_of_names(teacher, batch):
    z, x = batch
    loss = VICRegLoss(gamma=2.0, group=None)
    module = make(teacher, loss_type=loss, group="auto", preprocess=Preprocess(SIZE, antialias=True))
    loss, logs = module(z, x)
    target = teacher(Preprocess(SIZE, antialias=True)(x))["global"]
    expected = VICRegLoss(gamma=2.0)(module.projector(z), target)
    assert_close(loss, expected.loss)
    assert_close(logs["dino_vic_var"], expected.variance)
    for loss_type, same in (("cosine", CosineLoss()), ("mse", MSELoss())):
        torch.manual_seed(1)
        named = make(teacher, loss_type=loss_type)(z, x)[0]
        torch.manual_seed(1)
        assert torch.equal(named, make(teacher, loss_type=same)(z, x)[0])
    own = make(teacher, loss_type=nn.L1Loss())
    assert_close(own(z, x)[0], (own.projector(z) - own.encode(x)["global"]).abs().mean())
    halves = make(teacher, preprocess=nn.Upsample((SIZE, SIZE)))
    assert_close(halves.encode(x)["global"], teacher(nn.Upsample((SIZE, SIZE))(x))["global"])


def test_the_teachers_statistics_are_used(teacher, batch):
    teacher.mean, teacher.std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    x = batch[1]
    expected = teacher.eval()(nn.functional.interpolate(x, (SIZE, SIZE), mode="bilinear"))["global"]
    assert_close(make(teacher).encode(x)["global"], expected, rtol=1e-4, atol=1e-5)


def test_casts_happen_at_the_boundary(batch):
    z, x = batch
    torch.manual_seed(0)
    module = make(TinyTeacher(), teacher_dtype=torch.bfloat16)
    assert next(module.teacher.parameters()).dtype == torch.bfloat16
    assert module.encode(x)["global"].dtype == torch.bfloat16
    assert next(module.projector.parameters()).dtype == torch.float32
    for z_dtype in (torch.bfloat16, torch.float64):
        assert module(z.to(z_dtype), x.to(torch.bfloat16))[0].dtype == torch.float32
    seen = []
    module.teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module.encode(x)
    direct = Preprocess(SIZE)(x).bfloat16()
    assert torch.equal(seen[0], direct), "float32 inside, and one cast before the teacher"
    raw = ((x + 1) * 127.5).round().to(torch.uint8)
    assert_close(module.encode(raw)["global"], module.encode(raw / 127.5 - 1)["global"], rtol=0.02, atol=0.02)
    module = make(TinyTeacher())
    module.encode(x.bfloat16())
    module.teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module.encode(x.bfloat16())
    assert seen[-1].dtype == torch.float32
    assert torch.equal(seen[-1], Preprocess(SIZE, out_dtype=torch.float32)(x.bfloat16()))


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("img_size must be a multiple of the teacher's patch size 14", {"img_size": 60}),
        ("img_size must be", {"img_size": 0}),
        ("loss_type is 'huber'", {"loss_type": "huber"}),
        ("patch_target is 'all'", {"patch_target": "all"}),
        ("patch_grid must be", {"patch_grid": (0, 2)}),
        (r"latent_shape .* square maps that fit: \(1, 8, 8\), \(4, 4, 4\), \(16, 2, 2\)", {"use_patch": True}),
        ("latent_shape must be three", {"use_patch": True, "latent_shape": (8, 8)}),
        ("alpha must be", {"alpha": "strong"}),
        ("warmup_steps must be", {"warmup_steps": -1}),
        ("stop_step must be", {"stop_step": 1.5}),
        ("w_patch must be", {"w_patch": None}),
        ("use_patch must be True or False", {"use_patch": "no"}),
        ("stopgrad_image must be True or False", {"stopgrad_image": 0}),
        ("in_dim must be", {"in_dim": 0}),
        ("hidden_dim must be", {"hidden_dim": 2.5}),
        ("backend is 'cuda'", {"backend": "cuda"}),
        ("group is 'everyone'", {"group": "everyone", "loss_type": "vicreg"}),
        ("group is 'everyone'", {"group": "everyone"}),
        ("group is 'everyone'", {"group": "everyone", "loss_type": CosineLoss()}),
        ("group must be", {"group": 3}),
        ("preprocess is 'area'", {"preprocess": "area"}),
        ("stopgrad_image=False needs a loss_type", {"stopgrad_image": False, "loss_type": CosineLoss()}),
        ("teacher Linear must have an int embed_dim", {"teacher": nn.Linear(2, 2)}),
        ("teacher must be a model's name", {"teacher": 3}),
    ],
)
def test_configuration_errors_come_at_construction(teacher, message, options):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        make(**{"teacher": teacher, **options})


def test_a_teacher_for_another_size_is_refused(teacher):
    teacher.img_size = (224, 224)
    with pytest.raises(ValueError, match=r"^img_size is \(56, 56\) and the teacher was built for \(224, 224\)"):
        make(teacher)


def test_an_unknown_variant_names_the_known_ones():
    with pytest.raises(ValueError, match="vitl14"):
        DinoSupervision(teacher="vitxl14", pretrained=False)


def test_bad_calls_are_named(teacher, batch):
    z, x = batch
    module = make(teacher)
    for message, arguments in (
        ("z_text must be floats", {"z_text": z[:, :8], "x_img": x}),
        ("z_text must be floats", {"z_text": z.long(), "x_img": x}),
        ("z_text must be a tensor", {"z_text": None, "x_img": x}),
        ("z_text must have the images' batch size 4", {"z_text": z, "x_img": x[:4]}),
        (r"x_img must be \[B, 3, H, W\], got shape \[\]", {"z_text": z, "x_img": x[0, 0, 0, 0]}),
        ("x_img must be a torch.Tensor, got int", {"z_text": z, "x_img": 3}),
        ("x_img must be a torch.Tensor, got list", {"z_text": z, "x_img": list(x)}),
        ("x_img must be", {"z_text": z, "x_img": x[:, :1]}),
        ("give x_img", {"z_text": z}),
        ("give x_img or features, not both", {"z_text": z, "x_img": x, "features": module.encode(x)}),
        ("features must be", {"z_text": z, "features": x}),
        ("features must be", {"z_text": z, "features": {"global": torch.zeros(6, 25), "patch": None}}),
        ("features must be", {"z_text": z, "features": {"global": torch.zeros(6, 24), "patch": [1]}}),
        ("features must be", {"z_text": z, "features": {"global": torch.zeros(6, 24), "patch": torch.zeros(6, 24)}}),
        (
            "features must be",
            {"z_text": z, "features": {"global": torch.zeros(6, 24), "patch": torch.zeros(5, 16, 24)}},
        ),
        ("z_text must have the images' batch size 5", {"z_text": z, "features": module.encode(x[:5])}),
        ("alpha must be", {"z_text": z, "x_img": x, "alpha": "x"}),
        ("alpha must be", {"z_text": z, "x_img": x, "alpha": float("nan")}),
        ("alpha must be", {"z_text": z, "x_img": x, "alpha": torch.ones(2)}),
        ("alpha must be", {"z_text": z, "x_img": x, "alpha": torch.ones((), requires_grad=True)}),
    ):
        for loss_type in ("cosine", "vicreg"):
            with pytest.raises((ValueError, TypeError), match=f"^{message}"):
                make(teacher, loss_type=loss_type)(**arguments)
    with pytest.raises(ValueError, match="^z_text must be floats"):
        module.loss_dict(z[:, :8], x)
    assert module.schedule.step == 0, "a call that is refused is no step"
    with pytest.raises(TypeError, match="^x_img must be a torch.Tensor, got list"):
        module.encode(list(x))
    with pytest.raises(ValueError, match="^step must be"):
        module.loss_dict(z, x, step=-1)
    wrong = {"global": module.encode(x)["global"], "patch": torch.zeros(6, 17, 24)}
    with pytest.raises(ValueError, match="17 patch tokens where"):
        make(teacher, use_patch=True, latent_shape=LATENT)(z, features=wrong)
    with pytest.raises(ValueError, match=r"^group belongs to the loss .* VICRegLoss\(group=...\)"):
        make(teacher, loss_type=VICRegLoss(), group=None)
    with pytest.raises(TypeError, match="^loss_type must return a scalar"):
        make(teacher, loss_type=CosineLoss(reduction="none"))(z, x)


def test_a_loss_module_keeps_its_own_alpha_and_its_hooks(teacher, batch):
    z, x = batch
    torch.manual_seed(0)
    plain = make(teacher)(z, x)[0]
    torch.manual_seed(0)
    assert_close(make(teacher, loss_type=CosineLoss(scale=0.5))(z, x, alpha=3.0)[0], 1.5 * plain)
    torch.manual_seed(0)
    module, seen = make(teacher), []
    module.loss.register_forward_hook(lambda *call: seen.append(call))
    assert_close(module(z, x)[0], plain)
    assert len(seen) == 1


def test_the_projector_is_the_recipes(teacher):
    torch.manual_seed(5)
    theirs = recipe.head(64, 32, 24)
    torch.manual_seed(5)
    ours = make(teacher).projector
    for (name, p), (their_name, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == their_name
        assert torch.equal(p, q)
