"""`fused-dino recipes`: its list, one recipe as text and as JSON, and names that are none."""

import inspect
import json

import pytest

from fused_dino import recipes
from fused_dino.cli import main
from fused_dino.recipes import catalogue
from fused_dino.recipes.catalogue import MISSING, RECIPES, card
from test_cli import failure

pytest.importorskip("timm")
each = pytest.mark.parametrize("name", recipes.__all__)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["recipes", *arguments]) == 0
    return capsys.readouterr().out


def test_the_catalogue_has_every_recipe():
    assert sorted(RECIPES) == sorted(recipes.__all__)
    for name, recipe in RECIPES.items():
        assert recipe.make is getattr(recipes, name)
        assert next(iter(recipe.students.values()))[-1] == card(name).arguments[0].default


@each
def test_a_card_has_every_part_of_the_docstring(name):
    x = card(name)
    text = " ".join(inspect.getdoc(RECIPES[name].make).replace("``", "`").split())
    for part in (x.summary, " ".join(x.formula.split()), x.details, *(y.meaning for y in x.arguments), x.source):
        assert part, "nothing was found"
        assert part in text
    assert x.formula.startswith(("loss = ", "denoiser: "))
    assert "`" not in x.formula
    assert f"recipes.{name}(" in x.example
    assert ">>>" not in x.example
    parameters = inspect.signature(RECIPES[name].make).parameters
    assert {y.name: y.default for y in x.arguments} == {
        key: p.default for key, p in parameters.items() if p.kind is not p.VAR_KEYWORD
    }


def test_the_list_has_a_line_for_each(capsys):
    header, *lines = shown(capsys).splitlines()
    assert header.split() == ["recipe", "aligns", "loss", "constants", "source"]
    rows = {line.split()[0]: line for line in lines[: len(RECIPES)]}
    assert list(rows) == list(RECIPES)
    assert "kernel=3, standardize=0.6, alpha=1, resolution=256" in rows["irepa"]
    assert "alpha=0.5, stop_step=250000" in rows["haste"]
    assert "arXiv 2512.10794" in rows["irepa"]
    rest = "\n".join(lines[len(RECIPES) :])
    assert all(name in rest for name in MISSING)


def test_one_recipe_says_all_that_is_needed_to_write_it(capsys):
    text = shown(capsys, "irepa")
    for part in (
        "loss = -alpha * mean[b, n] cos(P(h)[b, n], t[b, n])", "Conv2d(C, D, kernel, padding=kernel // 2)",
        "std by N - 1", "[B, N, C] after block 8", "0.8 in JiT", "224 * (R // 256), bicubic without antialias",
        'recipes.irepa(48, teacher=DINOv2Backbone("vits14", pretrained=False))', "Source: Singh et al.",
    ):  # fmt: skip
        assert part in " ".join(text.split()) or part in text
    assert text.count("\npart ") == 1
    assert shown(capsys, "repa", "irepa").count("\npart ") == 2


def test_json_is_one_document(capsys):
    every = json.loads(shown(capsys, "--json"))
    assert [x["name"] for x in every["recipes"]] == list(RECIPES)
    assert "cost" not in every["recipes"][0]
    assert every["missing"]["vf"]["needs"] == catalogue.RELATIONS
    (irepa,) = json.loads(shown(capsys, "irepa", "--json"))["recipes"]
    assert {x["name"]: x["default"] for x in irepa["arguments"]}["kernel"] == 3
    assert irepa["loss"] == "-cosine"
    cost = {x["part"]: x for x in irepa["cost"]}
    assert list(cost) == ["preprocess", "teacher", "projector", "targets", "loss", "step"]
    rows, convolution = 256 * 256, 2 * 9 * 1152 * 768
    assert cost["projector"]["flops"] == 3 * rows * convolution
    assert cost["loss"]["bytes"] == 3 * rows * 768 * 2
    assert cost["teacher"]["flops"] == pytest.approx(256 * 46.32e9, rel=1e-3)
    assert cost["step"]["flops"] == sum(x["flops"] for part, x in cost.items() if part != "step")


def test_the_cost_is_of_what_the_recipe_makes(capsys):
    def parts(name):
        (found,) = json.loads(shown(capsys, name, "--json"))["recipes"]
        return {x["part"]: x for x in found["cost"]}

    repa, seed = parts("repa"), parts("seed")
    assert "targets" not in repa
    assert repa["projector"]["flops"] == 3 * 2 * 256 * 256 * (1152 + 2048 + 768) * 2048
    assert repa["step"] == parts("haste")["step"] == parts("repae")["step"]
    assert seed["projector"]["flops"] == 3 * 2 * 256 * (8192 + 1024) * 4096
    assert parts("vicreg")["loss"]["flops"] == 3 * 256 * 1024 * 256
    assert parts("reg")["loss"]["bytes"] == 3 * 256 * 257 * 768 * 2
    assert parts("raev2")["teacher"]["bytes"] > parts("prx")["teacher"]["bytes"]
    sra = parts("sra")
    assert list(sra) == ["projector", "loss", "step"]
    assert sra["projector"]["flops"] == 3 * 2 * 256 * 256 * 2 * 1152 * 2304
    assert list(parts("layersync")) == ["loss", "step"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("irpa", "'irpa' is no recipe; near are irepa"),
        ("xyzzy", "near are repa, irepa"),
        ("vf", "LightningDiT's VF loss, arXiv 2501.01423 needs a term of the similarities"),
        ("U-REPA", "'U-REPA' is no recipe yet: U-REPA's manifold loss"),
        ("haste attention", "a term of attention maps"),
        ("dino_perceptual", "a perceptual term"),
        ("crepa", "neighbouring frames"),
        ("LightningDiT", "'LightningDiT' is no recipe yet: LightningDiT's VF loss"),
        ("VF loss", "'VF loss' is no recipe yet: LightningDiT's VF loss"),
        ("dino_loss", "PercHead's dino_loss needs a perceptual term"),
        ("patch_kernel_alignment", "lightly's PatchKernelAlignmentLoss needs a term of the similarities"),
        ("distillationv2", "targets of several blocks, joined"),
        ("hypersphere", "a term of the distances between images"),
        ("PHI-S", "whitened by stored statistics"),
        ("repaa", "'repaa' is no recipe; near are repa"),
        ("vicreg_loss", "'vicreg_loss' is no recipe; near are vicreg"),
        ("loss", "'loss' is no recipe"),
    ],
)
def test_a_name_that_is_none_says_what_is_near_or_missing(name, says, capsys):
    assert says in failure(capsys, "recipes", "repa", name)


def test_what_is_missing_is_no_recipe_and_says_so_in_python_too():
    assert not set(MISSING) & set(RECIPES)
    for name, (what, needs) in MISSING.items():
        assert catalogue.find_missing(name) == f"{name!r} is no recipe yet: {what} needs {needs}"
    with pytest.raises(AttributeError, match="'vf' is no recipe yet"):
        recipes.vf  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'irpa'"):
        recipes.irpa  # noqa: B018
