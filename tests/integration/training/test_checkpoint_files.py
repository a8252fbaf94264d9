"""Checkpoints as files: evaluated, exported, damaged, of another format, or made to run code."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jobs.errors import JobError
from jobs.training.states import export, read
from tests.support.short_training import (
    Fresh,
    differences,
    digits_session,
    founder,
    momentum,
    save,
    save_trained,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# --- evaluation


@pytest.mark.parametrize("what", ["the model in training", "a file"])
def test_evaluation_draws_nothing_from_the_random_state(fresh: Fresh, what: str, tmp_path: Path) -> None:
    session = fresh()
    file = save_trained(session, founder(), tmp_path / "one.pt")
    before = session.state()
    for split in ("validation", "test"):
        if what == "a file":
            session.evaluate_file(file, split)
        else:
            session.evaluate(split)
    assert differences(before["rng"], session.state()["rng"]) == []


def test_evaluation_gives_the_same_metrics_again_in_another_session(fresh: Fresh, tmp_path: Path) -> None:
    session = fresh()
    result = train(session, founder())
    file = save(session, tmp_path / "one.pt")
    again = fresh().evaluate_file(file, "validation")
    assert again == {name: value for name, value in result.results[0].metrics.items() if name != "train_loss"}


# --- exported, damaged, or not checkpoints


def test_an_export_holds_only_the_weights(fresh: Fresh, tmp_path: Path) -> None:
    session = fresh()
    file = save_trained(session, founder(), tmp_path / "one.pt")
    with (tmp_path / "weights.pt").open("wb") as target:
        export(file, target)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    session.job.model().load_state_dict(weights)
    assert differences(weights, session.state()["model"]) == []


class RunsCode:
    """Creates a file when it is unpickled without weights_only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickle_alone(content: Any, target: IO[bytes]) -> None:
    pickle.dump(content, target, protocol=2)  # torch.load starts to read files with this protocol


@pytest.mark.parametrize("write", [torch.save, pickle_alone], ids=["as torch saves", "as pickle alone writes"])
def test_a_file_that_would_run_code_is_refused_without_running_it(write: Callable[..., None], tmp_path: Path) -> None:
    with (tmp_path / "bad.pt").open("wb") as target:
        write({"format": 2, "model": RunsCode(tmp_path / "it ran")}, target)
    with pytest.raises(JobError, match=r"bad\.pt: not a checkpoint of format 2: .*orch executes no code from files"):
        read(tmp_path / "bad.pt")
    assert not (tmp_path / "it ran").exists()
    if write is pickle_alone:
        pickle.loads((tmp_path / "bad.pt").read_bytes())
        assert (tmp_path / "it ran").exists()  # so reading the file without protection would have run the code


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns about pickle protocols that it does not use
@hypothesis_settings(deadline=None)
@given(content=st.binary(max_size=200) | st.binary(max_size=100).map(lambda rest: b"\x80\x02" + rest))
def test_arbitrary_bytes_are_an_error_that_names_the_file(content: bytes, tmp_path_factory: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "noise.pt"
    file.write_bytes(content)
    with pytest.raises(JobError, match=r"noise\.pt: not a checkpoint of format 2: "):
        read(file)


def test_a_file_truncated_anywhere_is_an_error(tmp_path: Path) -> None:
    whole = save_trained(digits_session(), founder(), tmp_path / "whole.pt").read_bytes()
    for size in [0, 1, 4, 30, *range(100, len(whole), len(whole) // 50), len(whole) - 1]:
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(JobError, match=r"cut\.pt: not a checkpoint of format 2: it is damaged"):
            read(tmp_path / "cut.pt")


def test_a_missing_file_is_the_systems_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        read(tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param({"model": {}}, "it names no format", id="no format"),
        pytest.param({"format": 3, "model": {}}, "its format is 3", id="a later format"),
        pytest.param([1], "it names no format", id="no state"),
    ],
)
def test_a_file_of_another_format_is_an_error_that_names_it(content: Any, problem: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(JobError, match=rf"other\.pt: not a checkpoint of format 2: {problem}$"):
        read(tmp_path / "other.pt")


def test_all_tensors_are_read_to_the_cpu(tmp_path: Path) -> None:
    """An optimizer's step count and the random states belong on the CPU, even if the model is on a GPU."""
    state = read(save_trained(digits_session(), founder(), tmp_path / "one.pt"))
    tensors = [*state["model"].values(), *momentum(state), state["rng"]["torch"]]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
