"""Files, bytes and streams to RGB pictures, and pictures to the square of pixels that the vision encoder reads.

A picture is refused by its header, before anything is decoded, and whatever is wrong with it is an `InputError`.
The resampling is Pillow's own, so the numbers are those of Apple's code to the last bit.
"""

import hashlib
import importlib
import io
import math
import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile
from torch import Tensor

from fastvlm.config import FITS, Fit
from fastvlm.errors import InputError

WEB_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats accepted from the network."""

FORMATS = (*WEB_FORMATS, "TIFF")
"""Formats accepted from files: TIFF's decoder is too large a surface for strangers."""

MAX_PIXELS = 100_000_000
MAX_SIDE = 30_000
_FRAMES_AT_ONCE = 4  # frames are held together: at most so many times the pixels of the largest picture

_MAX_STREAM_BYTES = 1 << 29  # a pipe has no size to check: `yes | fastvlm predict --image -` must end
_CHUNK_PIXELS = 1 << 22  # the largest black-padded piece held at once
_STRIP_ASPECT = 8  # longer pictures are cropped piece by piece, shorter ones by Pillow in one go
_MAX_RESIZED_SIDE = 1 << 20  # beyond it, Pillow's table of coefficients alone would take tens of megabytes

_DECODER_ERRORS = (
    OSError,  # truncated data, and Pillow's UnidentifiedImageError
    SyntaxError,  # Pillow's word for a header that it cannot read
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,  # where the caller turned warnings into errors
)

_READERS: dict[str, tuple[Callable[[bytes], bool], type[ImageFile]]] = {
    "JPEG": (lambda head: head.startswith(b"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    "PNG": (lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    "WEBP": (lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", WebPImagePlugin.WebPImageFile),
    "GIF": (lambda head: head.startswith((b"GIF87a", b"GIF89a")), GifImagePlugin.GifImageFile),
    "BMP": (lambda head: head.startswith(b"BM"), BmpImagePlugin.BmpImageFile),
    "TIFF": (lambda head: head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
}

_OTHER_KINDS: dict[str, Callable[[bytes], bool]] = {  # only to say what came instead of a picture that we read
    "PDF": lambda head: head.startswith(b"%PDF"),
    "EPS": lambda head: head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")),
    "PSD": lambda head: head.startswith(b"8BPS"),
    "ICO": lambda head: head.startswith((b"\0\0\1\0", b"\0\0\2\0")),
    "JPEG 2000": lambda head: head.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")),
    "AVIF": lambda head: head[4:12] in (b"ftypavif", b"ftypavis"),
    "HEIC": lambda head: head[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypheif", b"ftyphevc"),
    "SVG": lambda head: b"<svg" in head.lower(),
    "HTML": lambda head: head.lstrip().lower().startswith((b"<!doctype html", b"<html")),
    "video": lambda head: _is_video(head),
}

_TURNS = {  # EXIF orientation -> what puts the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112

_WARNINGS_LOCK = threading.Lock()  # `catch_warnings` swaps a process-wide list, so two threads must not nest


def read(  # noqa: PLR0913
    source: str | Path | bytes | BinaryIO | Image.Image,
    *,
    max_pixels: int = MAX_PIXELS,
    exif: Literal["apply", "ignore"] = "apply",
    alpha: Literal["drop", "white"] = "drop",
    formats: tuple[str, ...] = FORMATS,
    name: str | None = None,
) -> Image.Image:
    """Read one picture as RGB.

    The size is checked in the header, before decoding. Of an animation the first frame counts. Sixteen-bit grey is
    scaled by its whole range (65,535 is white). Wider integers are read as 0-255 or 0-65,535, the smaller of the two
    that holds every value, and floats as 0-1 or 0-255; values that fit neither are stretched from the lowest to the
    highest finite one. NaN is black. Colour profiles are ignored. (Pillow itself turns TIFF pictures upright.)

    Args:
        source: A path, the bytes of a file, a binary stream (read to its end when it cannot seek), or a picture that
            Pillow has opened, which is left as it is.
        max_pixels: Pictures with more are refused; so are sides over 30,000.
        exif: Whether to turn the picture as its EXIF orientation says; Apple's code does not.
        alpha: Drop transparency as Apple's code does (the colour underneath shows), or put the picture on white.
        formats: Which of `FORMATS` are accepted; by content, never by the file's name.
        name: What error messages call the source; a path names itself.

    Raises:
        InputError: There is no such file, or it is not a whole picture that we accept.
    """
    with opened(source, max_pixels=max_pixels, exif=exif, alpha=alpha, formats=formats, name=name) as picture:
        return picture.rgb


class Picture:
    """A picture whose header is good; the rest is read when somebody asks for it."""

    def __init__(self, image: Image.Image, file: BinaryIO | None, label: str, **rules: Any) -> None:
        self._image, self._file, self._label, self._rules = image, file, label, rules

    @cached_property
    def rgb(self) -> Image.Image:
        """The picture as `read` gives it."""
        return _to_rgb(self._image, self._label, **self._rules)

    def digest(self) -> bytes:
        """SHA-256 of the file's bytes (of one over 512 MiB a random number), or of a picture's size and RGB pixels."""
        if (file := self._file) is None:
            return hashlib.sha256(b"RGB %d %d " % self.rgb.size + self.rgb.tobytes()).digest()
        digest = hashlib.sha256()
        with _decoding(self._label):
            size = file.seek(0, os.SEEK_END)
            file.seek(0)  # whoever decodes seeks for himself
            while size <= _MAX_STREAM_BYTES and (block := file.read(1 << 20)):
                digest.update(block)
        return digest.digest() if size <= _MAX_STREAM_BYTES else os.urandom(32)


@contextmanager
def opened(  # noqa: PLR0913
    source: str | Path | bytes | BinaryIO | Image.Image,
    *,
    max_pixels: int = MAX_PIXELS,
    exif: Literal["apply", "ignore"] = "apply",
    alpha: Literal["drop", "white"] = "drop",
    formats: tuple[str, ...] = FORMATS,
    name: str | None = None,
) -> Iterator[Picture]:
    """Do what `read` does, in two steps: a picture that is known already need not be decoded."""
    label = _label(source, name)
    if unknown := sorted(set(formats) - set(FORMATS)):
        raise InputError(f"formats must be among {FORMATS}, got {unknown[0]!r}")
    if isinstance(source, Image.Image):
        _check_size(source.size, label, max_pixels)
        with _decoding(label):
            image = source.copy()
        yield Picture(image, None, label, exif=exif, alpha=alpha)
        return
    with _open_source(source, label) as file:
        yield Picture(_open_picture(file, label, max_pixels, formats), file, label, exif=exif, alpha=alpha)


def read_frames(  # noqa: PLR0913
    source: str | Path | bytes | BinaryIO,
    num_frames: int,
    *,
    max_pixels: int = MAX_PIXELS,
    exif: Literal["apply", "ignore"] = "apply",
    alpha: Literal["drop", "white"] = "drop",
    formats: tuple[str, ...] = FORMATS,
    name: str | None = None,
) -> list[Image.Image]:
    """Read `num_frames` frames, evenly from the first to the last, as RGB.

    Reads animations (GIF, WebP, APNG, TIFF pages), folders of pictures in the order of their names, and video files
    where PyAV is installed. A source with fewer frames gives all it has. The options are those of `read`.

    Raises:
        InputError: There is no such source, or a frame that is needed cannot be read.
    """
    label = _label(source, name)
    if num_frames < 1:
        raise InputError(f"num_frames must be 1 or more, got {num_frames}")
    if isinstance(source, str | Path) and _is_folder(source, label):
        paths = sorted(path for path in Path(source).iterdir() if path.is_file() and not path.name.startswith("."))
        if not paths:
            raise InputError(f"{label}: the folder has no pictures")
        chosen = [paths[i] for i in _spread(len(paths), num_frames)]
        return [read(path, max_pixels=max_pixels, exif=exif, alpha=alpha, formats=formats) for path in chosen]
    with _open_source(source, label) as file:
        if _is_video(_read_head(file, label)):
            return _read_video(file, label, num_frames=num_frames, max_pixels=max_pixels)
        frames = []
        picture = _open_picture(file, label, max_pixels, formats)
        chosen_frames = _spread(_count_frames(picture, label), num_frames)
        total = len(chosen_frames) * picture.width * picture.height
        if total > _FRAMES_AT_ONCE * max_pixels:
            raise InputError(
                f"{label}: {len(chosen_frames)} frames of {picture.width} x {picture.height} pixels are more than "
                f"{_FRAMES_AT_ONCE} times the limit of {max_pixels}; ask for fewer frames, or make them smaller"
            )
        for i in chosen_frames:
            with _decoding(label), _quiet():
                picture.seek(i)
                frame = picture.copy()
            frames.append(_to_rgb(frame, label, exif=exif, alpha=alpha))
        return frames


def resize(image: Image.Image, *, size: int, fit: Fit) -> NDArray[np.uint8]:
    """Make an RGB picture a square of `size` pixels, with Pillow's bicubic filter, `(H, W, 3)`.

    `pad` sets the picture in the middle of a black square first (Apple's predict.py), `crop` scales the shorter side
    to `size` and cuts the middle out (Apple's hub code and transformers), `stretch` scales both sides apart.

    Raises:
        InputError: The picture is not RGB, or the size or the fit is unknown.
    """
    if image.mode != "RGB" or not (image.width and image.height):
        raise InputError(
            f"a picture must be RGB with at least one pixel, got {image.mode} {image.size}; use image.read"
        )
    if not 1 <= size <= MAX_SIDE:
        raise InputError(f"size must be between 1 and {MAX_SIDE}, got {size}")
    if fit == "pad":
        square = _pad(image, size)
    elif fit == "crop":
        square = _crop(image, size)
    elif fit == "stretch":
        square = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        raise InputError(f"fit must be one of {FITS}, got {fit!r}")
    return np.array(square)


def to_pixels(image: Image.Image, *, size: int, fit: Fit) -> Tensor:
    """Make an RGB picture what the vision encoder reads: float32 `(1, 3, H, W)` in [0, 1], `H = W = size`.

    Raises:
        InputError: The picture is not RGB, or the size or the fit is unknown.
    """
    values = torch.from_numpy(resize(image, size=size, fit=fit)).permute(2, 0, 1).unsqueeze(0)
    return values.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _pad(image: Image.Image, size: int) -> Image.Image:
    """What resizing a black square around the picture gives, without the square."""
    side = max(image.size)
    x, y = (side - image.width) // 2, (side - image.height) // 2
    left, right = _reach(x, image.width, side, size)
    top, bottom = _reach(y, image.height, side, size)
    scaled = _scale_axis(image, 0, length=side, offset=x, out_length=size, window=(left, right))
    scaled = _scale_axis(scaled, 1, length=side, offset=y, out_length=size, window=(top, bottom))
    if scaled.size == (size, size):
        return scaled
    square = Image.new("RGB", (size, size))
    square.paste(scaled, (left, top))
    return square


def _crop(image: Image.Image, size: int) -> Image.Image:
    """What scaling the shorter side to `size` and cutting the middle gives; of a strip, without the parts cut off."""
    width, height = image.size
    short = min(width, height)
    out_width, out_height = (int(size * side / short) for side in (width, height))
    left, top = (out_width - size) // 2, (out_height - size) // 2
    if max(out_width, out_height) <= _STRIP_ASPECT * size:
        scaled = image.resize((out_width, out_height), Image.Resampling.BICUBIC)
        return scaled.crop((left, top, left + size, top + size))
    if max(out_width, out_height) > _MAX_RESIZED_SIDE:  # nobody can compute these exactly: within a step or two
        x, y = (width - short) / 2, (height - short) / 2
        return image.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + short, y + short))
    columns, rows = (left, left + size), (top, top + size)
    if height > width and height > out_height:  # the order is Pillow 13's, and decides the rounding
        scaled = _scale_axis(image, 1, length=height, offset=0, out_length=out_height, window=rows)
        return _scale_axis(scaled, 0, length=width, offset=0, out_length=out_width, window=columns)
    first, last = _sources(top, top + size, height, out_height)  # the other rows cannot be seen
    middle = image.crop((0, first, width, last))
    scaled = _scale_axis(middle, 0, length=width, offset=0, out_length=out_width, window=columns)
    return _scale_axis(scaled, 1, length=height, offset=first, out_length=out_height, window=rows)


def _sources(first: int, last: int, length: int, out_length: int) -> tuple[int, int]:
    """Which of `length` source pixels the outputs `[first, last)` can read, with a little room."""
    scale = length / out_length
    support = 2 * max(scale, 1.0) + 2  # two pixels of the bicubic filter either side
    return max(0, math.floor(first * scale - support)), min(length, math.ceil(last * scale + support))


def _reach(offset: int, extent: int, length: int, out_length: int) -> tuple[int, int]:
    """Which outputs can see source pixels `[offset, offset + extent)`, with a little room."""
    scale = length / out_length
    support = 2 * max(scale, 1.0) + 2
    first, last = (offset - support) / scale - 1, (offset + extent + support) / scale + 1
    return max(0, math.floor(first)), min(out_length, math.ceil(last))


def _scale_axis(  # noqa: PLR0913
    image: Image.Image, axis: int, *, length: int, offset: int, out_length: int, window: tuple[int, int]
) -> Image.Image:
    """Scale one axis of a picture that lies at `offset` on black lines of `length` pixels; return `window` of it.

    Lines do not see one another, so they go through Pillow's resampling a few at a time: each keeps the coefficients
    and the rounding of the whole, and no more than `_CHUNK_PIXELS` of black are ever held.
    """
    num_lines = image.size[1 - axis]
    first, last = window

    def shape(along: int, across: int) -> tuple[int, int]:
        return (along, across) if axis == 0 else (across, along)

    is_whole = image.size[axis] == length
    if length == out_length and is_whole and window == (0, out_length):
        return image
    if is_whole and num_lines * out_length <= _CHUNK_PIXELS:
        scaled = image.resize(shape(out_length, num_lines), Image.Resampling.BICUBIC)
        return scaled if window == (0, out_length) else scaled.crop((*shape(first, 0), *shape(last, num_lines)))
    result = Image.new("RGB", shape(last - first, num_lines))
    step = max(1, _CHUNK_PIXELS // max(length, out_length))
    for start in range(0, num_lines, step):
        stop = min(start + step, num_lines)
        lines = image.crop((*shape(0, start), *shape(image.size[axis], stop)))
        if not is_whole:
            padded = Image.new("RGB", shape(length, stop - start))
            padded.paste(lines, shape(offset, 0))
            lines = padded
        scaled = lines.resize(shape(out_length, stop - start), Image.Resampling.BICUBIC)
        result.paste(scaled.crop((*shape(first, 0), *shape(last, stop - start))), shape(0, start))
    return result


def _to_rgb(
    picture: Image.Image, label: str, *, exif: Literal["apply", "ignore"], alpha: Literal["drop", "white"]
) -> Image.Image:
    with _decoding(label):
        picture.load()
        with _quiet():
            tags = picture.getexif()
            orientation = tags.get(_ORIENTATION) if exif == "apply" else None
        rgb = _compose(picture, alpha)
        if isinstance(rgb, WebPImagePlugin.WebPImageFile):
            rgb = rgb.copy()  # the decoder behind it keeps the file and two more frames
        if isinstance(orientation, int) and orientation in _TURNS:
            rgb = rgb.transpose(_TURNS[orientation])
        rgb.info.clear()
        with _quiet():
            rgb.getexif().clear()  # a picture that was turned must not say that it should be
        return rgb


def _compose(picture: Image.Image, alpha: Literal["drop", "white"]) -> Image.Image:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return _scale_range(picture).convert("RGB")
    is_transparent = picture.has_transparency_data
    if is_transparent and (alpha == "white" or picture.mode in ("P", "PA", "La", "RGBa")):
        picture = picture.convert("RGBA")
    if is_transparent and alpha == "white":
        white = Image.new("RGB", picture.size, (255, 255, 255))
        white.paste(picture, mask=picture.getchannel("A"))
        return white
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _scale_range(picture: Image.Image) -> Image.Image:
    """Grey of more than eight bits to eight; `read` says by which rule."""
    values = np.asarray(picture)
    if isinstance(picture, TiffImagePlugin.TiffImageFile) and _is_unsigned(picture):
        values = values.view(np.uint32)  # Pillow's 32-bit pictures are signed, the file was not
    low, high = _range(values)
    grey = np.empty(values.shape, np.uint8)
    step = max(1, _CHUNK_PIXELS // values.shape[1])
    for start in range(0, len(values), step):
        rows = np.clip(values[start : start + step].astype(np.float64), low, high)
        grey[start : start + step] = np.rint(np.nan_to_num((rows - low) * (255 / (high - low or 1.0)), nan=0.0))
    return Image.fromarray(grey)


def _range(values: NDArray[Any]) -> tuple[float, float]:
    """What becomes black and what becomes white."""
    if values.dtype == np.uint16:
        return 0.0, 65_535.0
    if values.dtype.kind == "f":
        is_finite = np.isfinite(values)
        if not is_finite.any():
            return 0.0, 1.0
        low = float(np.min(values, where=is_finite, initial=np.inf))
        high = float(np.max(values, where=is_finite, initial=-np.inf))
        usual = (1.0, 255.0)
    else:
        low, high = float(values.min()), float(values.max())
        usual = (255.0, 65_535.0)
    return next(((0.0, top) for top in usual if low >= 0 and high <= top), (low, high))


def _is_unsigned(picture: TiffImagePlugin.TiffImageFile) -> bool:
    bits, sample_format = picture.tag_v2.get(258, (1,)), picture.tag_v2.get(339, (1,))
    return picture.mode == "I" and bits[0] == 32 and sample_format[0] == 1


def _open_picture(file: BinaryIO, label: str, max_pixels: int, formats: tuple[str, ...]) -> ImageFile:
    head = _read_head(file, label)
    if not head:
        raise InputError(f"{label}: the file is empty, expected a picture")
    kind = next((kind for kind, (accepts, _) in _READERS.items() if accepts(head)), None)
    if kind is None or kind not in formats:
        other = kind or next((kind for kind, accepts in _OTHER_KINDS.items() if accepts(head)), None)
        what = f"{other} is not accepted" if other else "not a picture"
        raise InputError(f"{label}: {what}; expected {', '.join(formats)}")
    if kind == "WEBP" and (size := _webp_size(head)):
        _check_size(size, label, max_pixels)  # its decoder allocates when it is created
    with _decoding(label):
        file.seek(0)
        # Not Image.open: it compares with a process-wide limit that belongs to whoever uses Pillow beside us.
        with _quiet():
            picture = _READERS[kind][1](file, "")
    _check_size(picture.size, label, max_pixels)
    return picture


def _check_size(size: tuple[int, int], label: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"{label}: the picture has no pixels ({width} x {height})")
    if max(size) > MAX_SIDE:
        raise InputError(f"{label}: {width} x {height} pixels, a side may have at most {MAX_SIDE}; make it smaller")
    if width * height > max_pixels:
        raise InputError(
            f"{label}: {width} x {height} pixels are more than the limit of {max_pixels}; raise it or make it smaller"
        )


def _webp_size(head: bytes) -> tuple[int, int] | None:
    chunk = head[12:16]
    if chunk == b"VP8X" and len(head) >= 30:
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if chunk == b"VP8L" and len(head) >= 25:
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 " and len(head) >= 30:
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    return None


def _label(source: str | Path | bytes | BinaryIO | Image.Image, name: str | None) -> str:
    text = name if name is not None else str(source) if isinstance(source, str | Path) else "the picture"
    return text if text.isprintable() and text else repr(text)


@contextmanager
def _open_source(source: str | Path | bytes | BinaryIO, label: str) -> Iterator[BinaryIO]:
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source)
    elif isinstance(source, str | Path):
        with _open_file(source, label) as file:
            yield file
    else:
        yield _seekable(source, label)


def _open_file(path: str | Path, label: str) -> BinaryIO:
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        if os.path.isdir(path):  # Windows cannot open one to find out
            raise InputError(f"{label}: is a folder, expected a picture")
        number = os.open(path, flags)  # without waiting: a pipe nobody writes to would hold us for ever
    except FileNotFoundError as error:
        hint = "; fastvlm.fetch.read_url gives the bytes of an address" if "://" in str(path) else ""
        raise InputError(f"{label}: no such file{hint}") from error
    except PermissionError as error:
        raise InputError(f"{label}: permission denied") from error
    except OSError as error:
        raise InputError(f"{label}: cannot be opened ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{label}: not a file name") from error
    file = os.fdopen(number, "rb")
    if not stat.S_ISREG(os.fstat(number).st_mode):
        file.close()
        raise InputError(f"{label}: not a regular file, expected a picture (`-` reads standard input)")
    return file


def _seekable(stream: BinaryIO, label: str) -> BinaryIO:
    if not hasattr(stream, "read"):
        raise InputError(f"{label}: expected a path, bytes, a file or a Pillow image, got {type(stream).__name__}")
    with _decoding(label):
        if stream.seekable():
            stream.seek(0)
            return stream
        content = stream.read(_MAX_STREAM_BYTES + 1)
    if len(content) > _MAX_STREAM_BYTES:
        raise InputError(f"{label}: more than {_MAX_STREAM_BYTES} bytes, expected one picture")
    return io.BytesIO(content)


def _read_head(file: BinaryIO, label: str) -> bytes:
    with _decoding(label):
        file.seek(0)
        head = file.read(64)
        file.seek(0)
    if not isinstance(head, bytes):
        raise InputError(f"{label}: the stream gives {type(head).__name__}, expected bytes")
    return head


def _is_folder(path: str | Path, label: str) -> bool:
    try:
        return os.path.isdir(path)
    except ValueError as error:
        raise InputError(f"{label}: not a file name") from error


@contextmanager
def _decoding(label: str) -> Iterator[None]:
    """Whatever Pillow raises becomes our one line; its own words may hold addresses of memory."""
    try:
        yield
    except MemoryError as error:
        raise InputError(f"{label}: not enough memory to read the picture") from error
    except _DECODER_ERRORS as error:
        raise InputError(f"{label}: the picture is damaged or cut off, and cannot be read") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns about odd headers; the picture is either read or refused, and a warning helps nobody."""
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _spread(total: int, count: int) -> Sequence[int]:
    """`count` of `total` positions, evenly from the first to the last."""
    if count >= total:
        return range(total)
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _count_frames(picture: ImageFile, label: str) -> int:
    with _decoding(label), _quiet():
        return int(getattr(picture, "n_frames", 1))


def _is_video(head: bytes) -> bool:
    if head[4:8] == b"ftyp":
        return head[8:12] not in (b"avif", b"avis", b"heic", b"heix", b"mif1", b"heif", b"hevc")
    return head.startswith((b"\x1a\x45\xdf\xa3", b"\0\0\1\xba", b"FLV\1")) or head[8:12] == b"AVI "


def _read_video(file: BinaryIO, label: str, *, num_frames: int, max_pixels: int) -> list[Image.Image]:
    try:
        av: Any = importlib.import_module("av")
    except ImportError as error:
        raise InputError(
            f"{label}: reading video files needs PyAV (pip install av); or give a GIF, a WebP or a folder of frames"
        ) from error
    av_errors: Any = (*_DECODER_ERRORS, av.error.FFmpegError)
    try:
        total = _count_video_frames(av, file)
        chosen = set(_spread(total, num_frames))
        frames = []
        file.seek(0)
        with av.open(file) as container:
            stream = container.streams.video[0]
            _check_size((stream.codec_context.width, stream.codec_context.height), label, max_pixels)
            for i, frame in enumerate(container.decode(stream)):
                if i in chosen:
                    frames.append(frame.to_image().convert("RGB"))
    except av_errors as error:
        raise InputError(f"{label}: the video is damaged, or has no pictures") from error
    if not frames:
        raise InputError(f"{label}: the video has no pictures")
    return frames


def _count_video_frames(av: Any, file: BinaryIO) -> int:
    """Headers often do not say, or lie: count what can be decoded."""
    file.seek(0)
    with av.open(file) as container:
        return sum(1 for _ in container.decode(container.streams.video[0]))
