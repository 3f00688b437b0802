"""What is made of the evidence of a run: sentences, tables, the README's part, docs/performance.md."""

from dataclasses import replace

import pytest

from benchmarks import evidence, judge, report, table
from benchmarks.evidence import Evidence, Record, Timing
from benchmarks.shapes import BACKWARD

EAGER, COMPILE, OURS = ("eager", "eager"), ("torch.compile", "compile"), ("fused_dino torch", "ours")


def recorded(times, kind="cpu", **changes):
    """Return a record whose providers took `times`, {(name, role): seconds, or None if it could not run}."""
    figure = "wall" if kind == "cpu" else "cold"
    timings = [
        Timing(name, role, None if seconds else "could not run: why", [1e-7] if seconds else [], None,
               [{figure: seconds * x} for x in (0.9, 1.0, 1.1)] if seconds else [])
        for (name, role), seconds in times.items()
    ]  # fmt: skip
    record = Record("cosine_loss", "4 x 8 float32", "IEEE", BACKWARD, kind, 1e9, 1e9, timings, True)
    return replace(record, **changes)


def evidence_of(*records, kind="cpu", name="a machine"):
    device = {"kind": kind, "name": name, "cores": 2, "threads": 2}
    return Evidence(
        device, {"torch": "2"}, "abc", "2030-01-01T00:00:00", True, {"copy": 1e10}, list(records), "complete"
    )


class TestWords:
    @pytest.mark.parametrize(
        ("times", "says"),
        [
            ({EAGER: 3.1, COMPILE: 1.4, OURS: 1.0}, "3.1x faster than eager, 1.4x faster than torch.compile"),
            ({EAGER: 75.0, COMPILE: 0.8, OURS: 1.0}, "75x faster than eager, 0.80x the speed of torch.compile"),
            ({EAGER: 1.02, COMPILE: 0.99, OURS: 1.0}, "as fast as eager, as fast as torch.compile"),
            ({EAGER: 1.07, COMPILE: None, OURS: 1.0}, "1.07x faster than eager, torch.compile could not run"),
            ({EAGER: 0.5, OURS: 1.0}, "0.50x the speed of eager, torch.compile could not run"),
            ({EAGER: 1.0, OURS: None}, "nothing of ours was timed: could not run: why"),
        ],
    )
    def test_sentences_are_honest(self, times, says):
        run = evidence_of(recorded(times))
        assert table.sentence("cosine_loss", run).startswith(f"cosine_loss: {says}")

    def test_the_roof_is_named_and_a_cache_is_no_roof(self):
        run = evidence_of(recorded({EAGER: 1.0, OURS: 0.125}))
        assert "80% of the copy roof" in table.sentence("cosine_loss", run)
        run = evidence_of(recorded({EAGER: 1.0, OURS: 0.05}))
        assert "roof" not in table.sentence("cosine_loss", run)
        assert "in cache" in table.of_record(run.records[0], run).plain()

    def test_the_fastest_of_the_compiled_is_what_is_compared(self):
        run = evidence_of(recorded({EAGER: 4.0, COMPILE: 3.0, ("torch.compile, tuned", "compile"): 2.0, OURS: 1.0}))
        assert "2.0x faster than torch.compile" in table.sentence("cosine_loss", run)

    @pytest.mark.parametrize(("kind", "width"), [("cpu", 80), ("cuda", 105)])
    def test_a_table_fits_a_terminal(self, kind, width):
        record = recorded({EAGER: 3.1e-3, COMPILE: 1e-4, ("torch.compile, tuned", "compile"): None, OURS: 1e-5}, kind)
        for timing in record.timings:
            timing.peak_bytes = 2**28
            for sample in timing.rounds:
                sample.update(graph=1.5e-4, host=1.5e-4)
        text = table.of_record(record, evidence_of(record, kind=kind)).plain()
        assert max(map(len, text.splitlines())) <= width, text

    @pytest.mark.parametrize(("load", "warns"), [(0.1, False), (None, False), (2.9, True)])
    def test_a_busy_machine_is_named(self, load, warns):
        run = evidence_of(recorded({EAGER: 1.0, OURS: 1.0}))
        run.device["load"] = load
        assert ("was busy" in table.report(run, 1)) == ("was busy" in report.summary({"x": run})) == warns

    def test_numbers(self):
        assert [table.time(x) for x in (1.234, 0.01234, 99.96e-3, 5.5e-6, None)] == [
            "1.23 s", "12.3 ms", "100 ms", "5.50 us", "-",
        ]  # fmt: skip
        assert [table.times(x) for x in (0.333, 1.0, 1.07, 3.14, 9.96, 75.2)] == [
            "0.33x", "1.00x", "1.07x", "3.1x", "10x", "75x",
        ]  # fmt: skip


class TestReport:
    def test_cpu_and_gpu_share_no_table(self):
        both = {x: evidence_of(recorded({EAGER: 1.0, OURS: 1.0}, x), kind=x) for x in ("cpu", "cuda")}
        assert report.summary(both).count("| op |") == 2
        assert report.page(both).count("### cosine_loss") == 2

    def test_the_readmes_table_has_the_most_telling_row_of_each_op(self):
        telling, other = (
            recorded({EAGER: 1.0, OURS: 1.0}, row=row, quick=row == "quick") for row in ("quick", "other")
        )
        for records in ([telling, other], [other, telling]):
            assert [row[1] for row in table.summary(evidence_of(*records)).rows] == ["quick"]

    def test_precisions_have_lines_of_their_own(self):
        run = evidence_of(*(recorded({EAGER: 1.0, OURS: 1.0}, precision=x) for x in ("IEEE", "TF32")))
        assert {row[1] for row in table.of_op("cosine_loss", run).rows} == {"IEEE", "TF32"}

    def test_the_page_is_what_the_evidence_says(self):
        rendered = report.page(report.load())
        assert report.PAGE.read_text() == rendered, "run make report"

    def test_the_readme_is_what_the_evidence_says(self):
        text = report.README.read_text()
        assert report.insert(text, report.summary(report.load())) == text, "run make report"

    def test_the_readme_leaves_out_a_run_of_whole_models_alone(self):
        step, cosine = (evidence_of(recorded({EAGER: 1.0, OURS: 1.0}, op=op)) for op in ("step", "cosine_loss"))
        assert report.summary({"a": step, "b": cosine}) == report.summary({"b": cosine}) != ""
        assert report.summary({"a": step}) == ""

    def test_a_changed_figure_shows(self):
        evidences = report.load()
        assert evidences, "there are results to render"
        for run in evidences.values():
            for timing in (timing for record in run.records for timing in record.timings):
                timing.rounds = [{name: 2 * value for name, value in x.items()} for x in timing.rounds]
        assert report.page(evidences) != report.PAGE.read_text()
        assert report.summary(evidences) not in report.README.read_text()

    def test_the_page_of_the_gpu_is_what_is_predicted(self, monkeypatch):
        text = report.GPU_PAGE.read_text()
        assert report.insert(text, judge.expected().markdown()) == text, "run make report"
        changed = replace(judge.PREDICTIONS[0], us=(12345, 67890))
        monkeypatch.setattr(judge, "PREDICTIONS", (changed, *judge.PREDICTIONS[1:]))
        assert report.insert(text, judge.expected().markdown()) != text

    def test_prediction_and_measurement_stand_side_by_side(self, tmp_path):
        """The results file is that of a GPU. The times of the three providers are 3, 2 and 0.1 ms."""
        p = next(p for p in judge.PREDICTIONS if p.op == "cosine_loss" and p.us and p.figure == "cold")
        record = recorded({EAGER: 3e-3, COMPILE: 2e-3, OURS: 1e-4}, "cuda", op=p.op, row=p.row, precision=p.precision,
                          direction=p.direction, bytes=4e8)  # fmt: skip
        run = evidence_of(record, kind="cuda", name="NVIDIA H200")
        run.roofs = {"copy": 4.3e12}
        evidence.save(run, tmp_path / "h200.json")
        text = report.page(report.load(tmp_path))
        assert "### Predicted and measured" in text
        line = next(line for line in text.splitlines() if "| memory, and a tail" in line)
        assert [x.strip() for x in line.strip("|").split("|")] == [
            "cosine_loss", p.row, p.precision, p.direction, "cold", "memory, and a tail of the last programs",
            "100", "100", "30x/9x", "20x/1.55x", "93%/93%", "met",
        ]  # fmt: skip
        for changes in ({"name": "NVIDIA A100"}, {"kind": "cpu"}):
            other = evidence_of(record, **{"kind": "cuda", "name": "NVIDIA H200", **changes})
            assert judge.beside(other) is None

    def test_where_our_host_is_slower_is_said(self):
        record = recorded({EAGER: 3e-3, OURS: 1e-4}, "cuda")
        run = evidence_of(record, kind="cuda", name="NVIDIA H100")
        for host, says in ((1e-4, False), (3e-4, True)):
            for timing, value in zip(record.timings, (2e-4, host), strict=True):
                timing.rounds = [{"cold": 1e-3, "host": value}] * 5
            assert ("above eager's: cosine_loss 4 x 8 float32" in report.page({"x": run})) == says
            assert ("above eager's" in table.report(run, 1)) == says

    def test_no_place_in_the_readme_is_an_error(self):
        with pytest.raises(ValueError, match=r"README\.md has no place"):
            report.insert("nothing here", "table")
