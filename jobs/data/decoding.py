"""Read one picture file as RGB pixels of 8 bits."""

from __future__ import annotations

import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from jobs.data.picture_folders import shown_path
from jobs.errors import JobError
from orchestrator.messages import shown

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 178_956_970  # pixels of a picture, before or after resizing; Pillow's own limit for files
LISTED = 10  # unreadable pictures that are named
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF


class UnreadableError(JobError):
    """A picture can't be read. `line` names the file and the reason, without advice."""

    def __init__(self, line: str) -> None:
        super().__init__(f"{line}; repair or remove it")
        self.line = line


def unreadable(lines: Sequence[str], total: int) -> JobError:
    """Return the error for one or more unreadable pictures. lines: of their UnreadableErrors; total: the number of all
    pictures."""
    if len(lines) == 1:
        return UnreadableError(lines[0])
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    named = "".join(f"\n  {line}" for line in [*lines[:LISTED], *more])
    return JobError(f"{len(lines)} of {total} pictures can't be read; repair or remove them:{named}")


def decode(path: Path, size: int) -> NDArray[np.uint8]:
    """Decode a picture and resize its shorter side to `size` pixels, exactly like torchvision's Resize. Returns
    (height, width, 3). Raises UnreadableError, or MemoryError that names the file."""
    from torchvision.transforms.v2 import functional

    with _errors_name(path):
        return np.asarray(functional.resize(_rgb(path, size), [size]))


def check(path: Path, size: int) -> None:
    """Raise the same errors as `decode`, in less time."""
    with _errors_name(path):
        _rgb(path, size)


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    name = shown_path(path)
    try:
        yield
    except UnreadableError as error:
        raise UnreadableError(f"{name} can't be read as a picture: {error.line}") from error
    except MemoryError as error:  # not the file's fault
        raise MemoryError(f"there is too little memory to decode {name}") from error
    except Exception as error:  # damaged bytes can make Pillow's decoders raise almost anything
        if isinstance(error, OSError) and error.errno is not None:
            raise UnreadableError(f"{name} can't be read: {error.strerror or error}") from error
        raise UnreadableError(f"{name} can't be read as a picture: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):  # its message repeats the path
        return "it is damaged, or of a format that Pillow does not know"
    return shown(str(error) or type(error).__name__, 200)


def _rgb(path: Path, size: int) -> Image:
    """Return the picture as RGB, turned upright. size: what its shorter side will be resized to, in pixels."""
    import PIL.Image

    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
        raise UnreadableError("it is not a file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata, and about large pictures that are read all the same
        with PIL.Image.open(path) as picture:
            short, long = sorted(picture.size)
            if not short:
                raise UnreadableError(f"it has no pixels, but a size of {picture.width}x{picture.height}")
            if size * (size * long // short) > LARGEST:
                raise UnreadableError(
                    f"it has {picture.width}x{picture.height} pixels; resized to a shorter side of {size}, it would be "
                    "too large"
                )
            picture.load()  # may change the mode
            pixels: Image = _eight_bits(picture) if picture.mode in _DEEP else picture
            return _upright(pixels if pixels.mode == "RGB" else pixels.convert("RGB"), picture)  # convert copies


_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # Pillow clips these to 255 when it converts them


def _eight_bits(picture: Image) -> Image:
    """Return a grey picture of 16 bits as one of 8 bits: the upper byte, as Pillow itself does for colours of 16 bits.
    Raises UnreadableError for numbers of an unknown range."""
    from PIL import Image

    # Some versions of Pillow give the 16 bits of PNG and PGM files as 32-bit numbers, of the same range.
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):
        kind = "floating-point numbers" if picture.mode == "F" else "signed or 32-bit integers"
        raise UnreadableError(
            f"its pixels are {kind}, and which of them are black and white is unknown (save it with 8 or 16 bits per "
            "channel)"
        )
    bits, inverted = 16, False
    if picture.format == "TIFF":
        tags = picture.tag_v2  # type: ignore[attr-defined]  # of TiffImageFile
        bits, inverted = tags[BITS_PER_SAMPLE][0], tags.get(PHOTOMETRIC) == 0  # 0: white is zero
    values = np.asarray(picture).astype(np.int64) >> (bits - 8)
    return Image.fromarray((255 - values if inverted else values).astype(np.uint8))


def _upright(pixels: Image, picture: Image) -> Image:
    """Turn or mirror the pixels as the picture's EXIF data say, like PIL.ImageOps.exif_transpose. That function also
    writes the EXIF data anew, which fails for some files."""
    from PIL.Image import Transpose

    try:
        orientation = picture.getexif().get(ORIENTATION)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data, which viewers ignore too; the pixels have been read
        return pixels
    methods = (
        Transpose.FLIP_LEFT_RIGHT,
        Transpose.ROTATE_180,
        Transpose.FLIP_TOP_BOTTOM,
        Transpose.TRANSPOSE,
        Transpose.ROTATE_270,
        Transpose.TRANSVERSE,
        Transpose.ROTATE_90,
    )
    turned = dict(enumerate(methods, start=2))
    return pixels.transpose(turned[orientation]) if orientation in turned else pixels
