"""A failure after the demo's training costs only the part that failed."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fused_dino.cli import main
from fused_dino.cli.demo import figures, ranks, report
from fused_dino.cli.text import printable
from pages import Page

pytestmark = pytest.mark.usefixtures("demo_extra")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def demo(folder: Path, colours: object, tmp_path: Path) -> Callable[..., int]:
    """Runs one step of the demo on `folder` under `colours` -> its exit status. It writes to `tmp_path / "out"`."""
    return lambda *argv: main(["demo", "--images", str(folder), "--out", str(tmp_path / "out"), "--steps", "1", *argv])


def fails(*args: object, **options: object) -> None:
    raise RuntimeError("no [/ink]\nleft")


# --- pictures ---------------------------------------------------------------------------------------------------------

ALL = 2 + 2 * 3  # two figures; a photograph and its patches, three times
LOST = {
    "figures.loss_curve": ("The loss", 1),
    "figures.similarity_maps": ("The similarity", 1),
    "figures.overview": ("overview.png", 0),
    "report.patch_colours": ("Patch tokens", 3),
}


@pytest.mark.parametrize("name", LOST)
def test_a_picture_that_fails_is_one_line(
    demo: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    what, lost = LOST[name]
    monkeypatch.setattr(f"fused_dino.cli.demo.{name}", fails)
    assert demo() == 0
    line = f"{what} could not be drawn: RuntimeError: no [/ink] left"
    page, out = Page(tmp_path / "out"), capsys.readouterr().out
    assert out.count(line) == page.text.count(line) == 1
    assert len(page.pictures) == ALL - lost
    assert (tmp_path / "out/overview.png").exists() == (name != "figures.overview")
    assert json.loads((tmp_path / "out/metrics.json").read_text())["steps_done"] == 1


def test_a_photograph_that_fails_costs_no_other(
    demo: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = report.reduced
    monkeypatch.setattr(report, "reduced", lambda photo: fails() if photo.name == "green" else draw(photo))
    assert demo() == 0
    page = Page(tmp_path / "out")
    assert len(page.pictures) == ALL - 2
    assert page.text.count("green could not be drawn") == 2
    assert page.text.count("Patch tokens of green could not be drawn") == 1
    assert {"red", "blue"} <= set(page.pictures)


def test_without_any_picture_there_is_a_report(
    demo: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the same where matplotlib or Pillow is installed and broken."""
    monkeypatch.setitem(sys.modules, "fused_dino.cli.demo.figures", None)
    monkeypatch.delattr("fused_dino.cli.demo.figures")
    monkeypatch.setattr(report, "reduced", fails)
    assert demo() == 0
    page = Page(tmp_path / "out")
    assert page.pictures == {}
    assert page.text.count("could not be drawn") == 3 + 2 * 3
    assert "right after learning" in page.text


# --- disks and folders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [("metrics.json",), ("report.html",), ("metrics.json", "overview.png", "report.html")])
def test_a_disk_that_fills_up_costs_what_it_has_no_room_for(
    demo: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], full: tuple[str, ...]
) -> None:
    (tmp_path / "out").mkdir()
    for name in full:
        (tmp_path / "out" / name).symlink_to("/dev/full")
    assert demo() == 2
    out, err = capsys.readouterr()
    said = "; ".join(f"cannot write {tmp_path / 'out' / name}: No space left on device" for name in full)
    assert err == f"fused-dino: --out: {said}\n"
    assert "all 3" in out  # the numbers, at least, are on the screen
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"metrics.json", "overview.png", "report.html"} - set(full)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_folder_without_room_is_refused_before_the_training(
    demo: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refuses(dir: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(report.tempfile, "TemporaryFile", refuses)
    assert demo() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "--out: cannot write to " in err
    assert err.endswith(f": {os.strerror(number)}\n")


def test_the_folder_keeps_what_it_holds(demo: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.writable").write_text("mine")
    assert demo() == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".writable",
        "metrics.json",
        "overview.png",
        "report.html",
    }


# --- what reads the output --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE])
def test_an_output_that_fails_ends_no_training(
    demo: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
) -> None:
    class Broken:
        encoding = "utf-8"

        def isatty(self) -> bool:
            return False

        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

        def flush(self) -> None:
            pass

        def fileno(self) -> int:
            return spare.fileno()

    with (tmp_path / "spare").open("w") as spare:
        monkeypatch.setattr("sys.stdout", Broken())
        assert demo() == (1 if number == errno.EPIPE else 2)
    assert Page(tmp_path / "out").pictures
    full = f"fused-dino: [Errno {number}] {os.strerror(number)}\n"
    assert capfd.readouterr().err == ("" if number == errno.EPIPE else full)


def test_a_log_on_a_full_disk_is_status_two() -> None:
    """Python would flush what was printed once more at its exit, fail, and exit with 120."""
    code = "import sys; from fused_dino.cli.main import say; print('begun'); say('refused'); sys.exit(2)"
    with Path("/dev/full").open("w") as full:
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=buffered, stdout=full, stderr=full)
    assert run.returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gb18030"])
def test_an_output_of_any_encoding_shows_a_name_as_it_can(
    demo: Callable[..., int], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    for suffix in ("png", "txt"):
        (folder / f"red.{suffix}").rename(folder / f"猫.{suffix}")
    with (tmp_path / "log").open("w", encoding=encoding) as log:
        monkeypatch.setattr("sys.stdout", log)
        assert demo() == 0
    said = (tmp_path / "log").read_text(encoding=encoding)
    assert "report.html" in said
    assert ("猫" if encoding == "gb18030" else r"\u732b") in said


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("café 猫 👩\u200d🚀 a\u202fb", "café 猫 👩\u200d🚀 a\u202fb"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("a\nb\tc\x1b[31m\x7f\x00", r"a\nb\tc\x1b[31m\x7f\x00"),
        ("line\u2028end \ufffe", r"line\u2028end \ufffe"),
    ],
)
def test_a_name_is_shown_or_escaped(name: str, shown: str) -> None:
    assert printable(name) == shown


def test_names_in_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / os.fsdecode(b"no\n[/such] caf\xe9")
    assert main(["demo", "--images", str(place)]) == 2
    assert capsys.readouterr().err.count(r"no\n[/such] caf\xe9") == 1


def test_labels_keep_both_ends_of_a_long_name() -> None:
    assert figures.label("IMG_20240131_123456", 16) == "IMG_202401…23456"
    assert figures.label("a wall for $5", 16) == r"a wall for \$5"


# --- clusters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "siblings", [{}, {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}]
)
@pytest.mark.parametrize("world", ["", "1", "2", "two"])
def test_a_clusters_world_size_starts_no_group(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    world: str,
    siblings: dict[str, str],
) -> None:
    for name, value in {"WORLD_SIZE": world, **siblings}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.init_process_group", fails)
    with ranks.joined() as found:
        assert found == (0, 1)
    note = f"WORLD_SIZE is {world!r}, but torchrun did not start this process: it runs alone.\n"
    assert capsys.readouterr().err == (note if world in ("2", "two") else "")
