"""Into one form: every file becomes an upright RGB JPEG of the right size or a reason, in bounded memory."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sd_nb.data.shrink import NotTaken, Shape, to_picture
from web import bad_pictures, photo, pictures, save

SHAPE = Shape(size=120)


def pixels(picture): return np.asarray(Image.open(io.BytesIO(picture.jpeg)).convert("RGB")).astype(int)


def reason(data, shape=SHAPE):
    try: return to_picture(data, shape)._replace(jpeg=b"")
    except NotTaken as error: return str(error)


@pytest.mark.parametrize("name", pictures())
def test_fault_19_odd_pictures_become_rgb(name):
    """Whatever a picture is stored as: an RGB JPEG that looks like it, its short side as asked."""
    picture = to_picture(pictures()[name], SHAPE)
    image = Image.open(io.BytesIO(picture.jpeg))
    upright = name == "turned.jpg"
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (120, 160) if upright else (160, 120))
    assert (picture.columns["width"], picture.columns["height"]) == image.size
    grey = np.asarray(photo(160, 120, "L").convert("RGB")).astype(int)
    ramp = np.broadcast_to(np.linspace(0, 255, 120)[:, None, None], (120, 160, 3))
    white_and_red = np.full((160, 120, 3), 255)
    white_and_red[:80, :, 1:] = 0
    expected = {"grey.jpg": grey, "la.png": grey, "grey16.png": ramp, "clear.png": np.full((120, 160, 3), 255),
                "turned.jpg": white_and_red}.get(name, np.asarray(photo(160, 120)).astype(int))
    allowed = {"palette.png": 16, "turned.jpg": 3}.get(name, 2.5)
    assert abs(pixels(picture) - expected).mean() < allowed


@pytest.mark.parametrize("name", bad_pictures())
def test_fault_19_20_what_is_no_picture_has_its_reason(name):
    data, expected = bad_pictures()[name]
    assert reason(data) == expected


def test_fault_20_nothing_is_decoded_of_a_bomb():
    """Memory does not grow by more than a few megabytes for pictures that would take hundreds."""
    bombs = [bad_pictures()[name][0] for name in ("81_megapixels.png", "196_megapixels.png", "text_bomb.png")]
    reason(pictures()["large.jpg"])
    with open("/proc/self/clear_refs", "w") as f: f.write("5")  # forget the peak so far
    before = peak()
    for data in bombs: assert reason(data) in ("too many pixels", "broken picture")
    assert peak() - before < 20e6


def peak():
    """The most memory that this process had, in bytes."""
    with open("/proc/self/status") as f: return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


def test_limits_are_exact():
    assert isinstance(reason(save(photo(64, 320), "PNG")), tuple)
    assert reason(save(photo(63, 100), "PNG")) == "too small"
    assert reason(save(photo(64, 321), "PNG")) == "too long"
    assert isinstance(reason(save(photo(100, 100), "PNG"), Shape(max_pixels=10_000)), tuple)
    assert reason(save(photo(100, 101), "PNG"), Shape(max_pixels=10_000)) == "too many pixels"


@settings(max_examples=40, deadline=None)
@given(st.integers(64, 700), st.integers(64, 700), st.integers(1, 400), st.sampled_from(["keep_ratio", "center_crop"]))
def test_sizes(width, height, size, mode):
    """The short side is what was asked for or what there was, the ratio stays, nothing is enlarged."""
    shape = Shape(size=size, mode=mode, max_aspect=100)
    got = to_picture(save(Image.new("RGB", (width, height)), "JPEG"), shape).columns
    short, side = min(width, height), min(size, width, height)
    expected = (side, side) if mode == "center_crop" else (round(width * side / short), round(height * side / short))
    assert (got["width"], got["height"]) == expected
    assert (got["original_width"], got["original_height"]) == (width, height)


def test_the_crop_is_the_centre():
    """Of a picture in three bands, the middle one."""
    bands = Image.new("RGB", (360, 120))
    for i, color in enumerate(("red", "lime", "blue")): bands.paste(color, (120 * i, 0, 120 * i + 120, 120))
    middle = pixels(to_picture(save(bands, "PNG"), Shape(size=100, mode="center_crop")))[:, 5:-5]
    assert abs(middle - [0, 255, 0]).max() < 40 and abs(middle - [0, 255, 0]).mean() < 2


def test_a_decode_at_half_size_is_nearly_as_good():
    """On nothing but grain, shrinking while decoding differs from the long way by about what the JPEG does, on shapes by less."""
    grain = save(Image.effect_noise((1600, 1200), 60).convert("RGB"), "JPEG")
    long_way = Image.open(io.BytesIO(grain)).resize((400, 300), Image.LANCZOS)
    stored = np.asarray(Image.open(io.BytesIO(save(long_way, "JPEG", quality=95)))).astype(int)
    ours = pixels(to_picture(grain, Shape(size=300)))
    assert abs(ours - np.asarray(long_way)).mean() < 2.5 * abs(stored - np.asarray(long_way)).mean()
    shapes = Image.open(io.BytesIO(pictures()["large.jpg"])).resize((160, 120), Image.LANCZOS)
    assert abs(pixels(to_picture(pictures()["large.jpg"], SHAPE)) - np.asarray(shapes)).mean() < 1.5


@pytest.mark.parametrize("turn", range(1, 9))
def test_all_eight_orientations(turn):
    """However the camera was held, the picture stands upright; the file's own numbers are those of the upright one."""
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[turn]
    stored = photo() if undo is None else photo().transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = turn
    for kind in ("JPEG", "PNG", "WEBP"):
        picture = to_picture(save(stored, kind, exif=exif), SHAPE)
        assert abs(pixels(picture) - np.asarray(photo(160, 120))).mean() < 2.5
        assert (picture.columns["original_width"], picture.columns["original_height"]) == (320, 240)


def test_the_place_is_not_kept():
    """What the camera says in words stays in the table; where it stood is nowhere, and the JPEG itself says nothing."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera", 1
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)
    picture = to_picture(save(photo(), "JPEG", exif=exif), SHAPE)
    assert json.loads(picture.columns["exif"]) == {"Make": "a camera", "Orientation": "1"}
    assert not Image.open(io.BytesIO(picture.jpeg)).getexif() and b"Exif" not in picture.jpeg


def test_the_same_file_gives_the_same_bytes():
    assert len({to_picture(pictures()["good.jpg"], SHAPE).jpeg for _ in range(3)}) == 1


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["good.jpg", "good.png", "good.webp"]), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=20),
       st.integers(0, 10**6))
def test_fault_19_damaged_files_end_well(name, changes, cut):
    """Bytes changed and cut at random: a picture or one of the known reasons, never another exception."""
    data = bytearray(pictures()[name])
    for place, value in changes: data[place % len(data)] = value
    end = reason(bytes(data[: cut % len(data) + 1]))
    assert isinstance(end, tuple) or end in {"not a picture", "broken picture", "too small", "too long", "too many pixels", "animated"}
