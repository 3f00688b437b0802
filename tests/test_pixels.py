"""The patch embedding of raw images, against resize, normalisation and convolution in float64."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

import fused_dino
from conftest import check_slope, grads, make_supervision
from fused_dino import DINOv2Backbone, Preprocess, Scaled
from fused_dino import functional as FD
from fused_dino.teacher import pixels
from fused_dino.teacher.caching import LIMIT
from fused_dino.teacher.embedding import take_patches
from fused_dino.teacher.pixels import Raw, embed, folded, read_raw

timm = pytest.importorskip("timm")
SHAPE = {"depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 0}
SIZE = 56  # of the teacher's input: 4 x 4 patches of 14
STATISTICS = (FD.IMAGENET_MEAN, FD.IMAGENET_STD)


def projection(patch: int, dtype=torch.float64, bias: bool = True) -> nn.Conv2d:
    """A convolution by patches whose weights have a mean, as filters of colours do."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    model.patch_embed = nn.Module()
    conv = model.patch_embed.proj = nn.Conv2d(3, 6, patch, patch, bias=bias).requires_grad_(False)
    mean = 0.05 * torch.randn(6, 3, 1, 1, generator=generator)
    conv.weight.copy_(mean + 0.05 * torch.randn(conv.weight.shape, generator=generator))
    if bias:
        conv.bias.copy_(torch.randn(6, generator=generator))
    return take_patches(model, patch).to(dtype)


def pictures(sides, input_range, dtype=torch.float64, batch: int = 2) -> Tensor:
    low, high = input_range
    x = torch.rand(batch, 3, *sides, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = low + (high - low) * x
    return x.round().to(dtype) if dtype == torch.uint8 else x.to(dtype)


def oracle(conv, x: Tensor, size, input_range) -> Tensor:
    """Resize, normalise and convolve in float64."""
    options = {"input_range": input_range, "backend": "reference"}
    weight, bias = (None if p is None else p.double() for p in (conv.weight, conv.bias))
    return F.conv2d(FD.preprocess(x.double(), size, **options), weight, bias, stride=weight.shape[2])


def tokens_of(conv, x: Tensor, raw: Raw) -> Tensor:
    return embed(x, raw, *folded(conv, x, raw))


def largest(x: Tensor) -> float:
    return x.abs().max().item()


# --- the convolution --------------------------------------------------------------------------------------------------

SIDES = [
    *((14, (224, 224), (side, side)) for side in (224, 256, 320, 448, 512)),
    (14, (518, 518), (592, 592)),
    (14, (56, 28), (64, 44)),  # each side by itself
    (14, (28, 42), (28, 51)),  # one is not resized
    (16, (32, 48), (34, 75)),
    (7, (21, 21), (30, 63)),
]


@pytest.mark.parametrize("input_range", [(-1.0, 1.0), (0.0, 255.0)])
@pytest.mark.parametrize(("patch", "size", "sides"), SIDES)
def test_is_resize_normalisation_and_convolution(patch, size, sides, input_range):
    conv = projection(patch, bias=patch != 7)
    for dtype in (torch.float64, torch.uint8) if input_range[1] == 255 else (torch.float64,):
        x = pictures(sides, input_range, dtype)
        expected = oracle(conv, x, size, input_range)
        assert expected.std() > 0.1
        assert_close(tokens_of(conv, x, Raw(size, input_range, *STATISTICS)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("input_range", [(0.0, 1.0), (-3.0, 7.0), (1000.0, 1001.0), (-1e-3, 0.0)])
def test_any_range(input_range):
    conv, x = projection(14), pictures((64, 64), input_range)
    raw = Raw((SIZE, SIZE), input_range, (0.1, 0.2, 0.9), (0.5, 1.0, 2.0))
    options = {"input_range": input_range, "mean": raw.mean, "std": raw.std, "backend": "reference"}
    expected = F.conv2d(FD.preprocess(x, SIZE, **options), conv.weight, conv.bias, stride=14)
    assert_close(tokens_of(conv, x, raw), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("stored", "input_range"),
    [
        (torch.float32, (-1.0, 1.0)),
        (torch.float32, (0.0, 1.0)),
        (torch.bfloat16, (0.0, 1.0)),
        (torch.float32, (1000.0, 1001.0)),
        (torch.uint8, (0.0, 255.0)),
        (torch.uint8, (0.0, 64.0)),
    ],
)
@pytest.mark.parametrize("sides", [(224, 224), (256, 256), (512, 512)])
def test_errs_at_most_twice_as_much_as_preprocessing(dtype, stored, input_range, sides):
    """The floor is float32's rounding in sums of 3,072 products."""
    conv, size = projection(14, dtype), (224, 224)
    x = pictures(sides, input_range, stored)
    expected = oracle(conv, x, size, input_range)
    resized = FD.preprocess(x, size, input_range=input_range, out_dtype=dtype)
    before = F.conv2d(resized, conv.weight, conv.bias, stride=14) - expected
    after = tokens_of(conv, x, Raw(size, input_range, *STATISTICS)) - expected
    floor = 4e-6 * largest(expected)
    assert largest(after) <= 2 * largest(before) + floor
    assert after.square().mean().sqrt() <= 2 * before.square().mean().sqrt() + floor / 4


def test_layouts_and_empty_batches():
    conv, raw = projection(14), Raw((SIZE, SIZE), (-1.0, 1.0), *STATISTICS)
    x = pictures((64, 64), (-1, 1))
    expected = tokens_of(conv, x, raw)
    for same in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT, x[:1].expand(2, -1, -1, -1)):
        assert_close(tokens_of(conv, same, raw)[0], expected[0], rtol=0, atol=1e-12)
    assert tokens_of(conv, x[:0], raw).shape == (0, 6, 4, 4)


# --- a supervision ----------------------------------------------------------------------------------------------------


@pytest.fixture
def grown(monkeypatch):
    """A CPU folds windows of any size."""
    monkeypatch.setattr(pixels, "CPU_GROWTH", 100)


@pytest.fixture
def resized(monkeypatch):
    """The sizes of the images that are preprocessed."""
    seen, run = [], Preprocess.forward

    def forward(self, images, *arguments, **options):
        seen.append(tuple(images.shape[2:]))
        return run(self, images, *arguments, **options)

    monkeypatch.setattr(Preprocess, "forward", forward)
    return seen


def model(name: str = "vit_small_patch14_dinov2", size=SIZE) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, img_size=size, **SHAPE)


def backbone(size=SIZE, **options) -> DINOv2Backbone:
    return DINOv2Backbone(model=model(), img_size=size, **options)


def without(teacher: DINOv2Backbone) -> DINOv2Backbone:
    """The same teacher, whose images are preprocessed."""
    twin = copy.deepcopy(teacher)
    twin.takes_raw = False
    return twin


def encoder(teacher, **options):
    return make_supervision(teacher, img_size=teacher.img_size, **options)


def official():
    vits = pytest.importorskip("dinov2.models.vision_transformer")
    shape = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    return vits.DinoVisionTransformer(img_size=SIZE, patch_size=14, init_values=1.0, block_chunks=0, **shape)


def hugging_face(kind: str, patch: int):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(image_size=4 * patch, patch_size=patch, **shape)
    )


MODELS = {
    "timm's": model,
    "timm's registers": lambda: model("vit_small_patch14_reg4_dinov2"),
    "timm's DINOv3": lambda: model("vit_small_patch16_dinov3", 64),
    "official": official,
    "transformers' DINOv2": lambda: hugging_face("Dinov2", 14),
    "transformers' DINOv3": lambda: hugging_face("DINOv3ViT", 16),
}


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_preprocessed_images(name, resized, grown):
    found = MODELS[name]()
    side = 64 if "v3" in name else SIZE
    teacher = DINOv2Backbone(model=found, img_size=side, dtype=torch.float64)
    folded, plain = encoder(teacher), encoder(without(teacher))
    for inside in (side, side * 8 // 7 if side == SIZE else 68, side * 2):
        x = pictures((inside, inside), (0, 255)).round()
        expected = plain.encode(x / 127.5 - 1)
        assert resized.pop() == (inside, inside)
        for images in (x / 127.5 - 1, x.to(torch.uint8), x.unsqueeze(0) / 127.5 - 1):
            out = folded.encode(images)
            for key in ("global", "patch"):
                assert_close(out[key], expected[key], rtol=0, atol=1e-10)
            assert (out["grid"], out["image_size"]) == (expected["grid"], expected["image_size"])
        assert not resized


def test_a_rule_folds_the_sizes_that_fit(resized):
    teacher = backbone(Scaled(7 / 8)).double()
    folded, plain = encoder(teacher), encoder(without(teacher))
    for sides in ((64, 64), (32, 80), (64, 62)):
        x = pictures(sides, (-1, 1))
        out = folded.encode(x)
        assert resized == ([sides] if 62 in sides else [])  # 62 become 56: a patch would begin between two pixels
        expected = plain.encode(x)
        resized.clear()
        assert out["grid"] == expected["grid"]
        assert_close(out["patch"], expected["patch"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("bytes_", [False, True])
def test_a_supervision_says_the_same(bytes_):
    """The tolerance is that of float32's resize, which errs by some 1e-5 of a pixel. The convolution does not."""
    teacher, z = backbone(), torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    x = pictures((64, 64), (0, 255) if bytes_ else (-1, 1), torch.uint8 if bytes_ else torch.float32, 4)
    found = []
    for module in (encoder(teacher), encoder(without(teacher))):
        module.load_state_dict(found[0][2] if found else module.state_dict())
        loss, logs = module(z, x)
        loss.backward()
        found.append((loss, logs, module.state_dict(), grads(module)))
    (loss, logs, _, slopes), (before, logs_before, _, slopes_before) = found
    assert_close(loss, before, rtol=0, atol=1e-6)
    assert_close(logs, logs_before, rtol=0, atol=1e-6)
    assert_close(slopes, slopes_before, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("input_range", [None, (0.0, 1.0)])
def test_the_image_gets_its_gradient(input_range, resized):
    options = {"stopgrad_image": False, "input_range": input_range}
    teacher = backbone(dtype=torch.float64)
    folded, plain = (encoder(part, **options).double() for part in (teacher, without(teacher)))
    plain.load_state_dict(folded.state_dict())
    x = pictures((64, 64), input_range or (-1, 1)).requires_grad_()
    z = torch.randn(2, 64, dtype=torch.float64)
    check_slope(lambda x: folded(z, x)[0], x)
    assert not resized
    slopes = [torch.autograd.grad(module(z, x)[0], x)[0] for module in (folded, plain)]
    assert_close(*slopes, rtol=0, atol=1e-10)


# --- what is preprocessed ---------------------------------------------------------------------------------------------


def hook(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda module, arguments: None)
    return module


REASONS = {
    "preprocess has interpolation=bicubic": {"preprocess": "bicubic"},
    "preprocess has antialias=True": {"preprocess": Preprocess(SIZE, antialias=True)},
    "preprocess has clamp=True": {"preprocess": Preprocess(SIZE, clamp=True)},
    "preprocess has out_dtype=torch.bfloat16": {"preprocess": Preprocess(SIZE, out_dtype=torch.bfloat16)},
    "backend torch is asked for by the argument backend=": {"backend": "torch"},
    "preprocess is no plain Preprocess": {"preprocess": hook(Preprocess(SIZE))},
}


@pytest.mark.parametrize("reason", REASONS)
def test_an_option_that_no_convolution_has(reason, resized):
    teacher = backbone()
    module, x = encoder(teacher, **REASONS[reason]), pictures((64, 64), (-1, 1), torch.float32)
    assert read_raw(teacher, module.preprocess, x, None) == reason
    out = module.encode(x)["patch"]
    assert resized == [(64, 64)]
    assert torch.equal(out, encoder(without(teacher), **REASONS[reason]).encode(x)["patch"])


def test_a_chosen_backend_runs(resized):
    module, x = encoder(backbone()), pictures((64, 64), (-1, 1), torch.float32)
    with fused_dino.use_backend("reference"):
        module.encode(x)
    assert resized == [(64, 64)]


@pytest.mark.parametrize(
    ("sides", "reason"),
    [
        ((62, 64), "a patch of 14 has no window of whole pixels where 62 become 56"),
        ((64, 28), "a patch of 14 has no window of whole pixels where 28 become 56"),
        ((112, 112), "a CPU resizes 112 x 112 to 56 x 56 faster than it multiplies so many pixels"),
    ],
)
def test_images_that_are_resized(sides, reason, resized):
    teacher = backbone()
    module, x = encoder(teacher), pictures(sides, (-1, 1), torch.float32)
    assert read_raw(teacher, module.preprocess, x, None) == reason
    out = module.encode(x)["patch"]
    assert resized == [sides]
    assert torch.equal(out, encoder(without(teacher)).encode(x)["patch"])


class Twice(nn.Module):
    """A model that reads its images outside of its patch embedding as well."""

    embed_dim, patch_size = 24, 14

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 24, 14, 14)

    def forward(self, x: Tensor) -> Tensor:
        return self.patch_embed.proj(x) + x.mean()


def quantised(teacher: DINOv2Backbone) -> None:
    class Packed(nn.Parameter):
        pass

    conv = teacher.computing.patch_embed.proj
    conv.weight = Packed(conv.weight.detach(), requires_grad=False)


def subclass(teacher: DINOv2Backbone) -> None:
    teacher.__class__ = type("Mine", (DINOv2Backbone,), {"forward": lambda self, x: DINOv2Backbone.forward(self, x)})


CHANGES = {
    "told": ("engine=False", lambda teacher: setattr(teacher, "takes_raw", False)),
    "hook": ("a hook reads what the teacher is given", hook),
    "hook of the embedding": ("a hook reads what the teacher", lambda teacher: hook(teacher.computing.patch_embed)),
    "hook of the convolution": (
        "a hook reads what the teacher",
        lambda teacher: hook(teacher.computing.patch_embed.proj),
    ),
    "weights of another kind": ("the patch embedding's weight is a Packed", quantised),
    "model that reads twice": ("Twice may read its images elsewhere, too", None),
    "subclass": (None, subclass),
}


@pytest.mark.parametrize("name", CHANGES)
def test_teachers_whose_images_are_preprocessed(name, resized):
    reason, change = CHANGES[name]
    teacher = DINOv2Backbone(model=Twice(), img_size=SIZE) if change is None else backbone()
    if change is not None:
        change(teacher)
    module, x = encoder(teacher), pictures((64, 64), (-1, 1), torch.float32)
    if reason is not None:
        assert read_raw(teacher, module.preprocess, x, None).startswith(reason)
    out = module.encode(x)["patch"]
    assert resized == [(64, 64)]
    assert torch.equal(out, teacher(FD.preprocess(x, SIZE))["patch"])


def test_the_backbone_says_whether_it_folds():
    assert "raw images           resized and normalised by the patch embedding" in backbone().explain()
    assert "raw images           Twice may read its images elsewhere" in DINOv2Backbone(model=Twice()).explain()
    assert "raw images" not in backbone(engine=False).explain()


# --- folded weights ---------------------------------------------------------------------------------------------------


def in_place(conv):
    conv.weight.mul_(2)


def bias_in_place(conv):
    conv.bias.add_(1)


def by_loading(conv):
    conv.load_state_dict({name: 2 * x for name, x in conv.state_dict().items()})


def by_assigning(conv):
    conv.load_state_dict({name: 2 * x for name, x in conv.state_dict().items()}, assign=True)


def by_replacing(conv):
    conv.weight = nn.Parameter(2 * conv.weight, requires_grad=False)


def by_casting(conv):
    conv.to(torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("change", [in_place, bias_in_place, by_loading, by_assigning, by_replacing, by_casting])
def test_weights_that_change_are_folded_anew(change):
    conv, fresh = projection(14, torch.float32), projection(14, torch.float32)
    x, raw = pictures((64, 64), (-1, 1), torch.float32), Raw((SIZE, SIZE), (-1.0, 1.0), *STATISTICS)
    before = tokens_of(conv, x, raw)
    assert len(conv.cache.results) == 1
    change(conv)
    change(fresh)
    after = tokens_of(conv, x, raw)
    assert torch.equal(after, tokens_of(fresh, x, raw))
    assert not torch.equal(after, before)


@torch.no_grad()
def test_a_fold_is_kept_for_the_sizes_used_last_and_in_no_checkpoint(monkeypatch):
    folds, fold = [], pixels.fold
    monkeypatch.setattr(pixels, "fold", lambda *arguments: folds.append(arguments[2]) or fold(*arguments))
    conv = projection(14)
    for columns in range(1, LIMIT + 5):
        for _ in range(2):
            tokens_of(conv, torch.zeros(1, 3, 14, 14 + columns), Raw((14, 14), (-1.0, 1.0), *STATISTICS))
    assert folds == [(14, 14 + columns) for columns in range(1, LIMIT + 5)]
    assert len(conv.cache.results) == LIMIT
    assert set(conv.state_dict()) == {"weight", "bias"}
    assert copy.deepcopy(conv).cache.results == {}


def test_copies_that_share_a_teacher_fold_their_own_weights():
    """A copy shares memory with its original until it is loaded."""
    module = encoder(backbone())
    twin, x = copy.deepcopy(module), pictures((64, 64), (-1, 1), torch.float32)
    before = module.encode(x)["patch"]
    assert torch.equal(twin.encode(x)["patch"], before)
    with torch.no_grad():
        twin.teacher.computing.patch_embed.proj.weight.mul_(2)  # is written in both
    after = module.encode(x)["patch"]
    assert not torch.equal(after, before)
    assert torch.equal(twin.encode(x)["patch"], after)
    state = {name: 2 * value for name, value in twin.teacher.model.state_dict().items()}
    twin.teacher.model.load_state_dict(state)
    assert torch.equal(module.encode(x)["patch"], after)
    assert not torch.equal(twin.encode(x)["patch"], after)


@torch.no_grad()
def test_the_published_weights_are_folded_again():
    """Loading folds them again, and so does refold after a write in place."""
    module, x = encoder(backbone()), pictures((64, 64), (-1, 1), torch.float32)
    found = [module.encode(x)["patch"]]
    state = module.teacher.model.state_dict()
    module.teacher.model.load_state_dict({name: 2 * value for name, value in state.items()})
    found.append(module.encode(x)["patch"])
    module.teacher.model.patch_embed.proj.weight.mul_(2)
    module.teacher.refold()
    found.append(module.encode(x)["patch"])
    for before, after in itertools.pairwise(found):
        assert not torch.allclose(before, after)
    assert_close(found[-1], encoder(without(module.teacher)).encode(x)["patch"], rtol=1e-4, atol=1e-4)


def test_weights_folded_in_inference_mode_serve_a_gradient():
    module, x = encoder(backbone(), stopgrad_image=False), pictures((64, 64), (-1, 1), torch.float32)
    with torch.inference_mode():
        module.encode(x)
    z = torch.randn(2, 64)
    (slope,) = torch.autograd.grad(module(z, x.requires_grad_())[0], x)
    assert slope.abs().min() >= 0
    assert slope.abs().max() > 0


@torch.no_grad()
def test_an_ensemble_of_weights_by_vmap():
    conv, x = projection(14), pictures((64, 64), (-1, 1))
    raw = Raw((SIZE, SIZE), (-1.0, 1.0), *STATISTICS)
    weights = {name: torch.stack([p, 2 * p]) for name, p in conv.named_parameters()}

    def run(p: dict) -> Tensor:
        holder = copy.copy(conv)
        holder._parameters = p
        return tokens_of(holder, x, raw)

    out = torch.func.vmap(run)(weights)
    expected = tokens_of(conv, x, raw)
    assert_close(out, torch.stack([expected, 2 * expected]), rtol=0, atol=1e-10)


# --- compilation ------------------------------------------------------------------------------------------------------


def test_compiles_as_one_graph_a_size(fresh_compiler, resized):
    module, counter = encoder(backbone(dtype=torch.float64)), CompileCounter()
    compiled = torch.compile(module.encode, fullgraph=True, backend=counter)
    for batch, side in [(2, 64), (3, 64), (5, 64), (2, 61), (3, 62)] * 2:
        x = pictures((side, side), (-1, 1), batch=batch)
        out = compiled(x)
        assert (len(resized) > 0) == (side != 64)
        assert_close(out["patch"], module.encode(x)["patch"], rtol=0, atol=1e-10)
        resized.clear()
    assert counter.frame_count <= 4
