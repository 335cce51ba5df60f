"""Decoding of single images, and what is refused."""

import io

import numpy as np
import pytest
from image_fixtures import noise
from PIL import Image, PngImagePlugin

from tl_jax import image_files


def test_orientation(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turn by 90 degrees
    image = noise(0, height=4, width=16)
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert image_files.header(tmp_path / "turned.jpg") == (16, 4, 3)
    assert image_files.decode(tmp_path / "turned.jpg").size == (4, 16)


def test_transparency_is_white():
    file = io.BytesIO()
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(file, "PNG")
    assert np.asarray(image_files.decode(file.getvalue())).tolist() == [[[255] * 3] * 2] * 2


def test_bomb(monkeypatch):
    monkeypatch.setattr(image_files, "MAX_PIXELS", 10)
    file = io.BytesIO()
    noise(0).save(file, "PNG")
    for look in (image_files.decode, image_files.header):
        with pytest.raises(image_files.UnreadableImage, match="too large"):
            look(file.getvalue())


def test_bomb_in_a_chunk():
    file, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text("note", "0" * (1 << 27), zip=True)
    noise(0).save(file, "PNG", pnginfo=info)
    with pytest.raises(image_files.UnreadableImage):
        image_files.decode(file.getvalue())


def test_sixteen_bits():
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), 40000, np.uint16)).save(file, "PNG")
    with pytest.raises(image_files.UnreadableImage, match="8 bits"):
        image_files.decode(file.getvalue())


def test_formats_that_run_programs_are_not_opened():
    file = io.BytesIO()
    noise(0).save(file, "EPS")
    with pytest.raises(image_files.UnreadableImage, match="format"):
        image_files.decode(file.getvalue())
