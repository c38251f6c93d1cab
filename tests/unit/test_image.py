"""Odd, hostile and damaged pictures: a right answer or one clear line."""

import contextlib
import hashlib
import io
import os
import random
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from fastvlm import image
from fastvlm.errors import InputError

COLOURS = np.array([[[250, 10, 20], [30, 240, 50]], [[60, 70, 230], [200, 210, 90]]], np.uint8)
SAVED = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


def picture(width=40, height=30, mode="RGB"):
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def encode(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, body=b"", depth=8, colour=2):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg_with_size(width, height):
    content = bytearray(encode(picture(16, 16), "JPEG"))
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def naive(source, size, fit):
    """What Apple's and transformers' code do, the whole canvas in memory."""
    if fit == "pad":
        side = max(source.size)
        square = Image.new("RGB", (side, side))
        square.paste(source, ((side - source.width) // 2, (side - source.height) // 2))
        return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    short = min(source.size)
    width, height = (int(size * side / short) for side in source.size)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = source.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    size=st.integers(1, 300),
    fit=st.sampled_from(["pad", "crop"]),
)
def test_any_shape_equals_the_whole_canvas_method(width, height, size, fit):
    source = picture(width, height)

    values = image.resize(source, size=size, fit=fit)

    np.testing.assert_array_equal(values, naive(source, size, fit))


@settings(max_examples=100, deadline=None)
@given(
    short=st.integers(1, 40),
    aspect=st.floats(8, 60),
    is_tall=st.booleans(),
    size=st.integers(1, 80),
    fit=st.sampled_from(["pad", "crop"]),
)
def test_any_strip_equals_the_whole_canvas_method(short, aspect, is_tall, size, fit):
    long = int(short * aspect)
    source = picture(short, long) if is_tall else picture(long, short)

    values = image.resize(source, size=size, fit=fit)

    np.testing.assert_array_equal(values, naive(source, size, fit))


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("chunk", [1, 100, 5000])
@pytest.mark.parametrize("shape", [(37, 300), (300, 37), (1, 200), (200, 1), (64, 64), (63, 64), (150, 149)])
def test_lines_done_a_few_at_a_time_give_the_same(shape, chunk, fit, monkeypatch):
    monkeypatch.setattr(image, "_CHUNK_PIXELS", chunk)
    source = picture(*shape)

    values = image.resize(source, size=64, fit=fit)

    np.testing.assert_array_equal(values, naive(source, 64, fit))


@pytest.mark.parametrize("shape", [(100, 3000), (3000, 100), (7, 1999), (1999, 7)])
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_strips_equal_the_whole_canvas_method(shape, fit):
    source = picture(*shape)

    values = image.resize(source, size=256, fit=fit)

    np.testing.assert_array_equal(values, naive(source, 256, fit))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5_000), (10_000, 1), (30_000, 2)])
@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_extreme_shapes_give_a_square(shape, fit):
    source = Image.new("RGB", shape, (200, 100, 50))

    values = image.resize(source, size=128, fit=fit)

    assert values.shape == (128, 128, 3)
    if fit != "pad":
        assert (values == (200, 100, 50)).all()


def test_a_crop_too_long_to_compute_takes_the_middle(monkeypatch):
    monkeypatch.setattr(image, "_STRIP_ASPECT", 0)
    monkeypatch.setattr(image, "_MAX_RESIZED_SIDE", 1)
    source = Image.linear_gradient("L").resize((8, 256)).convert("RGB")

    values = image.resize(source, size=64, fit="crop")

    assert np.abs(values.astype(int) - naive(source, 64, "crop")).max() <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("shape", [(100, 10_000), (30_000, 3)])
def test_a_strip_needs_no_square(shape, fit):
    code = f"""
from PIL import Image
from fastvlm import image
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
source = Image.effect_noise({shape}, 90).convert("RGB")
image.resize(Image.new("RGB", (64, 64)), size=1024, fit="pad")
before = peak()
image.resize(source, size=1024, fit="{fit}")
print((peak() - before) // 1024)
"""

    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    assert grown < 150  # MiB; the square of the first is 381


def test_pixels_never_become_float64():
    source = picture(900, 900)
    image.to_pixels(source, size=512, fit="pad")  # what is allocated once

    tracemalloc.start()
    pixels = image.to_pixels(source, size=512, fit="pad")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert pixels.shape == (1, 3, 512, 512)
    assert peak < 512 * 512 * 3 * 4


@pytest.mark.parametrize(("size", "fit"), [(0, "pad"), (-1, "crop"), (10**9, "pad"), (64, "squash")])
def test_unknown_size_or_fit_raises(size, fit):
    with pytest.raises(InputError):
        image.resize(picture(), size=size, fit=fit)


def test_a_picture_that_is_not_rgb_is_refused():
    with pytest.raises(InputError, match="RGB"):
        image.resize(Image.new("L", (4, 4)), size=64, fit="pad")


@pytest.mark.parametrize("kind", SAVED)
def test_every_format_is_read_from_path_bytes_and_stream(kind, tmp_path):
    content = encode(picture(), kind)
    path = tmp_path / f"a picture{SAVED[kind]}"
    path.write_bytes(content)

    results = [image.read(source) for source in (path, str(path), content, io.BytesIO(content))]

    assert all(result.mode == "RGB" and result.size == (40, 30) for result in results)
    assert len({result.tobytes() for result in results}) == 1
    if kind in {"PNG", "BMP", "TIFF"}:
        assert results[0].tobytes() == picture().tobytes()


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("frames", [1, 3])
def test_a_picture_is_decoded_after_it_was_named_by_its_bytes(kind, frames):
    others = {"save_all": True, "append_images": [picture().rotate(180)] * (frames - 1)} if frames > 1 else {}
    if frames > 1 and kind in ("JPEG", "BMP"):
        pytest.skip(f"{kind} holds one picture")
    content = encode(picture(), kind, **others)

    with image.opened(io.BytesIO(content)) as found:
        digest, pixels = found.digest(), np.asarray(found.rgb)

    assert digest == hashlib.sha256(content).digest()
    np.testing.assert_array_equal(pixels, np.asarray(image.read(content)))


def test_the_name_of_an_open_picture_is_its_size_and_its_pixels():
    def digest(source):
        with image.opened(source) as found:
            return found.digest()

    grey = picture(mode="L")

    assert digest(grey) == digest(grey.convert("RGB"))
    assert digest(picture()) != digest(picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert digest(Image.new("RGB", (6, 4))) != digest(Image.new("RGB", (4, 6)))


def test_the_content_decides_not_the_name(tmp_path):
    path = tmp_path / "photo.tif"
    path.write_bytes(encode(picture()))

    result = image.read(path)

    assert result.tobytes() == picture().tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16"])
@pytest.mark.parametrize("kind", SAVED)
def test_two_by_two_pictures_of_every_mode(kind, mode):
    small = Image.fromarray(COLOURS)
    small = Image.new("I;16", (2, 2), 40_000) if mode == "I;16" else small.convert(mode)
    try:
        content = encode(small, kind)
    except (OSError, ValueError):
        pytest.skip(f"{kind} does not hold {mode}")

    result = image.read(content)

    assert (result.mode, result.size) == ("RGB", (2, 2))


def test_cmyk_grey_and_progressive_equal_what_pillow_converts():
    for content in (
        encode(picture(mode="CMYK"), "JPEG"),
        encode(picture(mode="L")),
        encode(picture(), "JPEG", progressive=True),
    ):
        expected = Image.open(io.BytesIO(content)).convert("RGB")

        result = image.read(content)

        assert result.tobytes() == expected.tobytes()


def test_a_colour_profile_is_ignored():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    result = image.read(encode(picture(), icc_profile=profile))

    assert result.tobytes() == picture().tobytes()


def test_alpha_is_dropped_or_put_on_white():
    clear = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 200, 255))

    dropped, white = (image.read(encode(clear), alpha=alpha) for alpha in ("drop", "white"))

    assert [dropped.getpixel((x, 0)) for x in range(2)] == [(200, 0, 0), (0, 0, 200)]
    assert [white.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 200)]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_palette_transparency_is_dropped_or_put_on_white(transparency):
    small = Image.new("P", (2, 1))
    small.putpalette([10, 20, 30, 200, 100, 50])
    small.putpixel((1, 0), 1)
    content = encode(small, transparency=transparency)

    dropped, white = (image.read(content, alpha=alpha) for alpha in ("drop", "white"))

    assert [dropped.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (200, 100, 50)]
    assert [white.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_transparent_colour_is_put_on_white(mode):
    small = Image.new("RGB", (2, 1), (9, 9, 9)).convert(mode)
    small.putpixel((1, 0), 200 if mode == "L" else (200, 200, 200))
    content = encode(small, transparency=9 if mode == "L" else (9, 9, 9))

    white = image.read(content, alpha="white")

    assert [white.getpixel((x, 0))[0] for x in range(2)] == [255, 200]


def test_grey_with_alpha_is_put_on_white():
    white = image.read(encode(Image.new("LA", (1, 1), (100, 0))), alpha="white")

    assert white.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    values = np.array([[0, 128, 257, 32_768, 65_535]], np.uint16)

    result = image.read(encode(Image.fromarray(values), kind))

    assert np.asarray(result)[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def test_sixteen_bit_colour_is_scaled():
    row = b"\0" + struct.pack(">6H", 0, 32_768, 65_535, 65_535, 257, 0)

    result = image.read(png(2, 1, zlib.compress(row), depth=16))

    assert np.asarray(result).tolist() == [[[0, 128, 255], [255, 1, 0]]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 500.0, 1000.0], [0, 128, 255]),
        ([np.nan, 0.0, np.inf], [0, 0, 255]),
        ([np.nan, -np.inf, np.inf], [0, 0, 255]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),
    ],
)
def test_floats_are_scaled_not_clipped(values, expected):
    content = encode(Image.fromarray(np.array([values], np.float32)), "TIFF")

    result = image.read(content)

    assert np.asarray(result)[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 100, 255], [0, 100, 255]),
        ([0, 32_768, 65_535], [0, 128, 255]),
        ([0, 50_000, 100_000], [0, 128, 255]),
        ([-(2**31), 0, 2**31 - 1], [0, 128, 255]),
    ],
)
def test_wide_integers_are_scaled_not_clipped(values, expected):
    content = encode(Image.fromarray(np.array([values], np.int32)), "TIFF")

    result = image.read(content)

    assert np.asarray(result)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_counts(kind):
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    content = encode(red, kind, save_all=True, append_images=[blue], **({"lossless": True} if kind == "WEBP" else {}))

    result = image.read(content)

    assert result.getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(picture(48, 32), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    stored = Image.open(io.BytesIO(content)).convert("RGB")
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
    upright = stored if turn is None else stored.transpose(turn)

    turned, ignored = (image.read(content, exif=exif) for exif in ("apply", "ignore"))

    assert turned.size == upright.size
    assert turned.tobytes() == upright.tobytes()
    assert ignored.tobytes() == stored.tobytes()
    assert 0x0112 not in turned.getexif()


def test_the_first_picture_of_a_camera_pair_counts():
    content = encode(picture(), "MPO", save_all=True, append_images=[picture().rotate(180)])

    result = image.read(content)

    assert result.tobytes() == image.read(encode(picture(), "JPEG")).tobytes()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_exif_orientation_of_a_tiff_is_applied_once(orientation):
    content = encode(picture(48, 32), "TIFF", tiffinfo={0x0112: orientation})
    upright = picture(48, 32).rotate({1: 0, 3: 180, 6: 270}[orientation], expand=True)

    turned = image.read(content)

    assert turned.size == upright.size
    assert turned.tobytes() == upright.tobytes()


@pytest.fixture
def no_decoding(monkeypatch):
    """Fail where Pillow starts to decode."""

    def load(self):
        pytest.fail("decoding started")

    for reader in {reader for _, reader in image._READERS.values()} | {ImageFile.ImageFile}:
        monkeypatch.setattr(reader, "load", load)


def gif_with_size(width, height):
    content = bytearray(encode(picture(4, 4), "GIF"))
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def webp_with_size(width, height):
    body = (
        b"VP8X"
        + struct.pack("<I", 10)
        + bytes(4)
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body + bytes(64)


def bmp_with_size(width, height):
    content = bytearray(encode(picture(4, 4), "BMP"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def tiff_with_size(width, height):
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 64)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(68)


@pytest.mark.parametrize(
    "content",
    [
        png(50_000, 50_000),
        png(2**31 - 1, 1),
        png(1, 30_001),
        png(20_000, 20_000),
        jpeg_with_size(65_500, 65_500),
        jpeg_with_size(20_000, 20_000),
        gif_with_size(65_535, 65_535),
        gif_with_size(25_000, 25_000),
        webp_with_size(16_383, 16_383),
        bmp_with_size(30_000, 30_000),
        bmp_with_size(2**31 - 1, 2**31 - 1),
        tiff_with_size(2**31, 2**31),
        tiff_with_size(29_000, 29_000),
    ],
)
def test_a_bomb_is_refused_by_its_header(content, no_decoding):
    tracemalloc.start()
    with pytest.raises(InputError, match="pixels") as caught:
        image.read(content, name="bomb.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert str(caught.value).startswith("bomb.png: ")
    assert peak < 2**20


def test_the_limit_is_the_callers():
    content = encode(picture(40, 30))

    with pytest.raises(InputError, match="1199"):
        image.read(content, max_pixels=1199)

    assert image.read(content, max_pixels=1200).size == (40, 30)


def test_pillows_own_limits_stay_as_they_are():
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, warnings.filters[:]

    with pytest.raises(InputError):
        image.read(png(50_000, 50_000))
    image.read(encode(picture()))

    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, warnings.filters[:]) == before


def test_threads_may_read_at_once_and_leave_warnings_as_they_were():
    good, bad = encode(picture(), "TIFF"), encode(picture(), "TIFF")[:-200]
    before = warnings.filters[:]
    sizes = []

    def work():
        for _ in range(20):
            sizes.append(image.read(good).size)
            with contextlib.suppress(InputError):
                image.read(bad)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sizes == [(40, 30)] * 80
    assert warnings.filters[:] == before


def test_pillows_own_lower_limit_does_not_matter(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    content = encode(picture(40, 30))

    pixels = image.to_pixels(image.read(content), size=64, fit="pad")

    assert pixels.shape == (1, 3, 64, 64)


def forbidden():
    Image.init()
    kinds = {}
    for kind in sorted(set(Image.SAVE) - set(image.FORMATS) - {"MPO", "JPEG"}):
        for mode in ("RGB", "L", "1", "F", "P"):
            try:
                kinds[kind] = encode(picture(32, 32, "RGB").convert(mode), kind)
                break
            except (OSError, ValueError, KeyError, TypeError, AttributeError, DeprecationWarning):
                continue
    kinds["PSD by hand"] = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(300)
    kinds["FITS by hand"] = b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800)
    kinds["WMF by hand"] = b"\xd7\xcd\xc6\x9a\0\0" + bytes(60)
    kinds["HEIC by hand"] = b"\0\0\0\x18ftypheic" + bytes(60)
    kinds["SVG by hand"] = b'<?xml version="1.0"?><svg width="9" height="9"></svg>'
    kinds["HTML by hand"] = b"<!DOCTYPE html><html>Not found</html>"
    kinds["noise"] = random.Random(0).randbytes(200)
    kinds["zeros"] = bytes(200)
    kinds["one byte"] = b"\xff"
    return kinds


FORBIDDEN = forbidden()


def test_the_forbidden_formats_are_many():
    assert {"PDF", "EPS", "ICO", "JPEG2000", "TGA", "PCX", "PPM", "SPIDER", "MSP", "ICNS", "DDS"} <= FORBIDDEN.keys()


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_other_formats_disguised_as_png_are_refused(kind, tmp_path, no_decoding):
    path = tmp_path / "photo.png"
    path.write_bytes(FORBIDDEN[kind])

    with pytest.raises(InputError, match=r"expected JPEG, PNG, WEBP, GIF, BMP, TIFF$") as caught:
        image.read(path)

    assert str(caught.value).startswith(f"{path}: ")


def test_tiff_is_not_read_from_the_network():
    with pytest.raises(InputError, match="TIFF is not accepted; expected JPEG, PNG, WEBP, GIF, BMP"):
        image.read(encode(picture(), "TIFF"), formats=image.WEB_FORMATS)


def test_an_unknown_format_in_the_list_is_refused():
    with pytest.raises(InputError, match="PSD"):
        image.read(encode(picture()), formats=("PNG", "PSD"))


@pytest.mark.parametrize("kind", SAVED)
def test_half_a_file_is_refused(kind):
    content = encode(picture(200, 150), kind)

    with pytest.raises(InputError, match=r"^half\.x: the picture is damaged or cut off, and cannot be read$"):
        image.read(content[: len(content) // 2], name="half.x")


def attempt(content):
    """Read and resize; the shape, or None where the picture was refused in one line."""
    try:
        result = image.read(content, max_pixels=1_000_000, name="fuzzed")
    except InputError as error:
        text = str(error)
        assert text.startswith("fuzzed: ")
        assert "\n" not in text
        assert "0x" not in text
        return None
    return image.resize(result, size=32, fit="pad").shape


@pytest.mark.parametrize("kind", SAVED)
def test_a_file_cut_at_any_byte_is_a_picture_or_an_input_error(kind):
    content = encode(picture(12, 9), kind)

    shapes = {attempt(content[:length]) for length in range(len(content))}

    assert shapes <= {None, (32, 32, 3)}
    assert attempt(content) == (32, 32, 3)


def seeds():
    exif = Image.Exif()
    exif[0x0112] = 6
    small = picture(24, 18)
    frames = {"save_all": True, "append_images": [picture(24, 18, "L").convert("RGB")]}
    return [
        encode(small, "JPEG", exif=exif),
        encode(small, "JPEG", progressive=True),
        encode(small.convert("CMYK"), "JPEG"),
        encode(small),
        encode(small.convert("P"), transparency=3),
        encode(small, **frames),
        encode(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160)),
        encode(small, "WEBP", exif=exif),
        encode(small, "WEBP", lossless=True, **frames),
        encode(small, "GIF", **frames),
        encode(small, "BMP"),
        encode(small.convert("P"), "BMP"),
        encode(small, "TIFF"),
        encode(small, "TIFF", compression="tiff_lzw"),
        encode(small, "TIFF", compression="jpeg"),
        encode(Image.fromarray(np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20)), "TIFF"),
    ]


def mutate(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        start = rng.randrange(min(len(content), rng.choice([64, 200, 10**6])))
        action = rng.randrange(5)
        if action == 0:
            content[start] ^= 1 << rng.randrange(8)
        elif action == 1:
            content[start] = rng.choice([0, 1, 127, 128, 255])
        elif action == 2:
            del content[start : start + rng.randrange(1, 9)]
        elif action == 3:
            content[start:start] = rng.randbytes(rng.randrange(1, 9))
        else:
            content[start : start + 4] = struct.pack(
                rng.choice("<>") + "I", rng.choice([0, 1, 2**16, 2**31, 2**32 - 1])
            )
        content = content or bytearray(b"\0")
    return bytes(content[: rng.randrange(len(content))] if rng.random() < 0.1 else content)


def fuzz(first, last, capfd):
    corpus = seeds()
    shapes = []
    for i in range(first, last):
        rng = random.Random(i)
        shapes.append(attempt(mutate(rng.choice(corpus), rng)))
    assert set(shapes) == {None, (32, 32, 3)}  # some are refused, some survive, nothing else happens
    out, err = capfd.readouterr()
    assert out == ""
    assert "Warning" not in err  # libtiff writes its own lines about damaged TIFFs, past Python


def test_mutated_pictures_are_read_or_refused(capfd):
    fuzz(0, 400, capfd)


@pytest.mark.slow
def test_two_thousand_mutated_pictures_are_read_or_refused(capfd):
    fuzz(400, 2400, capfd)


@pytest.mark.parametrize(
    "name", ["missing.png", "", "a\0b", "x" * 5000, "no/such/folder/x.png", "new\nline.png", "\ud800"]
)
def test_a_path_that_is_not_there_is_one_line(name):
    with pytest.raises(InputError) as caught:
        image.read(name)

    assert "\n" not in str(caught.value)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        image.read(tmp_path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.png").touch()

    with pytest.raises(InputError, match=r"empty\.png: the file is empty"):
        image.read(tmp_path / "empty.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
def test_special_files_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")

    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(InputError, match="not a regular file"):
            image.read(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_refused(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(encode(picture()))
    path.chmod(0)

    with pytest.raises(InputError, match="permission denied"):
        image.read(path)


class Pipe(io.RawIOBase):
    """A stream that cannot seek, as standard input often is."""

    def __init__(self, content):
        self.stream = io.BytesIO(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.stream.readinto(buffer)


def test_a_pipe_is_read_to_its_end():
    result = image.read(io.BufferedReader(Pipe(encode(picture()))), name="standard input")

    assert result.tobytes() == picture().tobytes()


def test_an_endless_pipe_is_refused(monkeypatch):
    monkeypatch.setattr(image, "_MAX_STREAM_BYTES", 1000)

    with pytest.raises(InputError, match="standard input: more than 1000 bytes"):
        image.read(io.BufferedReader(Pipe(encode(picture(100, 100)))), name="standard input")


def test_a_stream_of_text_is_refused():
    with pytest.raises(InputError):
        image.read(io.StringIO("not bytes"))


def shades(count):
    return [Image.new("RGB", (8, 8), (10 * i, 10 * i, 10 * i)) for i in range(count)]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_frames_are_taken_evenly(kind):
    first, *rest = shades(11)
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(first, kind, save_all=True, append_images=rest, duration=40, **options)

    frames = image.read_frames(content, 3)

    assert [frame.mode for frame in frames] == ["RGB"] * 3
    assert [frame.getpixel((2, 2))[0] for frame in frames] == [0, 50, 100]


def test_a_short_source_gives_all_it_has():
    frames = image.read_frames(encode(picture()), 8)

    assert [frame.tobytes() for frame in frames] == [picture().tobytes()]


def test_a_folder_of_frames_is_read_in_the_order_of_names(tmp_path):
    for i, frame in enumerate(shades(5)):
        frame.save(tmp_path / f"{i:03}.png")

    frames = image.read_frames(tmp_path, 2)

    assert [frame.getpixel((0, 0))[0] for frame in frames] == [0, 40]


def test_an_empty_folder_of_frames_is_refused(tmp_path):
    with pytest.raises(InputError, match="no pictures"):
        image.read_frames(tmp_path, 2)


@pytest.mark.parametrize("head", [b"\0\0\0\x20ftypisom", b"\x1a\x45\xdf\xa3", b"RIFF\0\0\0\0AVI LIST"])
def test_a_video_file_needs_a_decoder_or_is_damaged(head):
    with pytest.raises(InputError, match=r"PyAV|damaged"):
        image.read_frames(head + bytes(200), 4, name="clip.mp4")


def test_a_video_file_is_no_picture():
    with pytest.raises(InputError, match="video is not accepted"):
        image.read(b"\0\0\0\x20ftypisom" + bytes(200))


def test_no_frames_is_an_error():
    with pytest.raises(InputError, match="num_frames"):
        image.read_frames(encode(picture()), 0)


def test_frames_of_a_real_film_are_spread_from_the_first_to_the_last(tmp_path):
    with av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(30):
            grey = np.full((48, 64, 3), 8 * i, np.uint8)
            film.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        film.mux(stream.encode())

    frames = image.read_frames(tmp_path / "film.mp4", 4)

    assert [frame.size for frame in frames] == [(64, 48)] * 4
    brightness = [float(np.asarray(frame).mean()) for frame in frames]
    assert brightness == pytest.approx([0, 80, 152, 232], abs=6)


def test_too_many_large_frames_at_once_are_refused(tmp_path):
    first, *rest = (Image.new("RGB", (100, 100), (i, 0, 0)) for i in range(10))
    first.save(tmp_path / "long.gif", save_all=True, append_images=rest)

    assert len(image.read_frames(tmp_path / "long.gif", 10, max_pixels=30_000)) == 10
    with pytest.raises(InputError, match="ask for fewer frames"):
        image.read_frames(tmp_path / "long.gif", 10, max_pixels=20_000)
