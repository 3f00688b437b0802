"""What only a GPU can show: CUDA graphs, streams and devices. Collected where there is one, and tried on every op."""

import copy

import pytest
import torch

from fused_dino import DINOv2Backbone, Scaled
from proving import IMPLEMENTATIONS, results
from table import OPS

each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
each_backend = pytest.mark.parametrize("backend", [x for x in IMPLEMENTATIONS if x != "reference"])
SHAPE = (300, 1000)  # rows, width
if torch.cuda.device_count() > 1:

    @each_op
    def test_a_device_that_is_not_the_current_one(op):
        here, there = op.draw(op.shape(*SHAPE)), tuple(x.to("cuda:1") for x in op.draw(op.shape(*SHAPE)))
        assert torch.cuda.current_device() == 0
        for want, got in zip(results(op, here, "triton"), results(op, there, "triton"), strict=True):
            assert got.device == torch.device("cuda:1")
            assert torch.equal(got.cpu(), want.cpu())
        assert torch.cuda.current_device() == 0


@each_op
@each_backend
def test_capture_in_a_cuda_graph(op, backend):
    """A replay computes anew from the current values of its inputs: the op reads and caches no value on the host."""
    inputs = op.draw(op.shape(*SHAPE))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(op, inputs, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = results(op, inputs, backend)
    for seed in (1, 2):
        for x, new in zip(inputs, op.draw(op.shape(*SHAPE), seed=seed), strict=True):
            x.copy_(new)
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        for got, want in zip(captured, results(op, inputs, backend), strict=True):
            assert torch.equal(got, want)


@each_op
@each_backend
def test_a_stream_of_its_own(op, backend):
    """Inputs that are still being written on a second stream: the op must wait for them there, and nowhere else."""
    want = results(op, op.draw(op.shape(*SHAPE)), backend)
    late = tuple(torch.full_like(x, float("nan")) for x in op.draw(op.shape(*SHAPE)))
    values = op.draw(op.shape(*SHAPE))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles: some ten milliseconds
        for x, value in zip(late, values, strict=True):
            x.copy_(value)
        got = results(op, late, backend)
    stream.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@each_op
def test_nothing_waits_for_the_gpu(op):
    inputs = op.draw(op.shape(*SHAPE))
    results(op, inputs, "triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(op, inputs, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_a_graph_of_a_teacher_has_positions_of_its_own():
    """Cached positions may leave their memory later. A graph that had captured them would go on reading it."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_small_patch14_dinov2", depth=1, img_size=56, num_classes=0)
    backbone = DINOv2Backbone(model=model, img_size=Scaled(7 / 8)).cuda()
    x = torch.randn(2, 3, 28, 42, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        backbone(x)
        want = backbone(x)["patch"]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = backbone(x)["patch"]
    with torch.cuda.stream(stream):
        for columns in range(1, 41):  # more sizes than are kept
            backbone(torch.randn(1, 3, 14, 14 * columns, device="cuda"))
    stream.synchronize()
    captured.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(captured, want)


@torch.no_grad()
def test_a_graph_of_an_engine_computes_with_the_weights_that_are_loaded_later():
    """A GPU holds the folded weights alone. The published ones stay on the host, and are folded into its memory."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_small_patch14_dinov2", depth=2, img_size=56, num_classes=0)
    published = DINOv2Backbone(model=copy.deepcopy(model), img_size=56, engine=False).cuda()
    backbone = DINOv2Backbone(model=model, img_size=56).cuda()
    assert {p.device.type for p in backbone.parameters()} == {"cuda"}
    assert {p.device.type for p in backbone.model.parameters()} == {"cpu"}
    x = torch.randn(2, 3, 56, 56, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.testing.assert_close(backbone(x)["patch"], published(x)["patch"], rtol=1e-4, atol=1e-4)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = backbone(x)["patch"]
    state = {name: 1.1 * weight for name, weight in backbone.model.state_dict().items()}
    backbone.model.load_state_dict(state)
    published.model.load_state_dict(state)
    graph.replay()
    torch.testing.assert_close(captured, published(x)["patch"], rtol=1e-4, atol=1e-4)
    assert "cosine 1.0000" in backbone.check(x)
    assert {p.device.type for p in backbone.model.parameters()} == {"cpu"}
    assert "on cuda:0" in backbone.bfloat16().explain()


@torch.no_grad()
def test_a_teacher_replays_cuda_graphs():
    """The features of one call stay as they are when the next call overwrites the memory of the graph."""
    timm = pytest.importorskip("timm")
    torch._dynamo.reset()
    model = timm.create_model("vit_small_patch14_dinov2", depth=2, img_size=56, num_classes=0)
    plain = DINOv2Backbone(model=copy.deepcopy(model), img_size=56).cuda()
    backbone = DINOv2Backbone(model=model, img_size=56, compile="reduce-overhead").cuda()
    batches = [torch.randn(batch, 3, 56, 56, device="cuda") for batch in (4, 4, 4, 2, 4)]
    found = [backbone(x)["patch"] for x in batches]
    for x, out in zip(batches, found, strict=True):
        torch.testing.assert_close(out, plain(x)["patch"], rtol=1e-4, atol=1e-4)
