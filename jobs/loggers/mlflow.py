"""MLflow: one MLflow run per chunk, in an experiment named after the orch run. Without MLFLOW_TRACKING_URI, all
chunks are stored in one SQLite file in the orch run's log folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.loggers.logger import Logger, Place, Points, Series, run_id

if TYPE_CHECKING:
    from mlflow import MlflowClient

FILE = "mlflow.db"
MOST_METRICS = 1000  # per call: MLflow's own limit
SERIES_TAG = "orch.series"


class MLflow(Logger):
    """Several workers may write to one SQLite file, and SQLite's own locks do not work on every shared file system. So
    each call holds a file lock, of a kind that works on this file system, and closes its database connection."""

    _client: MlflowClient
    _experiment: str
    _run_id: str

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._uri = os.environ.get("MLFLOW_TRACKING_URI")
        if self._uri is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._uri = f"sqlite:///{(self.folder / FILE).absolute()}"
            os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
            self._locked: Callable[[], Any] = self._file_locked
        else:
            self._locked = nullcontext
        self._last: dict[str, int] = {}  # by metric: the last step logged by an earlier job
        self._open()

    def _open(self) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        with self._locked():
            self._client = MlflowClient(tracking_uri=self._uri)
            experiment = self._client.get_experiment_by_name(self.run)
            if experiment is None:
                artifacts = str(self.folder / "mlflow") if self._locked is not nullcontext else None
                try:
                    self._experiment = self._client.create_experiment(self.run, artifacts)
                    return
                except MlflowException:  # on a server, another worker may just have created it
                    experiment = self._client.get_experiment_by_name(self.run)
                    if experiment is None:
                        raise
            self._experiment = experiment.experiment_id

    @contextmanager
    def _file_locked(self) -> Iterator[None]:
        from orchestrator.locking.choice import Choice, lock_of

        with lock_of(Choice(self.lock, "as the run's own"), self.folder / FILE):
            yield

    def begin(self, series: Series) -> None:
        name = f"{run_id(self.folder)}-{series.name}"
        self._last = {}
        with self._locked():
            runs = [] if series.new else self._client.search_runs([self._experiment], f"tags.`{SERIES_TAG}` = '{name}'")
            tags = {key: str(value) for key, value in series.tags.items()}
            if not runs:
                tags[SERIES_TAG] = name
                self._run_id = self._client.create_run(
                    self._experiment, tags=tags, run_name=f"{self.run} {series.name}"
                ).info.run_id
                return
            self._run_id = runs[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            for key, value in tags.items():
                self._client.set_tag(self._run_id, key, value)
            if series.rewrites:
                self._last = {key: self._last_step(key) for key in runs[0].data.metrics}

    def _last_step(self, metric: str) -> int:
        return max(int(point.step) for point in self._client.get_metric_history(self._run_id, metric))

    def log(self, points: Points) -> None:
        """Log points, skipping steps that an earlier job already logged before it died."""
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, int(1000 * at), step)
            for name, values in points.values.items()
            for step, at, value in zip(points.steps, points.times, values, strict=True)
            if step > self._last.get(name, -1)
        ]
        with self._locked():
            for first in range(0, len(metrics), MOST_METRICS):
                self._client.log_batch(self._run_id, metrics=metrics[first : first + MOST_METRICS])

    def image(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        with self._locked():
            self._client.log_image(self._run_id, pixels, artifact_file=f"images/{name}-{step:010d}.png")

    def histogram(self, step: int, name: str, values: NDArray[np.float32]) -> None:
        """MLflow has no histograms: write the counts of 64 equal intervals as a JSON file."""
        counts, edges = np.histogram(values, bins=64)
        with self._locked():
            text = {"step": step, "counts": counts.tolist(), "edges": edges.tolist()}
            self._client.log_dict(self._run_id, text, f"histograms/{name}-{step:010d}.json")

    def judge(self, promoted: bool) -> None:
        with self._locked():
            self._client.set_tag(self._run_id, "promoted", "yes" if promoted else "no")

    def end(self) -> None:
        with self._locked():
            self._client.set_terminated(self._run_id)
