"""The doctor finds what is broken, whatever broke it, and reports nothing where nothing is broken."""

import json
import os
import sys
import urllib.error
from subprocess import run as run_process

import pytest
import torch

from fused_dino import registry
from fused_dino.cli import doctor, errors
from fused_dino.cli.main import main


def document(capsys, *arguments):
    status = main(["doctor", "--json", *arguments])
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == (status == 0)
    return found["ok"], {finding["name"]: finding for finding in found["findings"]}


def test_a_sound_machine_is_sound(capsys):
    ok, findings = document(capsys)
    assert ok
    assert all(finding["ok"] for finding in findings.values())
    for op in doctor.OPS:
        assert "torch agrees" in findings[f"{op} on cpu"]["value"]


def test_timm_beside_a_broken_torchvision(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator nms does not exist')\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "fused_dino", "doctor"]
    done = run_process(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("timm "))
    assert "cannot be imported: RuntimeError: operator nms does not exist" in line


def wrong(student, target, **options):
    loss = (student - target).square().mean()
    return loss, loss.detach()


def failing(student, target, **options):
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(("closed_form", "says"), [(wrong, "torch is wrong by"), (failing, "no such instruction")])
def test_an_op_that_is_not_its_reference(capsys, monkeypatch, closed_form, says):
    monkeypatch.setitem(registry.OPS, "cosine_loss", registry.OPS["cosine_loss"]._replace(torch=closed_form))
    ok, findings = document(capsys)
    assert not ok
    assert [name for name, finding in findings.items() if not finding["ok"]] == ["cosine_loss on cpu"]
    assert says in findings["cosine_loss on cpu"]["value"]


def test_a_missing_package_is_broken_unless_it_is_optional(monkeypatch):
    def missing(name):
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    assert not doctor.package("timm").ok
    assert doctor.package("torchvision").ok


def test_a_gpu_needs_a_c_compiler(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/gcc")
    assert doctor.compiler().ok
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = doctor.compiler()
    assert not found.ok
    assert "/nowhere/gcc" in found.value


def unreachable(request, timeout):
    raise urllib.error.URLError("no route to host")


def forbidden(request, timeout):
    raise urllib.error.HTTPError(request.full_url, 403, "Forbidden", None, None)


@pytest.mark.parametrize(("answer", "ok"), [(unreachable, False), (forbidden, True)])
def test_places_are_asked_only_online(capsys, monkeypatch, answer, ok):
    monkeypatch.setattr(doctor, "is_cached", lambda source, variant: False)
    monkeypatch.setattr(doctor, "urlopen", answer)
    assert document(capsys)[0]
    sound, findings = document(capsys, "--online")
    assert sound == ok
    assert ("which answers" in findings["vitl14 by hub"]["value"]) == ok


def test_weights_in_the_cache_need_no_place(monkeypatch):
    monkeypatch.setattr(doctor, "is_cached", lambda source, variant: True)
    monkeypatch.setattr(doctor, "urlopen", unreachable)
    assert doctor.weights("hub", online=True) == ("vitl14 by hub", "in the cache", True)


def test_a_checkout_without_symbolic_links_is_one_line(capsys, monkeypatch, tmp_path):
    (tmp_path / "cli").mkdir()
    (tmp_path / "kernels").write_text("../kernels")
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "cli/errors.py"))
    assert main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{tmp_path / 'kernels'} is no folder: the checkout was unpacked without symbolic links" in said
