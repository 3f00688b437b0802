"""docs/costs.md has what was calculated and measured, and the models that are measured compute one function."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import cost_page, evidence, harness, models, report, shapes, test_step
from benchmarks.evidence import Evidence, Record, Timing
from benchmarks.shapes import BACKWARD, FORWARD, Row
from fused_dino import gpus
from fused_dino.cli import estimate
from fused_dino.gpus import GPUS

STEP, SEEN = "64 x 3 x 256 x 256 bfloat16 teacher=vits14", "64 x 3 x 224 x 224 bfloat16 teacher=vits14 needs=global"


def timing(name: str, role: str, seconds: float, figure: str) -> Timing:
    return Timing(name, role, rounds=[{figure: seconds * x} for x in (0.5, 1.0, 2.0)])


def run_of(kind: str, name: str) -> Evidence:
    """A step of 20 ms, of which the teacher takes 16, and a teacher of 8 ms beside eager's 12."""
    device = {"kind": kind, "name": name, "threads": 2, "cores": 2}
    figure = "wall" if kind == "cpu" else "cold"
    parts = [timing(part, "part", seconds, figure) for part, seconds in (("preprocess", 1e-3), ("teacher", 16e-3))]
    step = [timing("eager", "eager", 40e-3, figure), timing("fused_dino triton", "ours", 20e-3, figure), *parts]
    seen = [timing("eager", "eager", 12e-3, figure), timing("fused_dino", "ours", 8e-3, figure),
            Timing("hub's code", "peer", "not run: it is nowhere")]  # fmt: skip
    records = [
        Record("step", STEP, "bf16", BACKWARD, kind, 1e9, 2e12, step),
        Record("teacher", SEEN, "bf16", FORWARD, kind, 1e9, 0.8e12, seen),
        Record("cosine_loss", "4 x 8 bfloat16", "bf16", FORWARD, kind, 1e9, 1e9, seen),
    ]
    roofs = {"copy": 3e12, "bf16": 500e12}
    return Evidence(device, {"torch": "2"}, "abc", "2030-01-01T00:00:00", False, roofs, records, "complete")


def lines(text: str, first: str) -> list[list[str]]:
    """Return the cells of all table lines with this first cell."""
    found = [line.strip("|").split("|") for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in cells] for cells in found]


def test_the_page_is_what_calculation_and_evidence_say(monkeypatch: pytest.MonkeyPatch) -> None:
    written, evidences = report.COST_PAGE.read_text(), report.load()
    assert written == cost_page.page(evidences), "run make report"
    for run in evidences.values():
        for record in run.records:
            record.timings[0].rounds = [
                {name: 2 * value for name, value in x.items()} for x in record.timings[0].rounds
            ]
    assert written != cost_page.page(evidences)
    monkeypatch.setitem(GPUS, "b200", GPUS["b200"]._replace(copy=1e12))
    assert written != cost_page.page(report.load())


def test_the_predictions_are_the_commands() -> None:
    text = cost_page.page({})
    assert "No GPU has been measured yet." in text
    assert "Measured:" not in text
    for name in ("vits14", "vitl14"):
        _, flops, *speeds = lines(text, name)[0]
        for gpu, speed in zip(GPUS.values(), speeds, strict=True):
            *parts, whole = estimate.estimate(name, 256, gpu, 256, "cosine", "bfloat16")
            assert float(speed.replace(",", "")) == pytest.approx(256 / whole.seconds, rel=5e-3)
        assert float(flops) == pytest.approx(parts[1].flops / 256e9, rel=5e-3)


def test_measured_stands_beside_predicted() -> None:
    text = cost_page.page({"h100": run_of("cuda", "NVIDIA H100 80GB HBM3")})
    assert "No GPU has been measured yet." not in text
    section = text[text.index("## Measured: NVIDIA H100") :]
    assert "`benchmarks/results/h100.json`" in section
    step, teacher = (cost_page.predicted_parts(record, GPUS["h100"]) for record in run_of("cuda", "H100").records[:2])
    whole = sum(step.values())
    eager, ours = lines(section, "fused_dino triton")[0], lines(section, "fused_dino")[0]
    assert eager == ["fused_dino triton", "20.0 ms", "3200", "2.0x", "20%", "10%"]
    assert ours == ["fused_dino", "8.00 ms", "8000", "1.5x", "20%", "10%"]
    assert [line[2] for line in lines(section, "predicted, at the roofs")] == [
        f"{64 / whole:.0f}", f"{64 / teacher['teacher']:.0f}",
    ]  # fmt: skip
    shares = lines(section, "teacher")[-1]
    assert shares[:3] == ["teacher", "16.0 ms", "80%"]
    assert shares[4] == f"{step['teacher'] / whole:.0%}"
    assert lines(section, "step")[0][:3] == ["step", "20.0 ms", "100%"]
    assert "- hub's code: not run: it is nowhere" in section
    assert "cosine_loss" not in section


@pytest.mark.parametrize(("kind", "name"), [("cpu", "NVIDIA H100"), ("cuda", "NVIDIA RTX 4090")])
def test_a_machine_outside_the_table_has_no_prediction(kind: str, name: str) -> None:
    text = cost_page.page({"x": run_of(kind, name)})
    section = text[text.index("## Measured: ") :]
    assert "predicted" not in section
    assert lines(section, "fused_dino") == [["fused_dino", "8.00 ms", "8000", "1.5x", "20%"]]
    assert ("No GPU has been measured yet." in text) == (kind == "cpu")


def test_a_device_is_found_by_its_name() -> None:
    assert gpus.find("NVIDIA H200") is GPUS["h200"]
    assert gpus.find("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert gpus.find("Intel(R) Xeon(R)") is None


def test_a_rows_line_is_read_back() -> None:
    for row in (*shapes.ROWS, *shapes.IMAGES, *shapes.TEACHERS, *shapes.STEPS):
        again = shapes.read(str(row))
        assert (str(again), again.shape, again.dtype) == (str(row), row.shape, row.dtype)


# --- the models -------------------------------------------------------------------------------------------------------


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two blocks of twelve, and a narrow input of the projector, for speed: the others are the same."""
    timm, official = pytest.importorskip("timm"), pytest.importorskip("dinov2.models.vision_transformer")
    whole = official.DinoVisionTransformer
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2))
    monkeypatch.setattr(official, "DinoVisionTransformer", lambda **options: whole(**{**options, "depth": 2}))
    monkeypatch.setattr(test_step, "IN_DIM", 32)
    models.weights.cache_clear()
    yield
    models.weights.cache_clear()


def judged(op: str, row: Row) -> dict[str, Timing]:
    """Try every implementation but the compiled one."""
    bench = harness.benches()[op]
    case = harness.Case(bench, row, row.directions[-1])
    trial = harness.Trial(case, "cpu")
    return {p.name: trial.judge(p)[0] for p in harness.providers(case, "cpu") if p.role != "compile"}


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("needs", ["global", "patch"])
def test_timm_hubs_code_and_ours_are_one_function(needs: str) -> None:
    row = Row((1, 3, 224, 224), "", options={"teacher": "vits14", "needs": needs}, directions=(FORWARD,))
    found = judged("teacher", row)
    assert list(found) == ["eager", "fused_dino", "fused_dino, engine=False", "hub's code"]
    assert {name: timing.why for name, timing in found.items()} == dict.fromkeys(found)


@pytest.mark.usefixtures("shallow")
def test_a_step_of_ours_is_the_seeds() -> None:
    found = judged("step", Row((1, 3, 64, 64), "", options={"teacher": "vits14"}, directions=(BACKWARD,)))
    assert {name: timing.why for name, timing in found.items()} == {"eager": None, "fused_dino torch": None}


def test_hubs_code_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dinov2.models.vision_transformer", None)
    bench = harness.benches()["teacher"]
    trial = harness.Trial(harness.Case(replace(bench, recipe=lambda row: torch.sin), bench.rows[0], FORWARD), "cpu")
    provider = harness.Provider("hub's code", "peer", lambda: bench.peers["hub's code"](bench.rows[0]))
    assert trial.judge(provider)[0].why == "not run: the package dinov2, which holds hub's code, is not installed"


def test_the_evidence_of_a_model_counts_its_images(tmp_path: Path) -> None:
    run = run_of("cpu", "a machine")
    run.records[0].images = 64
    evidence.save(run, tmp_path / "x.json")
    assert [record.images for record in evidence.load(tmp_path / "x.json").records] == [64, None, None]
