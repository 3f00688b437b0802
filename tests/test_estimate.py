"""`fused-dino estimate`: its arithmetic and sources, what it shares with the benchmarks, and measurements beside it."""

import json
import math
from pathlib import Path

import pytest
import torch

from fused_dino import costs, gpus
from fused_dino.benchmarks import evidence, harness, judge, report
from fused_dino.benchmarks.evidence import Evidence, Record, Timing
from fused_dino.cli import estimate, main
from fused_dino.gpus import GPUS
from test_cli import ROOT, failure, python

SMALL = ("--teacher", "vits14", "--batch", "64")


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["estimate", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict]:
    return {x["part"]: x for x in document(capsys, *arguments)["parts"]}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in place of benchmarks/results/."""
    load = report.load
    monkeypatch.setattr(report, "load", lambda: load(tmp_path))
    return tmp_path


def test_the_parts_are_their_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    parts = lines(capsys, *SMALL)
    assert parts["preprocess"]["bytes"] == 64 * 3 * (256**2 + 224**2) * 2
    assert parts["loss"]["bytes"] == 3 * 64 * 384 * 2
    assert parts["projector"]["flops"] == 3 * 2 * 64 * (8192 + 384) * 4096
    # The last block computes queries, their products with keys and values, and the MLP of the class token alone.
    unread = 2 * 256 * (2 * 384**2 + 2 * 257 * 384 + 8 * 384**2)
    assert parts["teacher"]["flops"] == pytest.approx(64 * (12.247e9 - unread), rel=1e-4)
    for figure in ("flops", "bytes", "launches", "seconds", "share"):
        assert parts["step"][figure] == pytest.approx(sum(x[figure] for name, x in parts.items() if name != "step"))


def test_a_kernel_takes_the_longer_of_its_two_times() -> None:
    part = costs.Part("both", [costs.Kernel(300, 10), costs.Kernel(100, 4000)], 2)
    assert part.seconds(copy=100, matrix=1000) == 3 + 4


def test_a_vision_transformer_launches_what_its_blocks_do(capsys: pytest.CaptureFixture[str]) -> None:
    """A block has 2 norms, 4 products, attention, GELU and 2 sums. The last block computes the class token's query
    apart.

    The rest is the convolution of the patches, joining the class token, adding the positions, and the last norm.
    """
    assert lines(capsys, *SMALL)["teacher"]["launches"] == 12 * 10 + 1 + 4


def test_every_gpu_has_its_roofs_and_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    times = {}
    for name, gpu in GPUS.items():
        assert gpu.source.startswith("https://www.nvidia.com/")
        assert set(gpu.matrix) == {"bf16", "fp16", "TF32", "IEEE"}
        assert gpu.matrix["bf16"] == gpu.matrix["fp16"] > gpu.matrix["TF32"] > gpu.matrix["IEEE"]
        times[name] = estimate.estimate("vits14", 8, gpu, 256, "cosine", "bfloat16")[-1].seconds
    assert times["a100"] > times["h100"] > times["h200"] > times["b200"]


def test_the_benchmarks_count_the_same() -> None:
    """Each row of the benchmarks has the counts that `estimate` uses."""
    for name, bench in harness.benches().items():
        for row in bench.rows[:1]:
            moved, computed = bench.work(row, row.directions[-1])
            backward, itemsize = row.directions[-1] != "forward", getattr(torch, row.dtype).itemsize
            if name == "step":
                parts = costs.step(costs.on_meta(row.options["teacher"]), 2, 256, "cosine", torch.float32)
                assert computed == sum(part.flops for part in parts)
                assert moved < sum(part.bytes for part in parts), "the least bytes are fewer than eager's"
            elif name == "teacher":
                seen = costs.teacher_kernels(costs.on_meta(row.options["teacher"]), row.shape[0], torch.float32)
                assert computed == sum(kernel.flops for kernel in seen)
                assert moved < sum(kernel.bytes for kernel in seen)
            elif name != "preprocess":
                assert (moved, computed) == getattr(costs, name)(row.shape, itemsize, backward)
                assert moved == (3 if backward else 2) * math.prod(row.shape) * itemsize


def test_the_predictions_speak_of_gpus_of_the_table() -> None:
    assert [gpu.name for gpu in judge.GPUS] == ["H100", "H200"]
    assert judge.gpu_of("NVIDIA H200") == 1
    assert judge.gpu_of("NVIDIA A100-SXM4-80GB") is None
    assert (GPUS["h100"], GPUS["h200"]) == judge.GPUS


def test_a_row_that_memory_limits_is_predicted_by_its_bytes_and_the_tables_speed() -> None:
    """Each row that memory limits moves the bytes that the benchmarks count, at its share of the speed of a copy."""
    rows = {(bench.op, str(row)): (bench, row) for bench in harness.benches().values() for row in bench.rows}
    streamed = [p for p in judge.PREDICTIONS if p.us is not None and "memory" in p.limiter]
    assert len(streamed) == 8
    for p in streamed:
        bench, row = rows[p.op, p.row]
        moved, _ = bench.work(row, p.direction)
        for gpu, us, share in zip(judge.GPUS, p.us, p.share, strict=True):
            assert us == round(moved * p.traffic / (share * gpus.COPIED * gpu.copy) * 1e6)


def test_our_launches_are_what_the_kernels_do() -> None:
    """The interpreter runs each op's forward and backward, and counts its launches."""
    code = """
import torch
from triton.runtime.interpreter import GridExecutor
from fused_dino import functional as FD
from fused_dino.costs import LAUNCHES
seen, run = [], GridExecutor.__call__
GridExecutor.__call__ = lambda self, *a, **k: (seen.append(self.fn.__name__), run(self, *a, **k))[1]
for op, launches in LAUNCHES.items():
    seen.clear()
    if op == "preprocess":
        FD.preprocess(torch.rand(1, 3, 16, 16), 14, backend="triton")
    else:
        x = torch.randn(4, 32, requires_grad=True)
        out = getattr(FD, op)(x, torch.randn(4, 32), backend="triton")
        (out if op != "vicreg_loss" else out.loss).backward()
    assert len(seen) == launches, (op, launches, seen)
"""
    run = python("-c", code, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr


def test_needs_neither_a_gpu_nor_cuda(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("asked for a GPU")

    for name in ("is_available", "_lazy_init", "device_count", "current_device"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    assert lines(capsys, *SMALL)["step"]["seconds"] > 0


def test_the_table_fits_80_columns_and_has_no_empty_column(capsys: pytest.CaptureFixture[str], results: Path) -> None:
    assert main(["estimate", *SMALL, "--gpu", "H200", "--loss", "vicreg", "--dtype", "float16"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "measured" not in out
    assert [line.split()[0] for line in out.splitlines()[4:10]] == [
        "part", "preprocess", "teacher", "projector", "loss", "step",
    ]  # fmt: skip
    assert GPUS["h200"].source in out


def test_measurements_of_that_gpu_and_size_stand_beside(capsys: pytest.CaptureFixture[str], results: Path) -> None:
    def record(op: str, row: str, direction: str, **timings: tuple[str, float]) -> Record:
        found = [Timing(name, role, rounds=[{"cold": cold}]) for name, (role, cold) in timings.items()]
        return Record(op, row, "bf16", direction, "cuda", 1.0, 1.0, found)

    step = record(
        "step", "64 x 3 x 256 x 256 bfloat16 teacher=vits14", "forward + backward",
        triton=("ours", 9e-3), teacher=("part", 8e-3), preprocess=("part", 2e-5),
    )  # fmt: skip
    op = record("preprocess", "64 x 3 x 256 x 256 bfloat16 size=224", "forward", triton=("ours", 1e-5))
    alone = record("teacher", "32 x 3 x 224 x 224 bfloat16 teacher=vits14 needs=global", "forward", ours=("ours", 3e-3))
    other = record("cosine_loss", "65 x 384 bfloat16", "forward + backward", triton=("ours", 1.0))
    for name in ("H100", "H200"):
        run = Evidence({"kind": "cuda", "name": f"NVIDIA {name}"}, {}, None, "2026-01-01", False, {"copy": 3e12})
        run.records = [step, op, alone, other] if name == "H100" else []
        evidence.save(run, results / f"{name.lower()}.json")
    measured = {name: x["measured"] for name, x in lines(capsys, *SMALL).items()}
    assert measured == {"preprocess": 1e-5, "teacher": 8e-3, "projector": None, "loss": None, "step": 9e-3}
    assert main(["estimate", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "8.00 ms" in out
    assert "benchmarks/results/h100.json. Roofs, measured in the same run: copy 3000 GB/s" in out
    assert set(lines(capsys, *SMALL, "--batch", "65")["teacher"].items()) >= {("measured", None)}
    assert lines(capsys, *SMALL, "--batch", "32")["teacher"]["measured"] == 3e-3, "the teacher alone was measured"
    assert lines(capsys, *SMALL, "--loss", "mse")["step"]["measured"] is None, "the benchmark's step is by cosine"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "h10"], "--gpu: 'h10' is not in the table; near are h100"),
        (["--teacher", "vitl41"], "--teacher: 'vitl41' is no teacher; near are vitl14"),
        (["--teacher", "vit?14"], "give one, such as vits14"),
        (["--batch", "0"], "--batch: '0' is not a positive whole number"),
        (["--loss", "l1"], "invalid choice: 'l1'"),
    ],
)
def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert says in failure(capsys, "estimate", *arguments)


def test_a_results_file_that_cannot_be_read_is_one_line(capsys: pytest.CaptureFixture[str], results: Path) -> None:
    (results / "h100.json").write_text("{}")
    assert "benchmarks/results: h100.json is no results file" in failure(capsys, "estimate", *SMALL)


def test_the_guide_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str], results: Path) -> None:
    assert main(["estimate", "--teacher", "vitl14", "--batch", "256", "--gpu", "h100"]) == 0
    printed = capsys.readouterr().out.split("\n\n")[1]
    assert printed in (ROOT / "docs/guide.md").read_text(encoding="utf-8")
