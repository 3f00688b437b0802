"""The engine's features against the published code's, in float64, for every kind of model that it knows."""

import copy
import re
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from fused_dino import DinoSupervision, DINOv2Backbone, RegionTerm, Scaled, Supervision, TokenTerm
from fused_dino.counting import count
from fused_dino.terms import GlobalTerm

timm = pytest.importorskip("timm")
SHAPE = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
GLOBAL = frozenset({"global"})


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Make every weight large enough to show in the features, those of LayerScale and LayerNorm included."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        centre = 1 if re.search(r"norm\w*\.weight|gamma", name) else 0
        deviation = 0.5 if "pos" in name else 0.2
        parameter.copy_(centre + deviation * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def official(**options) -> nn.Module:
    vits = pytest.importorskip("dinov2.models.vision_transformer")
    shape = {"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return randomised(vits.DinoVisionTransformer(**shape | {"init_values": 1.0, "block_chunks": 0} | options))


def official_giant(**options) -> nn.Module:
    """The model has the parts of vitg14: SwiGLU, the blocks of nested tensors, and chunks as in the training code."""
    layers = pytest.importorskip("dinov2.layers")
    block = partial(layers.NestedTensorBlock, attn_class=layers.MemEffAttention)
    return official(ffn_layer="swiglufused", block_fn=block, block_chunks=2, **{"depth": 2} | options)


def of_timm(name: str, **options) -> nn.Module:
    patch = int(re.search(r"patch(\d+)", name)[1])
    return randomised(timm.create_model(name, **SHAPE | {"img_size": (2 * patch, 3 * patch)} | options))


MODELS = {
    "official": official,
    "official giant": official_giant,
    "official without biases": partial(official, qkv_bias=False, proj_bias=False, ffn_bias=False, init_values=None),
    "DINOv2": partial(of_timm, "vit_small_patch14_dinov2"),
    "DINOv2 with registers": partial(of_timm, "vit_small_patch14_reg4_dinov2"),
    "DINOv2 giant": partial(of_timm, "vit_giant_patch14_reg4_dinov2"),
    "DINOv3": partial(of_timm, "vit_small_patch16_dinov3"),
    "DINOv3 with SwiGLU": partial(of_timm, "vit_small_plus_patch16_dinov3_qkvb"),
    "EVA-02": partial(of_timm, "eva02_tiny_patch14_224"),  # neighbours are a pair, products of q, k and v apart
    "mixed RoPE": partial(of_timm, "vit_small_patch16_rope_mixed_ape_224"),  # each block its own
    "SigLIP": partial(of_timm, "vit_base_patch16_siglip_224"),  # no class token
    "CLIP": partial(of_timm, "vit_base_patch16_clip_224"),  # a norm before the blocks
    "registers alone": partial(of_timm, "vit_medium_patch16_reg4_gap_256"),
    "no affine": partial(of_timm, "vit_small_patch14_dinov2", norm_layer=partial(nn.LayerNorm, eps=1e-3, bias=False)),
}
if timm.__version__.startswith("1.0.22"):  # whose mixed rotations multiply float32 by float64
    del MODELS["mixed RoPE"]
POOLED = ("SigLIP", "registers alone")
each = pytest.mark.parametrize("name", MODELS)


def pair(model: nn.Module, img_size=None, **options) -> tuple[DINOv2Backbone, DINOv2Backbone]:
    """Return backbones of a model: as it was published, and by the engine."""
    if img_size is None:
        size = model.patch_embed.img_size
        img_size = (28, 42) if size == (56, 56) else size  # the official code resamples
    published = DINOv2Backbone(model=copy.deepcopy(model), img_size=img_size, engine=False, **options)
    ours = DINOv2Backbone(model=model, img_size=img_size, **options)
    assert published.engine is None
    assert ours.engine is not None, ours.explain()
    return published, ours


def image(size: tuple[int, int], **options) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).to(**options)


# --- values -----------------------------------------------------------------------------------------------------------


@each
def test_features_and_their_gradients_are_the_published_ones(name):
    published, ours = (backbone.double() for backbone in pair(MODELS[name]()))
    x = image(ours.img_size, dtype=torch.float64).requires_grad_()
    expected, found = published(x), ours(x)
    for key in ("global", "patch"):
        assert expected[key].std() > 0.1  # the comparison is between numbers of order one
        assert_close(found[key], expected[key], rtol=0, atol=1e-10)
        weight = torch.randn(expected[key].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        slopes = [torch.autograd.grad((out[key] * weight).sum(), x, retain_graph=True)[0] for out in (expected, found)]
        assert_close(*slopes, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_the_official_code_itself_gives_them():
    """The engine is compared with the authors' own call, on the grid of the training and on another."""
    for model in (official(), official_giant()):
        theirs = copy.deepcopy(model).double()
        for size in ((56, 56), (28, 42)):
            ours = DINOv2Backbone(model=copy.deepcopy(model), img_size=size).double()
            x = image(size, dtype=torch.float64)
            expected, found = theirs.forward_features(x), ours(x)
            assert_close(found["global"], expected["x_norm_clstoken"], rtol=0, atol=1e-10)
            assert_close(found["patch"], expected["x_norm_patchtokens"], rtol=0, atol=1e-10)


class Registers(nn.Module):
    """The prepare_tokens_with_masks of today's official code, which has registers, in place of the published copy's."""

    def prepare_tokens_with_masks(self, x, masks=None):
        x = super().prepare_tokens_with_masks(x, masks)
        return torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)


@torch.no_grad()
def test_registers_of_todays_official_code_are_no_patches():
    """Today's code has a number where attention had a dropout module."""
    model = official()
    kind, names = type(model), ("__module__", "__qualname__")
    kind = type(kind.__name__, (Registers, kind), {name: getattr(kind, name) for name in names})
    model.__class__, model.num_register_tokens = kind, 3
    model.register_tokens = nn.Parameter(torch.randn(1, 3, 32))
    for block in model.blocks:
        del block.attn.attn_drop
        block.attn.attn_drop = 0.0
    ours = DINOv2Backbone(model=copy.deepcopy(model), img_size=(28, 42)).double()
    assert ours.engine is not None, ours.explain()
    assert (ours.engine.prefix, ours.prefix_tokens) == (4, 4)
    theirs = official()
    theirs.__class__, theirs.register_tokens = kind, model.register_tokens
    x = image((28, 42), dtype=torch.float64)
    tokens = theirs.double().forward_features(x)
    assert_close(ours(x)["global"], tokens["x_norm_clstoken"], rtol=0, atol=1e-10)
    assert_close(ours(x)["patch"], tokens["x_norm_patchtokens"][:, 3:], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["official", "DINOv2 with registers", "DINOv3", "SigLIP"])
def test_images_of_any_size(name):
    options = {"dynamic_img_size": True} if name == "DINOv3" else {}
    published, ours = (backbone.double() for backbone in pair(MODELS[name](**options), Scaled(7 / 8)))
    for grid in ((2, 3), (3, 2), (1, 4), (2, 3)):
        x = image(tuple(side * ours.patch_size for side in grid), dtype=torch.float64)
        expected, found = published(x), ours(x)
        assert found["grid"] == grid
        for key in ("global", "patch"):
            assert_close(found[key], expected[key], rtol=0, atol=1e-10)


@torch.no_grad()
def test_patches_in_place_of_pixels():
    published, ours = (backbone.double() for backbone in pair(MODELS["DINOv2 with registers"]()))
    x = image(ours.img_size, dtype=torch.float64)
    patches = torch.nn.functional.unfold(x, 14, stride=14).transpose(1, 2)
    for needs in (None, GLOBAL):
        assert_close(ours(patches, needs)["global"], published(x)["global"], rtol=0, atol=1e-10)
    assert_close(ours(patches)["patch"], published(x)["patch"], rtol=0, atol=1e-10)


@torch.no_grad()
@each
def test_sixteen_bits_cost_no_more_than_they_did(name):
    published, ours = pair(MODELS[name](), dtype=torch.bfloat16)
    x = image(ours.img_size).bfloat16()
    exact = DINOv2Backbone(model=MODELS[name](), img_size=ours.img_size, engine=False).double()(x.double())
    expected, found = published(x), ours(x)
    for key in ("global", "patch"):
        assert found[key].dtype == torch.bfloat16
        errors = [(out[key].double() - exact[key]).square().mean().sqrt() for out in (found, expected)]
        assert errors[0] < 1.2 * errors[1]
        assert (found[key].double() - exact[key]).abs().max() < 2 * (expected[key].double() - exact[key]).abs().max()


# --- what is read -----------------------------------------------------------------------------------------------------


@each
def test_the_class_token_alone_is_the_same(name):
    published, ours = (backbone.double() for backbone in pair(MODELS[name]()))
    x = image(ours.img_size, dtype=torch.float64).requires_grad_()
    for needs in (GLOBAL, frozenset()):
        expected, found = published(x), ours(x, needs=needs)
        assert found["patch"] is None
        assert published(x, needs)["patch"] is None
        assert_close(found["global"], expected["global"], rtol=0, atol=1e-10)
        slopes = [torch.autograd.grad(out["global"].square().sum(), x)[0] for out in (expected, found)]
        assert_close(*slopes, rtol=1e-9, atol=1e-10)
    assert_close(ours(x, frozenset({"patch"}))["patch"], published(x)["patch"], rtol=0, atol=1e-10)


LAYERS = (0, -1, -2)


@each
@torch.no_grad()
def test_layers_are_those_of_the_published_model(name):
    published, ours = (backbone.double() for backbone in pair(MODELS[name](depth=3), layers=LAYERS))
    x = image(ours.img_size, dtype=torch.float64)
    for needs in (None, frozenset({"layers"}), frozenset({"layers", "global"}), GLOBAL):
        expected, found = published(x, needs), ours(x, needs)
        assert found.keys() == expected.keys()
        assert list(found.get("layers", LAYERS)) == list(LAYERS)
        assert_close(found, expected, rtol=0, atol=1e-10)
        assert ("layers" in found, "global" in found) == (needs is not GLOBAL, needs != {"layers"})


def test_no_block_runs_after_the_last_layer_that_is_read():
    def blocks_run(backbone, needs):
        ran = []
        for number, block in enumerate(backbone.engine.blocks):
            block.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        backbone(image(backbone.img_size), needs)
        return ran

    for layers, last in (((0,), 0), ((-2, 0), 1), ((-1,), 2)):
        alone = pair(of_timm("vit_small_patch14_dinov2", depth=3), layers=layers)[1]
        assert blocks_run(alone, frozenset({"layers"})) == list(range(last + 1))
    for needs in (None, GLOBAL, frozenset({"layers", "global"}), frozenset({"layers", "patch"})):
        ours = pair(of_timm("vit_small_patch14_dinov2", depth=3), layers=(0,))[1]
        assert blocks_run(ours, needs) == [0, 1, 2]


def test_a_supervision_of_a_layer_reads_that_alone():
    images, students = torch.rand(2, 3, 40, 50), {"a": torch.randn(2, 8), "b": torch.randn(2, 6, 8)}
    losses = []
    for backbone in pair(of_timm("vit_small_patch14_dinov2", depth=3), layers=(1, 0)):
        torch.manual_seed(0)
        terms = {"a": GlobalTerm(8, hidden_dim=16, layer=(0, 1)), "b": TokenTerm(8, layer=1)}
        supervision = Supervision(backbone, terms)
        losses.append(supervision(images, students))
        assert_close(supervision(features=supervision.encode(images), students=students), losses[-1])
    assert_close(*losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["official giant", "DINOv3", "SigLIP"])
def test_the_last_block_computes_no_token_that_nobody_reads(name):
    ours = pair(MODELS[name]())[1].to("meta")
    x = torch.empty(2, 3, *ours.img_size, device="meta")
    every, alone = (sum(kernel.flops for kernel in count(lambda n=n: ours(x, n))) for n in (None, GLOBAL))
    b, n, d = 2, 6 + ours.engine.prefix, 32
    last = ours.engine.blocks[-1]
    # Of the other tokens: queries, their products with keys and values, proj, and the MLP.
    saved = d * d + 2 * n * d + d * d + last.up.weight.numel() + last.down.weight.numel()
    assert every - alone == (0 if name in POOLED else 2 * b * (n - 1) * saved)


@torch.no_grad()
def test_the_engine_launches_less_than_the_published_model():
    published, ours = (backbone.to("meta") for backbone in pair(official()))
    x = torch.empty(2, 3, *ours.img_size, device="meta")
    launches = [len(count(lambda backbone=backbone: backbone(x))) for backbone in (published, ours)]
    # A block's scores, their softmax and their product with the values are one op; no scale of q, no LayerScale.
    assert launches[0] - launches[1] >= 2 * 5


class Spy(DINOv2Backbone):
    """A teacher that records the needs of each call."""

    def forward(self, x, needs=None):
        self.asked = needs
        return super().forward(x, needs)


@pytest.mark.parametrize(
    ("terms", "needs"),
    [
        ({"a": lambda: GlobalTerm(8, hidden_dim=16)}, {"global"}),
        ({"a": lambda: TokenTerm(8)}, {"patch"}),
        ({"a": lambda: TokenTerm(8, layer=0)}, {"layers"}),
        (
            {"a": lambda: GlobalTerm(8, hidden_dim=16), "b": lambda: RegionTerm(latent_shape=(2, 2, 2), grid=(2, 2))},
            {"global", "patch"},
        ),
    ],
)
def test_a_supervision_asks_for_what_its_terms_need(terms, needs):
    teacher = Spy(model=of_timm("vit_small_patch14_dinov2"), img_size=(28, 42), layers=(0,))
    supervision = Supervision(teacher, {name: make() for name, make in terms.items()})
    students = {name: torch.randn(2, 6, 8) if term == "TokenTerm" else torch.randn(2, 8)
                for name, term in ((n, type(t).__name__) for n, t in supervision.terms.items())}  # fmt: skip
    supervision(torch.rand(2, 3, 40, 50), students)
    assert teacher.asked == needs
    assert supervision.encode(torch.rand(2, 3, 40, 50))["patch"].shape == (2, 6, 32)
    assert teacher.asked is None


def test_a_compiled_teacher_is_asked_for_no_more():
    teacher = Spy(model=of_timm("vit_small_patch14_dinov2"), img_size=(28, 42))
    torch._dynamo.reset()
    supervision = Supervision(torch.compile(teacher, backend="eager"), {"a": GlobalTerm(8, hidden_dim=16)})
    students = {"a": torch.randn(2, 8)}
    images = torch.rand(2, 3, 40, 50)
    found = supervision(images, students)
    assert teacher.asked == {"global"}
    assert_close(found, supervision(features=supervision.encode(images), students=students))


def test_a_teacher_that_does_not_take_needs_is_not_told(teacher, batch):
    images = batch[1]
    found = Supervision(teacher, {"a": GlobalTerm(8, hidden_dim=16)}, img_size=56)(images, {"a": torch.randn(6, 8)})
    assert found[0].isfinite()


@pytest.mark.parametrize("stopgrad_image", [True, False])
def test_a_supervised_step_has_the_same_numbers(stopgrad_image):
    z, images = torch.randn(4, 32), torch.rand(4, 3, 40, 50) * 2 - 1
    results = []
    for backbone in pair(of_timm("vit_small_patch14_reg4_dinov2")):
        torch.manual_seed(0)
        options = {"use_patch": True, "latent_shape": (8, 2, 2), "token_dim": 8, "token_grid": (2, 3)}
        options |= {} if stopgrad_image else {"stopgrad_image": False}
        dino = DinoSupervision(
            32, teacher=backbone, img_size=(28, 42), hidden_dim=16, **options, **detached(stopgrad_image)
        )
        x = images.clone().requires_grad_(not stopgrad_image)
        loss = dino.loss_dict(z, x, step=10_000, tokens=torch.ones(4, 6, 8))
        loss["loss_dino"].backward()
        results.append((loss, [p.grad for p in dino.parameters()], x.grad))
    assert_close(*results, rtol=1e-6, atol=1e-6)


def detached(stopgrad_image: bool) -> dict:
    from fused_dino import CosineLoss

    return {} if stopgrad_image else {"loss_type": CosineLoss(detach_teacher=False)}


@torch.no_grad()
def test_it_compiles_as_one_graph():
    for name in ("official giant", "DINOv3"):
        ours = pair(MODELS[name]())[1]
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="eager")
        x = image(ours.img_size)
        for needs in (None, GLOBAL):
            found, expected = compiled(x, needs), ours(x, needs)
            assert_close(found["global"], expected["global"])
            assert (found["patch"] is None) == (needs is GLOBAL)


def test_a_supervision_compiles_as_one_graph():
    dino = DinoSupervision(8, teacher=pair(of_timm("vit_small_patch14_dinov2"))[1], img_size=(28, 42), hidden_dim=16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, x: dino(z, x)[0], fullgraph=True, backend="eager")
    z, x = torch.randn(2, 8), torch.rand(2, 3, 40, 50)
    assert_close(compiled(z, x), dino(z, x)[0])


# --- models that it does not know -------------------------------------------------------------------------------------


def with_hook(model):
    model.blocks[1].attn.register_forward_hook(lambda *_: None)


def with_a_method(model):
    model.blocks[1].forward = lambda x: x


def with_a_subclass(model):
    model.blocks[1].__class__ = type("Mine", (type(model.blocks[1]),), {})


def with_another_linear(model):
    model.blocks[1].mlp.fc1.__class__ = type("LoRA", (nn.Linear,), {})


def with_a_parametrization(model):
    nn.utils.parametrizations.weight_norm(model.blocks[1].attn.proj)


def with_another_scale(model):
    model.blocks[1].attn.scale = 1.0


def with_another_dtype(model):
    model.blocks[1].norm1.double()


def with_a_gate(model):
    model.blocks[1].attn.gate = nn.Linear(32, 32)


def with_fewer_keys(model):
    model.blocks[1].attn.num_kv_groups = 2


def with_a_fast_norm(model):
    model.blocks[1].norm2.__class__ = timm.layers.LayerNorm
    model.blocks[1].norm2._fast_norm = True


def with_another_drop_path(model):
    model.blocks[1].drop_path2 = nn.Tanh()


def with_checkpointing(model):
    model.set_grad_checkpointing()


def with_integers(model):
    for p in model.parameters():
        p.requires_grad_(False)
        p.data = p.data.to(torch.int8)


def with_no_blocks(model):
    model.blocks = nn.Sequential()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_hook, "blocks.1.attn has hooks"),
        (with_a_method, "blocks.1 has a forward of its own"),
        (with_a_subclass, "block 1: it is a Mine"),
        (with_another_linear, "block 1: mlp.fc1 is a LoRA"),
        (with_a_parametrization, "block 1: proj is a ParametrizedLinear"),
        (with_another_scale, "block 1: attn has a scale of 1.0"),
        (with_another_dtype, "its weights have several dtypes or devices"),
        (with_a_gate, "block 1: attn has a gate"),
        (with_fewer_keys, "block 1: attn has fewer heads of keys than of queries"),
        (with_a_fast_norm, "block 1: norm2 is timm's fast norm"),
        (with_another_drop_path, "block 1: drop_path2 is a Tanh"),
        (with_checkpointing, "the model checkpoints its blocks"),
        (with_integers, "its weights are torch.int8"),
        (with_no_blocks, "it has no blocks"),
    ],
)
def test_a_changed_model_runs_as_it_is(change, reason):
    model = of_timm("vit_small_patch14_dinov2")
    change(model)
    backbone = DINOv2Backbone(model=model, img_size=(28, 42))
    assert backbone.engine is None
    assert backbone._modules["model"] is model
    first = backbone.explain().splitlines()[0]
    assert first == f"engine: off, the model runs as it was published: {backbone.refused}"
    assert reason in backbone.explain()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"qk_norm": True}, "block 0: attn.q_norm is a LayerNorm"),
        ({"scale_attn_norm": True}, "block 0: attn.norm is a LayerNorm"),
        ({"scale_mlp_norm": True}, "block 0: mlp.norm is a LayerNorm"),
        ({"norm_layer": timm.layers.RmsNorm}, "block 0: norm1 is a RmsNorm"),
        ({"act_layer": nn.PReLU}, "block 0: mlp.act is a PReLU"),
        ({"mlp_layer": timm.layers.GluMlp}, "block 0: mlp has its gate last"),
        ({"block_fn": timm.models.vision_transformer.ResPostBlock}, "block 0: it is a ResPostBlock"),
        ({"attn_layer": "diff"}, "block 0: attn is a DiffAttention"),
    ],
)
@torch.no_grad()
def test_options_that_it_does_not_know(options, reason):
    try:
        model = of_timm("vit_small_patch14_dinov2", **options)
    except TypeError:
        pytest.skip("this timm does not have the option")
    backbone = DINOv2Backbone(model=copy.deepcopy(model), img_size=(28, 42))
    assert reason in backbone.explain()
    x = image((28, 42))
    assert torch.equal(backbone(x)["patch"], model.forward_features(x)[:, 1:])


def test_other_models_are_named():
    for name, kind in (
        ("tf_efficientnet_lite0", "EfficientNet"),
        ("eva02_base_patch14_224", "mlp.norm is a LayerNorm"),
    ):
        options = {} if "eff" in name else {"depth": 1, "embed_dim": 32, "num_heads": 2}
        model = timm.create_model(name, num_classes=0, **options)
        backbone = DINOv2Backbone(model=model, img_size=224)
        assert kind in backbone.explain()
        assert "nothing to compare" in backbone.check(torch.zeros(1, 3, 224, 224))


# --- what it says -----------------------------------------------------------------------------------------------------


def test_it_lists_its_rewrites_and_their_bytes():
    ours = pair(of_timm("vit_small_patch14_dinov2"))[1]
    said = ours.explain()
    folded, published = (sum(p.nbytes for p in part.parameters()) / 1e6 for part in (ours.engine, ours.model))
    assert f"{folded:.1f} MB on cpu, {published:.1f} MB as published on the host" in said
    assert "engine: on, 2 blocks in float32 on cpu" in said
    assert "LayerScale           folded" in said
    assert "class token alone" in said
    assert "there is none" in pair(MODELS["CLIP"]())[1].explain()
    assert "pooled from the patches" in pair(MODELS["SigLIP"]())[1].explain()


def test_a_check_says_what_bfloat16_costs():
    ours = pair(of_timm("vit_small_patch14_dinov2"), dtype=torch.bfloat16)[1]
    x = image((28, 42))
    said = ours.check(x)
    assert said.startswith("2 images, bfloat16 with the published weights in float32:\n")
    numbers = [float(number) for number in re.findall(r"cosine ([\d.]+) on average", said)]
    assert len(numbers) == 2
    published = pair(of_timm("vit_small_patch14_dinov2"))[0](x)
    for number, key in zip(numbers, ("global", "patch"), strict=True):
        cosine = nn.functional.cosine_similarity(ours(x)[key].double(), published[key].double(), dim=-1).mean()
        assert number == round(cosine.item(), 6)
        assert 0.999 < number < 1
    exact = pair(of_timm("vit_small_patch14_dinov2"))[1].check(x)
    assert exact.count("cosine 1.000000 on average, 1.000000 at least") == 2


def test_a_check_finds_an_engine_that_is_wrong():
    ours = pair(of_timm("vit_small_patch14_dinov2"))[1]
    with torch.no_grad():
        ours.engine.blocks[0].down.weight.mul_(2)
    assert min(float(number) for number in re.findall(r"([\d.]+) at least", ours.check(image((28, 42))))) < 0.99
