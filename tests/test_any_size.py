"""A backbone whose img_size is a rule, against backbones of the same weights that were built for each size."""

import copy
import functools
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from fused_dino import DINOv2Backbone, Preprocess, Scaled
from fused_dino.sizes import resolve
from fused_dino.teacher import backbone as loading
from fused_dino.teacher import positions
from fused_dino.teacher.caching import LIMIT
from fused_dino.teacher.weight_files import official_names

timm = pytest.importorskip("timm")
RULE = Scaled(7 / 8)
GRIDS = [(4, 4), (2, 3), (3, 2), (8, 2), (1, 7), (6, 6)]  # the weights' own first; 8 x 2 has as many patches
SHAPE = {"depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 0}


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Position embeddings of order one, so that resampling them another way shows."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        centre = 1 if re.search(r"norm\w*\.weight|gamma|lambda", name) else 0
        deviation = 0.5 if "pos" in name else 0.05
        parameter.copy_(centre + deviation * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def image(backbone: DINOv2Backbone, grid: tuple[int, int], **options) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, *(side * backbone.patch_size for side in grid), generator=generator).to(**options)


@torch.no_grad()
def check_against_fixed(backbone: DINOv2Backbone, fixed, dtype=torch.float64) -> None:
    """Compare with fixed(size), twice on every grid: the second time the positions come from the cache."""
    backbone.to(dtype)
    assert backbone.grid is None
    for grid in GRIDS + GRIDS:
        x = image(backbone, grid, dtype=dtype)
        expected, out = fixed(tuple(x.shape[2:])).to(dtype)(x), backbone(x)
        assert out["grid"] == expected["grid"] == grid
        assert out["patch"].shape == (2, grid[0] * grid[1], backbone.embed_dim)
        assert out["patch"].std() > 0.1  # the comparison is between numbers of order one
        for key in ("global", "patch"):
            torch.testing.assert_close(out[key], expected[key], rtol=0, atol=1e-10)


# --- DINOv2 by its name -----------------------------------------------------------------------------------------------


def official_vit(**shape) -> nn.Module:
    vits = pytest.importorskip("dinov2.models.vision_transformer")
    shape = {"img_size": 56, "embed_dim": 384, "depth": 1, "num_heads": 6} | shape
    return randomised(vits.DinoVisionTransformer(patch_size=14, init_values=1.0, block_chunks=0, **shape))


@pytest.fixture
def shallow(monkeypatch):
    """Limit every model of timm's to one block."""
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=1))


@pytest.fixture(params=["plain", "registers"])
def checkpoint(request, tmp_path):
    """(variant, path) of weights on a grid of 4 x 4."""
    path = tmp_path / "dinov2.pth"
    if request.param == "plain":
        torch.save(official_vit().state_dict(), path)
        return "vits14", path
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 384, "num_hidden_layers": 1, "num_attention_heads": 6, "image_size": 56, "patch_size": 14}
    model = transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(num_register_tokens=4, **shape)
    )
    torch.save(official_names(randomised(model).state_dict()), path)
    return "vits14_reg", path


@pytest.mark.parametrize("pos_embed", ["official", "timm", "transformers"])
def test_weights_of_a_file(checkpoint, shallow, pos_embed):
    variant, path = checkpoint
    options = {"weights": path, "pos_embed": pos_embed}
    check_against_fixed(DINOv2Backbone(variant, RULE, **options), lambda size: DINOv2Backbone(variant, size, **options))


@pytest.mark.parametrize("how", [{}, {"interpolate_offset": 0.1, "interpolate_antialias": False}])
def test_the_hubs_model(monkeypatch, how):
    """The published copy of the official code has the offset as a constant; today's code has it as an attribute."""
    model = official_vit()
    vars(model).update(how)
    monkeypatch.setattr("fused_dino.teacher.weights.load_hub", lambda *_: copy.deepcopy(model))
    backbone = DINOv2Backbone("vits14", RULE, source="hub")
    assert isinstance(backbone.model, positions.HubPositions if how else positions.Interpolated)
    check_against_fixed(backbone, lambda size: DINOv2Backbone("vits14", size, source="hub"))


def test_random_weights_have_the_grid_of_the_training(shallow):
    backbone = DINOv2Backbone("vits14", RULE, pretrained=False)
    assert backbone.model.pos_embed.shape == (1, 1 + 37 * 37, 384)
    assert backbone(image(backbone, (2, 3)))["patch"].shape == (1 + 1, 6, 384)


# --- other models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"]
)
def test_timms_vision_transformers_as_modules(name):
    """The models of fixed size have a grid that is no square, and resample by timm's own set_input_size."""
    patch = 14 if "14" in name else 16
    model = randomised(timm.create_model(name, img_size=(4 * patch, 3 * patch), **SHAPE))

    def fixed(size):
        resized = copy.deepcopy(model)
        resized.set_input_size(size)
        return DINOv2Backbone(model=resized, img_size=size)

    check_against_fixed(DINOv2Backbone(model=copy.deepcopy(model), img_size=RULE), fixed)


@pytest.mark.parametrize(
    ("name", "module", "dtype"),
    [
        ("vit_tiny_patch16_224", "vision_transformer", torch.float64),
        ("vit_small_patch14_dinov2", "vision_transformer", torch.float64),
        ("vit_small_patch16_dinov3", "eva", torch.float64),
        ("eva02_tiny_patch14_224", "eva", torch.float32),  # whose fixed angles stay those of float32 in float64
    ],
)
def test_timms_models_by_their_names(monkeypatch, name, module, dtype):
    options = {name: value for name, value in SHAPE.items() if name != "num_classes"}
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **options))
    backbone = DINOv2Backbone(model=name, img_size=RULE, pretrained=False)
    randomised(backbone.model)
    backbone.refold()
    files = pytest.importorskip(f"timm.models.{module}")

    def fixed(size):
        other = DINOv2Backbone(model=name, img_size=size, pretrained=False)
        other.model.load_state_dict(files.checkpoint_filter_fn(backbone.model.state_dict(), other.model))
        return other

    check_against_fixed(backbone, fixed, dtype)


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "SiglipVision"])
def test_models_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    patch = 16 if kind in ("DINOv3ViT", "SiglipVision") else 14
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": patch}
    shape |= {"image_size": 4 * patch} | ({"intermediate_size": 64} if patch == 16 else {})
    model = randomised(getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**shape)))
    check_against_fixed(
        DINOv2Backbone(model=copy.deepcopy(model), img_size=RULE),
        lambda size: DINOv2Backbone(model=copy.deepcopy(model), img_size=size),
    )


def test_convolutional_networks():
    backbone = DINOv2Backbone(model="mobilenetv3_small_050", img_size=RULE, pretrained=False).double()
    for grid in GRIDS:
        x = image(backbone, grid, dtype=torch.float64)
        fixed = DINOv2Backbone(model=backbone.model, img_size=tuple(x.shape[2:]))
        assert torch.equal(backbone(x)["patch"], fixed(x)["patch"])


def test_a_model_of_one_size_is_refused_by_name():
    swin = {"depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 2, 4), "window_size": 2, "img_size": 64}
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, **SHAPE)
    bare = timm.models.eva.Eva(patch_size=14, img_size=28, **SHAPE)  # of which timm has no configuration
    for model in (timm.create_model("swin_tiny_patch4_window7_224", **swin), eva, bare, "mixer_s32_224"):
        with pytest.raises(ValueError, match=r"^img_size must be an int or a pair .* Scaled.* takes one size"):
            DINOv2Backbone(model=model, img_size=RULE, pretrained=False)


# --- positions that are kept ------------------------------------------------------------------------------------------


def tiny(**options) -> DINOv2Backbone:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_reg4_dinov2", **SHAPE | {"img_size": 56})
    return DINOv2Backbone(model=randomised(model), img_size=RULE, **options)


def resized(backbone: DINOv2Backbone, x: Tensor) -> bool:
    """Return whether a forward resamples."""
    with torch.profiler.profile() as profile:
        backbone(x)
    return any("upsample_bicubic" in event.key for event in profile.key_averages())


@torch.no_grad()
def test_positions_are_kept_for_the_sizes_used_last():
    backbone = tiny()
    often = image(backbone, (2, 2))
    grids = [(1, columns) for columns in range(1, LIMIT + 1)]
    for grid in grids:
        backbone(often)
        assert resized(backbone, image(backbone, grid))
        assert not resized(backbone, image(backbone, grid))
    assert len(backbone.computing.cache.results) == LIMIT
    assert not resized(backbone, often)
    assert not resized(backbone, image(backbone, grids[1]))
    assert resized(backbone, image(backbone, grids[0]))
    assert len(backbone.computing.cache.results) == LIMIT


def test_they_are_in_no_checkpoint():
    backbone = tiny()
    names = set(backbone.model.state_dict())
    backbone(image(backbone, (2, 3)))
    assert set(backbone.model.state_dict()) == names == {name for name, _ in backbone.model.named_parameters()}
    assert list(backbone.buffers()) == []


def in_place(model):
    model.pos_embed.mul_(2)


def by_loading(model):
    model.load_state_dict({name: 2 * x for name, x in model.state_dict().items()})


def by_assigning(model):
    model.load_state_dict({name: 2 * x for name, x in model.state_dict().items()}, assign=True)


def by_replacing(model):
    """The address alone tells the new tensor from the old, since both have the same count of writes."""
    new = nn.Parameter(2 * model.pos_embed, requires_grad=False)
    while new._version < model.pos_embed._version:
        new.mul_(1)
    model.pos_embed = new


def where_the_old_ones_were(model):
    """Freed memory may become the next tensor of the same size."""
    new, version = 2 * model.pos_embed, model.pos_embed._version
    del model.pos_embed
    model.pos_embed = nn.Parameter(torch.empty_like(new), requires_grad=False)
    while model.pos_embed._version < version:
        model.pos_embed.copy_(new)


def by_casting(model):
    model.double().pos_embed.mul_(2)


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [in_place, by_loading, by_assigning, by_replacing, where_the_old_ones_were, by_casting]
)
def test_positions_that_change_are_resampled_anew(change):
    backbone, fresh = tiny(engine=False), tiny(engine=False)
    x = image(backbone, (2, 3))
    before = backbone(x)["patch"]
    change(backbone.model)
    change(fresh.model)
    assert torch.equal(backbone(x)["patch"], fresh(x)["patch"])
    assert (backbone(x)["patch"] - before).norm() > 0.01 * before.norm()


@torch.no_grad()
def test_what_is_moved_or_loaded_holds_no_old_positions():
    backbone = tiny(engine=False)
    for change in (nn.Module.double, lambda model: model.load_state_dict(model.state_dict())):
        backbone(image(backbone, (2, 3)))
        assert len(backbone.model.cache.results) == 1
        change(backbone.model)
        assert backbone.model.cache.results == {}


@torch.no_grad()
def test_copies_and_pickles_keep_nothing_and_give_the_same():
    interpolated = DINOv2Backbone(model=official_vit(), img_size=RULE)
    for backbone in (tiny(), interpolated):
        x = image(backbone, (2, 3))
        expected = backbone(x)
        for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
            assert type(twin.model) is type(backbone.model)
            assert twin.computing.cache.results == {}
            assert (twin.img_size, twin.grid) == (RULE, None)
            assert torch.equal(twin(x)["patch"], expected["patch"])
            assert len(twin.computing.cache.results) == len(backbone.computing.cache.results) == 1
    assert repr(backbone).startswith("DINOv2Backbone(\n  DinoVisionTransformer, img_size=Scaled(ratio=0.875), ")


@torch.no_grad()
def test_a_cast_teacher_casts_its_positions():
    half = tiny(dtype=torch.bfloat16)
    x = image(half, (2, 3))
    assert half(x)["patch"].dtype == torch.bfloat16
    backbone = tiny()
    backbone(x)
    assert torch.equal(backbone.to(torch.bfloat16)(x)["patch"], half(x)["patch"])


def test_positions_kept_in_inference_mode_serve_a_gradient():
    backbone = tiny()
    x = image(backbone, (2, 3))
    with torch.inference_mode():
        backbone(x)
    x.requires_grad_()
    backbone(x)["patch"].square().sum().backward()
    assert x.grad.abs().min() > 0
    with torch.inference_mode():
        built = tiny()
    with torch.no_grad():
        assert torch.equal(built(x)["patch"], backbone(x)["patch"])


def test_positions_that_train_are_not_kept():
    backbone = tiny(engine=False)
    backbone.model.pos_embed.requires_grad_(True)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(backbone(image(backbone, (2, 3)))["patch"].sum(), backbone.model.pos_embed)
        assert gradient.abs().sum() > 0
    assert backbone.model.cache.results == {}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_the_weights_are_not_kept():
    """An ensemble of teachers under vmap has a batch of positions."""
    backbone = tiny()
    x = image(backbone, (2, 3))
    weights = dict(backbone.named_parameters())
    several = {name: torch.stack([p, 2 * p]) for name, p in weights.items()}
    out = torch.func.vmap(lambda p: torch.func.functional_call(backbone, p, (x,))["patch"])(several)
    torch.testing.assert_close(out[0], backbone(x)["patch"])
    assert len(backbone.computing.cache.results) == 1


@torch.no_grad()
def test_threads_share_a_backbone():
    backbone = tiny()
    grids = [(1 + i % 5, 1 + i // 5) for i in range(25)] * 2
    expected = [tiny()(image(backbone, grid))["patch"] for grid in grids]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda grid: backbone(image(backbone, grid))["patch"], grids))
    assert all(map(torch.equal, found, expected))


# --- compilation ------------------------------------------------------------------------------------------------------

BUCKETS = [(4, 4), (2, 3), (3, 2), (2, 7), (7, 7)]
MORE = [(2, columns) for columns in range(3, 13)]  # than the programs that torch keeps of one function


def count_compilations(backbone: DINOv2Backbone, grids, counter) -> int:
    torch._dynamo.reset()
    compiled = torch.compile(backbone, fullgraph=True, backend=counter)
    with torch.no_grad():
        for grid in grids + grids:
            x = image(backbone, grid)
            expected, out = backbone(x), compiled(x)
            assert out["grid"] == grid
            torch.testing.assert_close(out["patch"], expected["patch"], rtol=1e-4, atol=1e-5)
    return counter.frame_count


def test_at_most_one_compilation_a_size():
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    published = official_vit(), transformers.Dinov2Model(transformers.Dinov2Config(**shape))
    for backbone in (tiny(), *(DINOv2Backbone(model=model, img_size=RULE) for model in published)):
        assert 1 <= count_compilations(backbone, BUCKETS, CompileCounter()) <= len(BUCKETS)


def test_any_number_of_sizes_takes_few_programs():
    """The official resampling takes a scale, which a compiler would make a constant."""
    model = official_vit()
    vars(model).update(interpolate_offset=0.1, interpolate_antialias=False)
    for backbone in (tiny(), DINOv2Backbone(model=model, img_size=RULE)):
        assert count_compilations(backbone, MORE, CompileCounterWithBackend("aot_eager")) <= 3


def test_the_op_in_compiled_code_is_an_op():
    source = torch.randn(1, 1 + 16, 8)
    for grid in ((4, 4), (2, 3)):
        for how in ((False, 0.1), (True, 0.0)):
            torch.library.opcheck(positions.resize_in_graph, (source, 4, 4, *grid, *how))


# --- inputs -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_16_pixel_latent_grid_is_met_token_by_token():
    backbone = tiny()
    for h, w in ((64, 96), (160, 32)):
        size = resolve(backbone.img_size, h, w, backbone.patch_size)
        x = Preprocess()(torch.rand(2, 3, h, w) * 2 - 1, size=size)
        assert backbone(x)["grid"] == (h // 16, w // 16)


@pytest.mark.parametrize("shape", [(2, 3, 28, 43), (2, 3, 0, 28), (2, 1, 28, 28), (3, 28, 28), (2, 6, 588)])
def test_images_of_no_grid_are_refused(shape):
    with pytest.raises(ValueError, match=r"^x must be floating of shape \[B, 3, H, W\] with multiples of 14 .* a rule"):
        tiny()(torch.zeros(shape))


def test_a_size_that_is_none_is_refused_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(loading, "load_dinov2", None)
    with pytest.raises(TypeError, match="^img_size must be .* got the class Scaled itself"):
        DINOv2Backbone(img_size=Scaled)
