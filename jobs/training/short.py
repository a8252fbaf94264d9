"""Trainers with few examples in an epoch: to try a job before a launch, and to check that it resumes exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jobs.data.feeds import Feed
from jobs.data.splits import Split
from jobs.data.streams import BatchStreamFeed
from jobs.job import Job
from jobs.training.examples import Examples, Opened
from jobs.training.own_loop import OwnLoop
from jobs.training.session import JobTrainer, Session
from orchestrator.records import Work


class ShortExamples(Examples):
    """Uses few of the examples, spread over all, because data sets are often sorted by class."""

    def __init__(self, job: Job, steps: int, batch_size: int) -> None:
        """steps: batches of an epoch, at most. batch_size: for which these are counted."""
        super().__init__(job)
        self._steps = steps
        self._count = steps * batch_size - batch_size // 4  # the last batch is smaller, as in most real epochs

    def _feed_of(self, split: Split, opened: Opened) -> Feed:
        if opened.indices is not None:
            count = min(len(opened.indices), self._count)
            chosen = [opened.indices[i * len(opened.indices) // count] for i in range(count)]
            return super()._feed_of(split, replace(opened, indices=chosen))
        feed = super()._feed_of(split, opened)  # a stream: read only its beginning
        feed.count = min(feed.count, self._steps if isinstance(feed, BatchStreamFeed) else self._count)
        return feed


class Short(JobTrainer):
    """What a short session and a short loop of the job's own have in common."""

    def __init__(self, job: Job, steps: int, batch_size: int | None = None) -> None:
        """batch_size: at most; None: that of the settings."""
        self._steps = steps
        self._batch_size = batch_size or 10**9
        super().__init__(job)

    def _examples(self, run_folder: Path | None) -> ShortExamples:
        return ShortExamples(self.job, self._steps, min(self._batch_size, self.settings.max_batch_size))

    def _open_data(self, work: Work) -> None:
        super()._open_data(work)
        for split in ("train", self.settings.select_on) if self.has_data else ():
            feed = self.feed(split)
            feed.batch_size = min(feed.batch_size, self._batch_size)


class ShortSession(Short, Session):
    """A Session with few examples."""


class ShortOwnLoop(Short, OwnLoop):
    """A loop of the job's own with few examples, if it has any."""
