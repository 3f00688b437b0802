"""Token alignment: a denoiser's hidden states against the teacher's patch tokens, by the formula in use."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from conftest import TinyTeacher, check_slope, grads, make_supervision
from fused_dino import Preprocess
from fused_dino.terms.token_grids import find_grid, standardize
from proving import DEVICE, IMPLEMENTATIONS

C = 10


def make(teacher, **options):
    torch.manual_seed(2)
    return make_supervision(teacher, **{"token_dim": C, **options})


def hidden(count=16, batch=6, dtype=torch.float32):
    return torch.randn(batch, count, C, generator=torch.Generator().manual_seed(5)).to(dtype)


def square(images):
    return images[..., :60, :]


def onto(x, grid, size):
    x = rearrange(x, "b (h w) d -> b d h w", h=grid[0])
    return F.interpolate(x, size, mode="bilinear", align_corners=False).flatten(2).mT


def repa(student, target):
    """Minus the mean similarity of normalised tokens, as REPA's trainer writes it, and one more."""
    return 1 - (F.normalize(student, dim=-1) * F.normalize(target, dim=-1)).sum(-1).mean()


CASES = [  # img_size, the tokens' grid as an argument, their grid, the grid where both meet
    (56, None, (4, 4), (4, 4)),
    (56, None, (7, 7), (7, 7)),
    (56, (2, 2), (2, 2), (4, 4)),
    ((56, 28), None, (4, 2), (4, 2)),
    ((56, 28), (2, 6), (2, 6), (4, 6)),
    ((28, 70), (3, 3), (3, 3), (3, 5)),
    (56, (1, 1), (1, 1), (4, 4)),
]


@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
@pytest.mark.parametrize("projector", ["mlp", "conv"])
@pytest.mark.parametrize(("size", "argument", "grid", "meeting"), CASES, ids=range(len(CASES)))
def test_is_the_formula_in_value_and_gradient(teacher, batch, size, argument, grid, meeting, projector, backend):
    options = {"token_grid": argument, "token_projector": projector, "preprocess": Preprocess(size)}
    module = make(teacher, in_dim=None, img_size=size, backend=backend, **options).to(DEVICE, torch.float64)
    x, h = (v.to(DEVICE, torch.float64) for v in (square(batch[1])[:2], hidden(grid[0] * grid[1], 2)))
    h.requires_grad_()
    target = module.encode(x)["patch"]
    loss, logs = module(x_img=x, tokens=h)
    p = module.token_projector
    if projector == "mlp":
        student = F.linear(F.silu(F.linear(F.silu(F.linear(h, p[0].weight, p[0].bias)), p[2].weight, p[2].bias)),
                           p[4].weight, p[4].bias)  # fmt: skip
        assert [p[i].out_features for i in (0, 2, 4)] == [2048, 2048, 24]
    else:
        maps = F.conv2d(rearrange(h, "b (h w) c -> b c h w", h=grid[0]), p.weight, p.bias, padding=1)
        student = maps.flatten(2).mT
    expected = repa(onto(student, grid, meeting), onto(target, module.teacher_grid, meeting))
    assert_close(loss, 0.5 * expected, rtol=1e-11, atol=1e-12)
    assert_close(logs, {"dino_token": expected.detach()}, rtol=1e-11, atol=1e-12)
    leaves = [h, *module.parameters()]
    assert_close(*(torch.autograd.grad(x, leaves) for x in (loss, 0.5 * expected)), rtol=1e-8, atol=1e-12)


def test_standardised_targets_have_mean_zero_and_deviation_one(teacher, batch):
    module = make(teacher, in_dim=None, token_standardize=True).double()
    x, h = batch[1].double(), hidden(dtype=torch.float64)
    t = module.encode(x)["patch"]
    t = (t - t.mean(1, keepdim=True)) / (t.var(1, unbiased=False, keepdim=True).sqrt() + 1e-6)
    assert_close(module(x_img=x, tokens=h)[1]["dino_token"], repa(module.token_projector(h), t).detach())
    assert_close(standardize(3 + 5 * t), t, rtol=1e-4, atol=1e-5)


def test_an_image_of_one_token_is_standardised_to_zero():
    token = torch.randn(3, 1, 8, requires_grad=True)
    out = standardize(token)
    assert torch.equal(out, torch.zeros(3, 1, 8))
    (grad,) = torch.autograd.grad(out.sum(), token)
    assert grad.isfinite().all()
    assert standardize(torch.ones(2, 5, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_adds_up_with_the_other_terms_and_stays_out_of_their_way(teacher, batch):
    options = {"use_patch": True, "latent_shape": (4, 4, 4), "w_global": 2.0, "w_patch": 0.3, "w_token": 0.7}
    module = make(teacher, warmup_steps=4, alpha=1.0, **options)
    loss, logs = module(*batch, tokens=hidden())
    assert list(logs) == ["dino_global", "dino_patch", "dino_token"]
    assert_close(loss.detach(), 2 * logs["dino_global"] + 0.3 * logs["dino_patch"] + 0.7 * logs["dino_token"])
    out = module.loss_dict(*batch, step=1, tokens=hidden())
    assert_close(out["loss_dino"], loss / 4)
    assert_close(out["dino_token"], logs["dino_token"])
    assert [name for name in out if "loss" in name] == ["loss_dino"]
    cached = module.loss_dict(batch[0], features=module.encode(batch[1]), step=1, tokens=hidden())
    assert_close(cached, out)


def test_tokens_alone_leave_a_zero_gradient_elsewhere(teacher, batch):
    options = {"use_patch": True, "latent_shape": (4, 4, 4), "patch_target": "attention"}
    module = make(teacher, warmup_steps=0, alpha=1.0, **options)
    with torch.no_grad():
        module.projector[0].weight.fill_(float("nan"))
    out = module.loss_dict(x_img=batch[1], tokens=hidden())
    assert out.keys() == {"loss_dino", "dino_token"}
    assert_close(out["loss_dino"].detach(), 0.5 * out["dino_token"])
    out["loss_dino"].backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any() == name.startswith("token_projector."), name
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_a_stopped_loss_reaches_every_parameter(teacher, batch, projector):
    module = make(teacher, stop_step=1, token_projector=projector)
    for p in module.parameters():
        nn.init.constant_(p, float("nan"))
    loss = module.loss_dict(*batch, tokens=hidden())["loss_dino"]
    assert loss == 0
    loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())
    alone = make(teacher, stop_step=1, in_dim=None, token_projector=nn.Linear(C, 24))
    assert {name for name, _ in alone.named_parameters()} == {"token_projector.weight", "token_projector.bias"}
    alone.loss_dict(x_img=batch[1], tokens=hidden())["loss_dino"].backward()


def test_any_module_may_project(teacher, batch):
    own = nn.Linear(C, 24)
    module = make(teacher, in_dim=None, token_projector=own)
    expected = repa(own(hidden()), module.encode(batch[1])["patch"])
    assert_close(module(x_img=batch[1], tokens=hidden())[1]["dino_token"], expected.detach())
    for wrong in (nn.Linear(C, 23), nn.Flatten(), nn.LSTM(C, 24)):
        with pytest.raises(ValueError, match=r"^token_projector must make \[6, 16, 24\]"):
            make(teacher, token_projector=wrong)(*batch, tokens=hidden())


def test_a_teacher_without_patches_lends_its_global_token(batch):
    module = make(TinyTeacher(patches=False), token_standardize=True)
    with pytest.warns(UserWarning, match="no patch tokens") as caught:
        _, logs = module(*batch, tokens=hidden(9))
        module(*batch, tokens=hidden(9))
    assert len(caught) == 1
    assert logs["dino_token_is_global"] == 1
    expected = repa(module.token_projector(hidden(9)), module.encode(batch[1])["global"].unsqueeze(1))
    assert_close(logs["dino_token"], expected.detach())


def test_a_teacher_without_patches_compiles_as_one_graph(fresh_compiler, batch):
    """The first call is compiled, too, and would warn."""
    module = make(TinyTeacher(patches=False))
    compiled = torch.compile(lambda z, x, tokens: module(z, x, tokens=tokens), fullgraph=True, backend="aot_eager")
    loss, logs = compiled(*batch, hidden())
    assert logs["dino_token_is_global"] == 1
    with pytest.warns(UserWarning, match="no patch tokens"):
        assert_close(loss, module(*batch, tokens=hidden())[0])


def test_casts_happen_at_the_boundary_and_autocast_stays_outside(teacher, batch):
    module = make(teacher, in_dim=None, token_grid=(3, 5), token_projector="conv")
    h = hidden(15, dtype=torch.bfloat16).requires_grad_()
    loss, _ = module(x_img=batch[1], tokens=h)
    assert loss.dtype == torch.float32
    loss.backward()
    assert h.grad.dtype == torch.bfloat16
    assert_close(module(x_img=batch[1], tokens=h.float())[0], loss)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(module(x_img=batch[1], tokens=h)[0], loss, rtol=0.01, atol=0)
    half = copy.deepcopy(module).bfloat16()
    assert_close(half(x_img=batch[1], tokens=h)[0], loss, rtol=0.02, atol=0)
    back = half.double()
    assert back(x_img=batch[1], tokens=h)[0].dtype == torch.float64


def test_the_image_gets_a_gradient_only_when_asked(teacher, batch):
    x, h = square(batch[1]).double().requires_grad_(), hidden(9, dtype=torch.float64)
    options = {"in_dim": None, "token_projector": "conv", "token_standardize": True}
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(make(teacher, **options).double()(x_img=x, tokens=h)[0], x)
    module = make(teacher, stopgrad_image=False, **options).double()
    check_slope(lambda x: module(x_img=x, tokens=h)[0], x)


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_copies_and_checkpoints_carry_it(teacher, batch, projector):
    module = make(teacher, token_grid=(2, 3), token_projector=projector)
    assert {name.partition(".")[0] for name in module.state_dict()} == {"projector", "token_projector", "schedule"}
    other = make(TinyTeacher(), token_grid=(2, 3), token_projector=projector)
    other.load_state_dict(module.state_dict())
    other.teacher = teacher
    expected = module(*batch, tokens=hidden(6))[0]
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(*batch, tokens=hidden(6))[0], expected)
    assert {p.device.type for p in (*module.to("meta").parameters(), *module.buffers())} == {"meta"}


@pytest.mark.parametrize("options", [{}, {"token_grid": (3, 3), "token_projector": "conv"}, {"in_dim": None}])
def test_compiles_as_one_graph(fresh_compiler, teacher, batch, options):
    module = make(teacher, token_standardize=True, warmup_steps=2, **options)
    twin = copy.deepcopy(module)
    arguments = {"z_text": None if "in_dim" in options else batch[0], "x_img": square(batch[1]), "tokens": hidden(9)}
    a = module.loss_dict(**arguments)
    b = torch.compile(twin.loss_dict, fullgraph=True, backend="aot_eager")(**arguments)
    assert_close(a, b)
    a["loss_dino"].backward()
    b["loss_dino"].backward()
    assert_close(grads(module), grads(twin))


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_wrapped_by_a_trainer_every_parameter_has_a_gradient_in_every_step(teacher, batch, wrap, tmp_path):
    """Latents and tokens, then tokens alone, then the stopped zero; DDP raises where a parameter is left out."""

    class Model(nn.Module):
        def __init__(self, dino):
            super().__init__()
            self.dino = dino

        def forward(self, **arguments):
            return self.dino.loss_dict(**arguments)["loss_dino"]

    options = {"use_patch": True, "latent_shape": (4, 4, 4), "patch_target": "attention", "stop_step": 3}
    plain = Model(make(teacher, warmup_steps=0, **options))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        twin = copy.deepcopy(plain)
        if wrap == "fsdp2":
            fully_shard(twin.dino, mesh=mesh)
        wrapped = DistributedDataParallel(twin) if wrap == "ddp" else fully_shard(twin, mesh=mesh)
        for z in (batch[0], None, batch[0]):
            for model in (plain, wrapped):
                model.zero_grad()
                model(z_text=z, x_img=batch[1], tokens=hidden()).backward()
            for p, q in zip(plain.parameters(), twin.parameters(), strict=True):
                assert_close(getattr(q.grad, "to_local", lambda q=q: q.grad)(), p.grad)
    finally:
        dist.destroy_process_group()


def test_a_grid_is_the_argument_the_images_or_the_teachers():
    assert find_grid(12, (2, 6), (3, 4), (60, 60)) == (2, 6)
    assert find_grid(16, None, (2, 8), (60, 60)) == (4, 4)
    assert find_grid(16, None, (2, 8), (60, 240)) == (2, 8)
    assert find_grid(64, None, (8, 8), (60, 240)) == (4, 16)
    assert find_grid(64, None, (8, 8), (60, 70)) == (8, 8)
    assert find_grid(16, None, (2, 8)) == (2, 8)
    for images in (None, (60, 70)):
        with pytest.raises(ValueError, match=r"^token_grid must be given"):  # a square is of square images alone
            find_grid(16, None, (3, 8), images)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("token_dim must be None or a positive int", {"token_dim": 0}),
        ("token_dim must be None or a positive int", {"token_dim": 2.5}),
        ("token_dim must be given", {"token_dim": None, "token_projector": "conv"}),
        ("token_dim must be given", {"token_dim": None, "token_standardize": True}),
        ("token_projector is 'attention'", {"token_projector": "attention"}),
        ("token_projector must be", {"token_projector": 3}),
        ("token_grid must be None or two positive ints", {"token_grid": 4}),
        ("token_grid must be None or two positive ints", {"token_grid": (4, 0)}),
        ("token_grid must be None or two positive ints", {"token_grid": torch.tensor([4, 4])}),
        ("token_standardize must be True or False", {"token_standardize": 1}),
        ("w_token must be", {"w_token": "half"}),
        ("in_dim must be", {"in_dim": None, "token_dim": None}),
        ("in_dim must be", {"in_dim": None, "use_patch": True}),
    ],
)
def test_configuration_errors_come_at_construction(teacher, message, options):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        make(teacher, **options)


def test_bad_calls_are_named(teacher, batch):
    (z, x), h = batch, hidden()
    module, alone = make(teacher), make(teacher, in_dim=None)
    for m, message, arguments in (
        (module, "tokens must be given", {"z_text": z, "x_img": x}),
        (module, "tokens must be given", {"x_img": x}),
        (module, "tokens must be floats", {"z_text": z, "x_img": x, "tokens": h[0]}),
        (module, "tokens must be floats", {"z_text": z, "x_img": x, "tokens": h[..., :8]}),
        (module, "tokens must be floats", {"z_text": z, "x_img": x, "tokens": h.long()}),
        (module, "tokens must be floats", {"z_text": z, "x_img": x, "tokens": [1]}),
        (module, "tokens must have the images' batch size 6", {"z_text": z, "x_img": x, "tokens": h[:4]}),
        (module, "tokens must have the images' batch size", {"x_img": x, "tokens": h[:4]}),
        (module, "tokens must have the images' batch", {"features": module.encode(x), "tokens": h[:4]}),
        (module, "token_grid must be given", {"x_img": x, "tokens": h[:, :15]}),
        (make(teacher, token_grid=(4, 4)), "tokens must be 4 x 4", {"x_img": x, "tokens": h[:, :9]}),
        (module, "give x_img", {"tokens": h}),
        (alone, "z_text must be left out", {"z_text": z, "x_img": x, "tokens": h}),
        (make(teacher, token_dim=None), "tokens must be left out: construct with token_dim", {"x_img": x, "tokens": h}),
        (make(teacher, token_dim=None), "z_text must be a tensor", {"x_img": x}),
        (module, "z_text must be a tensor", {"z_text": [1], "x_img": x, "tokens": h}),
    ):
        for call in (m, m.loss_dict):
            with pytest.raises((ValueError, TypeError), match=f"^{message}"):
                call(**arguments)
