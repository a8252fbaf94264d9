"""The examples of a job: each split's data, which of them are used, and the proof that they stay the same."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.data import fingerprint, randomness, splits, streams
from jobs.data.feeds import Feed, loader_processes, make_feed
from jobs.data.fingerprint import Fingerprint
from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.job import Job
from jobs.training.checked import checked_data
from jobs.training.ranks import ALONE, Alone
from orchestrator.files import fingerprints
from orchestrator.files.run_folder import FINGERPRINTS

log = logging.getLogger("orch")


@dataclass(frozen=True)
class Opened:
    """A split's data, with what they depend on."""

    data: Any
    labels: NDArray[np.int64] | None
    indices: list[int] | None  # of the examples that are used; None: all of a stream
    fingerprint: Fingerprint
    params: str | None  # the profile's, as JSON, if data() has read the profile


class Examples:
    """Opens the splits of a job. Each is opened once; the data stay loaded."""

    def __init__(self, job: Job, group: Alone = ALONE, run_folder: Path | None = None) -> None:
        """run_folder: where the fingerprints are kept with which the data are compared; None: do not compare."""
        self.job = job
        self.settings = job.context.settings
        self._group = group
        self._run_folder = run_folder
        self._feeds: dict[Split, Feed] = {}
        self._made_for: dict[Split, str | None] = {}  # Opened.params of each feed
        self._opened: dict[Split, Opened] = {}  # whose feeds are not made yet
        self._facts: dict[Split, Fingerprint] = {}
        self._again: list[Any] | None = None  # the training set's sample, read with other random numbers
        self._notes: list[str] = []
        self._named: dict[str, Fingerprint] = {}  # see _to_keep

    @property
    def own_validation(self) -> bool:
        """Whether data("validation") is a set of its own, not a part of data("train")."""
        wanted = self.settings.validation
        return self.job.own_validation if wanted is None else wanted == "own"

    def feed(self, split: Split) -> Feed:
        """Return the batches of a split. Raises JobError if the data are not usable, or not those of the run."""
        params = self._params()
        if split in self._feeds and self._made_for[split] in (None, params):
            return self._feeds[split]
        self._feeds.pop(split, None)  # frees the memory first
        opened = self._opened.pop(split, None)
        if opened is None or opened.params not in (None, params):
            opened = self._load(split)
        self._made_for[split] = opened.params
        self._feeds[split] = feed = self._feed_of(split, opened)
        return feed

    def _params(self) -> str:
        return json.dumps(self.job.profile.params, sort_keys=True, default=str)

    def open(self, split: Split) -> Opened:
        """Load a split's data, choose the examples to use, and compare them with those of the run. They are kept until
        the feed is made."""
        if split not in self._opened:
            self._opened[split] = self._load(split)
        return self._opened[split]

    def _load(self, split: Split) -> Opened:
        # Loading must not change the training's random state, because each process that resumes a chunk loads the data
        # again. All splits have the same seed, so that a job that generates its data returns the same examples for
        # "train" and "validation".
        params = self._params()
        self.job.profile_was_read = False
        with randomness.random_state_kept():
            randomness.seed_cpu(self.settings.seed)
            data = checked_data(self.job, self.job.data(split), split)
            labels = self._labels(data, split)
            indices = self._indices(split, data, labels)
            randomness.seed_cpu(self.settings.seed)
            facts = fingerprint.fingerprint_of(data, labels, indices)
            if split == "train" and facts["sample"] and not self.own_validation:
                randomness.seed_cpu(self.settings.seed + 1)
                self._again = fingerprint.sample_of(data)
        opened = Opened(data, labels, indices, facts, params if self.job.profile_was_read else None)
        self._facts[split] = facts
        if split == "test" and "train" not in self._facts and (kept := self._kept("train")):
            self._facts["train"] = kept
        self._compare_splits(split)
        self._compare_with_run(split, opened)
        return opened

    def _labels(self, data: Any, split: Split) -> NDArray[np.int64] | None:
        """Return the class of each example, as the job knows it. Raises JobError if there is not one for each."""
        labels = None if streams.is_stream(data) else self.job.labels(data, split)
        if labels is None:
            return None
        values = np.asarray(labels)
        if values.shape != (len(data),) or values.dtype.kind not in "biu":
            raise JobError(
                f"{type(self.job).__name__}.labels(data, {split!r}) returned {values.dtype} of shape {values.shape}; "
                f"allowed: a whole number for each of the {len(data)} examples, or None"
            )
        return values.astype(np.int64)

    def _indices(self, split: Split, data: Any, labels: NDArray[np.int64] | None) -> list[int] | None:
        """Return the indices of this split's examples in `data`, which the job returned for it."""
        whole = split == "test" or self.settings.select_on == "test" or self.own_validation
        if streams.is_stream(data):
            if not whole:
                raise JobError(
                    f"{type(self.job).__name__}.data({split!r}) can only be read in order, so no part of it can be "
                    "set aside for validation. Return another stream for data('validation') and set "
                    '"validation": "own"'
                )
            return None
        if whole:
            return list(range(len(data)))
        fraction, seed = self.settings.validation_fraction, self.settings.seed
        parts = splits.split_labels(labels if self.settings.stratify else None, len(data), fraction, seed)
        return parts[split == "validation"]

    def _feed_of(self, split: Split, opened: Opened) -> Feed:
        settings, context = self.settings, self.job.context
        collate = self.job.collate if type(self.job).collate is not Job.collate else None
        size = settings.max_batch_size
        if streams.is_stream(opened.data):
            processes = loader_processes(context.device, context.cores)
            feed = streams.stream_feed(opened.data, size, context.device, processes, collate)
        else:
            feed = make_feed(opened.data, opened.indices or [], size, context.device, context.cores, collate)
        if split == "train":
            feed.last_batch = "drop" if settings.drop_last else "merge"
        return feed

    # --- comparisons

    def _compare_splits(self, split: Split) -> None:
        """Compare what data() returned for this split with what it returned for the others."""
        facts, job = self._facts, type(self.job).__name__
        train, validation, test = (facts.get(name) for name in ("train", "validation", "test"))
        if train and validation and split != "test":
            if self.own_validation:
                alike = all(train[key] == validation[key] for key in ("examples", "labels"))
                if alike and train["sample"] and fingerprint.same_sample(train, validation):
                    raise JobError(
                        f'"validation" is "own", but {job}.data("validation") returned the training examples; return '
                        'other examples, or set "validation": "split"'
                    )
            elif train["examples"] != validation["examples"] or train["labels"] != validation["labels"]:
                sizes = f"{train['examples']:,} and {validation['examples']:,} examples"
                raise JobError(
                    f'{job}.data("train") and {job}.data("validation") must list the same examples ({sizes}), from '
                    'which orch selects a part for each. If data("validation") is a validation set of its own, set '
                    '"validation": "own", and both are used whole'
                )
            elif self._again and validation["sample"]:
                targets, inputs = fingerprint.unlike(train["sample"], self._again, validation["sample"])
                if targets:
                    raise JobError(_another_order(job, "targets"))
                self._notes = [_another_order(job, "inputs")] if inputs else []
        for other in (validation, test):
            named = train and other and None not in (train["classes"], other["classes"])
            if train and other and named and train["classes"] != other["classes"]:
                name = "validation" if other is validation else "test"
                change = fingerprint.class_change(train["classes"], other["classes"])
                raise JobError(
                    f'{job}.data("{name}") does not number its classes as data("train") does: {change}. Give each '
                    "class the number that it has in the training set"
                )

    def _compare_with_run(self, split: Split, opened: Opened) -> None:
        """Compare with the fingerprint that the run's first process kept, or keep this one. Raises JobError."""
        now = opened.fingerprint
        self._named |= (named := self._to_keep(split, opened))
        if self._group.count > 1:
            digest = hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()
            number = int(digest[:15], 16)
            if self._group.same(number) != number:
                raise JobError(f"data({split!r}) differs between the processes of this worker; it must be the same")
        if self._run_folder is None:
            return
        found: list[str] = []
        for name, facts in named.items():
            if self._kept(name) is None:
                fingerprints.keep(self._run_folder, name, facts)
            found += fingerprint.changes(self._kept(name) or facts, facts)
        if found:
            raise JobError(
                f"data({split!r}) is not the same as when this run began: {'; '.join(found)}. Scores of different data "
                "can't be compared, and a changed split validates on trained examples. Restore the data, or launch "
                f"another run. (To go on all the same, delete {self._run_folder / FINGERPRINTS})"
            )

    def _to_keep(self, split: Split, opened: Opened) -> dict[str, Fingerprint]:
        """Return what must stay the same, by name. Data that depend on the profile have a fingerprint for each of its
        params, but these may only choose among whole training sets: else a profile would train on examples with which
        models of another one are validated."""
        facts = opened.fingerprint
        if opened.params is None:
            return {split: facts}
        own = {f"{split}-{hashlib.sha256(opened.params.encode()).hexdigest()[:16]}": facts}
        return own if split == "train" and self.own_validation else {split: {**facts, "sample": None}, **own}

    def _kept(self, name: str) -> Fingerprint | None:
        """Return the fingerprint that the run's folder has under a name."""
        return None if self._run_folder is None else fingerprints.kept(self._run_folder, name)

    def notes(self) -> list[str]:
        """Return what is odd about the data, but may be meant."""
        return self._notes

    def fingerprints(self) -> dict[str, Fingerprint]:
        """Return the fingerprints of the splits that were opened, by name."""
        return dict(self._named)


def _another_order(job: str, what: str) -> str:
    return (
        f'{job}.data("train") and {job}.data("validation") have different {what} for the same number of an example. '
        "They must list the same examples in the same order, or validation uses examples that were trained on; a "
        'validation set of its own needs "validation": "own"'
    )
