"""A worker with two processes gives the same results as a worker with one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.training.distributed import dismiss
from jobs.training.states import read
from orchestrator.profile import GradientClip
from orchestrator.settings.settings import Settings
from tests.support.distributed_jobs import (
    FAST,
    STEPS,
    Dicts,
    Noisy,
    Odd,
    Team,
    Together,
    Watched,
    alone,
    assert_close,
    check_equal,
    founder,
    interrupt,
    metrics,
    saved,
    settings,
    team_of,
    train,
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Two processes for many tests: each opens its own job."""
    with team_of(2, tmp_path_factory.mktemp("two")) as team:
        yield team
        dismiss(team.ranks)
        assert team.endings() == [(0, "stopped by rank 0")]
        assert not team.failed


def test_an_epoch_of_two_processes_equals_one_of_a_single_process(two: Team, tmp_path: Path) -> None:
    check_equal(two, settings(), tmp_path, epochs=2)


def test_two_processes_augment_as_a_single_process_does(two: Team, tmp_path: Path) -> None:
    check_equal(two, settings(Noisy), tmp_path)


@pytest.mark.parametrize("size", [230, 383], ids=["one example, which joins the batch before", "two examples"])
def test_a_small_last_batch_is_trained_as_by_a_single_process(two: Team, size: int, tmp_path: Path) -> None:
    check_equal(two, settings(max_batch_size=size), tmp_path)  # of 1151 examples


def test_two_processes_accumulate_and_clip_as_a_single_process_does(two: Team, tmp_path: Path) -> None:
    """Each batch has 7 examples, and each step 4 batches."""
    profile = replace(FAST, batch_size=7, accumulate=4, gradient_clip=GradientClip(norm=0.1))
    check_equal(two, settings(), tmp_path, profile=profile)


def test_unequal_parts_are_weighted_by_their_size(two: Team, tmp_path: Path) -> None:
    """Each batch has 3 examples: one process gets 1, the other gets 2."""
    given = settings(max_batch_size=3)
    states = [interrupt(s, founder(), 12, tmp_path / "cut.pt") for s in (alone(given), two.open(given))]
    assert_close(*states)
    assert states[1]["cut"]["loss_sum"] == pytest.approx(states[0]["cut"]["loss_sum"], abs=1e-4)


def test_the_parts_of_a_step_make_up_its_batch_in_order(two: Team, tmp_path: Path) -> None:
    def steps(folder: Path, session: Callable[[Settings], Any], *names: str) -> list[list[list[int]]]:
        folder.mkdir()
        train(session(settings(job_params={"seen": str(folder)})), founder())
        return [[json.loads(line) for line in (folder / name).read_text().splitlines()] for name in names]

    (whole,) = steps(tmp_path / "one", alone, "rank-0")
    first, second = steps(tmp_path / "all", two.open, "rank-0", "rank-1")
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert [len(a) for a in first] == [100] * 5 + [75]
    assert [len(b) for b in second] == [100] * 5 + [76]


def test_batches_of_any_structure_are_shared_and_the_average_is_the_same(two: Team, tmp_path: Path) -> None:
    check_equal(two, settings(Dicts), tmp_path, epochs=2)
    assert read(tmp_path / "all.pt")["average"]["updates"] == 2 * STEPS


def test_all_processes_run_a_jobs_own_loop(two: Team, tmp_path: Path) -> None:
    session = two.open(settings(Together))
    result = train(session, founder(epochs=2))
    assert [epoch["accuracy"] for epoch in metrics(result)] == pytest.approx([0.3, 0.3])
    assert saved(session, tmp_path / "x.pt")["own"] == {"ranks": 2}
    interrupt(session, founder(epochs=2), 1, tmp_path / "cut.pt")
    assert len(train(session, replace(founder(epochs=2), suspended=tmp_path / "cut.pt")).results) == 2


def test_a_layer_that_only_one_process_uses_is_trained_and_an_unused_one_is_not(two: Team, tmp_path: Path) -> None:
    """The model uses `sometimes` for a part of 75 examples. Only rank 0 has one, in the last batch (151 examples)."""
    session = two.open(settings(Odd))
    start = interrupt(session, founder(), 0, tmp_path / "start.pt")["model"]
    cut = interrupt(session, founder(), STEPS - 1, tmp_path / "cut.pt")
    train(session, replace(founder(), suspended=tmp_path / "cut.pt"))
    end = saved(session, tmp_path / "end.pt")
    assert torch.equal(end["model"]["unused.weight"], start["unused.weight"])
    assert torch.equal(cut["model"]["sometimes.weight"], start["sometimes.weight"])
    assert not torch.equal(end["model"]["sometimes.weight"], start["sometimes.weight"])
    assert sum(bool(state["momentum_buffer"].any()) for state in end["optimizer"]["state"].values()) == 4


def test_the_scored_model_is_the_saved_one(two: Team, tmp_path: Path) -> None:
    """On a CPU, batch normalisation uses each part of a batch separately, so the processes' statistics differ."""
    given = settings(Odd, job_params={"normalise": True}, max_batch_size=100)
    session = two.open(given)
    result = train(session, founder())
    saved(session, tmp_path / "one.pt")
    again = alone(given).evaluate_file(tmp_path / "one.pt", "validation")
    assert {name: result.results[0].metrics[name] for name in again} == pytest.approx(again)


# --- interruptions


@pytest.mark.parametrize("steps", [0, 2, STEPS, 2 * STEPS - 1])
def test_an_interrupted_chunk_with_dropout_equals_the_uninterrupted_one(two: Team, steps: int, tmp_path: Path) -> None:
    given = settings(Watched, job_params={"seen": str(tmp_path)})
    session = two.open(given)
    expected = train(session, founder(epochs=2))
    whole = saved(session, tmp_path / "whole.pt")

    interrupt(two.open(given), founder(epochs=2), steps, tmp_path / "cut.pt")
    later = two.open(given)
    result = train(later, replace(founder(epochs=2), suspended=tmp_path / "cut.pt"))
    resumed = saved(later, tmp_path / "resumed.pt")

    for part in ("model", "optimizer"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
    assert torch.equal(resumed["rng"]["torch"], whole["rng"]["torch"])
    assert metrics(result) == metrics(expected)


def test_all_processes_stop_at_the_same_step(two: Team, tmp_path: Path) -> None:
    session = two.open(settings(job_params={"seen": str(tmp_path)}))
    for steps in (3, 1):
        interrupt(session, founder(), steps, tmp_path / "cut.pt")
        parts = [(tmp_path / name).read_text().splitlines() for name in ("rank-0", "rank-1")]
        assert [len(part) for part in parts] == [steps, steps]
        for name in ("rank-0", "rank-1"):
            (tmp_path / name).unlink()


def test_a_child_continues_from_the_parent_that_rank_0_reads(two: Team, tmp_path: Path) -> None:
    given = settings()
    parent = alone(given)
    train(parent, founder())
    saved(parent, tmp_path / "parent.pt")
    work = replace(founder(), parent=tmp_path / "parent.pt", repeat=1)
    children = []
    for session in (alone(given), two.open(given)):
        train(session, work)
        children.append(saved(session, tmp_path / "child.pt"))
    assert_close(*children)
