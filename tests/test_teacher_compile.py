"""DINOv2Backbone(compile=...): how often it compiles, what it returns, and what its copies do."""

import copy
import functools
import pickle

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.testing import assert_close

from fused_dino import DINOv2Backbone, GlobalTerm, Scaled, Supervision
from fused_dino.teacher import running

timm = pytest.importorskip("timm")
SHAPE = {"depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 0}


def backbone(size=56, name="vit_small_patch14_reg4_dinov2", **options) -> DINOv2Backbone:
    torch.manual_seed(0)
    return DINOv2Backbone(model=timm.create_model(name, img_size=56, **SHAPE), img_size=size, **options)


def images(batch: int, sides=(64, 64), dtype=torch.float32) -> Tensor:
    return torch.rand(batch, 3, *sides, generator=torch.Generator().manual_seed(1)).mul(2).sub(1).to(dtype)


def supervision(teacher: DINOv2Backbone, **options) -> Supervision:
    torch.manual_seed(0)
    return Supervision(teacher, {"global": GlobalTerm(40, hidden_dim=32)}, **options)


@pytest.fixture
def counter(monkeypatch, fresh_compiler):
    """Count programs in place of making them."""
    count = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    return count


@pytest.fixture
def traced(monkeypatch, fresh_compiler):
    """Run what is traced, by ATen's ops."""
    count = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    return count


# --- how often it compiles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [3, 1])
def test_a_run_of_one_batch_size_compiles_once_and_a_smaller_last_batch_once_more(counter, last):
    module, plain = supervision(backbone(compile=True)), supervision(backbone())
    for epoch in range(2):
        for batch in (4, 4, 4, last):
            x = images(batch)
            out = module.encode(x)
            assert counter.frame_count == (1 if batch == 4 and not epoch else 2)
            assert_close(out["patch"], plain.encode(x)["patch"])


def test_a_bucket_compiles_at_most_once(counter):
    module, plain = supervision(backbone(Scaled(7 / 8), compile=True)), supervision(backbone(Scaled(7 / 8)))
    buckets, before = [(64, 64), (48, 80), (80, 48), (32, 112)], 0
    for sides in buckets + buckets:
        for _ in range(2):
            x = images(2, sides)
            out = module.encode(x)
            assert out["grid"] == (sides[0] // 16, sides[1] // 16)
            assert_close(out["patch"], plain.encode(x)["patch"], rtol=1e-4, atol=1e-5)
        assert counter.frame_count <= before + 1
        before = counter.frame_count
    assert counter.frame_count <= len(buckets)


def test_slices_of_a_batch_compile_as_batches_do(counter):
    module = supervision(backbone(compile=True, micro_batch=3))
    for _ in range(2):
        module.encode(images(8))
    assert counter.frame_count == 2  # of three images, and of the two that are left


def test_nothing_breaks_the_graph(counter):
    for options in ({}, {"name": "vit_small_patch16_dinov3", "size": 64}):
        module = supervision(backbone(compile=True, **options), img_size=options.get("size"))
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        module.encode(images(2))
        assert not torch._dynamo.utils.counters["graph_break"]
    assert counter.frame_count == 2


# --- what it gives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(64, 64), (62, 64)])  # folded, resized
def test_a_compiled_step_is_the_step(traced, sides):
    x, z = images(4, sides, torch.float64).requires_grad_(), torch.randn(4, 40, dtype=torch.float64)
    found = []
    for compile in (False, True):
        module = supervision(backbone(compile=compile, dtype=torch.float64), stopgrad_image=False).double()
        loss, _ = module(x, {"global": z})
        found.append((loss.detach(), *torch.autograd.grad(loss, [x, *module.parameters()])))
    assert traced.frame_count == 1
    assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_patches_and_choices_of_features(counter):
    compiled, plain = backbone(compile=True, dtype=torch.float64), backbone(dtype=torch.float64)
    x = images(2, (56, 56), torch.float64)
    patches = torch.nn.functional.unfold(x, 14, stride=14).mT
    for arguments in ((patches,), (x, frozenset({"global"}))):
        out, expected = compiled(*arguments), plain(*arguments)
        assert out.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(out[key], value, rtol=0, atol=1e-12)
    assert counter.frame_count == 2


def test_a_compiler_around_it_takes_it_in(fresh_compiler):
    module, count = supervision(backbone(compile=True)), CompileCounter()
    torch.compile(module.encode, backend=count, fullgraph=True)(images(2))
    assert count.frame_count == 1
    assert module.teacher.compiled.compiled is None


def test_the_published_model_is_compared_as_it_is(traced):
    """check runs the published model, which nothing compiles."""
    module = backbone(compile=True)
    assert "cosine 1.000000" in module.check(images(2, (56, 56)))
    assert traced.frame_count == 1


# --- copies -----------------------------------------------------------------------------------------------------------


def test_it_is_copied_pickled_and_moved(traced):
    module, x = backbone(compile=True), images(2, (56, 56))
    expected = module(x)["patch"]
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(supervision(module)).teacher]
    for twin in twins:
        assert twin.compiled is not module.compiled
        assert (twin.compiled.mode, twin.compiled.compiled) == ("default", None)
        assert_close(twin(x)["patch"], expected)
    moved = twins[0].double()(x.double())["patch"]
    assert moved.dtype == torch.float64
    assert_close(moved.float(), expected)
    weights = {name: 2 * value for name, value in module.model.state_dict().items()}
    module.model.load_state_dict(weights)
    twins[1].model.load_state_dict(weights)
    fresh = backbone()
    fresh.model.load_state_dict(weights)
    for twin in (module, twins[1]):
        assert_close(twin(x)["patch"], fresh(x)["patch"])
    assert not torch.allclose(module(x)["patch"], expected)


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", running.MODES)
def test_results_of_cuda_graphs_are_copied(monkeypatch, mode):
    """A graph writes its results where it wrote those of the call before."""
    memory: dict[str, Tensor] = {}

    def replaying(function, mode):
        def run(*arguments):
            out = function(*arguments)
            for key in ("global", "patch"):
                memory.setdefault(key, torch.empty_like(out[key])).copy_(out[key])
            return {**out, **memory}

        return run

    monkeypatch.setattr(torch, "compile", replaying)
    module = backbone(compile=mode)
    x = images(2, (56, 56))
    first = module(x)
    assert (first["patch"] is memory["patch"]) == (mode not in running.CUDA_GRAPHS)
    assert_close(first["patch"], backbone()(x)["patch"])
    other = module(x.flip(0))
    assert torch.equal(first["patch"], other["patch"]) == (mode not in running.CUDA_GRAPHS)
    assert torch.equal(other["patch"], memory["patch"])


def test_nothing_in_it_asks_for_a_value():
    """Tensors without memory have no values: a graph of kernels never needs the host."""
    module = backbone(Scaled(7 / 8)).to("meta")
    assert module(torch.empty(2, 3, 28, 42, device="meta"))["patch"].shape == (2, 6, 24)
    assert supervision(module).encode(torch.empty(2, 3, 32, 48, device="meta"))["patch"].shape == (2, 6, 24)


@pytest.mark.parametrize("wrong", ["fast", 1, None])
def test_another_mode_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match="^compile is .*; use one of default, reduce-overhead"):
        backbone(compile=wrong)
