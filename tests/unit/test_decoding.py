"""Picture files of every kind become RGB pixels of 8 bits. A file that can't be read is named in one line."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from jobs.data import decoding
from jobs.data.decoding import UnreadableError, check, decode
from jobs.errors import JobError

SIZE = 16  # the shorter side of the pictures here, so that resizing does not change them
GREY = np.random.default_rng(0).integers(0, 256, (SIZE, 20), dtype=np.uint8)
COLOURS = np.random.default_rng(1).integers(0, 256, (SIZE, 20, 3), dtype=np.uint8)
AS_COLOURS = np.repeat(GREY[..., None], 3, axis=2)


def saved(path: Path, picture: Image.Image, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def png_of_16_bits(path: Path, pixels: NDArray[np.uint8]) -> Path:
    """Write a PNG of 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels of 16 bits, which Pillow can't write."""
    height, width, channels = pixels.shape
    rows = (pixels.astype(">u2") * 257).astype(">u2")

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b""))
    return path


# --- 16 bits


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm"])
def test_a_grey_picture_of_16_bits_equals_its_copy_of_8_bits(name: str, tmp_path: Path) -> None:
    deep = GREY.astype(np.uint16) * 257
    picture = Image.fromarray(deep.astype(np.int32)) if name.endswith("pgm") else Image.fromarray(deep)
    assert np.array_equal(decode(saved(tmp_path / name, picture), SIZE), AS_COLOURS)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_each_kind_of_png_of_16_bits_equals_its_copy_of_8_bits(channels: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (SIZE, 20, channels), dtype=np.uint8)
    expected = np.repeat(pixels[..., :1], 3, axis=2) if channels < 3 else pixels[..., :3]
    assert np.array_equal(decode(png_of_16_bits(tmp_path / "deep.png", pixels), SIZE), expected)


def test_png_pictures_of_16_bits_may_also_be_opened_as_32_bit_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by earlier versions of Pillow: the mode is "I", but the range that of 16 bits."""
    path = saved(tmp_path / "grey.png", Image.fromarray(GREY.astype(np.uint16) * 257))
    opened = Image.open

    def as_32_bits(*arguments: Any, **options: Any) -> Image.Image:
        picture = opened(*arguments, **options)
        wide = Image.fromarray(np.asarray(picture).astype(np.int32))
        wide.format = picture.format
        return wide

    monkeypatch.setattr(Image, "open", as_32_bits)
    assert np.array_equal(decode(path, SIZE), AS_COLOURS)


def test_a_tiff_of_12_bits_uses_their_whole_range(tmp_path: Path) -> None:
    width = height = 16
    values = np.arange(256, dtype=np.uint16).reshape(height, width) * 16
    packed = bytearray()
    for one, other in values.reshape(-1, 2).tolist():
        packed += bytes([one >> 4, (one & 15) << 4 | other >> 8, other & 255])
    path = tmp_path / "deep.tif"
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags.append((279, len(packed)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    path.write_bytes(start + packed + struct.pack("<H", len(tags)) + entries + b"\0" * 4)
    assert np.array_equal(decode(path, 16)[..., 0].ravel(), np.arange(256))


def test_a_tiff_of_16_bits_in_which_white_is_zero_is_not_inverted(tmp_path: Path) -> None:
    path = saved(tmp_path / "grey.tif", Image.fromarray(GREY.astype(np.uint16) * 257))
    content = path.read_bytes()
    tag = struct.pack("<HHI", 262, 3, 1)
    assert content.count(tag) == 1
    path.write_bytes(content.replace(tag + b"\1", tag + b"\0"))
    assert np.array_equal(decode(path, SIZE), 255 - AS_COLOURS)


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (np.linspace(0, 1, 400, dtype=np.float32).reshape(20, 20), "floating-point numbers"),
        (np.arange(400, dtype=np.int32).reshape(20, 20) * 1000, "signed or 32-bit integers"),
    ],
)
def test_numbers_of_an_unknown_range_are_refused(pixels: NDArray[Any], kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "deep.tif", Image.fromarray(pixels))
    message = rf"^{path} can't be read as a picture: its pixels are {kind}, .*save it with 8 or 16 bits per channel"
    for read in (decode, check):
        with pytest.raises(UnreadableError, match=message) as raised:
            read(path, SIZE)
        assert "\n" not in str(raised.value)


# --- colours and transparency


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("1", "1.png"),
        ("L", "l.png"),
        ("LA", "la.png"),
        ("P", "p.png"),
        ("RGB", "rgb.bmp"),
        ("RGBA", "rgba.png"),
        ("CMYK", "cmyk.tif"),
        ("CMYK", "cmyk.jpg"),
        ("YCbCr", "ycbcr.tif"),
        ("LAB", "lab.tif"),
    ],
)
def test_each_kind_of_colour_is_converted_as_pillow_does(mode: str, name: str, tmp_path: Path) -> None:
    if mode == "LAB":
        picture = Image.frombytes("LAB", (20, SIZE), COLOURS.tobytes())
    else:
        picture = Image.fromarray(COLOURS).convert(mode)
    path = saved(tmp_path / name, picture)
    assert np.array_equal(decode(path, SIZE), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparency_is_ignored(mode: str, tmp_path: Path) -> None:
    """A transparent pixel keeps the colour that the file has for it."""
    alpha = Image.fromarray(np.random.default_rng(3).integers(0, 256, GREY.shape, dtype=np.uint8))
    match mode:
        case "RGBA":
            expected, picture = COLOURS, Image.fromarray(COLOURS)
            picture.putalpha(alpha)
        case "LA" | "PA":
            expected, picture = AS_COLOURS, Image.fromarray(GREY)
            picture.putalpha(alpha)
        case _:
            expected, picture = AS_COLOURS, Image.fromarray(GREY).convert("P")
            picture.putpalette([value for value in range(256) for _ in range(3)])
            picture.info["transparency"] = bytes(range(256))
    path = saved(tmp_path / ("x.tif" if mode == "PA" else "x.png"), picture)
    assert np.array_equal(decode(path, SIZE), expected)


# --- orientation


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.tif"])
@pytest.mark.parametrize("orientation", range(0, 10))
def test_a_picture_is_turned_as_its_exif_data_say(orientation: int, name: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[decoding.ORIENTATION] = orientation
    path = saved(tmp_path / name, Image.fromarray(COLOURS), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert np.array_equal(decode(path, SIZE), np.asarray(expected))
    assert (expected.height > expected.width) is (orientation in (5, 6, 7, 8))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0nonsense of many bytes"])
def test_damaged_exif_data_do_not_matter(exif: bytes, tmp_path: Path) -> None:
    path = saved(tmp_path / "x.png", Image.fromarray(COLOURS), exif=exif)
    assert np.array_equal(decode(path, SIZE), COLOURS)


# --- files that can't be read


def content(format_: str = "PNG") -> bytes:
    target = io.BytesIO()
    Image.fromarray(COLOURS).save(target, format_)
    return target.getvalue()


def bomb(path: Path) -> None:
    """A PNG file that claims 100,000 x 100,000 pixels."""
    path.write_bytes(content().replace(struct.pack(">II", 20, SIZE), struct.pack(">II", 10**5, 10**5), 1))
    data = bytearray(path.read_bytes())
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


def broken_chunk(path: Path) -> None:
    """A PNG file whose second chunk has no valid name, for which Pillow raises SyntaxError."""
    data = bytearray(content())
    data[data.index(b"IDAT") : data.index(b"IDAT") + 4] = b"\0\1\2\3"
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"<!DOCTYPE html>"),
    "cut off": lambda path: path.write_bytes(content()[:60]),
    "cut off jpeg": lambda path: path.write_bytes(content("JPEG")[:700]),
    "a broken chunk": broken_chunk,
    "a bomb": bomb,
    "no width": lambda path: path.write_bytes(b"P6 0 5 255\n"),
    "no bitmap": lambda path: path.write_bytes(b"BM" + b"\xff" * 60),
    "half a bitmap": lambda path: path.write_bytes(content("BMP")[:30]),
    "half a TIFF": lambda path: path.write_bytes(content("TIFF")[:100]),
    "half a GIF": lambda path: path.write_bytes(content("GIF")[:20]),
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "too long": lambda path: saved(path, Image.new("L", (60_000, 1)), format="PNG"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["x.png", "two\nlines \udcff.png"])
def test_a_file_that_can_not_be_read_is_named_in_one_printable_line(damage: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    DAMAGES[damage](path)
    for read in (decode, check):
        with pytest.raises(JobError) as raised:
            read(path, 256)
        message = str(raised.value)
        assert message.isprintable()
        assert message.startswith(f"{tmp_path!s}/{'x.png' if name == 'x.png' else 'two'}")
        assert "can't be read" in message
        assert message.endswith("; repair or remove it")
        assert json.loads(json.dumps(message)) == message


@pytest.mark.parametrize("error", [SyntaxError, EOFError, struct.error, OverflowError, KeyError, RecursionError])
def test_any_error_of_a_decoder_names_the_file(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "x.png", Image.fromarray(COLOURS))

    def fail(*_: Any) -> None:
        raise error("broken")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(JobError, match=f"^{path} can't be read as a picture: .*broken"):
        decode(path, SIZE)


def test_too_little_memory_is_not_taken_for_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.png", Image.fromarray(COLOURS))

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MemoryError, match=f"^there is too little memory to decode {path}$"):
        decode(path, SIZE)


def test_a_file_whose_name_is_no_text_can_be_read(tmp_path: Path) -> None:
    path = saved(tmp_path / os.fsdecode(b"\xff\n.png"), Image.fromarray(COLOURS))
    assert np.array_equal(decode(path, SIZE), COLOURS)
