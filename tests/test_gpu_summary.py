"""The summary of a run on a GPU: it fits a screen, and names what failed, what is known, and each row's verdict."""

import json

import pytest

from benchmarks import digest, evidence, harness, judge, smoke
from benchmarks.evidence import Evidence, Record, Timing
from benchmarks.predictions import PREDICTIONS
from benchmarks.shapes import BACKWARD, FORWARD
from benchmarks.stages import Outcome, Stage

STAGES = ("smoke", "tests", "memcheck", "racecheck", "benchmarks")
H200 = "NVIDIA H200"
TOKENS = ("cosine_loss", "65536 x 1024 bfloat16", "bf16", BACKWARD)


def outcomes(**ends):
    return [
        Outcome(Stage(name, [], 1.0, proves=name != "benchmarks"), ends.get(name, "passed"), 99.0) for name in STAGES
    ]


def line(key=TOKENS, **changes):
    """Return a line of smoke.jsonl for a row that is right."""
    op, row, precision, direction = key
    made = {"op": op, "row": row, "precision": precision, "direction": direction, "wrong": None, "repeats": True}
    times = {"cold_us": 100.0, "graph_us": 99.0, "host_us": 80.0, "eager_host_us": 90.0}
    return made | times | {"share": 0.94, "roof": "copy"} | changes


def every_line(**changes):
    """Return a line for each row that a GPU has."""
    cases = smoke.order(smoke.chosen(harness.benches().values(), "cuda"))
    return [line((c.bench.op, str(c.row), c.row.precision, c.direction), **changes) for c in cases]


def smoked(out, *lines, device=H200):
    head = {"device": device, "planned": 54, "roofs": {}, "torch": "2.11.0", "triton": "3.6.0", "numpy": "2.5.0"}
    (out / "smoke.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (head, *lines)))


def tell(out, *told, name="tests"):
    found = [{"test": f"tests/{test}", "outcome": outcome, "why": why} for test, outcome, why in told]
    (out / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in found))


def measured(out, *keys, host=1e-4):
    """Evidence of rows in which ours takes 0.1 ms, torch.compile 1.6 and eager 10 times that."""
    records = []
    for op, row, precision, direction in keys:
        taken = {"eager": (1e-3, 2e-4), "compile": (1.6e-4, 2e-4), "ours": (1e-4, host)}
        timings = [
            Timing(role, role, rounds=[{"cold": gpu, "graph": gpu, "host": spent}] * 5)
            for role, (gpu, spent) in taken.items()
        ]
        records.append(Record(op, row, precision, direction, "cuda", 4.1e8, 1e6, timings, True))
    run = Evidence({"kind": "cuda", "name": H200}, {}, None, "now", False, {"copy": 4.3e12}, records, "out of time")
    evidence.save(run, out / "h200.json")


def row_of(out, start):
    return next(x for x in digest.text(out, outcomes()).splitlines() if x.startswith(start))


@pytest.mark.parametrize("failed", [0, 3, 500])
@pytest.mark.parametrize("wrong", [None, "its value is off by 1e-2, allowed 1e-6"])
def test_it_fits_a_screen(tmp_path, failed, wrong):
    smoked(tmp_path, *every_line(wrong=wrong))
    told = [
        (f"test_ops.py::test_is_as_accurate_as_eager[{i}-{'x' * 90}]", "failed", "AssertionError")
        for i in range(failed)
    ]
    tell(tmp_path, *told, ("test_resize.py::test_gradients[reference]", "known", "atomics " * 40))
    measured(tmp_path, *dict.fromkeys((p.op, p.row, p.precision, p.direction) for p in PREDICTIONS))
    text = digest.text(tmp_path, outcomes(tests="failed" if failed else "passed"))
    assert len(text.splitlines()) <= digest.HEIGHT == 60
    assert max(map(len, text.splitlines())) <= digest.WIDTH == 100
    assert text.startswith(f"{H200}: {'FAILED' if failed else 'passed'} (torch 2.11.0, triton 3.6.0, numpy 2.5.0)")
    named = text.count("FAILED tests/test_ops.py")
    assert named == failed or named >= digest.FAILURES - 1
    assert (f"... and {failed - named} more, in tests.jsonl" in text) == (failed > named)
    if not failed and wrong is None:  # every row, and every comparison
        rows = {(x["op"], x["row"], x["precision"]) for x in every_line()}
        assert text.count(" right\n") + text.count(" met\n") + text.endswith(" met") == len(rows) + len(PREDICTIONS)
        assert "more, in" not in text
    if wrong:
        assert text.count("WRONG") > 30


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({}, " 100   94%    93% met"),
        ({"share": 0.926}, " 100   93%    93% met"),
        ({"share": 0.92}, " 100   92%    93% not met"),
        ({"share": 0.92, "wrong": "off"}, " 100   92%    93% WRONG"),
        ({"repeats": False}, " 100   94%    93% BITS DIFFER"),
    ],
)
def test_a_rows_verdict(tmp_path, changes, ends):
    smoked(tmp_path, line(**changes))
    said = " ".join(row_of(tmp_path, "cosine 65536x1024 bf16").split())
    assert said.endswith(" ".join(ends.split()))


@pytest.mark.parametrize(
    ("key", "changes", "says"),
    [
        (("vicreg_loss", "256 x 8192 float32", "TF32", BACKWARD), {"cold_us": 19.0}, "28 94% 20 us met"),
        (("vicreg_loss", "256 x 8192 float32", "TF32", BACKWARD), {"cold_us": 21.0}, "28 94% 20 us not met"),
        (("vicreg_loss", "256 x 8192 float32", "IEEE", BACKWARD), {}, "- 94% - right"),
        (("vicreg_loss", "256 x 1024 float32", "IEEE", BACKWARD), {}, "18 graph 94% - right"),
        (("cosine_loss", "256 x 1024 float32", "IEEE", BACKWARD), {"eager_host_us": 161.0}, "125 host 94% - met"),
        (("cosine_loss", "256 x 1024 float32", "IEEE", BACKWARD), {"eager_host_us": 159.0}, "125 host 94% - not met"),
        # Which moves 5 tensors where the row counts 3: its share is one of those.
        (("cosine_loss", "65536 x 1024 bfloat16 grad_output=0.25", "bf16", BACKWARD), {"share": 0.56}, "93% 93% met"),
    ],
)
def test_what_is_predicted_and_what_is_to_be_reached(tmp_path, key, changes, says):
    smoked(tmp_path, line(key, **changes))
    said = row_of(tmp_path, f"{key[0].removesuffix('_loss')} {digest.short(key[1])}")
    assert " ".join(said.split()).endswith(says)


def test_nothing_is_predicted_for_another_gpu(tmp_path):
    smoked(tmp_path, line(), device="NVIDIA A100")
    assert row_of(tmp_path, "cosine 65536").split()[-4:] == ["-", "94%", "-", "right"]


def test_where_our_host_is_slower_than_eager_is_marked(tmp_path):
    smoked(tmp_path, line(), line((*TOKENS[:3], FORWARD), host_us=100.0))
    text = digest.text(tmp_path, outcomes())
    assert "host with > is above eager's, in 1 of 2 lines of smoke.jsonl" in text
    assert ">" not in row_of(tmp_path, "cosine 65536")
    smoked(tmp_path, line(host_us=100.0))
    assert " 100>90 " in row_of(tmp_path, "cosine 65536")


def test_a_forward_is_a_line_of_its_own_where_it_is_wrong(tmp_path):
    forward = (*TOKENS[:3], FORWARD)
    for wrong, lines in ((None, 1), ("off", 2)):
        smoked(tmp_path, line(), line(forward, wrong=wrong))
        assert digest.text(tmp_path, outcomes()).count("cosine 65536x1024 bf16") == lines


def test_stages_tell_what_they_found(tmp_path):
    smoked(tmp_path, line(), line(wrong="off"))
    tell(
        tmp_path, ("a", "began", ""), ("a", "passed", ""), ("b", "began", ""), ("c", "failed", "ValueError: no"),
        ("c", "failed", "worker 'gw1' crashed"), ("d", "skipped", ""),
    )  # fmt: skip
    (tmp_path / "memcheck.log").write_text("a case\n========= ERROR SUMMARY: 3 errors\nTraceback\n  the last\n")
    measured(tmp_path, TOKENS)
    text = digest.text(tmp_path, outcomes(smoke="out of time", memcheck="failed"))
    assert "smoke      out of time   99 s  2 of 54 rows, 1 wrong, 0 whose bits differ" in text
    assert "tests      passed        99 s  1 passed, 1 failed, 1 skipped, 1 unfinished" in text
    assert "memcheck   failed        99 s  ERROR SUMMARY: 3 errors" in text
    assert "benchmarks passed        99 s  1 rows (out of time)" in text
    assert "FAILED tests/c - ValueError: no" in text, "what it died of, and not that it died"
    assert "BEGAN  tests/b, and did not end" in text
    assert "10x/9x" in text


def test_what_is_known_is_told_apart(tmp_path):
    names = [f"test_ops.py::test_bits_repeat[preprocess-{dtype}-reference]" for dtype in ("a", "b")]
    tell(tmp_path, (names[0], "known", "atomics"), (names[1], "passed", ""), name="wide")
    text = digest.text(tmp_path, outcomes())
    assert "KNOWN  test_bits_repeat[preprocess-a-reference]: atomics" in text
    assert "KNOWN to fail, and passed: tests/test_ops.py::test_bits_repeat[preprocess-b-reference]" in text
    assert "FAILED" not in text


def test_comparisons_say_what_is_met(tmp_path):
    measured(tmp_path, TOKENS, host=3e-4)
    text = digest.text(tmp_path, outcomes())
    assert " ".join(text.splitlines()[-2].split()) == "cosine 65536x1024 bf16 100 10x/9x 1.6x/1.55x 95%/93% met"
    assert "Our host time is above eager's: cosine_loss 65536 x 1024 bfloat16" in text


def test_a_folder_in_which_little_was_left(tmp_path):
    assert digest.text(tmp_path, []) == "a device that no stage has told: no stage has ended"
    (tmp_path / "x.json").write_text('{"schema"')
    (tmp_path / "smoke.jsonl").write_text('{"device": "NVIDIA H2')
    assert "1 passed" not in digest.text(tmp_path, outcomes())


def test_every_prediction_is_of_a_row_that_is_measured():
    plan = smoke.chosen(harness.benches().values(), "cuda")
    rows = {(c.bench.op, str(c.row), c.direction, c.row.precision) for c in plan}
    assert {(p.op, p.row, p.direction, p.precision) for p in PREDICTIONS} <= rows
    assert len({(p.op, p.row, p.direction, p.precision, p.figure) for p in PREDICTIONS}) == len(PREDICTIONS)
    assert all(p.figure in judge.FIGURES for p in PREDICTIONS)
