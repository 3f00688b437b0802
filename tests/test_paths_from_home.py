"""A `~` in the paths of commands that no shell has expanded."""

from pathlib import Path

import pytest

from fused_dino.cli.main import make_parser


@pytest.mark.parametrize(
    ("command", "option"), [("demo", "images"), ("demo", "out"), ("bench", "json")], ids=lambda text: text
)
def test_a_tilde_is_the_home(command, option, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))

    def read(text: str) -> Path:
        return getattr(make_parser().parse_args([command, f"--{option}={text}"]), option)

    assert read("~/a b") == tmp_path / "a b"
    assert read("a/~") == Path("a/~")
    assert read("~nobody_of_this_name/x") == Path("~nobody_of_this_name/x")
