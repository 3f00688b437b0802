"""DINOv2Backbone's names, sizes and files of weights, and the arguments that it refuses."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fused_dino import DinoSupervision
from fused_dino.teacher import DINOv2Backbone
from fused_dino.teacher.weights import canonical

timm = pytest.importorskip("timm")

NAMES = [f"vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg")]


@pytest.fixture(scope="module")
def timm_weights(tmp_path_factory):
    """timm's own names of vits14, with random weights of a 4 x 4 grid."""
    path = tmp_path_factory.mktemp("timm") / "model.pth"
    torch.save(timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=56).state_dict(), path)
    return path


# --- names and arguments ----------------------------------------------------------------------------------------------


def timm_name(variant: str) -> str:
    size = {"s": "small", "b": "base", "l": "large", "g": "giant"}[variant[3]]
    return f"vit_{size}_patch14_{'reg4_' if variant.endswith('_reg') else ''}dinov2"


def hf_name(variant: str) -> str:
    size = {"s": "small", "b": "base", "l": "large", "g": "giant"}[variant[3]]
    return f"facebook/dinov2-{'with-registers-' if variant.endswith('_reg') else ''}{size}"


@pytest.mark.parametrize("variant", NAMES)
def test_trap_2_every_variant_by_every_name(variant):
    width, depth = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "g": (1536, 40)}[variant[3]]
    name = timm_name(variant)
    repa = f"dinov2{'reg' if 'reg' in variant else ''}-vit-{variant[3]}"
    aliases = [variant, variant.upper(), f"dinov2_{variant}", name, f"{name}.lvd142m", repa, hf_name(variant)]
    assert [canonical(alias) for alias in aliases] == [variant] * 7
    with torch.device("meta"):
        backbone = DINOv2Backbone(aliases[-1], (28, 42), pretrained=False)
        out = backbone(torch.empty(2, 3, 28, 42))
    assert (backbone.variant, backbone.embed_dim, backbone.source) == (variant, width, "random")
    assert (len(backbone.model.blocks), backbone.model.num_prefix_tokens) == (depth, 5 if "reg" in variant else 1)
    assert (backbone.img_size, backbone.grid, backbone.patch_size) == ((28, 42), (2, 3), 14)
    assert (backbone.mean, backbone.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert out["global"].shape == (2, width)
    assert out["patch"].shape == (2, 6, width)


@pytest.mark.parametrize(
    "variant",
    ["vith14", "vitl16", "vit_gigantic_patch14_224", "", None, "vits14_reg_reg", "mocov3-vit-b", "dinov2-vit-h"],
)
def test_trap_3_unknown_variants_are_refused(variant):
    with pytest.raises(ValueError, match="variant is .*vits14, vitb14, .*vitg14_reg"):
        DINOv2Backbone(variant, pretrained=False)


@pytest.mark.parametrize(
    ("name", "source", "patch"),
    [
        ("dinov2-vit-s", "random", 14),
        ("dinov2reg-vit-s", "random", 14),
        ("vit_small_patch14_dinov2.lvd142m", "random", 14),
        ("vit_tiny_patch16_224", "model", 16),
        ("vit_small_patch16_dinov3.lvd1689m", "model", 16),
        ("tf_efficientnet_lite0", "model", 32),
    ],
)
def test_a_supervision_takes_a_teacher_by_repas_and_timms_names(name, source, patch):
    dino = DinoSupervision(in_dim=8, teacher=name, img_size=2 * patch, hidden_dim=16, pretrained=False)
    assert (dino.teacher.source, dino.teacher.grid) == (source, (2, 2))
    assert torch.isfinite(dino(torch.randn(2, 8), torch.rand(2, 3, 40, 40) * 2 - 1)[0])


@pytest.mark.parametrize("name", ["mocov3-vit-b", "vit_of_nobody", ""])
def test_a_teacher_of_no_known_name_is_refused(name):
    with pytest.raises(ValueError, match=rf"^teacher is '{name}'; use a DINOv2, one of vits14, .* timm \d"):
        DinoSupervision(in_dim=8, teacher=name, pretrained=False)


@pytest.mark.parametrize(
    ("size", "nearest"), [(225, ": (224, 224) or (238, 238)"), ((28, 20), ": (28, 14) or (28, 28)"), (3, ": (14, 14)")]
)
def test_trap_23_sizes_between_patches_are_refused(size, nearest):
    with pytest.raises(ValueError, match="img_size must be a multiple of the patch size 14") as caught:
        DINOv2Backbone("vits14", size, source="local", weights="never opened")
    assert str(caught.value).endswith(nearest)


@pytest.mark.parametrize("size", [0, -14, 224.0, True, (224,), (14, 14, 14), "224", None, (14, 0)])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(ValueError, match="img_size must be a positive int or a pair"):
        DINOv2Backbone("vits14", size, pretrained=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "github"}, "source is 'github'; use one of auto, hub, timm, local"),
        ({"pos_embed": "bicubic"}, "pos_embed is 'bicubic'; use one of official, timm"),
        ({"source": "local"}, 'source="local" needs weights'),
        ({"source": "local", "pretrained": False}, 'source="local" needs weights'),
        ({"source": "hub", "weights": "w.pth"}, "weights='w.pth' needs source"),
        ({"source": "timm", "weights": Path("w.pth")}, "weights='w.pth' needs source"),
        ({"weights": "w.pth", "pretrained": False}, "weights and pretrained=False"),
        ({"source": "hub", "pos_embed": "timm"}, 'pos_embed="timm"'),
        ({"use_timm_fallback": False, "pos_embed": "timm"}, 'pos_embed="timm"'),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DINOv2Backbone("vits14", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 1}, "model must be None, a timm model's name or a module, got int"),
        ({"model": "vit_of_nobody"}, "model is 'vit_of_nobody', which timm"),
        ({"model": "resnet18", "source": "timm"}, "model brings its own weights"),
        ({"model": nn.Identity(), "weights": "w.pth"}, "model brings its own weights"),
        ({"model": "resnet18", "pos_embed": "timm"}, "model brings its own weights"),
        ({"weights": 1}, "weights must be None or the path of a file or folder, got 1"),
        ({"weights": ""}, "weights must be None or the path of a file or folder, got ''"),
    ],
)
def test_what_is_no_model_or_path_is_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}"):
        DINOv2Backbone("vits14", **options)


@pytest.mark.parametrize("name", ["pretrained", "use_timm_fallback"])
def test_flags_are_true_or_false(name):
    with pytest.raises(TypeError, match=f"^{name} must be True or False, got 'yes'"):
        DINOv2Backbone("vits14", **{"pretrained": False, name: "yes"})


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, "bfloat16"])
def test_dtypes_that_are_not_floating_are_refused(dtype):
    with pytest.raises(TypeError, match="dtype must be"):
        DINOv2Backbone("vits14", pretrained=False, dtype=dtype)


# --- files ------------------------------------------------------------------------------------------------------------


def test_trap_1_timm_is_built_for_the_size():
    backbone = DINOv2Backbone("vits14", pretrained=False)
    assert backbone(torch.zeros(1, 3, 224, 224))["patch"].shape == (1, 256, 384)
    assert backbone.source == "random"


def test_dtype_is_the_files_unless_asked(timm_weights, tmp_path):
    half = DINOv2Backbone("vits14", 56, weights=timm_weights, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    state = half.model.state_dict()
    assert {x.dtype for x in state.values()} == {torch.float32}, "which is how they are stored"
    torch.save({name: x.bfloat16() for name, x in state.items()}, tmp_path / "half.pth")
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        backbone = DINOv2Backbone("vits14", 28, weights=tmp_path / "half.pth", dtype=dtype)
        assert {p.dtype for p in backbone.parameters()} == {expected}
        assert backbone.source == "local"


def test_the_default_device_is_kept(timm_weights):
    with torch.device("meta"):
        backbone = DINOv2Backbone("vits14", 28, weights=timm_weights)
    assert {p.device.type for p in backbone.parameters()} == {"meta"}
    assert backbone.mean == (0.485, 0.456, 0.406)


def test_files_that_are_not_this_model_are_refused(timm_weights, tmp_path):
    def refused(path, variant="vits14", error=ValueError):
        with pytest.raises(error, match="weights: ") as caught:
            DINOv2Backbone(variant, 28, source="local", weights=path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    refused(tmp_path / "missing.pth", error=FileNotFoundError)
    refused(tmp_path, error=FileNotFoundError)
    assert "does not hold DINOv2 'vits14_reg'" in refused(timm_weights, "vits14_reg")
    assert "does not hold DINOv2 'vitb14'" in refused(timm_weights, "vitb14")
    for name in ("broken.safetensors", "broken.pth"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        refused(tmp_path / name)
    torch.save({"resnet.weight": torch.zeros(1)}, tmp_path / "other.pth")
    assert "0 vision transformers" in refused(tmp_path / "other.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "code.pth")
    assert "it holds a torch.nn.modules.linear.Linear, and not tensors alone" in refused(tmp_path / "code.pth")
    state = DINOv2Backbone("vits14", 28, weights=timm_weights).model.state_dict()
    torch.save({f"{who}.{k}": v for k, v in state.items() for who in ("student", "teacher")}, tmp_path / "two.pth")
    assert "2 vision transformers" in refused(tmp_path / "two.pth")
    torch.save(state | {"pos_embed": torch.zeros(1, 7, 384)}, tmp_path / "grid.pth")
    assert "no square grid" in refused(tmp_path / "grid.pth")
    torch.save(state | {"patch_embed.proj.weight": torch.zeros(384, 3, 16, 16)}, tmp_path / "patch16.pth")
    assert "[384, 3, 16, 16]" in refused(tmp_path / "patch16.pth")
    torch.save({k: v for k, v in state.items() if k != "norm.bias"}, tmp_path / "part.pth")
    assert "norm.bias" in refused(tmp_path / "part.pth")
