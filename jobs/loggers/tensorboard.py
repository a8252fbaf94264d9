"""TensorBoard: one folder per chunk, with one event file for each job that trained the chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.loggers.logger import Logger, Points, Series

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Logger):
    """Writes event files. View them with `tensorboard --logdir RUN/logs/tensorboard`."""

    _writer: SummaryWriter

    def begin(self, series: Series) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides events that an earlier job wrote for purge_step or later steps.
        purge_step = series.step if series.rewrites else None
        self._writer = SummaryWriter(str(self.folder / "tensorboard" / series.name), purge_step=purge_step)
        self._tags, self._step = series.tags, series.step
        self._write_tags()

    def _write_tags(self) -> None:
        table = "".join(f"| {name} | {value} |\n" for name, value in self._tags.items())
        self._writer.add_text("lineage", f"| | |\n|---|---|\n{table}", self._step)
        self._writer.flush()

    def log(self, points: Points) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # Writing one event per step takes half the time of add_scalar, which writes one event per value.
        names, columns = list(points.values), list(points.values.values())
        file_writer: Any = self._writer.file_writer
        for step, at, *row in zip(points.steps, points.times, *columns, strict=True):
            values = [Summary.Value(tag=name, simple_value=value) for name, value in zip(names, row, strict=True)]
            file_writer.add_summary(Summary(value=values), step, at)
        self._step = points.steps[-1]
        self._writer.flush()

    def image(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")

    def histogram(self, step: int, name: str, values: NDArray[np.float32]) -> None:
        self._writer.add_histogram(name, values, step)

    def judge(self, promoted: bool) -> None:
        self._tags = {**self._tags, "promoted": "yes" if promoted else "no"}
        self._write_tags()

    def end(self) -> None:
        self._writer.close()
