"""DINOv2Backbone as a module: pixels or patches in, frozen, and invisible to checkpoints."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from fused_dino import DinoSupervision, Preprocess
from fused_dino.teacher import DINOv2Backbone

timm = pytest.importorskip("timm")


def tiny_vit(**options) -> nn.Module:
    """A DINOv2 of timm's, one block of width 32, for images of 28 x 42."""
    torch.manual_seed(0)
    shape = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": (28, 42), "num_classes": 0}
    return timm.create_model("vit_small_patch14_reg4_dinov2", **(shape | options))


@pytest.fixture
def backbone() -> DINOv2Backbone:
    return DINOv2Backbone(img_size=(28, 42), model=tiny_vit())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 28, 42, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_trap_5_registers_are_no_patches(backbone, x):
    tokens = backbone.model.forward_features(x)
    out = backbone(x)
    assert tokens.shape == (2, 1 + 4 + 6, 32)
    assert set(out) == {"global", "patch", "grid"}
    torch.testing.assert_close(out["global"], tokens[:, 0])
    torch.testing.assert_close(out["patch"], tokens[:, 5:])
    assert out["grid"] == backbone.grid == (2, 3)


def test_models_that_cannot_serve_are_refused_at_construction():
    with pytest.raises(ValueError, match="embed_dim"):
        DINOv2Backbone(img_size=28, model=nn.Identity())
    with pytest.raises(ValueError, match=r"img_size must be \(28, 42\)"):
        DINOv2Backbone(img_size=56, model=tiny_vit())
    with pytest.raises(ValueError, match=r"multiple of the patch size 32.* \(32, 64\) or \(64, 64\)"):
        DINOv2Backbone(img_size=(48, 64), model="tf_efficientnet_lite0", pretrained=False)


# --- patches in place of pixels ---------------------------------------------------------------------------------------


def patches_of(x: Tensor, p: int) -> Tensor:
    """Return the patches of images row by row, each in the order of a convolution's weight."""
    return torch.nn.functional.unfold(x, p, stride=p).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "size"), [("vit_small_patch14_reg4_dinov2", (56, 70)), ("vit_small_patch16_dinov3", (48, 80))]
)
def test_patches_give_the_features_of_their_pixels(name, size):
    backbone = DINOv2Backbone(model=name, img_size=size, pretrained=False).double()
    x = torch.randn(2, 3, *backbone.img_size, dtype=torch.float64)
    expected, out = backbone(x), backbone(patches_of(x, backbone.patch_size))
    for key in ("global", "patch"):
        torch.testing.assert_close(out[key], expected[key], rtol=1e-10, atol=1e-10)
    assert torch.equal(backbone(x)["patch"], expected["patch"]), "and pixels are taken again afterwards"


@torch.no_grad()
def test_patches_are_one_matrix_product(backbone, x):
    with torch.profiler.profile() as profile:
        backbone(patches_of(x, 14))
    assert not any("conv" in event.key for event in profile.key_averages())


@torch.no_grad()
def test_threads_that_share_a_teacher_get_each_their_own_features(backbone, x):
    """Every thread hands in its patches before any of them goes on."""
    several = [patches_of(x + i, 14) for i in range(4)]
    expected = [backbone(patches)["patch"] for patches in several]
    barrier = threading.Barrier(len(several))

    def meet(*_):
        barrier.wait(timeout=60)

    backbone.computing.patch_embed.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(len(several)) as pool:
        actual = [out["patch"] for out in pool.map(backbone, several)]
    torch.testing.assert_close(actual, expected)


def test_gradient_reaches_the_patches(backbone, x):
    x = x.double().requires_grad_()
    backbone.double()
    patches = patches_of(x, 14)
    (through,) = torch.autograd.grad(backbone(patches)["patch"].square().sum(), x)
    (true,) = torch.autograd.grad(backbone(x)["patch"].square().sum(), x)
    torch.testing.assert_close(through, true, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_supervision_through_patches(backbone):
    images, z = torch.rand(2, 3, 40, 50) * 2 - 1, torch.randn(2, 8)
    dino = DinoSupervision(in_dim=8, teacher=backbone, img_size=(28, 42), hidden_dim=16)
    expected = dino(z, images)[0]
    dino.preprocess = Preprocess((28, 42), patch_size=14)
    torch.testing.assert_close(dino(z, images)[0], expected)


@pytest.mark.parametrize("shape", [(2, 5, 588), (2, 6, 587), (6, 588)])
def test_patches_of_another_grid_are_refused(backbone, shape):
    with pytest.raises(ValueError, match=r"x must be .*\[B, 3, 28, 42\], or patches \[B, 6, 588\]"):
        backbone(torch.zeros(shape))


# --- frozen, and out of the way ---------------------------------------------------------------------------------------


def test_trap_7_stays_frozen_and_in_eval_mode():
    model = nn.Sequential(nn.Conv2d(3, 8, 14, 14), nn.BatchNorm2d(8), nn.Dropout(0.5)).train()
    model.embed_dim = 8
    parent = nn.ModuleDict({"teacher": DINOv2Backbone(img_size=28, model=model)})
    parent.train()
    assert parent.training
    assert not any(module.training for module in parent["teacher"].modules())
    parent["teacher"].requires_grad_(True).train()
    assert not any(p.requires_grad for p in model.parameters())
    x = torch.randn(4, 3, 28, 28)
    first, second = parent["teacher"](x), parent["teacher"](x)
    assert torch.equal(first["patch"], second["patch"])
    assert not first["patch"].requires_grad
    assert model[1].num_batches_tracked == 0


class Parent(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.teacher = DINOv2Backbone(img_size=(28, 42), model=tiny_vit())
        torch.manual_seed(seed)
        self.head = nn.Linear(32, 4)
        with torch.no_grad():
            self.teacher.model.cls_token.fill_(seed)


def test_trap_7_teacher_stays_out_of_checkpoints(backbone):
    assert set(Parent(0).state_dict()) == {"head.weight", "head.bias"}
    assert len(backbone.state_dict()) == 0
    assert len(backbone.model.state_dict()) > 10


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_without_the_teacher_loads_strictly(assign):
    parent, saved = Parent(0), Parent(1).state_dict()
    assert parent.load_state_dict(saved, strict=True, assign=assign) == ([], [])
    assert torch.equal(parent.head.weight, saved["head.weight"])
    assert (parent.teacher.model.cls_token == 0).all()
    assert not any(p.requires_grad for p in parent.teacher.parameters())
    parent.teacher.load_state_dict({}, assign=assign)
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        parent.load_state_dict({"head.weight": saved["head.weight"]})


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_with_the_teacher_loads_it(assign):
    parent, other = Parent(0), Parent(1)
    full = other.state_dict() | other.teacher.model.state_dict(prefix="teacher.model.")
    parent.load_state_dict(full, strict=True, assign=assign)
    assert (parent.teacher.model.cls_token == 1).all()
    assert not any(p.requires_grad for p in parent.teacher.parameters())
    del full["teacher.model.reg_token"]
    with pytest.raises(RuntimeError, match="reg_token"):
        parent.load_state_dict(full)


@torch.no_grad()
def test_copies_and_pickles_are_the_same_teacher(backbone, x):
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(twin(x)["patch"], backbone(x)["patch"])
        assert (twin.grid, twin.mean, twin.training) == (backbone.grid, backbone.mean, False)
        assert not any(p.requires_grad for p in twin.parameters())
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(twin.parameters(), backbone.parameters(), strict=True))


# --- inputs -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_trap_21_images_are_cast_to_the_weights(backbone, x):
    """The recipe's float32 teacher raised an error on bfloat16 images."""
    exact = backbone(x)["patch"]
    out = backbone(x.bfloat16())
    assert out["patch"].dtype == torch.float32
    assert torch.equal(out["patch"], backbone(x.bfloat16().float())["patch"])
    half = backbone.to(torch.bfloat16)(x)
    assert half["global"].dtype == half["patch"].dtype == torch.bfloat16
    torch.testing.assert_close(half["patch"].float(), exact, atol=0.1, rtol=0.05)
    assert DINOv2Backbone(img_size=(28, 42), model=tiny_vit(), dtype=torch.float64)(x)["patch"].dtype == torch.float64


def test_trap_22_gradient_reaches_the_image(backbone, x):
    x = x.double().requires_grad_()
    backbone.double()
    assert torch.autograd.gradcheck(lambda x: backbone(x)["patch"][:, :, :2].sum((1, 2)), x[:1], fast_mode=True)
    out = backbone(x)
    (out["global"].sum() + out["patch"].square().sum()).backward()
    assert x.grad.abs().min() > 0
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize("shape", [(3, 28, 42), (2, 1, 28, 42), (2, 3, 42, 28), (2, 3, 28, 43), (2, 6, 32)])
def test_images_of_another_shape_are_refused(backbone, shape):
    with pytest.raises(ValueError, match=r"x must be .*\[B, 3, 28, 42\]"):
        backbone(torch.zeros(shape))


def test_integer_images_are_refused(backbone):
    with pytest.raises(ValueError, match=r"x must be floating .* torch\.uint8"):
        backbone(torch.zeros(2, 3, 28, 42, dtype=torch.uint8))


@torch.no_grad()
def test_no_images_give_no_features(backbone, x):
    out = backbone(x[:0])
    assert out["global"].shape == (0, 32)
    assert out["patch"].shape == (0, 6, 32)


@torch.no_grad()
def test_compiles_as_one_graph(backbone, x):
    compiled = torch.compile(backbone, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x)["patch"], backbone(x)["patch"])
    patches = patches_of(x, 14)
    assert torch.equal(compiled(patches)["patch"], backbone(patches)["patch"])
    assert torch.equal(compiled(x)["patch"], backbone(x)["patch"])
