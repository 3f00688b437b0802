"""Where DINOv2Backbone finds published weights: hub, timm, their caches, and what it says when there are none."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fused_dino.teacher import DINOv2Backbone

timm = pytest.importorskip("timm")

REVISION = "7764ea0f912e53c92e82eb78a2a1631e92725fc8"
HUBCONF = """
import torch

class Stub(torch.nn.Module):
    embed_dim, patch_size = 2, 14

    def __init__(self):
        super().__init__()
        self.cls = torch.nn.Parameter(torch.zeros(2))

    def forward_features(self, x):
        patches = torch.nn.functional.avg_pool2d(x, 14)[:, :2].flatten(2).transpose(1, 2)
        return {"x_norm_clstoken": self.cls.expand(len(x), 2), "x_norm_patchtokens": patches}

def dinov2_vits14(pretrained=True):
    model = Stub()
    if pretrained:
        url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"
        model.load_state_dict(torch.hub.load_state_dict_from_url(url, map_location="cpu"))
    return model
"""


@pytest.fixture
def caches(monkeypatch, tmp_path):
    """Empty caches of torch hub's and Hugging Face's, as (hub, hf)."""
    from huggingface_hub import constants

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "torch" / "hub", tmp_path / "hf"


@pytest.fixture
def calls(monkeypatch):
    """The hosts that anything asked for, none of which answers."""
    asked = []

    def refuse(host, *args, **kwargs):
        asked.append(host)
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.lower(), raising=False)
    return asked


def fill_hub(hub: Path, value: float = 3.0) -> None:
    code = hub / f"facebookresearch_dinov2_{REVISION}"
    code.mkdir(parents=True)
    (code / "hubconf.py").write_text(HUBCONF)
    (hub / "checkpoints").mkdir()
    torch.save({"cls": torch.full((2,), value)}, hub / "checkpoints" / "dinov2_vits14_pretrain.pth")


@pytest.fixture(scope="module")
def timm_weights(tmp_path_factory):
    """timm's own file for vits14, with random weights of a 4 x 4 grid."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=56)
    nn.init.constant_(model.norm.bias, 7.0)
    save_file(model.state_dict(), path)
    return path


def fill_hf(hf: Path, weights: Path, name: str = "vit_small_patch14_dinov2.lvd142m") -> None:
    repository = hf / f"models--timm--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "model.safetensors").symlink_to(weights)


# --- no network -------------------------------------------------------------------------------------------------------


def test_trap_4_every_attempt_and_its_cause_is_told(calls, caches):
    with pytest.raises(RuntimeError) as caught:
        DINOv2Backbone("vits14")
    lines = str(caught.value).splitlines()
    assert "'vits14'" in lines[0]
    assert lines[1].startswith(f"  hub (facebookresearch/dinov2:{REVISION}): URLError: ")
    assert lines[2].startswith("  timm (timm/vit_small_patch14_dinov2.lvd142m): ConnectError: ")
    assert all("no network in this test" in line for line in lines[1:3])
    assert 'source="local"' in lines[3]
    assert "weights=PATH" in lines[3]
    assert "no network in this test" in str(caught.value.__cause__)
    assert list(dict.fromkeys(calls)) == ["github.com", "huggingface.co"]


@pytest.mark.parametrize(
    ("options", "tried"),
    [
        ({"source": "hub"}, ["hub"]),
        ({"source": "timm"}, ["timm"]),
        ({"use_timm_fallback": False}, ["hub"]),
        ({"pos_embed": "timm"}, ["timm"]),
    ],
)
def test_named_sources_never_fall_back(options, tried, calls, caches):
    with pytest.raises(RuntimeError) as caught:
        DINOv2Backbone("vits14", **options)
    assert [line.split()[0] for line in str(caught.value).splitlines() if line.startswith("  ")] == tried
    assert set(calls) == {{"hub": "github.com", "timm": "huggingface.co"}[tried[0]]}


@pytest.mark.parametrize("error", [ImportError, RuntimeError, OSError])
def test_a_timm_that_cannot_be_imported_is_a_cause(error, calls, caches, monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "timm":
                raise error("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(RuntimeError, match=rf"timm \(.*\): {error.__name__}: operator torchvision::nms"):
        DINOv2Backbone("vits14", pretrained=False)
    assert not calls


def test_random_weights_ask_nobody(calls, caches):
    assert DINOv2Backbone("vits14", 28, pretrained=False).source == "random"
    assert not calls
    assert not caches[0].exists()
    assert not caches[1].exists()


# --- caches -----------------------------------------------------------------------------------------------------------


def test_hub_from_a_full_cache_needs_no_network_and_no_lock(calls, caches):
    fill_hub(caches[0])
    before = sorted(caches[0].rglob("*.*"))
    for source in ("auto", "hub"):
        backbone = DINOv2Backbone("dinov2_vits14", (28, 42), source=source)
        out = backbone(torch.ones(2, 3, 28, 42))
        assert backbone.source == "hub"
        assert (out["global"] == 3).all()
        assert out["patch"].shape == (2, 6, 2)
    assert not calls
    assert [path for path in sorted(caches[0].rglob("*.*")) if "__pycache__" not in path.parts] == before


def test_hub_without_weights_runs_the_cached_code(calls, caches):
    fill_hub(caches[0])
    backbone = DINOv2Backbone("vits14", 28, source="hub", pretrained=False)
    assert (backbone.model.cls == 0).all()
    assert (backbone.source, calls) == ("random", [])


def test_timm_from_a_full_cache_comes_before_hub_from_the_network(calls, caches, timm_weights):
    fill_hf(caches[1], timm_weights)
    for source in ("auto", "timm"):
        backbone = DINOv2Backbone("vits14", 28, source=source)
        assert backbone.source == "timm"
        assert (backbone.model.norm.bias == 7).all()
    assert not calls
    assert not (caches[1] / ".locks").exists()


def test_hub_comes_first_where_both_are_cached_and_timm_where_hub_is_broken(calls, caches, timm_weights):
    fill_hf(caches[1], timm_weights)
    fill_hub(caches[0])
    assert DINOv2Backbone("vits14", 28).source == "hub"
    assert DINOv2Backbone("vits14", 28, pos_embed="timm").source == "timm"
    (caches[0] / f"facebookresearch_dinov2_{REVISION}" / "hubconf.py").write_text(
        "raise TypeError('for a newer Python')"
    )
    assert DINOv2Backbone("vits14", 28).source == "timm"
    assert not calls


def test_downloads_are_bounded_in_time(caches, timm_weights, monkeypatch):
    import huggingface_hub

    seen = {}

    def hub(*args, **options):
        seen["socket"] = socket.getdefaulttimeout()
        raise OSError("too slow")

    def hf(*args, etag_timeout, **options):
        seen["etag"] = etag_timeout
        fill_hf(caches[1], timm_weights)

    monkeypatch.setattr(torch.hub, "load", hub)
    monkeypatch.setattr(
        huggingface_hub, "get_hf_file_metadata", lambda url, timeout: seen.update(url=url, head=timeout)
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf)
    before = socket.getdefaulttimeout()
    assert DINOv2Backbone("vits14", 28).source == "timm"
    assert 0 < seen["socket"] < 60
    assert 0 < seen["etag"] < 60
    assert 0 < seen["head"] < 60
    assert seen["url"].endswith("timm/vit_small_patch14_dinov2.lvd142m/resolve/main/model.safetensors")
    assert socket.getdefaulttimeout() == before


WORKER = """
import os, pathlib, sys, time, torch
from fused_dino.teacher import DINOv2Backbone

room, hubconf = pathlib.Path(sys.argv[1]), sys.argv[2]
hub, load = pathlib.Path(torch.hub.get_dir()), torch.hub.load

def download(repo, *args, source="github", **options):
    if source == "github":
        with (room / "downloads").open("a") as log:
            log.write(f"{os.getpid()} {repo}\\\\n")
        time.sleep(0.5)
        code = hub / repo.replace("/", "_").replace(":", "_")
        code.mkdir(parents=True)
        (code / "hubconf.py").write_text(hubconf)
        time.sleep(0.5)
        (hub / "checkpoints").mkdir()
        torch.save({"cls": torch.full((2,), 5.0)}, hub / "checkpoints" / "dinov2_vits14_pretrain.pth")
    else:
        return load(repo, *args, source=source, **options)

torch.hub.load = download
(room / f"ready-{os.getpid()}").touch()
while len(list(room.glob("ready-*"))) < int(sys.argv[3]):
    time.sleep(0.01)
backbone = DINOv2Backbone("vits14", 28, source="hub")
assert (backbone.model.cls == 5).all()
"""


def test_one_process_downloads_for_all(tmp_path):
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"TORCH_HOME": str(tmp_path / "torch"), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", WORKER.replace("\\\\n", "\\n"), str(tmp_path), HUBCONF, "2"]
    workers = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    assert len((tmp_path / "downloads").read_text().splitlines()) == 1
