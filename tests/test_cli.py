"""The `fused-dino` command: its help, what it says of wrong arguments, and the doctor."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import fused_dino
from fused_dino.cli import main
from fused_dino.cli.doctor import OPS

ROOT = Path(__file__).parents[1]


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return what `fused-dino *argv` says as it refuses: one line on stderr, status 2, nothing on stdout."""
    try:
        status = main(argv)
    except SystemExit as exit:  # argparse leaves this way
        status = exit.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.startswith("fused-dino")
    assert err.count("\n") == 1
    return err


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_the_module_is_the_command_and_works_uninstalled() -> None:
    run = python("-m", "fused_dino", "--help")
    assert run.returncode == 0
    assert run.stdout.startswith("usage: fused-dino")
    assert "demo" in run.stdout
    assert "doctor" in run.stdout
    assert run.stderr == ""


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["demo", "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for option in ("--teacher", "--images", "--loss", "--steps", "--seconds", "--seed", "--out"):
        assert option in text


def test_help_waits_for_nothing_that_a_command_needs() -> None:
    code = "import sys, fused_dino.cli; print({'timm', 'triton', 'rich', 'matplotlib', 'skimage'} & set(sys.modules))"
    run = python("-c", code)
    assert run.stdout.strip() == "set()", run.stderr


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "required"),
        (["paint"], "invalid choice: 'paint'"),
        (["demo", "--steps", "0"], "--steps: '0' is not a positive whole number"),
        (["demo", "--steps", "-3"], "--steps"),
        (["demo", "--steps", "2.5"], "--steps: '2.5' is not"),
        (["demo", "--steps", "1" + "0" * 5000], "is not a positive whole number of at most 9 digits"),
        (["demo", "--images", ""], "--images: '' is no path"),
        (["demo", "--out", ""], "--out: '' is no path"),
        (["bench", "--json", ""], "--json: '' is no path"),
        (["estimate", "--batch", str(10**30)], "--batch: '1000"),
        (["estimate", "--side", str(10**9)], "--side: '1000"),
        (["demo", "--seed", "1" * 5000], "is not a whole number from 0 to 2**63 - 1"),
        (["demo", "--seconds", "nan"], "--seconds: 'nan' is not a positive number"),
        (["demo", "--seconds", "0"], "--seconds"),
        (["demo", "--seconds", "soon"], "--seconds: 'soon' is not"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--seed", "x"], "--seed: 'x' is not a whole number"),
        (["demo", "--loss", "l1"], "invalid choice: 'l1'"),
        (["demo", "--images", "no/such/folder"], "cannot read the folder no/such/folder"),
        (["doctor", "--loud"], "unrecognized arguments: --loud"),
    ],
)
def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    assert says in failure(capsys, *argv)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"fused-dino {fused_dino.__version__}\n"


@pytest.mark.parametrize(
    ("backend", "says"), [("numpy", "FUSED_DINO_BACKEND is 'numpy'"), ("triton", "cannot run on triton")]
)
def test_a_backend_that_cannot_run_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str, says: str
) -> None:
    monkeypatch.setenv("FUSED_DINO_BACKEND", backend)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert says in failure(capsys, "demo", "--out", str(tmp_path))


def test_whoever_reads_may_stop() -> None:
    run = subprocess.Popen(
        [sys.executable, "-m", "fused_dino", "doctor"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    run.stdout.close()
    assert run.stderr.read() == b""
    assert run.wait() == 1


def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "fused_dino", "doctor"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (run.returncode, run.stderr) == (2, "fused-dino: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(("stream", "status", "says"), [("/dev/full", 2, "[Errno 28] No space"), ("pipe", 1, "")])
def test_a_help_that_nobody_can_read_is_no_traceback(stream: str, status: int, says: str) -> None:
    """Python would flush it once more at its exit, fail, and exit with 120."""
    if stream == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(stream, os.O_WRONLY)
    command = [sys.executable, "-m", "fused_dino", "--help"]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    run = subprocess.run(command, cwd=ROOT, env=buffered, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert run.returncode == status
    assert run.stderr.startswith(f"fused-dino: {says}") if says else run.stderr == ""


def test_streams_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    with pytest.raises(SystemExit, match="^0$"):
        main(["--version"])
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert main(["recipes", "no such recipe"]) == 2


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_dino.cli.demo.find_spec", lambda name: None if name == "rich" else name)
    assert 'needs rich: pip install "fused_dino[demo]"' in failure(capsys, "demo")


@pytest.mark.usefixtures("demo_extra")
class TestImages:
    """A folder of the user's own, and the path of the report, may be wrong in many ways."""

    def refused(self, capsys: pytest.CaptureFixture[str], folder: Path) -> str:
        return failure(capsys, "demo", "--images", str(folder), "--out", str(folder / "out"))

    def test_empty(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "holds 0 images" in self.refused(capsys, tmp_path)

    def test_one_image(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        for name in ("red", "green"):
            (folder / f"{name}.png").unlink()
        assert "holds 1 images" in self.refused(capsys, folder)

    def test_file_in_place_of_a_folder(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        assert "cannot read the folder" in self.refused(capsys, folder / "red.png")

    @pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n cut short"])
    def test_broken_image(self, capsys: pytest.CaptureFixture[str], folder: Path, content: bytes) -> None:
        (folder / "red.png").write_bytes(content)
        assert "cannot read the image" in self.refused(capsys, folder)

    def test_truncated_image(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        from PIL import Image

        Image.effect_noise((96, 96), 50).convert("RGB").save(folder / "red.png")
        whole = (folder / "red.png").read_bytes()
        (folder / "red.png").write_bytes(whole[: len(whole) // 2])
        assert "cannot read the image" in self.refused(capsys, folder)

    def test_tiny_image(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        from PIL import Image

        Image.new("RGB", (31, 200)).save(folder / "red.png")
        assert "31x200: too small" in self.refused(capsys, folder)

    def test_no_captions(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        (folder / "blue.txt").unlink()
        assert "blue.png has no captions" in self.refused(capsys, folder)

    @pytest.mark.parametrize("text", ["", "only one\n", "twice\n\n  twice \n", "one\n...\n"])
    def test_too_few_captions(self, capsys: pytest.CaptureFixture[str], folder: Path, text: str) -> None:
        (folder / "blue.txt").write_text(text, encoding="utf-8")
        assert "at least two different captions" in self.refused(capsys, folder)

    def test_captions_in_another_encoding(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        (folder / "blue.txt").write_bytes("café\nthé\n".encode("latin-1"))
        assert "cannot read" in self.refused(capsys, folder)

    def test_unwritable_out(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        out = folder / "red.png" / "inside"  # a file is in the way, also for root
        says = failure(capsys, "demo", "--images", str(folder), "--out", str(out))
        assert f"--out: cannot write to {out}" in says

    def test_unknown_teacher(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        says = failure(capsys, "demo", "--images", str(folder), "--out", str(folder / "out"), "--teacher", "vitx14")
        assert "--teacher vitx14" in says
        assert "vits14" in says
        assert "efficientnet-lite0" in says

    def test_unreachable_teacher(
        self, capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(*args: object, **options: object) -> None:
            raise RuntimeError("no source gave the weights:\n  hub: timed out\n  timm: timed out\n")

        monkeypatch.setattr("fused_dino.cli.demo.teacher.DINOv2Backbone", unreachable)
        says = failure(capsys, "demo", "--images", str(folder), "--out", str(folder / "out"), "--teacher", "vits14")
        assert "--teacher vits14: no source gave the weights: hub: timed out timm: timed out" in says


class TestDoctor:
    def test_names_versions_and_every_op(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor"]) == 0
        lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " on " not in line)
        assert lines["torch"] == version("torch")
        assert lines["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
        assert {"fused_dino", "triton", "timm", "einops", "gpu"} <= {name.rstrip("0123456789") for name in lines}

    def test_explains_every_op(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["doctor"])
        out = capsys.readouterr().out
        for op in OPS:
            (line,) = (line for line in out.splitlines() if line.startswith(f"{op} on cpu"))
            assert line.split()[3].rstrip(":") in ("reference", "torch", "triton")

    def test_says_whether_triton_is_interpreted(self) -> None:
        run = python("-m", "fused_dino", "doctor", TRITON_INTERPRET="1")
        assert "triton interpreted       yes" in run.stdout

    def test_survives_a_backend_that_does_not_exist(self) -> None:
        run = python("-m", "fused_dino", "doctor", FUSED_DINO_BACKEND="fortran")
        assert run.returncode == 1, run.stderr
        assert "'fortran', which is no backend" in run.stdout
