"""Pretrained weights, chosen by a file path or by a torchvision name. `orch prepare` downloads the file of a name."""

from __future__ import annotations

import errno
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import WeightsEnum

from jobs.errors import JobError
from jobs.training.states import why_unreadable

# Mean and standard deviation of ImageNet's training set; torchvision's weights expect inputs normalised with them.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def weights_file(wanted: str, known: type[WeightsEnum], setting: str, download: bool = False) -> Path:
    """Return the path of the weights file chosen by a setting. wanted: the setting's value, either a path or a name in
    `known`; the files of these names are in torch's hub folder (in $TORCH_HOME). setting: its name, for errors.
    download: fetch the file if it is missing. Raises JobError if the file is missing or can't be fetched."""
    if Path(wanted).expanduser().is_file():
        return Path(wanted).expanduser()
    if wanted not in known.__members__:
        names = ", ".join(known.__members__)
        raise JobError(f"{setting}: {wanted!r} is neither a file nor one of torchvision's: {names}")
    url: str = known[wanted].url
    cached: Path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not cached.is_file() and download:
        try:
            torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise JobError(
                f"{setting}: {wanted} can't be downloaded: {error}. On a machine with internet, run "
                f"`orch prepare` and copy {cached.name} to {cached.parent}, or name a file in {setting}"
            ) from error
    if not cached.is_file():
        raise JobError(
            f"{setting}: {wanted} is not on this machine ({cached}). Run `orch prepare SETTINGS` where "
            f"there is internet, or name a file in {setting}"
        )
    return cached


def read_weights(file: Path, setting: str) -> dict[str, Tensor]:
    """Load a file's tensors by name, on the CPU, without executing code in it. setting: its name, for errors."""
    again = (
        "fetch it again (a torchvision file: delete it and run `orch prepare SETTINGS`), or name another file "
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
