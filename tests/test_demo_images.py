"""Images as people have them: the demo reads what a viewer shows, and passes over what is no image."""

import os
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_dino.cli.demo import data, images
from fused_dino.cli.errors import CommandError
from pages import Page

pytest.importorskip("PIL")
import numpy as np
from PIL import Image, ImageCms, features

RAMP = np.linspace(0, 1, 64 * 96).reshape(64, 96)
BYTES = (255 * RAMP).round().astype(np.uint8)


def read(image: Image.Image, path: Path, **options: object) -> Tensor:
    image.save(path, **options)
    return images.read_image(path).float()


def is_grey(pixels: Tensor, values: np.ndarray, within: float = 1) -> bool:
    return (pixels - torch.from_numpy(values.astype(np.float32))).abs().max().item() <= within


@pytest.mark.parametrize(
    ("kind", "top"),
    [
        *((kind, 65535) for kind in ("<u2", ">u2", "<i4", "<f4")),
        *((kind, 255) for kind in ("<i4", "<f4")),
        ("<i4", 2**31 - 1),
        ("<f4", 1),
    ],
)
def test_grey_of_any_depth_is_the_grey_of_eight_bits(tmp_path: Path, kind: str, top: int) -> None:
    assert is_grey(read(Image.fromarray((top * RAMP).astype(kind)), tmp_path / "x.tiff"), BYTES)


def test_thirty_two_bits_without_a_sign_are_read_as_such(tmp_path: Path) -> None:
    """Pillow reads them as signed, and writes no others: the file's tag is set by hand."""
    path = tmp_path / "x.tiff"
    Image.fromarray(((2**32 - 1) * RAMP).astype(np.uint32)).save(path)
    tag = struct.Struct("<HHIH").pack
    signed, unsigned = (tag(images.SAMPLE_FORMAT, 3, 1, value) for value in (2, images.UNSIGNED))
    assert path.read_bytes().count(signed) == 1
    path.write_bytes(path.read_bytes().replace(signed, unsigned))
    assert is_grey(images.read_image(path).float(), BYTES)


def test_sixteen_bits_stand_on_their_full_scale(tmp_path: Path) -> None:
    for suffix in ("png", "tiff"):
        dark = Image.fromarray((20_000 * RAMP).astype(np.uint16))
        assert is_grey(read(dark, tmp_path / f"x.{suffix}"), BYTES * (20_000 / 65535))


@pytest.mark.parametrize(("least", "greatest"), [(-1, 1), (-3e30, 7e30), (1000, 1004)])
def test_floats_on_no_usual_scale_are_shown_from_the_least_to_the_greatest(
    tmp_path: Path, least: float, greatest: float
) -> None:
    values = (least + (greatest - least) * RAMP).astype(np.float32)
    assert is_grey(read(Image.fromarray(values), tmp_path / "x.tiff"), BYTES)


@pytest.mark.parametrize("constant", [0.0, 0.5, 300.0, float("nan"), float("inf")])
def test_values_that_are_no_numbers_and_constants_are_read(tmp_path: Path, constant: float) -> None:
    values = RAMP.astype(np.float32)
    values[:8] = constant
    expected = BYTES.copy()
    expected[:8] = 255 * min(constant, 1) if constant == constant else 0
    if constant != 300:
        assert is_grey(read(Image.fromarray(values), tmp_path / "x.tiff"), expected)
    flat = np.full((64, 64), constant, np.float32)
    assert read(Image.fromarray(flat), tmp_path / "x.tiff").std() == 0


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    alpha = Image.fromarray(np.where(RAMP < 0.5, 0, 255).astype(np.uint8))
    red, expected = Image.new("RGB", (96, 64), "red"), np.where(RAMP < 0.5, 255, 0)
    clear = {"RGBA": red.copy(), "LA": Image.new("L", (96, 64), 0).convert("LA")}
    for mode, image in clear.items():
        image.putalpha(alpha)
        for suffix in ("png", "tiff"):
            assert is_grey(read(image, tmp_path / f"{mode}.{suffix}")[1:], expected)
    steps = Image.fromarray((RAMP >= 0.5).astype(np.uint8))
    steps.putpalette([9, 9, 9, 0, 0, 0])
    assert is_grey(read(steps, tmp_path / "palette.png", transparency=0), expected)
    assert is_grey(read(steps, tmp_path / "palette.gif", transparency=0), expected)
    assert is_grey(read(steps, tmp_path / "partly.png", transparency=b"\x00\xff"), expected)
    for kind, low in ((np.uint8, 9), (np.uint16, 9 * 257)):
        grey = Image.fromarray(np.where(RAMP < 0.5, low, 0).astype(kind))
        assert is_grey(read(grey, tmp_path / "grey.png", transparency=low), expected)
    half = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    assert is_grey(read(half, tmp_path / "half.png"), np.full((64, 64), 127))


def test_palettes_bits_and_inks_are_their_colours(tmp_path: Path) -> None:
    colours = Image.new("RGB", (96, 64), (200, 40, 90))
    expected = torch.tensor([200.0, 40, 90]).view(3, 1, 1)
    for image, suffix in (
        (colours.quantize(4), "png"),
        (colours.quantize(4), "gif"),
        (colours.convert("CMYK"), "tiff"),
        (colours.convert("CMYK"), "jpg"),
        (colours.convert("YCbCr"), "tiff"),
    ):
        assert (read(image, tmp_path / f"x.{suffix}") - expected).abs().max() <= 3
    bits = Image.fromarray(RAMP > 0.5)
    assert bits.mode == "1"
    for suffix in ("png", "bmp", "tiff"):
        assert is_grey(read(bits, tmp_path / f"x.{suffix}"), np.where(RAMP > 0.5, 255, 0))


def test_a_colour_profile_is_followed_and_a_broken_one_passed_over(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), (200, 40, 90))
    linear = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    expected = torch.tensor([200.0, 40, 90]).view(3, 1, 1)
    for profile in (srgb, linear, b"broken"):  # the second is of no colours
        assert (read(image, tmp_path / "x.png", icc_profile=profile) - expected).abs().max() <= 1
    # Red and blue in each other's place: their primaries stand in tags of 20 bytes.
    red, blue = (srgb.index(tag) for tag in (b"rXYZ", b"bXYZ"))
    swapped = bytearray(srgb)
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    for picture in (image, image.convert("RGBA")):
        found = read(picture, tmp_path / "x.png", icc_profile=bytes(swapped))
        assert (found - expected.flip(0)).abs().max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_stands_upright(tmp_path: Path, orientation: int) -> None:
    sensor = Image.fromarray(BYTES)
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's transpositions
    expected = sensor.transpose(turned[orientation]) if orientation > 1 else sensor
    exif = Image.Exif()
    exif[0x112] = orientation
    assert is_grey(read(sensor, tmp_path / "x.png", exif=exif), np.array(expected))


def test_broken_metadata_is_passed_over(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"):
        Image.fromarray(BYTES).save(tmp_path / "x.jpg", exif=exif, quality=100)
        recwarn.clear()  # what Pillow says as it writes
        assert is_grey(images.read_image(tmp_path / "x.jpg").float(), BYTES, 3)
        assert not recwarn.list


def test_the_first_frame_is_shown(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("white", "black")]
    for suffix in ("gif", "png", "webp", "tiff"):
        options = {"lossless": True} if suffix == "webp" else {}
        found = read(frames[0], tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], **options)
        assert found.min() == 255


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tiff"])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = Image.effect_noise((96, 96), 50)
    path = tmp_path / f"x.{suffix}"
    noise.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CommandError, match="cannot read the image"):
        images.read_image(path)


@pytest.mark.parametrize("turned", [False, True])
def test_a_panorama_keeps_its_height_or_is_refused(tmp_path: Path, turned: bool) -> None:
    for size, expected in {
        (1280, 640): (640, 320),
        (8000, 1000): (1792, 224),
        (2000, 100): (2000, 100),
        (640, 32): (640, 32),
        (2001, 100): "2001x100: too long",
        (20000, 40): "20000x40: too long",
        (400, 31): "400x31: too small",
    }.items():
        flip = slice(None, None, -1 if turned else 1)
        Image.new("RGB", size[flip]).save(tmp_path / "x.png")
        if isinstance(expected, str):
            sides, fault = expected.split(":")
            with pytest.raises(CommandError, match="x".join(sides.split("x")[flip]) + ":" + fault):
                images.read_image(tmp_path / "x.png")
        else:
            assert tuple(images.read_image(tmp_path / "x.png").shape[:0:-1]) == expected[flip]


# --- folders ----------------------------------------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return [photo.name for photo in data.from_folder(folder)]


def test_what_is_no_image_is_passed_over(folder: Path) -> None:
    (folder / "._red.png").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + b"\x00" * 80)
    (folder / ".hidden.png").write_bytes((folder / "red.png").read_bytes())
    (folder / "thumbnails.jpg").mkdir()
    (folder / ".thumbnails.png").mkdir()
    (folder / "Thumbs.db").touch()
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")  # to open it would wait for ever
    assert names(folder) == ["blue", "green", "red"]


def test_a_broken_link_is_refused_by_its_name(folder: Path) -> None:
    (folder / "red.png").unlink()
    (folder / "red.png").symlink_to(folder / "gone.png")
    with pytest.raises(CommandError, match=r"cannot read the image .*red\.png"):
        data.from_folder(folder)


def test_suffixes_may_be_upper_case(folder: Path) -> None:
    for suffix in ("png", "txt"):
        (folder / f"red.{suffix}").rename(folder / f"red.{suffix.upper()}")
    assert names(folder) == ["blue", "green", "red"]


@pytest.mark.parametrize("suffix", images.SUFFIXES)
def test_every_suffix_is_read(folder: Path, suffix: str) -> None:
    if suffix == ".avif" and not features.check("avif"):
        return
    Image.new("RGB", (64, 64), "red").save(folder / f"more{suffix}")
    (folder / "more.txt").write_text("more\nmore red\n", encoding="utf-8")
    assert "more" in names(folder)


# --- a whole run ------------------------------------------------------------------------------------------------------


def awkward(folder: Path) -> None:
    """Write twenty captioned images of awkward kinds and names, and files that are no images."""
    exif = Image.Exif()
    exif[0x112] = 6
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    grey, colours = Image.fromarray(BYTES), Image.merge("RGB", [Image.fromarray(BYTES)] * 3)
    clear = colours.copy()
    clear.putalpha(grey)
    pictures: dict[bytes, tuple[Image.Image, dict[str, object]]] = {
        b"sixteen.PNG": (Image.fromarray((65535 * RAMP).astype(np.uint16)), {}),
        b"thirty-two.tif": (Image.fromarray((2**31 * 0.9 * RAMP).astype(np.int32)), {}),
        b"float.TIFF": (Image.fromarray((RAMP - 0.5).astype(np.float32)), {}),
        b"nan.tiff": (Image.fromarray(np.full((64, 64), np.nan, np.float32)), {}),
        b"clear.png": (clear, {}),
        b"greys and alpha.png": (clear.convert("LA"), {}),
        b"palette.gif": (colours.quantize(8), {"transparency": 0}),
        b"bits.bmp": (grey.convert("1"), {}),
        b"inks.JPG": (colours.convert("CMYK"), {}),
        b"turned.jpeg": (colours, {"exif": exif}),
        b"moving.webp": (frames[0], {"save_all": True, "append_images": frames[1:]}),
        b"pages.tiff": (frames[0], {"save_all": True, "append_images": frames[1:]}),
        b"panorama.jpg": (Image.new("RGB", (4000, 250), "green"), {}),
        b"broken metadata.jpg": (colours, {"exif": b"Exif\0\0garbage", "icc_profile": b"none"}),
        b"caf\xe9.png": (colours, {}),
        "猫 café 🐈\u202f$x$".encode() + b".png": (colours, {}),
        b"wall [draft] [red].png": (colours, {}),
        b"<b>&amp; {{ 1 }} :cat: --> %s.png": (colours, {}),
        b"two\nlines \x1b[31m\x7f.png": (colours, {}),
        b"a-name-without-a-space-" * 9 + b".png": (colours, {}),
    }
    folder.mkdir()
    for name, (picture, options) in pictures.items():
        kind = Image.registered_extensions()[os.path.splitext(name)[1].decode().lower()]
        with open(os.fsencode(folder) + b"/" + name, "w+b") as file:
            picture.save(file, kind, **options)
        with open(os.fsencode(folder) + b"/" + os.path.splitext(name)[0] + b".txt", "w", encoding="utf-8") as file:
            file.write("[bold]one[/] caption\x00\x1b of $many\nanother :cat: caption of many --> 🐈\n")
    (folder / "._sixteen.png").write_bytes(b"\x00\x05\x16\x07")
    (folder / "folder.jpg").mkdir()


@pytest.mark.usefixtures("demo_extra", "colours")
def test_a_folder_of_twenty_awkward_files_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fused_dino.cli import main

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("fused_dino.cli.demo.report.SHOWN", 20)
    awkward(tmp_path / "images")
    assert main(["demo", "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out [1]"), "--steps", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    page = Page(tmp_path / "out [1]")
    assert len(page.pictures) == 2 + 2 * 20
    assert "could not be drawn" not in page.text
    names = [
        r"caf\xe9",
        "猫 café 🐈\u202f$x$",
        "wall [draft] [red]",
        r"two\nlines \x1b[31m\x7f",
        "<b>&amp; {{ 1 }} :cat: --> %s",
    ]
    for name in names:
        assert name in out
        assert name in page.pictures
    assert "out [1]/report.html" in out
    assert "another :cat: caption of many --> 🐈" in page.text
    width, height = page.pictures["turned"].size
    assert height > width
    assert page.pictures["panorama"].size == (480, 30)
