"""The original report's job: torchvision's AlexNet (Krizhevsky 2014, "One weird trick") on folders of images. The
report's three parts differ in which of the 13 feature and 7 classifier layers are pretrained and which are trained."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision import models

from jobs.data import sketches
from jobs.data.download import Fetch, Say, Source, UnreachableError, check_sha256, checked, download_all
from jobs.data.picture_folders import PictureFolder, class_names, describe, list_pictures
from jobs.errors import JobError
from jobs.job import JobContext, local_path
from jobs.pictures import Files, PictureJob, PictureParams
from jobs.training.pretrained import bring_weights, read_weights, weights_file, weights_source
from jobs.training.session import Session
from jobs.training.states import weights
from orchestrator.files.atomic import publish
from orchestrator.messages import counted
from orchestrator.profile import Profile
from orchestrator.records import EpochResult, Finished, Work

LAYERS = {"features": 13, "classifier": 7}
WEIGHTS = "pretrained_weights"
HIDDEN_UNITS = 4096  # of each of the two hidden classifier layers
Url = Annotated[str, Field(pattern=r"^https?://\S+$", max_length=1000)]


class Params(PictureParams):
    image_size: Annotated[int, Field(ge=63)] = 224  # pixels; AlexNet's convolutions need at least 63
    hidden_units: Annotated[int, Field(ge=1)] = HIDDEN_UNITS  # fewer make a smaller and faster network, not AlexNet
    dataset: Literal["tu_berlin"] | None = None  # what `orch prepare` fetches: the report's sketches, or nothing
    dataset_url: Url = sketches.URL  # a mirror of the archive of sketches
    weights_url: Url | None = None  # a mirror of torchvision's weights file


class AlexNet(PictureJob):
    """training_source_dir and testing_source_dir each contain one folder per class."""

    Params = Params

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        self.pretrained = {part: self._flags("pretrained", part) for part in LAYERS}
        self.trainable = {part: self._flags("trainable", part) for part in LAYERS}
        if not any(any(flags) for flags in self.trainable.values()):
            raise JobError("trainable_features and trainable_classifier: nothing is trainable")
        self.uses_pretrained = any(any(flags) for flags in self.pretrained.values())

    def _flags(self, kind: str, part: str) -> list[bool]:
        key = f"{kind}_{part}"
        value: bool | list[bool] = getattr(self.context.settings, key)
        flags = [value] * LAYERS[part] if isinstance(value, bool) else value
        if len(flags) != LAYERS[part]:
            raise JobError(f"{key}: {len(flags)} flags; AlexNet's {part} part needs {LAYERS[part]}, one per layer")
        return flags

    def files(self, train: bool) -> Files:
        folder = self._listed(train)
        return folder.files, folder.targets

    def _listed(self, train: bool) -> PictureFolder:
        """List the files; test pictures get the training set's class numbers. Raises JobError."""
        folder = self._folder(train)
        return list_pictures(folder, None if train else class_names(self._folder(train=True)))

    def _folder(self, train: bool) -> Path:
        setting: Literal["training_source_dir", "testing_source_dir"]
        setting = "training_source_dir" if train else "testing_source_dir"
        return local_path(self.context.settings, setting)

    def model(self) -> nn.Module:
        classes = len(class_names(self._folder(train=True)))
        net: nn.Module = models.alexnet(weights=None, num_classes=classes)
        if (units := self.params.hidden_units) != HIDDEN_UNITS:
            for index, inputs, outputs in ((1, 256 * 6 * 6, units), (4, units, units), (6, units, classes)):
                net.set_submodule(f"classifier.{index}", nn.Linear(inputs, outputs))
        if self.uses_pretrained:
            self._load_pretrained(net, read_weights(self.weights_file(), WEIGHTS, self._command))
        for part in LAYERS:
            for layer, trainable in zip(net.get_submodule(part).children(), self.trainable[part], strict=True):
                layer.requires_grad_(trainable)
        return net

    def _load_pretrained(self, net: nn.Module, state: dict[str, Tensor]) -> None:
        for part in LAYERS:
            for index, wanted in enumerate(self.pretrained[part]):
                layer = f"{part}.{index}"
                for name, value in net.get_submodule(layer).named_parameters() if wanted else ():
                    key = f"{layer}.{name}"
                    if key not in state or state[key].shape != value.shape:
                        shape = tuple(state[key].shape) if key in state else "none"
                        raise JobError(
                            f"pretrained_{part}[{index}]: {key} has shape {shape} in the weights file, "
                            f"{tuple(value.shape)} here; for other classes the last layer can't be pretrained"
                        )
                    with torch.no_grad():
                        value.copy_(state[key])

    @property
    def _command(self) -> str:
        return self.context.settings.prepare_command

    def weights_file(self, download: bool = False) -> Path:
        """Return the file of pretrained weights: for stand-in data those made with them, unless a file is named."""
        stand_in = self._stand_in_weights()
        if stand_in is not None:
            return stand_in
        wanted = self.context.settings.pretrained_weights
        return weights_file(
            wanted,
            models.AlexNet_Weights,
            WEIGHTS,
            command=self._command,
            download=download,
            mirror=self.params.weights_url,
        )

    def _stand_in_weights(self) -> Path | None:
        source = self._source()
        if source is None or not source.stand_in or Path(self.context.settings.pretrained_weights).is_file():
            return None
        file = self._root() / sketches.WEIGHTS
        if not file.is_file():
            raise JobError(
                f"{WEIGHTS}: {file} is missing. Run `{self._command} --stand-in`, or name a file in {WEIGHTS}"
            )
        wanted = self._network()
        if source.weights_params not in ({}, wanted):
            made, asked = (", ".join(f"{k}={v}" for k, v in p.items()) for p in (source.weights_params, wanted))
            raise JobError(
                f"{WEIGHTS}: {file} was made with job_params {made}, but these settings have {asked}. Use the "
                f"same --set options as for `orch prepare`, or delete the file and run `{self._command} --stand-in`"
            )
        return file

    def _network(self) -> dict[str, int]:
        """The job_params that weights depend on."""
        return {"image_size": self.params.image_size, "hidden_units": self.params.hidden_units}

    # --- the sketches of the report, or drawings in their place

    def _root(self) -> Path:
        settings = self.context.settings
        return sketches.root_of(settings.training_source_dir, settings.testing_source_dir)

    def _source(self) -> sketches.DataSource | None:
        return sketches.read_source(self._root()) if self.params.dataset == "tu_berlin" else None

    def data_source(self) -> Mapping[str, Any]:
        source = self._source()
        return asdict(source) if source else {}

    def fetch(self, how: Fetch) -> list[str]:
        """Fetch the sketches and torchvision's weights, or make stand-in data. Raises JobError. Without a network, its
        message names all files to bring."""
        if self.params.dataset is None:
            return super().fetch(how)
        root = self._root()
        if how.stand_in:
            return self._make_stand_in(root, how)
        source = self._source()
        if source is not None and source.stand_in:
            raise JobError(
                f"{root} contains {source.name}. To use them, run `{self._command} --stand-in`; to fetch the sketches, "
                "move that folder away"
            )
        pretrained = self._weights_to_fetch()
        expected = "" if how.sha256 is None else check_sha256(how.sha256)
        kept = root.parent / sketches.ARCHIVE
        size_bytes = sketches.ARCHIVE_BYTES
        archive = Source(self.params.dataset_url, kept, expected, sha256_by_user=True, size_bytes=size_bytes)
        if not sketches.is_there(root):
            sketches.refuse_to_replace(root)
        elif source is not None and not (source.sha256 or "").startswith(expected):
            raise JobError(f"{root} was made from an archive with the SHA-256 {source.sha256}, not {expected}")
        for file in how.brought:
            if file.suffix in (".pth", ".pt"):
                if pretrained is None:
                    raise JobError(f"--from {file}: these settings need no weights from torchvision")
                bring_weights(file, pretrained, how.say)
        for file in how.brought:
            if file.suffix not in (".pth", ".pt"):
                self._bring_archive(file, root, source, expected, how.say)
        missing = [] if sketches.is_there(root) else [archive]
        missing += [pretrained] if pretrained and not pretrained.file.is_file() else []
        brought_by_user = kept.is_file()  # put where the message of missing files says
        try:
            sha256 = download_all(missing, self._command, how.say)
        except UnreachableError as error:
            stand_in = f"For a small artificial data set, which needs no network, run\n  {self._command} --stand-in"
            raise JobError(f"{error}\n{stand_in}") from error
        if archive in missing:
            url, remove = (None, False) if brought_by_user else (archive.url, True)
            sketches.unpack(kept, root, url=url, sha256=sha256[archive], say=how.say, remove=remove)
        return []

    def _bring_archive(
        self, file: Path, root: Path, source: sketches.DataSource | None, expected: str, say: Say
    ) -> None:
        sha256 = checked(file, expected, say=say)
        if source is not None and source.sha256 == sha256 and sketches.is_there(root):
            say(f"{root} was made from this archive already")
            return
        sketches.unpack(file, root, url=None, sha256=sha256, say=say)

    def _weights_to_fetch(self) -> Source | None:
        """Return the weights file of torchvision that the settings need; None if they need none or name a file."""
        if not self.uses_pretrained:
            return None
        wanted = self.context.settings.pretrained_weights
        source = weights_source(wanted, models.AlexNet_Weights, WEIGHTS, self.params.weights_url)
        return source if isinstance(source, Source) else None

    def _make_stand_in(self, root: Path, how: Fetch) -> list[str]:
        if how.brought or how.sha256:
            raise JobError("--stand-in: it needs no files; leave out --from and --sha256")
        source = self._source()
        if source is not None and not source.stand_in:
            raise JobError(f"{root} contains the {source.name}; stand-in data would replace them. Move it away first")
        if source is None:
            source = sketches.draw_stand_in(root, how.say)
        if self.uses_pretrained and not (root / sketches.WEIGHTS).is_file():
            pretrain(self, root, source, how.say)
        return []

    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        """Return the feature layers if none of them is trained and images are not augmented."""
        features = model.get_submodule("features")
        if self.params.augment != "none" or any(p.requires_grad for p in features.parameters()):
            return None
        return features

    def prepare(self, download: bool) -> list[str]:
        train, test = self._listed(train=True), self._listed(train=False)
        classes = counted(len(train.classes), "class", "classes")
        source = self._source()
        lines = [f"data: {source}"] if source else []
        lines += [f"{classes} in {train.root}", *describe(train, test), *self.prepared(train.targets, download)]
        if source and self.uses_pretrained:
            lines += [f"{name}: {origin}" for name, origin in source.weights.items()]
        return lines


PRETRAINING_CLASSES, PRETRAINING_EPOCHS, PRETRAINING_SEED = 10, 4, 1
PRETRAINING = Profile("pretraining", learning_rate=3e-4, optimizer="AdamW")


def pretrain(job: AlexNet, root: Path, source: sketches.DataSource, say: Say) -> None:
    """Make the pretrained weights of stand-in data: train the network from random weights on other drawn classes, and
    write the weights to ROOT. Raises JobError."""
    with TemporaryDirectory(prefix=f".{root.name}-pretraining-", dir=root.parent) as folder:
        other = Path(folder, "drawings")
        sketches.draw_stand_in(other, say, PRETRAINING_CLASSES, PRETRAINING_SEED)
        settings = job.context.settings.model_copy(
            update={
                "training_source_dir": str(other / "train"),
                "testing_source_dir": str(other / "test"),
                "pretrained_features": False,
                "pretrained_classifier": False,
                "trainable_features": True,
                "trainable_classifier": True,
                "job_params": job.context.settings.job_params | {"normalization": "imagenet"},
            }
        )
        session = Session(AlexNet(JobContext(settings, cores=len(os.sched_getaffinity(0)))))
        work = Work(PRETRAINING, PRETRAINING_EPOCHS, seed=PRETRAINING_SEED, repeat=0, parent=None, suspended=None)

        def on_epoch(result: EpochResult) -> None:
            accuracy = f"validation accuracy {result.metrics['accuracy']:.3f}"
            say(f"pretraining on other drawings: epoch {result.number} of {PRETRAINING_EPOCHS}, {accuracy}")

        say("pretraining a network on these drawings, because there are no weights here; on a CPU, this takes minutes")
        finished = session.train(work, lambda: False, on_epoch)
        assert isinstance(finished, Finished), "nothing interrupts it"
        publish(root / sketches.WEIGHTS, lambda target: torch.save(weights(session.state()), target))
    origin = (
        f"trained by `orch prepare --stand-in` on {PRETRAINING_CLASSES} other drawn classes, "
        f"{PRETRAINING_EPOCHS} epochs, validation accuracy {finished.score:.3f}"
    )
    made = replace(source, weights={sketches.WEIGHTS: origin}, weights_params=job._network())
    sketches.write_source(root, made)
