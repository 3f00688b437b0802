"""`fused-dino teachers`: its facts against published ones, its table, its JSON, and the warning of a licence."""

import json
import warnings
from types import SimpleNamespace

import pytest
import timm
import torch

from fused_dino.cli import main, teachers
from fused_dino.counting import Kernel, count
from fused_dino.teacher import licences
from fused_dino.teacher.weights import VARIANTS, create_timm
from test_cli import failure


def document(capsys: pytest.CaptureFixture[str], *names: str) -> dict:
    assert main(["teachers", "--json", *names]) == 0
    return json.loads(capsys.readouterr().out)


def test_vitl14_has_the_published_size_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """304 M parameters, as its card at huggingface.co/facebook/dinov2-large says; 162 GFLOP, of 81 GMAC."""
    (row,) = document(capsys, "vitl14")["teachers"]
    assert round(row["parameters"] / 1e6) == 304
    assert row["gflop"] == pytest.approx(162.0, rel=1e-3)
    assert (row["width"], row["patch"]) == (1024, 14)
    assert row["mean"] == [0.485, 0.456, 0.406]
    assert row["std"] == [0.229, 0.224, 0.225]
    assert (row["licence"], row["commercial"], row["gated"]) == ("Apache-2.0", True, False)
    assert [source.split()[0] for source in row["sources"]] == ["hub", "timm"]


def test_the_flop_of_a_vision_transformer_are_its_formula(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = document(capsys, "vits14")["teachers"]
    d, depth, tokens, hidden = 384, 12, 257, 4 * 384
    block = 2 * tokens * (3 * d * d + d * d + 2 * d * hidden) + 4 * tokens**2 * d
    assert row["gflop"] * 1e9 == pytest.approx(depth * block + 2 * 256 * 3 * 14 * 14 * d, rel=1e-4)


def test_other_families_have_their_published_sizes_and_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    """ViT-S/16 of DINOv3: 21 M, its model card; ViT-B/16 of SigLIP 2: 93 M, google-research/big_vision."""
    names = "vit_small_patch16_dinov3", "vit_base_patch16_siglip_256.v2_webli"
    dinov3, siglip = document(capsys, *names)["teachers"]
    assert (dinov3["width"], dinov3["patch"], dinov3["parameters"] // 10**6) == (384, 16, 21)
    assert (siglip["width"], siglip["patch"], round(siglip["parameters"] / 1e6)) == (768, 16, 93)
    assert siglip["mean"] == siglip["std"] == [0.5, 0.5, 0.5]
    assert dinov3["gated_note"] == "those of Meta's own repositories are"


def test_every_family_is_listed() -> None:
    dinov2, dinov3, siglip = (teachers.listed(family) for family in teachers.FAMILIES)
    assert dinov2 == list(VARIANTS)
    assert {name.partition("_patch")[0] for name in dinov3 if name.startswith("vit")} == {
        "vit_small", "vit_small_plus", "vit_base", "vit_large", "vit_huge_plus", "vit_7b",
    }  # fmt: skip
    assert sum(name.startswith("convnext") for name in dinov3) == 4
    assert {name.partition("_patch")[0].removeprefix("naflex") for name in siglip} >= {
        "vit_base", "vit_large", "vit_so400m", "vit_giantopt",
    }  # fmt: skip
    assert all(".v2_" in name for name in siglip)
    assert not {*dinov2, *dinov3, *siglip} - set(teachers.known())


def test_every_listed_model_has_a_known_licence() -> None:
    expected = {"DINOv2": "Apache-2.0", "DINOv3": "DINOv3 License", "SigLIP": "Apache-2.0"}
    for family in teachers.FAMILIES:
        for name in teachers.listed(family):
            config = timm.get_pretrained_cfg(VARIANTS[name].timm if name in VARIANTS else name).to_dict()
            assert licences.licence_of(config).name == expected[family.title.split()[0]], name


def test_the_table_says_shared_facts_once_and_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teachers", "vits14", "vitl14", "vit_small_patch16_dinov3"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("licence Apache-2.0, which allows commercial use") == 1
    assert out.count("licence DINOv3 License") == 1
    lines = [line.split() for line in out.splitlines() if line.startswith("  vit")]
    assert lines[0] == ["vits14", "384", "14", "22.1", "M", "12.2"]
    assert lines[1] == ["vitl14", "1024", "14", "304.4", "M", "162.0"]


def test_a_licence_that_forbids_commercial_use_and_one_that_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    rows = document(capsys, "convnextv2_atto.fcmae", "fastvit_t8.apple_in1k")["teachers"]
    assert [(row["licence"], row["commercial"], row["gated"]) for row in rows] == [
        ("CC-BY-NC-4.0", False, None),
        ("fastvit-license", None, None),
    ]


def test_a_model_that_cannot_teach_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, family: object) -> None:
        raise ValueError("it takes 256 alone")

    monkeypatch.setattr(teachers, "describe", refuse)
    assert main(["teachers", "vits14"]) == 0
    assert capsys.readouterr().out == "vits14 cannot teach at 224: it takes 256 alone\n"


@pytest.mark.parametrize(
    ("name", "near"), [("vitl41", "vitl14"), ("vit_smal_patch16_dinov3", "vit_small_patch16_dinov3")]
)
def test_an_unknown_teacher_is_one_line_with_near_names(
    capsys: pytest.CaptureFixture[str], name: str, near: str
) -> None:
    says = failure(capsys, "teachers", name)
    assert f"{name!r} is no teacher" in says
    assert near in says


def test_loading_warns_once_of_a_licence_that_forbids_commercial_use(monkeypatch: pytest.MonkeyPatch) -> None:
    licences.warn_of.cache_clear()
    config = {"license": "cc-by-nc-4.0"}
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: SimpleNamespace(pretrained_cfg=config))
    with pytest.warns(UserWarning, match="resnet18 must not be used commercially: CC-BY-NC-4.0, https://") as caught:
        for _ in range(2):
            create_timm("resnet18", (224, 224), pretrained=True)
    assert len(caught) == 1
    licences.warn_of.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_timm("resnet18", (224, 224), pretrained=False)
        config["license"] = "apache-2.0"
        create_timm("resnet18", (224, 224), pretrained=True)


def test_counting_reads_inputs_writes_outputs_and_leaves_views_out() -> None:
    a, b, bias = (torch.empty(shape, device="meta") for shape in ((8, 16), (16, 4), (4,)))
    kernels = count(lambda: (a @ b).view(2, 16).t() + 1)
    assert kernels == [Kernel(4 * (8 * 16 + 16 * 4 + 8 * 4), 2 * 8 * 16 * 4), Kernel(4 * 2 * 32, 0)]
    assert count(lambda: bias.expand(8, 4) * 2) == [Kernel(4 * (4 + 32), 0)], "what is expanded is read once"


def test_counting_takes_attention_as_one_kernel() -> None:
    q, k, v = (torch.empty(2, 3, 10, 8, device="meta") for _ in range(3))
    (kernel,) = count(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert kernel == Kernel(4 * 4 * q.numel(), 4 * 2 * 3 * 10 * 10 * 8)
