"""`fused-dino demo`: learning, and what a run leaves behind."""

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor

import copies
from fused_dino import DinoSupervision
from fused_dino.cli import main
from fused_dino.cli.demo import data, learn, report
from fused_dino.cli.demo import teacher as teachers

pytestmark = pytest.mark.usefixtures("demo_extra")


@pytest.fixture
def demo(folder: Path, colours: teachers.Teacher, tmp_path: Path) -> Callable[..., dict]:
    """Runs the demo on `folder` under `colours` -> its metrics, and its exit status as "status"."""

    def run(*argv: str, out: str = "out") -> dict:
        status = main(["demo", "--images", str(folder), "--out", str(tmp_path / out), *argv])
        return {"status": status, **json.loads((tmp_path / out / "metrics.json").read_text())}

    return run


# --- learning ---------------------------------------------------------------------------------------------------------


def test_every_loss_learns_and_its_control_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crops of 128 pixels a side, 4 x 4 of the teacher's patches, show enough."""
    for module in (learn, teachers):
        monkeypatch.setattr(module, "IMG_SIZE", 128)
    encode, seen = DinoSupervision.encode, {}

    def remember(self: DinoSupervision, images: Tensor) -> dict[str, Tensor]:
        """One seed gives one sequence of crops, so that the teacher computes it once for the three losses."""
        key = images.numpy().tobytes()
        if key not in seen:
            seen[key] = encode(self, images)
        return seen[key]

    monkeypatch.setattr(DinoSupervision, "encode", remember)
    teacher = teachers.load_teacher(teachers.STAND_IN).train
    photos = data.embedded()
    for loss in learn.LOSSES:
        settings = learn.Settings(loss=loss, steps=40)
        student, control = (learn.Student(teacher, settings) for _ in range(2))
        exam = learn.Exam(photos, student, settings)
        before = exam.sit(student).top1
        course = learn.train(student, control, photos, settings, lambda loss: None)
        assert course.losses[-1] < course.losses[0]
        # Chance is 1/9, about which 18 guesses scatter by sqrt(1/9 * 8/9 / 18) = 0.07: three times that is 0.33.
        assert before < 0.33, loss
        assert exam.sit(control).top1 < 0.33, loss
        assert exam.sit(student).top1 > 0.5, loss


def test_the_control_starts_as_the_student_does(colours: teachers.Teacher) -> None:
    one, other = (learn.Student(colours.train, learn.Settings(seed=3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_captions_of_a_lesson_belong_to_its_crops(folder: Path) -> None:
    photos = data.from_folder(folder)
    crops, captions, strangers = learn.lesson(photos, torch.Generator().manual_seed(0))
    assert len(crops) == len(captions) == len(strangers) == learn.CROPS_PER_STEP
    for crop, caption in zip(crops, captions, strict=True):
        assert ("red", "green", "blue")[int(crop.mean((1, 2)).argmax())] in caption
    assert captions != strangers


def test_the_seed_decides(demo: Callable[..., dict]) -> None:
    same = [demo("--steps", "5", "--seed", "7", out=name) for name in ("one", "two")]
    other = demo("--steps", "5", "--seed", "8", out="three")
    for key in ("losses", "control_losses", "top1", "per_photo"):
        assert same[0][key] == same[1][key]
    assert same[0]["losses"] != other["losses"]


def test_it_learns_colours(demo: Callable[..., dict]) -> None:
    found = demo("--steps", "60")
    assert found["status"] == 0
    assert found["top1"]["after"] == 1
    assert found["top1"]["chance"] == pytest.approx(1 / 3)


def test_seconds_bound_the_training(demo: Callable[..., dict], capsys: pytest.CaptureFixture[str]) -> None:
    found = demo("--steps", "1000000", "--seconds", "0.2")
    assert 1 <= found["steps_done"] < 1000000
    assert found["status"] == 0
    assert not found["interrupted"]
    assert "The 0.2 s for training were over" in capsys.readouterr().out


# The student and its control take turns: the fifth call is the student's third step.
@pytest.mark.parametrize(("call", "steps"), [(1, 0), (5, 2)])
def test_ctrl_c_keeps_what_was_learnt(
    demo: Callable[..., dict],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    call: int,
    steps: int,
) -> None:
    learn_one, calls = learn.Student.learn, []

    def interrupted(self: learn.Student, *args: object) -> float:
        calls.append(self)
        if len(calls) == call:
            raise KeyboardInterrupt
        return learn_one(self, *args)

    monkeypatch.setattr(learn.Student, "learn", interrupted)
    found = demo("--steps", "50")
    assert found["status"] == 130
    assert found["interrupted"]
    assert found["steps_done"] == steps
    assert f"Interrupted after {steps} of 50 steps" in capsys.readouterr().out
    assert "interrupted by Ctrl-C" in (tmp_path / "out/report.html").read_text()


def test_ctrl_c_before_training_is_one_line(
    folder: Path, colours: teachers.Teacher, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(learn, "Exam", interrupted)
    assert main(["demo", "--images", str(folder), "--out", str(folder / "out")]) == 130
    assert capsys.readouterr().err == "fused-dino: interrupted\n"


# --- what a run leaves behind -----------------------------------------------------------------------------------------


class Loads(HTMLParser):
    """Return every address that a page makes the browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fetching = ("src", "srcset", "data", "poster") if tag == "a" else ("src", "srcset", "data", "poster", "href")
        self.found += [value or "" for name, value in attrs if name in fetching]
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")


def test_the_report_needs_nothing_from_elsewhere(demo: Callable[..., dict], tmp_path: Path) -> None:
    demo("--steps", "3")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    loads = Loads()
    loads.feed(page)
    assert len(loads.found) == 2 + 2 * 3  # two figures; a photograph and its patches, three times
    for address in loads.found:
        kind, content = address.split(";base64,")
        assert kind in ("data:image/svg+xml", "data:image/jpeg")
        if kind.endswith("svg+xml"):
            assert not re.search(rb'(?:href|src)="(?!#|data:)|url\((?!#)', base64.b64decode(content))
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_a_file_that_cannot_be_written_is_one_line(
    folder: Path, colours: teachers.Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "metrics.json").mkdir(parents=True)
    assert main(["demo", "--images", str(folder), "--out", str(out), "--steps", "1"]) == 2
    assert capsys.readouterr().err.startswith(f"fused-dino: --out: cannot write {out / 'metrics.json'}")


def test_metrics_say_what_was_run_and_found(demo: Callable[..., dict], tmp_path: Path) -> None:
    found = demo("--steps", "3", "--loss", "vicreg", "--seed", "2")
    config = found["config"]
    assert (config["teacher"], config["loss"], config["steps"], config["seed"]) == ("Colours", "vicreg", 3, 2)
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert len(found["losses"]) == len(found["control_losses"]) == found["steps_done"] == 3
    assert set(found["top1"]) == {"before", "after", "control", "chance"}
    assert [photo["name"] for photo in found["per_photo"]] == ["blue", "green", "red"]
    for name in ("before", "after", "control"):
        mean = sum(photo[name] for photo in found["per_photo"]) / 3
        assert found["top1"][name] == pytest.approx(mean, abs=1e-6)
    assert found["seconds"] > 0
    assert (tmp_path / "out/overview.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_stands_beside_chance_and_control(
    demo: Callable[..., dict], capsys: pytest.CaptureFixture[str]
) -> None:
    demo("--steps", "2")
    out = capsys.readouterr().out
    for column in ("before", "after", "control", "chance", "all 3", "0.33", "report.html"):
        assert column in out
    assert "DINO" not in out


def test_strange_captions_do_no_harm(
    demo: Callable[..., dict], folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (folder / "red.txt").write_text(
        "一堵红色的墙\n<b>red</b> for $5, not $7\n红色的 & $x_1$ {{ 1 }}\n", encoding="utf-8"
    )
    demo("--steps", "1")
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "红色的 &amp; $x_1$ {{ 1 }}" in page
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_a_long_album_is_shown_in_part(demo: Callable[..., dict], folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    for i in range(report.SHOWN):
        Image.new("RGB", (64, 64), (20 * i, 255 - 20 * i, 128)).save(folder / f"many{i}.jpg")
        (folder / f"many{i}.txt").write_text(f"number {i}\nthe {i}th\n", encoding="utf-8")
    found = demo("--steps", "1")
    assert found["photographs"] == len(found["per_photo"]) == report.SHOWN + 3
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert page.count("<article") == report.SHOWN
    assert f"The first {report.SHOWN} of {report.SHOWN + 3}" in page


def test_two_processes_learn_as_one(folder: Path, tmp_path: Path) -> None:
    """torchrun's two ranks share each batch: VICReg's statistics are the whole batch's, and one of them reports."""
    root = Path(__file__).parent.parent
    demo = ["-m", "fused_dino", "demo", "--images", str(folder), "--loss", "vicreg", "--steps", "3", "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    runs = {"one": demo, "two": [*torchrun, *demo]}
    losses = {}
    for name, command in runs.items():
        done = copies.python(*command, tmp_path / name, cwd=root)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Report: ") == 1
        losses[name] = json.loads((tmp_path / name / "metrics.json").read_text())["losses"]
    # Sums over the ranks are taken in another order, in float32.
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
