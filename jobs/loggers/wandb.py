"""Weights & Biases: one W&B run per chunk, in a group named after the orch run. Offline unless WANDB_MODE is set,
because compute nodes often have no internet; `wandb sync` uploads the curves later."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.loggers.logger import Logger, Place, Points, Series, run_id

if TYPE_CHECKING:
    import wandb


class WeightsAndBiases(Logger):
    """The lineage's optimizer step is used as W&B's step. W&B ignores values for a step that is already logged, so if a
    job dies and its last steps are trained again, the values logged first remain."""

    _run: wandb.Run

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._mode = os.environ.setdefault("WANDB_MODE", "offline")
        if self._mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # sending error reports needs internet access
        self.folder.mkdir(parents=True, exist_ok=True)

    def begin(self, series: Series) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "orch"),
            group=self.run,
            id=f"{run_id(self.folder)}-c{series.chunk:08d}",
            name=f"{self.run} {series.name}",
            job_type=str(series.tags["profile"]) if "profile" in series.tags else None,
            tags=[f"founder {series.tags['founder']}"] if "founder" in series.tags else None,
            config=dict(series.tags),
            dir=os.environ.get("WANDB_DIR", str(self.folder)),
            resume="allow",
            reinit="create_new",  # do not touch a W&B run opened by the user's code in this process
            settings=wandb.Settings(
                silent=True, console="off", symlink=False, disable_git=True, disable_code=True, x_disable_meta=True,
                x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
            ),  # write only the curves, in few files, because shared file systems limit the number of files
        )  # fmt: skip

    def log(self, points: Points) -> None:
        names, columns = list(points.values), list(points.values.values())
        for step, *row in zip(points.steps, *columns, strict=True):
            self._run.log(dict(zip(names, row, strict=True)), step=step)

    def image(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        import wandb

        self._run.log({name: wandb.Image(pixels.squeeze())}, step=step)

    def histogram(self, step: int, name: str, values: NDArray[np.float32]) -> None:
        import wandb

        self._run.log({name: wandb.Histogram(values.ravel().tolist())}, step=step)

    def judge(self, promoted: bool) -> None:
        config: Any = self._run.config
        config.update({"promoted": promoted}, allow_val_change=True)

    def test(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics to the run's summary, because W&B would ignore points at a step already logged."""
        self._run.summary.update({f"test/{name}": value for name, value in metrics.items()})

    def end(self) -> None:
        folder = Path(self._run.dir).parent
        self._run.finish()
        if self._run.offline:  # everything to upload is in one .wandb file, so these folders are not needed
            for name in ("files", "logs", "tmp"):
                shutil.rmtree(folder / name, ignore_errors=True)

    def close(self) -> None:
        import wandb

        wandb.teardown()
