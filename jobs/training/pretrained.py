"""Pretrained weights: a file given by path, or a torchvision file given by name, which `orch prepare` downloads."""

from __future__ import annotations

import errno
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import WeightsEnum

from jobs.data.download import Say, Source, checked, copy_into_place, download_all
from jobs.errors import JobError
from jobs.training.states import why_unreadable

# Mean and standard deviation of ImageNet's training set; torchvision's weights expect inputs normalised with them.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_HASH = re.compile(r"-([0-9a-f]{8,64})\.")


def weights_file(
    wanted: str,
    known: type[WeightsEnum],
    setting: str,
    *,
    command: str,
    download: bool = False,
    mirror: str | None = None,
    say: Say = lambda line: None,
) -> Path:
    """Return the path of the weights file chosen by a setting. wanted: the setting's value, either a path or a name in
    `known`; the files of these names are in torch's hub folder (in $TORCH_HOME). setting: its name, for errors.
    command: the `orch prepare` command of these settings, for errors. download: fetch the file if it is missing, from
    the address `mirror` if given. Raises JobError if the file is missing, UnreachableError if it can't be fetched."""
    source = weights_source(wanted, known, setting, mirror)
    if isinstance(source, Path):
        return source
    if not source.file.is_file() and download:
        download_all([source], command, say)
    if not source.file.is_file():
        raise JobError(
            f"{setting}: {wanted} is not on this machine ({source.file}). Run `{command}` where there is internet, or "
            f"carry {source.file.name} here and run `{command} --from {source.file.name}`, or name a file in {setting}"
        )
    return source.file


def weights_source(wanted: str, known: type[WeightsEnum], setting: str, mirror: str | None = None) -> Path | Source:
    """Return the file that the user named, or what to download for a name in `known`. Raises JobError."""
    if Path(wanted).expanduser().is_file():
        return Path(wanted).expanduser()
    if wanted not in known.__members__:
        names = ", ".join(known.__members__)
        raise JobError(f"{setting}: {wanted!r} is neither a file nor one of torchvision's: {names}")
    weights = known[wanted]
    name = weights.url.rsplit("/", 1)[-1]
    digits = _HASH.search(name)  # torchvision's file names end with the first digits of the SHA-256
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    size_mb = weights.meta.get("_file_size")
    size_bytes = int(size_mb * 2**20) if size_mb else None
    return Source(mirror or weights.url, file, digits[1] if digits else "", size_bytes=size_bytes)


def bring_weights(file: Path, source: Source, say: Say) -> None:
    """Copy a file that the user has carried here to where `weights_file` finds it. Raises JobError if its checksum is
    wrong or the disk is full."""
    say(f"{file}: SHA-256 {checked(file, source.sha256)}")
    copy_into_place(file, source.file)


def read_weights(file: Path, setting: str, command: str) -> dict[str, Tensor]:
    """Load a file's tensors by name, on the CPU, without executing code in it. setting: its name,
    command: the `orch prepare` command, both for errors. Raises JobError."""
    again = (
        f"fetch it again (a torchvision file: delete it and run `{command}`), or name another file "
        "written by torch.save(model.state_dict(), file)"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about files that it did not write
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes can make the unpickler raise almost anything
        if isinstance(error, MemoryError):
            raise
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a truncated file
            raise JobError(f"{setting}: {file} can't be read: {error.strerror or error}") from error
        raise JobError(f"{setting}: {file} can't be read: {why_unreadable(error)}; {again}") from error
    if not isinstance(state, dict):
        raise JobError(f"{setting}: {file} holds no weights, but a {type(state).__name__}; {again}")
    if "model" in state and "format" in state:
        raise JobError(f"{setting}: {file} is an orch checkpoint; extract its weights with `orch export`")
    if not any(isinstance(value, Tensor) for value in state.values()):
        names = ", ".join(f"{name!r:.40}" for name in list(state)[:5]) or "nothing"
        raise JobError(f"{setting}: {file} holds no weights by name, but {names}; {again}")
    return state
