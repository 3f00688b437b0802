"""The demo's photographs, captions and stand-in teacher."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fused_dino.cli import main
from fused_dino.cli.demo import data
from fused_dino.cli.demo import teacher as teachers
from fused_dino.cli.demo.photographs import PHOTOGRAPHS
from fused_dino.cli.errors import CommandError

pytestmark = pytest.mark.usefixtures("demo_extra")


# --- photographs and captions -----------------------------------------------------------------------------------------


def words(captions: tuple[str, ...]) -> set[str]:
    return {word for caption in captions for word in data.WORD.findall(caption.lower())}


def test_captions_are_all_different() -> None:
    captions = [caption for entry in PHOTOGRAPHS for caption in (*entry.learn, *entry.held_out)]
    assert len(set(captions)) == len(captions)
    assert all((len(entry.learn), len(entry.held_out)) == (6, 2) for entry in PHOTOGRAPHS)


def test_held_out_captions_use_known_words_in_new_sentences() -> None:
    known = set().union(*(words(entry.learn) for entry in PHOTOGRAPHS))
    for entry in PHOTOGRAPHS:
        assert words(entry.held_out) <= known
        for held_out in entry.held_out:
            assert all(words((held_out,)) != words((caption,)) for caption in entry.learn)


def test_every_photograph_has_an_owner_a_licence_and_a_source() -> None:
    for entry in PHOTOGRAPHS:
        assert entry.credit
        assert entry.licence
        assert entry.source.startswith("http")


def test_embedded_photographs_are_there_and_in_colour() -> None:
    for photo in data.embedded():
        assert photo.pixels.dtype == torch.uint8
        assert max(photo.pixels.shape) <= data.LONGEST_SIDE
        assert photo.pixels.float().std(0).mean() > 1, f"{photo.name} is grey"


@pytest.mark.parametrize("size", [(50, 90), (90, 50), (64, 64)])
def test_crops_to_learn_from_and_held_out_share_no_pixel(size: tuple[int, int]) -> None:
    height, width = size
    numbers = torch.arange(height * width).view(1, height, width)
    photo = data.Photo("numbers", numbers, (), ())
    learning, held_out = (set(photo.part(flag).flatten().tolist()) for flag in (False, True))
    assert not learning & held_out
    assert len(learning | held_out) == height * width
    assert 0.55 < len(learning) / (height * width) < 0.65


def test_a_crop_is_a_square_in_range() -> None:
    part = torch.randint(0, 256, (3, 40, 70), dtype=torch.uint8)
    for seed in range(20):
        square = data.crop(part, 32, torch.Generator().manual_seed(seed))
        assert square.shape == (3, 32, 32)
        assert square.min() >= -1
        assert square.max() <= 1


def test_a_folder_holds_out_the_last_quarter(folder: Path) -> None:
    (folder / "red.txt").write_text("\n".join(f"caption {i}" for i in range(8)), encoding="utf-8")
    by_name = {photo.name: photo for photo in data.from_folder(folder)}
    assert by_name["red"].held_out == ("caption 6", "caption 7")
    assert by_name["blue"].learn == ("a blue wall", "the wall is blue")
    assert by_name["blue"].held_out == ("all blue",)


def test_bags_ignore_order_and_case_and_split_ideographs() -> None:
    bags = data.bag_of_words(["A red Cup, red", "cup a RED red", "红色的杯子", "杯子 红色"], 512)
    assert torch.equal(bags[0], bags[1])
    assert torch.allclose(bags.norm(dim=1), torch.ones(4))
    assert bags[2] @ bags[3] > 0.8  # four of five characters


# --- the teacher's weights --------------------------------------------------------------------------------------------


def test_tampered_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    content = bytearray(teachers.stand_in_file().read_bytes())
    content[len(content) // 2] ^= 1
    tampered = tmp_path / "weights.pth"
    tampered.write_bytes(content)
    monkeypatch.setattr(teachers, "stand_in_file", lambda: tampered)
    assert main(["demo", "--images", str(folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "weights.pth is not the known file: its sha256 is" in error


def test_weights_by_position_need_the_same_shapes() -> None:
    saved = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    assert list(teachers.by_position(saved, {"x": torch.zeros(2, 3), "y": torch.zeros(4)})) == ["x", "y"]
    for wrong in ({"x": torch.zeros(4), "y": torch.zeros(2, 3)}, {"x": torch.zeros(2, 3)}):
        with pytest.raises(CommandError, match="shapes"):
            teachers.by_position(saved, wrong)


def test_the_pretrained_teacher_knows_what_it_sees() -> None:
    backbone = teachers.load_teacher(teachers.STAND_IN).train
    assert (backbone.embed_dim, backbone.grid) == (1280, (7, 7))
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    classes = {"cat": (281, 282, 285), "coffee": (967,)}  # ImageNet: tabby, tiger cat, Egyptian cat; espresso
    for photo in data.embedded():
        if photo.name in classes:
            image = F.interpolate(photo.pixels[None] / 127.5 - 1, size=(224, 224), mode="bilinear", antialias=True)
            with torch.no_grad():
                assert backbone.model(image).argmax().item() in classes[photo.name]
