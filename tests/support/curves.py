"""Read the curves written by loggers, with each logger's own library: {name: [(step, value), ...]}."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

Curves = dict[str, list[tuple[int, float]]]


def of_tensorboard(logs: Path, chunk: int) -> tuple[Curves, dict[str, str]]:
    """Return the curves that TensorBoard shows, and the lineage."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs / "tensorboard" / f"chunk-{chunk:08d}"), size_guidance={"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    curves = {name: [(point.step, point.value) for point in events.Scalars(name)] for name in names}
    text = events.Tensors("lineage/text_summary")[-1].tensor_proto.string_val[0].decode()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
    return curves, {name: value for name, value in rows}


def of_wandb(logs: Path, chunk: int) -> tuple[Curves, dict[str, str]]:
    """Return what `wandb sync` would upload: the files of a run, in the order in which they were started. A step that
    the run already has is ignored, as by the server."""
    curves: Curves = {}
    summary: Curves = {}  # also contains the last value of each curve
    config: dict[str, str] = {}
    last: dict[str, int] = {}
    for file in sorted(logs.glob(f"wandb/offline-run-*-c{chunk:08d}*/run-*.wandb"), key=_age):
        for record in _records(file):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                values = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                step = int(values.pop("_step", record.history.step.num))
                for name in values:
                    if not name.startswith("_") and step > last.get(name, -1):
                        curves.setdefault(name, []).append((step, float(values[name])))
                        last[name] = step
            elif kind == "run":
                config |= {item.key: item.value_json.strip('"') for item in record.run.config.update}
                config |= {"group": record.run.run_group, "id": record.run.run_id}
            elif kind == "config":
                config |= {item.key: item.value_json.strip('"') for item in record.config.update}
            elif kind == "summary":
                for item in record.summary.update:
                    name = item.key or ".".join(item.nested_key)
                    if name.startswith("test/"):
                        summary[name] = [(-1, float(item.value_json))]
    return summary | curves, config


def _age(file: Path) -> tuple[str, int]:
    """Return a sort key for folders by age. Folders made in the same second have numbers."""
    start, _, rest = file.parent.name.removeprefix("offline-run-").partition("-")
    number = rest.rpartition("-")[2]
    return start, 0 if number.startswith("c") else int(number)


def _records(file: Path) -> Iterator[Any]:
    """Read a log in LevelDB's format: blocks of 32 KiB that contain pieces of records (checksum, length, kind)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, pieces = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the piece is a whole record or the last piece of one
            yield Record.FromString(pieces)
            pieces = b""


def of_mlflow(logs: Path, chunk: int) -> tuple[Curves, dict[str, str]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{logs / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    (run,) = client.search_runs([experiment.experiment_id], f"tags.chunk = '{chunk}'")
    curves = {
        name: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
    }
    return curves, run.data.tags | {"experiment": experiment.name}


READERS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "mlflow": of_mlflow}


def needed(logger: str) -> None:
    """Skip the test if the logger's package is not installed."""
    if logger != "tensorboard":
        pytest.importorskip(logger, reason=f"{logger} is not installed: pip install 'orch[{logger}]'")
