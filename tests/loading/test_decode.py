"""Pillow's part: values that are not bytes, sizes that are too large, formats that are not read, each by its true name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastadvisor.loading.decode import Unreadable, decode_rgb

RAMP = np.linspace(0, 1, 64, dtype=np.float64).reshape(8, 8)
BYTES = np.round(RAMP * 255).astype(np.uint8)


def tiff(values):
    out = io.BytesIO()
    Image.fromarray(values).save(out, "TIFF")
    return out.getvalue()


@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype(np.float32),  # fractions
        (RAMP * 255).astype(np.float32),
        (RAMP * 4e6 - 1e6).astype(np.float32),  # anything else: the image's own range
        np.round(RAMP * 255).astype(np.int32),
        np.round(RAMP * 100_000).astype(np.int32),
        np.round(RAMP * 2e9 - 1e9).astype(np.int32),
        np.round(RAMP * 65535).astype(np.uint16),
    ],
    ids=["fractions", "float bytes", "floats", "int bytes", "ints", "negative ints", "16 bits"],
)
def test_a_gray_image_of_any_type_keeps_its_picture(values):
    pixels = np.asarray(decode_rgb(tiff(values)))
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels[..., 0].astype(int) - BYTES).max() <= 1
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_fractions_that_do_not_fill_their_range_are_not_stretched():
    assert np.asarray(decode_rgb(tiff((RAMP / 2).astype(np.float32)))).max() in (127, 128)
    assert np.asarray(decode_rgb(tiff(np.full((4, 4), 7_000, np.int32)))).max() == 0  # one value has no range


@pytest.mark.parametrize("high", [1.0000001, 1.02])
def test_fractions_that_overshoot_are_fractions(high):
    pixels = np.asarray(decode_rgb(tiff((RAMP * high).astype(np.float32))))[..., 0]
    assert np.abs(pixels.astype(int) - BYTES).max() <= 6


def test_small_floats_are_not_cut_off_as_bytes():
    assert len(np.unique(np.asarray(decode_rgb(tiff((RAMP * 3.2).astype(np.float32)))))) > 60


@pytest.mark.parametrize("share", [1, 0.25, 0.003])
@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_16_bits_lose_their_lower_bits(kind, share):
    values, out = np.round(RAMP * share * 65535).astype(np.uint16), io.BytesIO()
    if kind == "PNG":
        Image.fromarray(values).save(out, kind)
    else:
        out.write(b"P5 8 8 65535\n" + values.astype(">u2").tobytes())
    pixels = np.asarray(decode_rgb(out.getvalue()))[..., 0]
    assert np.array_equal(pixels, values // 256)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(value):
    with pytest.raises(Unreadable, match="values that are not finite"):
        decode_rgb(tiff(np.array([[0, value]], dtype=np.float32)))


def png(width, height):
    """A sound 1-bit PNG of white."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + b"\xff" * ((width + 7) // 8)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * height)) + chunk(b"IEND", b"")


def test_a_very_large_image_is_called_large():
    with pytest.raises(Unreadable, match=r"^too large \(200 megapixels\): at most 178 megapixels are read$"):
        decode_rgb(png(20_000, 10_000))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # the module's own filter is not pytest's
def test_an_image_of_half_that_size_is_read():
    assert decode_rgb(png(11_000, 9_000)).getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"II*\0" + b"\0" * 60, "a TIFF of a kind that is not read here"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 60, "HEIC, which is not read here"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG, which is not read here"),
        (b"no image at all", "not an image"),
        (png(300, 300)[:50], "cut short"),
        (b"\x89PNG\r\n\x1a\n" + b"junk" * 10, "damaged"),
    ],
    ids=["TIFF", "HEIC", "SVG", "text", "cut short", "damaged"],
)
def test_what_cannot_be_read_is_called_what_it_is(data, reason):
    with pytest.raises(Unreadable, match=f"^{reason}$"):
        decode_rgb(data)
