"""The bytes that autograd keeps of a term and of the teacher, against the least possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fused_dino import DINOv2Backbone, GlobalTerm, Preprocess, RegionTerm, Supervision, TokenTerm

timm = pytest.importorskip("timm")
B, N, D, C, H = 6, 16, 24, 40, 32  # images, patch tokens, widths of teacher and student, hidden width
GRID, K, M, MAP = (4, 4), 4, 5, (3, 8, 4)  # of the tokens; regions; tokens of a subset; the latent as a map
FLOAT = 4


def tensors_in(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)


def kept_by(run: Callable[[], Any], held: Iterable[Tensor]) -> tuple[Any, dict[int, int]]:
    """Return run(), and the bytes of each storage that its graph keeps, without those that are held anyway."""
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    others = {x.untyped_storage().data_ptr() for x in held}
    return out, {at: x.untyped_storage().nbytes() for at, x in saved.items() if at not in others}


# --- terms ------------------------------------------------------------------------------------------------------------

# A projector of Linear, GELU, LayerNorm, Linear keeps for each row what the last three of them read, and a mean and a
# deviation; its own input is the student's.
PROJECTOR = 3 * H + 2
# The cosine keeps the student's row and the gradient that the forward has written: the first backward returns that, a
# later one reads the row. The target's row is the teacher's.
COSINE = 2 * D
# Resampling keeps its two small matrices and none of the tokens.
REGIONS = 2 * 8 + 2 * 4
LINEAR = {"projector": nn.Linear(C, D)}

TERMS: dict[str, tuple[Callable[[], Any], tuple[int, ...], dict[str, Any], int]] = {
    "global": (lambda: GlobalTerm(C, hidden_dim=H, out_dim=D), (B, C), {}, B * (PROJECTOR + COSINE)),
    "global, squared": (
        lambda: GlobalTerm(C, hidden_dim=H, out_dim=D, loss="mse"),
        (B, C),
        {},
        B * (PROJECTOR + COSINE),
    ),
    # A weight for each image.
    "global, weighed": (
        lambda: GlobalTerm(C, hidden_dim=H, out_dim=D),
        (B, C),
        {"weight": torch.rand(B)},
        B * (PROJECTOR + COSINE + 1),
    ),
    # The region's target is pooled; the projector's input too.
    "regions": (
        lambda: RegionTerm(MAP, out_dim=D, hidden_dim=H),
        (B, *MAP),
        {},
        REGIONS + B * K * (MAP[0] + PROJECTOR + COSINE + D),
    ),
    "regions, nearest": (
        lambda: RegionTerm(MAP, out_dim=D, hidden_dim=H, target="nearest"),
        (B, *MAP),
        {},
        REGIONS + B * K * (MAP[0] + PROJECTOR + COSINE + D),
    ),
    # The queries need a gradient: rows of student and target, no gradient that is written ahead, and the attention.
    "regions, attention": (
        lambda: RegionTerm(MAP, out_dim=D, hidden_dim=H, target="attention"),
        (B, *MAP),
        {},
        REGIONS + B * K * (MAP[0] + PROJECTOR + 2 * D + N),
    ),
    "tokens": (lambda: TokenTerm(C, out_dim=D, **LINEAR), (B, N, C), {}, B * N * COSINE),
    # Standardised tokens are a target of its own.
    "tokens, standardised": (
        lambda: TokenTerm(C, out_dim=D, standardize=True, **LINEAR),
        (B, N, C),
        {},
        B * N * (COSINE + D),
    ),
    # Four tokens become sixteen, by two matrices of 4 x 2.
    "tokens of another grid": (
        lambda: TokenTerm(C, out_dim=D, token_grid=(2, 2), **LINEAR),
        (B, 4, C),
        {},
        2 * 4 * 2 + B * N * COSINE,
    ),
    # Positions of 8 bytes.
    "tokens of a subset": (
        lambda: TokenTerm(C, out_dim=D, **LINEAR),
        (B, M, C),
        {"index": torch.arange(B * M).view(B, M) % N},
        B * M * (COSINE + 2),
    ),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_keeps_what_its_backward_reads(name):
    make, shape, options, least = TERMS[name]
    term, student = make(), torch.randn(shape, requires_grad=True)
    features = {"global": torch.randn(B, D), "patch": torch.randn(B, N, D), "grid": GRID, "image_size": (56, 56)}
    held = [student, *term.parameters(), *tensors_in(features)]
    (loss, _), kept = kept_by(lambda: term(student, features, **options), held)
    assert sum(kept.values()) == FLOAT * least
    loss.backward()
    assert student.grad is not None


# --- the teacher ------------------------------------------------------------------------------------------------------


def supervision(terms: dict[str, Any], **options: Any) -> Supervision:
    torch.manual_seed(0)
    shape = {"depth": 2, "embed_dim": D, "num_heads": 2, "num_classes": 0, "img_size": 56}
    teacher = DINOv2Backbone(model=timm.create_model("vit_small_patch14_reg4_dinov2", **shape), img_size=56)
    return Supervision(teacher, terms, preprocess=Preprocess(56), **options)


def watch(module: Supervision) -> list[StorageWeakRef]:
    """Return a list that gets the memory of all patch tokens that the teacher returns."""
    seen: list[StorageWeakRef] = []

    def hook(teacher: nn.Module, images: Any, features: Any) -> None:
        if features["patch"] is not None:
            seen.append(StorageWeakRef(features["patch"].untyped_storage()))

    module.teacher.register_forward_hook(hook)
    return seen


@pytest.mark.parametrize(
    ("terms", "of_teacher"),
    [
        (("global",), B * D),
        (("region",), B * K * D),
        (("global", "region"), B * (K + 1) * D),
        (("token",), B * N * D),
        (("global", "token"), B * (N + 1) * D),
    ],
)
def test_what_survives_of_the_teacher_are_the_targets(terms, of_teacher):
    """Patch tokens die with the forward, unless a term compares them themselves."""
    parts = {
        "global": (lambda: GlobalTerm(C, hidden_dim=H), torch.randn(B, C, requires_grad=True)),
        "region": (lambda: RegionTerm(MAP, hidden_dim=H), torch.randn(B, *MAP, requires_grad=True)),
        "token": (lambda: TokenTerm(C, **LINEAR), torch.randn(B, N, C, requires_grad=True)),
    }
    kept_of_terms = {
        "global": B * (PROJECTOR + COSINE),
        "region": REGIONS + B * K * (MAP[0] + PROJECTOR + COSINE),
        "token": B * N * COSINE,
    }
    module = supervision({name: parts[name][0]() for name in terms})
    students, images = {name: parts[name][1] for name in terms}, torch.rand(B, 3, 64, 64) * 2 - 1
    seen = watch(module)
    held = [*students.values(), *module.parameters(), *module.teacher.parameters()]
    (loss, _), kept = kept_by(lambda: module(images, students), held)
    assert sum(kept.values()) == FLOAT * (of_teacher + sum(kept_of_terms[name] for name in terms))
    assert all(memory.expired() for memory in seen)
    loss.backward()


def test_what_encode_returns_is_what_is_asked_for():
    """A global token that is cached keeps no patch tokens alive."""
    features = supervision({"global": GlobalTerm(C, hidden_dim=H)}).encode(torch.zeros(B, 3, 56, 56))
    assert features["global"].untyped_storage().nbytes() == FLOAT * B * D


# --- slices of a batch, and blocks that run twice ---------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Records the largest tensor that any op returns, apart from those that it is told to leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and "cat" not in func.name() and not func.is_view:
            self.sizes.append(out.numel())
        return out


def backbone(**options: Any) -> DINOv2Backbone:
    torch.manual_seed(0)
    shape = {"depth": 3, "embed_dim": D, "num_heads": 2, "num_classes": 0, "img_size": 56}
    return DINOv2Backbone(model=timm.create_model("vit_small_patch14_reg4_dinov2", **shape), img_size=56, **options)


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("side", [64, 62])  # folded, resized
def test_slices_give_what_the_batch_gives(side, engine):
    options = {"dtype": torch.float64, "engine": engine, "layers": (0, -1)}
    terms = {"region": RegionTerm(MAP, hidden_dim=H)}
    images, student = torch.rand(B, 3, side, side).double() * 2 - 1, torch.randn(B, *MAP, dtype=torch.float64)
    torch.manual_seed(0)
    whole = Supervision(backbone(**options), terms).double()
    expected = whole.encode(images)
    for size in (1, 4, B, B + 1):
        sliced = Supervision(backbone(micro_batch=size, **options), terms).double()
        out = sliced.encode(images)
        assert out.keys() == expected.keys()
        assert (out["grid"], out["image_size"]) == (expected["grid"], expected["image_size"])
        pairs = [(out, expected), *((out["layers"][n], expected["layers"][n]) for n in (0, -1))]
        for found, wanted in pairs:
            for key in ("global", "patch"):
                assert_close(found[key], wanted[key], rtol=0, atol=1e-12)
        assert_close(sliced(images, {"region": student}), whole(images, {"region": student}), rtol=0, atol=1e-12)
        assert sliced.encode(images[:0])["patch"].shape == (0, N, D)


@torch.no_grad()
def test_a_slice_bounds_what_the_teacher_needs():
    sizes = {}
    for size in (None, 2):
        module, images = backbone(micro_batch=size), torch.rand(B, 3, 56, 56)
        with Largest() as largest:
            module(images)
        sizes[size] = max(largest.sizes)
    assert sizes[2] * B == sizes[None] * 2


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "4"])
def test_a_slice_of_no_images_is_refused(wrong):
    with pytest.raises(ValueError, match="^micro_batch must be a positive int"):
        backbone(micro_batch=wrong)


@pytest.mark.parametrize("options", [{}, {"micro_batch": 4}, {"layers": (0, -1)}])
def test_checkpointed_blocks_keep_their_inputs_alone(options):
    images = (torch.rand(B, 3, 64, 64, dtype=torch.float64) * 2 - 1).requires_grad_()
    slopes, bytes_ = [], []
    for grad_checkpointing in (False, True):
        teacher = backbone(dtype=torch.float64, grad_checkpointing=grad_checkpointing, **options)
        module = Supervision(teacher, {"token": TokenTerm(C, **LINEAR)}, stopgrad_image=False)
        with torch.no_grad():
            assert module._teach(images)["patch"].shape == (B, N, D)
        weights = [x for _, pair in teacher.projection.cache.results.values() for x in pair]  # of the raw images
        held = [images, *weights, *teacher.parameters()]
        out, kept = kept_by(lambda module=module: module._teach(images), held)
        slopes.append(torch.autograd.grad(out["patch"].square().sum(), images)[0])
        bytes_.append(sum(kept.values()) / (8 * B))
    assert_close(slopes[1], slopes[0], rtol=0, atol=1e-12)
    tokens, norm = (N + 5) * D, 2 * (N + 5)
    # The input of each of three blocks and of the last norm, which also keeps a mean and a deviation of each token;
    # the norm of a layer reads what the next block does.
    assert bytes_[1] == 4 * tokens + norm * (2 if "layers" in options else 1)
    assert bytes_[0] > 7 * bytes_[1]


def test_blocks_that_no_engine_runs_are_not_checkpointed():
    with pytest.raises(ValueError, match=r"^grad_checkpointing needs the engine, which does not run: engine=False"):
        backbone(engine=False, grad_checkpointing=True)
