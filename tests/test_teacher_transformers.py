"""DINOv2Backbone around models of transformers, alone and in wrappers, against what the models themselves give."""

import copy
import json
import pickle

import pytest
import torch
from torch import Tensor, nn

from fused_dino import DinoSupervision, DINOv2Backbone, Preprocess

transformers = pytest.importorskip("transformers")
HALF, IMAGENET = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
SIZES = {"Dinov2": 14, "Dinov2WithRegisters": 14, "DINOv3ViT": 16, "SiglipVision": 16}
PREFIX = {"Dinov2": 1, "Dinov2WithRegisters": 5, "DINOv3ViT": 5, "SiglipVision": 0}


def build(kind: str, **options) -> nn.Module:
    """A model of width 32 for squares of 4 patches a side, its positions of order one."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"patch_size": SIZES[kind], "image_size": 4 * SIZES[kind]}
    shape |= {"num_register_tokens": 4} if PREFIX[kind] == 5 else {}
    shape |= {"intermediate_size": 64} if "ViT" in kind or "Siglip" in kind else {}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**(shape | options)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "position" in name or "token" in name or "norm" in name:
                p.add_(torch.randn_like(p) / 2)
    return model.train()


def tokens_of(kind: str, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (global, patch) as a user of transformers takes them."""
    resized = {"interpolate_pos_encoding": True} if kind == "SiglipVision" else {}
    out = model(x, **resized)
    return out.pooler_output, out.last_hidden_state[:, PREFIX[kind] :]


@pytest.fixture(params=SIZES)
def kind(request) -> str:
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("grid", [(4, 4), (2, 3)])
def test_features_are_the_models_own(kind, grid):
    model, p = build(kind), SIZES[kind]
    backbone = DINOv2Backbone(model=model, img_size=(grid[0] * p, grid[1] * p))
    x = torch.randn(2, 3, *backbone.img_size)
    pooled, patch = tokens_of(kind, model, x)
    out = backbone(x)
    assert torch.equal(out["global"], pooled)
    assert torch.equal(out["patch"], patch)
    assert patch.std() > 0.1
    assert (backbone.embed_dim, backbone.patch_size, backbone.grid, backbone.source) == (32, p, grid, "model")
    assert backbone.mean == (HALF if kind == "SiglipVision" else IMAGENET)
    patches = nn.functional.unfold(x, p, stride=p).transpose(1, 2)
    for key in ("global", "patch"):
        torch.testing.assert_close(backbone(patches)[key], out[key], rtol=1e-4, atol=1e-5)


class Wrapper(nn.Module):
    """What a user writes around a model: `take` chooses what of its output to return."""

    def __init__(self, model: nn.Module, take) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"vision": model})
        self.take = take

    def forward(self, x: Tensor):
        return self.take(self.net["vision"](x))


@torch.no_grad()
@pytest.mark.parametrize("take", ["output", "tokens", "dict"])
def test_a_wrapper_gives_the_models_features(kind, take):
    takes = {
        "output": lambda out: out,
        "tokens": lambda out: out.last_hidden_state,
        "dict": lambda out: {"global": out.pooler_output, "patch": out.last_hidden_state[:, PREFIX[kind] :]},
    }
    model, size = build(kind), 4 * SIZES[kind]
    x = torch.randn(2, 3, size, size)
    backbone = DINOv2Backbone(model=Wrapper(model, takes[take]), img_size=size)
    pooled, patch = tokens_of(kind, model, x)
    out = backbone(x)
    torch.testing.assert_close(out["patch"], patch)
    averaged = (kind, take) == ("SiglipVision", "tokens")  # it has no class token, and the head was not run
    torch.testing.assert_close(out["global"], patch.mean(1) if averaged else pooled)
    assert (backbone.embed_dim, backbone.patch_size) == (32, SIZES[kind])
    assert backbone.mean == (HALF if kind == "SiglipVision" else IMAGENET)
    with pytest.raises(ValueError, match="no patch embedding"):  # a wrapper may change the pixels first
        backbone(torch.zeros(2, 16, 3 * SIZES[kind] ** 2))


@torch.no_grad()
def test_wrappers_of_torch(kind):
    model, size = build(kind), 4 * SIZES[kind]
    x = torch.randn(2, 3, size, size)
    expected = tokens_of(kind, model.eval(), x)
    for wrapper in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        out = DINOv2Backbone(model=wrapper, img_size=size)(x)
        torch.testing.assert_close((out["global"], out["patch"]), expected)


def test_what_a_wrapper_says_of_itself_comes_first():
    wrapper = Wrapper(build("Dinov2"), lambda out: out.last_hidden_state[:, 1:])
    wrapper.num_prefix_tokens, wrapper.mean = 0, HALF
    backbone = DINOv2Backbone(model=wrapper, img_size=56)
    out = backbone(torch.randn(2, 3, 56, 56))
    assert backbone.mean == HALF
    assert torch.equal(out["global"], out["patch"].mean(1))


@torch.no_grad()
def test_a_classifier_gives_its_backbones_features():
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**shape))
    x = torch.randn(2, 3, 28, 28)
    backbone = DINOv2Backbone(model=model, img_size=28)
    assert torch.equal(backbone(x)["global"], model.dinov2(x).pooler_output)


@torch.no_grad()
def test_tuples_and_a_head_that_is_left_out():
    model = build("SiglipVision", vision_use_head=False)
    model.config.return_dict = False
    x = torch.randn(2, 3, 64, 64)
    out = DINOv2Backbone(model=model, img_size=64)(x)
    assert torch.equal(out["patch"], model(x)[0])
    assert torch.equal(out["global"], out["patch"].mean(1))


@torch.no_grad()
def test_mean_and_std_lie_beside_the_weights(kind, tmp_path, monkeypatch):
    from huggingface_hub import constants

    build(kind).save_pretrained(tmp_path / "saved")
    statistics = json.dumps({"image_mean": [0.43, 0.411, 0.296], "image_std": [0.25, 0.5, 1]})
    (tmp_path / "saved" / "preprocessor_config.json").write_text(statistics)
    model = type(build(kind)).from_pretrained(tmp_path / "saved")
    size = 4 * SIZES[kind]
    for teacher in (model, Wrapper(model, lambda out: out)):
        backbone = DINOv2Backbone(model=teacher, img_size=size)
        assert (backbone.mean, backbone.std) == ((0.43, 0.411, 0.296), (0.25, 0.5, 1.0))
    cached = tmp_path / "cache" / "models--some--model" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    (cached / "preprocessor_config.json").write_text(statistics)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model.config._name_or_path, model.config._commit_hash = "some/model", "abc"
    assert DINOv2Backbone(model=model, img_size=size).mean == (0.43, 0.411, 0.296)
    for gone in ("some/other", str(tmp_path / "gone" / "folder")):
        model.config._name_or_path = gone
        assert DINOv2Backbone(model=model, img_size=size).mean == (HALF if kind == "SiglipVision" else IMAGENET)


def test_other_models_of_transformers_are_refused_by_name():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = shape | {"image_size": 32, "patch_size": 16}, shape | {"vocab_size": 8, "max_position_embeddings": 4}
    both = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    for model in (transformers.ViTModel(transformers.ViTConfig(**vision)), both):
        with pytest.raises(
            ValueError, match=rf"model {type(model).__name__} must have .*Dinov2Model.*SiglipVisionModel"
        ):
            DINOv2Backbone(model=model, img_size=32)


def test_it_is_a_teacher_like_any_other(kind):
    """Frozen, in eval mode, copied, pickled, compiled as one graph, and with a gradient to the image."""
    model, size = build(kind), 4 * SIZES[kind]
    backbone = DINOv2Backbone(model=model, img_size=size)
    assert not any(part.training for part in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    x = torch.randn(2, 3, size, size, requires_grad=True)
    out = backbone(x)
    out["patch"].square().sum().backward()
    assert x.grad.abs().sum() > 0
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(twin(x)["patch"], out["patch"])
    compiled = torch.compile(backbone, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)["patch"], out["patch"])
    half = DINOv2Backbone(model=copy.deepcopy(model), img_size=size, dtype=torch.bfloat16)
    assert half(x)["patch"].dtype == torch.bfloat16


def test_a_supervision_by_a_model_of_transformers(kind):
    size = 4 * SIZES[kind]
    teacher = DINOv2Backbone(model=build(kind), img_size=size)
    dino = DinoSupervision(in_dim=8, teacher=teacher, img_size=size, hidden_dim=16)
    images, z = torch.rand(2, 3, 40, 50) * 2 - 1, torch.randn(2, 8)
    expected = dino(z, images)[0]
    dino.preprocess = Preprocess(size, mean=teacher.mean, std=teacher.std, patch_size=SIZES[kind])
    torch.testing.assert_close(dino(z, images)[0], expected)


def test_a_supervision_says_how_a_bare_model_becomes_a_teacher():
    with pytest.raises(ValueError, match=r"^teacher Dinov2Model must have an int embed_dim.*DINOv2Backbone\(model="):
        DinoSupervision(in_dim=8, teacher=build("Dinov2"), img_size=56)
