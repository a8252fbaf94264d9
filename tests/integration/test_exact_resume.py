"""Training that is interrupted at any step of any chunk and resumed in another process equals uninterrupted training,
bit for bit: weights, buffers, optimizer, random states, metrics, and the order of the data."""

from __future__ import annotations

import ast
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from jobs.errors import JobError
from jobs.training.states import read
from jobs.verify_resume import link as link_module
from jobs.verify_resume.check import Verdict, as_json, in_fresh_process, verify
from jobs.verify_resume.exactness import count_tensors, differences
from jobs.verify_resume.link import NO_STOP, RecordingSession, Trial, break_points, train_link, write_plan
from orchestrator.cli.main import main
from orchestrator.settings.settings import Settings

CHUNKS, EPOCHS, STEPS = 3, 2, 3  # an epoch has 3 steps: 40 training examples in batches of 16
PER_CHUNK = EPOCHS * STEPS
TOTAL = CHUNKS * PER_CHUNK

SETTINGS: dict[str, Any] = {
    "name": "resume",
    "job": "tests.support.resume_jobs:Noisy",
    "job_params": {"width": 2},
    "cores_per_worker": 1,
    "max_batch_size": 16,
    "validation_fraction": 0.2,
    "deterministic": True,
    "training_profiles": [
        {"name": "fast", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.0005},
        {"name": "fine", "learning_rate": 0.01, "momentum": 0.5, "weight_decay": 0.01},
        {"name": "plain", "learning_rate": 0.02, "momentum": 0.0},
    ],
}


def plan_for(job: str = "Noisy", chunks: int = CHUNKS, interruptions: int = 4, **changes: Any) -> Trial:
    named = job if ":" in job else f"tests.support.resume_jobs:{job}"
    given = SETTINGS | {"job": named} | changes
    return Trial(
        settings=Settings.model_validate(given),
        import_paths=[],
        cores=1,
        device="cpu",
        chunks=chunks,
        epochs_per_chunk=EPOCHS,
        steps_per_epoch=STEPS,
        interruptions=interruptions,
    )


ONE_CYCLE = [
    {"name": "one", "learning_rate": 0.01, "optimizer": "AdamW", "schedule": {"name": "OneCycleLR", "epochs": 4}}
]


def scramble(seed: int) -> None:
    """Change the random states, because a new process has other ones."""
    random.seed(seed)
    random.gauss(0, 1)  # Python and NumPy draw two numbers at a time and keep the second one
    np.random.seed(seed)
    np.random.normal()
    torch.manual_seed(seed)


def link(
    plan: Trial, folder: Path, start: int, stop: int | None, snapshots: Collection[int] = (), seed: int | None = None
) -> dict[str, Any]:
    """Run a link in this process as in a fresh process: with a new Session, a new job and other random states."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    scramble(1000 + start if seed is None else seed)
    session = RecordingSession(plan, torch.device("cpu"))
    trained = train_link(session, plan, folder, start, stop, snapshots)
    return trained | {"seen": session.job.__dict__["seen"]}


class Reference:
    """Training that was never interrupted, with its state before every step."""

    def __init__(self, folder: Path) -> None:
        self.plan, self.folder = plan_for(), folder
        self.trained = link(self.plan, folder, 0, None, snapshots=range(TOTAL))
        self.states = {steps: whole(folder / f"{steps}.pt") for steps in range(1, TOTAL + 1)}

    def check(self, folder: Path, links: list[dict[str, Any]], stops: list[int]) -> None:
        for stop in stops:
            assert list(differences(self.states[stop], whole(folder / f"{stop}.pt"))) == []
        for what in ("seen", "batches"):
            assert [one for trained in links for one in trained[what]] == self.trained[what]
        assert {end: each for trained in links for end, each in trained["metrics"].items()} == self.trained["metrics"]


def whole(file: Path) -> dict[str, Any]:
    return {key: value for key, value in read(file).items() if key != "cut"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"))


def test_each_step_of_the_compared_training_changes_the_whole_state(reference: Reference) -> None:
    """The other tests rely on it: each step changes the weights, buffers, momentum and every random state."""
    assert len(reference.trained["batches"]) == len(set(reference.trained["batches"])) == TOTAL
    epochs = [reference.trained["seen"][at : at + STEPS] for at in range(0, TOTAL, STEPS)]
    assert {tuple(sorted(chain.from_iterable(epoch))) for epoch in epochs} == {tuple(sorted(chain(*epochs[0])))}
    assert len({str(epoch) for epoch in epochs}) == TOTAL // STEPS
    assert list(reference.trained["metrics"]) == [str(end) for end in range(STEPS, TOTAL + 1, STEPS)]
    for steps in range(1, TOTAL):
        changed = {d.path for d in differences(reference.states[steps], reference.states[steps + 1])}
        assert {"model.0.weight", "model.1.running_mean", "model.1.num_batches_tracked"} <= changed
        assert ("optimizer.state[0].momentum_buffer" in changed) is (steps < 2 * PER_CHUNK)  # "plain" has no momentum
        assert "rng.torch" in changed
        assert any(path.startswith("rng.python") for path in changed)
        assert any(path.startswith("rng.numpy") for path in changed)
    rates = [reference.states[PER_CHUNK * (chunk + 1)]["optimizer"]["param_groups"][0]["lr"] for chunk in range(CHUNKS)]
    assert rates == [0.05, 0.01, 0.02]
    assert count_tensors(reference.states[1]) == 2 * 8 + 3 + 2  # weights and momentum; buffers; random states


@pytest.mark.parametrize("stop", range(1, TOTAL), ids=lambda stop: f"after {stop} steps")
def test_training_interrupted_at_any_one_step_equals_the_uninterrupted_one(
    reference: Reference, stop: int, tmp_path: Path
) -> None:
    links = [link(reference.plan, tmp_path, 0, stop), link(reference.plan, tmp_path, stop, None)]
    reference.check(tmp_path, links, [stop, TOTAL])


def test_training_interrupted_before_every_step_equals_the_uninterrupted_one(
    reference: Reference, tmp_path: Path
) -> None:
    links = [link(reference.plan, tmp_path, step, step + 1) for step in range(TOTAL)]
    reference.check(tmp_path, links, list(range(1, TOTAL + 1)))


@hypothesis_settings(max_examples=8, deadline=None)
@given(stops=st.sets(st.integers(1, TOTAL - 1), max_size=6), seed=st.integers(0, 2**32 - 1))
def test_training_interrupted_at_several_steps_equals_the_uninterrupted_one(
    reference: Reference, stops: set[int], seed: int
) -> None:
    marks = [0, *sorted(stops), TOTAL]
    with tempfile.TemporaryDirectory() as folder:
        links = [link(reference.plan, Path(folder), *ends, seed=seed) for ends in pairwise(marks)]
        reference.check(Path(folder), links, marks[1:])


# --- where to interrupt


def test_interruptions_come_first_where_they_matter_most() -> None:
    telling = {1: [2], 2: [2, 8], 3: [2, 8, 15], 4: [2, 8, 12, 15], 6: [2, 5, 8, 10, 12, 15]}
    assert {wanted: break_points([[4, 8], [12, 16]], wanted) for wanted in telling} == telling


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(1, 60))
def test_there_are_as_many_interruptions_as_wanted_all_inside_the_training(
    steps: int, epochs: int, chunks: int, wanted: int
) -> None:
    ends = [[steps * (chunk * epochs + epoch) for epoch in range(1, epochs + 1)] for chunk in range(chunks)]
    points = break_points(ends, wanted)
    assert points == sorted(set(points))
    assert len(points) == min(wanted, steps * epochs * chunks - 1)
    assert all(0 < point < steps * epochs * chunks for point in points)


# --- the verdict, with links in this process


def in_this_process(plan: Trial, root: Path, name: str, start: int, stop: int | None) -> dict[str, Any]:
    scramble(7 + start)
    torch.use_deterministic_algorithms(False)  # as in a fresh process
    link_module.main(root, name, start, NO_STOP if stop is None else stop)
    result: dict[str, Any] = json.loads((root / "link.json").read_text())
    if "error" in result:
        raise JobError(result["error"])
    return result


def verdict_on(job: str, chunks: int = 2, **changes: Any) -> Verdict:
    return verify(plan_for(job, chunks=chunks, **changes), lambda _line: None, in_this_process)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(plan_for(), id="noisy pictures"),
        pytest.param(plan_for("BufferedCounter"), id="a counter that is a buffer of the model"),
        pytest.param(plan_for("ExtraState"), id="a counter in a module's extra state"),
        pytest.param(plan_for("WithAdam"), id="an optimizer that counts its steps"),
        pytest.param(plan_for("jobs.digits:Digits", deterministic=False), id="the digits, deterministic mode off"),
        pytest.param(plan_for("jobs.digits:Digits", max_batch_size=1, chunks=1), id="batches of one"),
        pytest.param(plan_for(select_on="test"), id="selection on the test set"),
        pytest.param(plan_for("RandomSubset"), id="data that are drawn when they are loaded"),
        pytest.param(plan_for("Averaged"), id="an average of the weights"),
        pytest.param(plan_for(precision="bf16"), id="bf16"),
        pytest.param(plan_for("Averaged", precision="fp16", training_profiles=ONE_CYCLE), id="fp16, AdamW, one cycle"),
    ],
)
def test_a_job_whose_checkpoint_is_complete_is_exact(plan: Trial) -> None:
    lines: list[str] = []
    verdict = verify(plan, lines.append, in_this_process)
    assert verdict.exact
    assert verdict.advice == []
    assert verdict.steps == STEPS * EPOCHS * plan.chunks
    assert verdict.batches_compared == verdict.steps
    assert verdict.states_compared == len({*verdict.interrupted_after, *range(PER_CHUNK, verdict.steps + 1, PER_CHUNK)})
    assert verdict.tensors_compared % verdict.states_compared == 0
    assert len(lines) == len(verdict.interrupted_after) + 2


@pytest.mark.parametrize(
    ("job", "first", "at", "batch", "parts", "cause"),
    [
        pytest.param(
            "OwnGenerator", "model.0.weight", (2, 6), None, ["model", "optimizer"], "kept outside the model",
            id="a generator in the job",
        ),
        pytest.param(
            "OwnCounter", "model.1.0.weight", (2, 6), None, ["model", "optimizer"], r"a buffer with persistent=False",
            id="a counter that is not in state_dict",
        ),
        pytest.param(
            "OwnAugmentation", "model.0.weight", (2, 6), 3, ["model", "optimizer"], "from step 3 on the batches differ",
            id="an augmentation with a counter of its own",
        ),
        pytest.param(
            "OwnMetric", "metrics[0].asked", (6, 9), None, ["metrics"], "the states are the same, the metrics are not",
            id="a metric that remembers",
        ),
    ],
)  # fmt: skip
def test_a_job_with_state_outside_its_checkpoint_is_inexact_and_the_first_difference_named(
    job: str, first: str, at: tuple[int, int], batch: int | None, parts: list[str], cause: str
) -> None:
    verdict = verdict_on(job)
    assert verdict.inexact is not None
    assert verdict.inexact.first.path == first
    assert verdict.inexact.first.kind == "value"
    assert verdict.inexact.first.max_abs_difference > 0
    assert verdict.inexact.largest >= verdict.inexact.first.max_abs_difference
    assert (verdict.inexact.interrupted_after, verdict.inexact.found_after) == at
    assert verdict.inexact.first_batch == batch
    assert set(parts) <= set(verdict.inexact.parts)
    assert [cause in line for line in verdict.advice] == [True]


def test_a_difference_before_any_interruption_is_reported_as_such() -> None:
    verdict = verdict_on("FromTheClock")
    assert verdict.inexact is not None
    assert verdict.inexact.first.path == "model.0.weight"
    assert (verdict.inexact.interrupted_after, verdict.inexact.found_after) == (None, 2)
    assert ["two processes that train from the start differ" in line for line in verdict.advice] == [True]


def test_with_deterministic_mode_off_a_difference_is_reported_with_that_as_a_cause() -> None:
    verdict = verdict_on("OwnGenerator", deterministic=False)
    assert not verdict.exact
    assert verdict.inexact is not None
    assert verdict.inexact.largest > 0
    assert ["deterministic mode is off" in line for line in verdict.advice] == [True, False]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        pytest.param(
            "NoDeterministicKernel",
            r'^job .*:NoDeterministicKernel: put_ has no deterministic implementation .* "deterministic": true\.',
            id="an operation that has no deterministic implementation",
        ),
        pytest.param("Exploding", "^the loss is infinite or NaN after 3 steps under the profile 'fast'", id="no loss"),
        pytest.param("Failing", r"^job .*:Failing: ValueError: no loss today$", id="an error of the job's own"),
        pytest.param(
            "AnotherLength", r"data\('train'\) does not have the same length .*: an epoch had 3", id="other data"
        ),
        pytest.param("Nobody", r"has no class Nobody$", id="no such class"),
    ],
)
def test_a_job_that_cannot_be_trained_is_one_clear_error(job: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        verdict_on(job)


def test_an_operation_without_deterministic_kernel_is_allowed_with_deterministic_mode_off() -> None:
    assert verdict_on("NoDeterministicKernel", chunks=1, deterministic=False).exact


def test_a_missing_gpu_is_an_error_that_says_what_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(JobError, match=r"^--device cuda: torch sees no GPU here; .* --device cpu$"):
        verify(replace(plan_for(), device="cuda"), lambda _line: None, in_this_process)


def test_the_temporary_folder_is_removed_after_success_and_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert verdict_on("Noisy", chunks=1).exact
    with pytest.raises(JobError):
        verdict_on("Failing")
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_folder_without_room_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "2.pt").symlink_to("/dev/full")
    with pytest.raises(
        JobError, match=r"^the state can't be written to /.*\. That folder needs room for a few checkpoints; "
    ):
        link(plan_for(), tmp_path, 0, 2)


def test_an_infinite_difference_is_null_in_json() -> None:
    verdict = verdict_on("OwnGenerator")
    assert verdict.inexact is not None
    inexact = replace(verdict.inexact, first=replace(verdict.inexact.first, max_abs_difference=float("inf")))
    report = as_json(replace(verdict, inexact=inexact))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["exact"] is False
    assert report["inexact"]["first"]["max_abs_difference"] is None


def test_a_killed_process_is_an_error_that_names_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    write_plan(plan_for(), tmp_path)
    with pytest.raises(JobError, match=r"its process was killed by SIGKILL while it trained from step 4 on"):
        in_fresh_process(plan_for(), tmp_path, "resumed", 4, 6)


# --- the command, with real processes

Verify = Callable[..., tuple[int, str, str]]


@pytest.fixture
def verify_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Verify:
    """Runs `orch verify-resume` in a new folder. Returns its exit code, its output and its error output."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "work").mkdir()
    shutil.copy(Path(__file__).parents[2] / "tests" / "support" / "resume_jobs.py", tmp_path / "work" / "mine.py")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def run(*arguments: str, **changes: Any) -> tuple[int, str, str]:
        Path("settings.json").write_text(json.dumps(SETTINGS | {"job": "mine:Noisy"} | changes))
        sys.modules.pop("mine", None)
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["orch", "verify-resume", "settings.json", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        sys.modules.pop("mine", None)
        left = {path.name for path in (tmp_path / "work").iterdir()} - {
            "__pycache__",
            "mine.py",
            "settings.json",
            "trace",
        }
        assert left == set()
        assert list((tmp_path / "temporary").iterdir()) == []
        return (int(end.value.code or 0), *capfd.readouterr())

    return run


def test_a_users_own_job_is_exact_when_fresh_processes_resume_it(verify_resume: Verify) -> None:
    code, out, err = verify_resume(
        *("--json", "--steps", "3", "--interruptions", "1", "--device", "cpu"),
        job_params={"width": 2, "trace": "trace"},
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["exact"] is True
    assert report["inexact"] is None
    assert (report["job"], report["device"], report["threads"]) == ("mine:Noisy", "cpu", 1)
    assert (report["steps"], report["interrupted_after"]) == (12, [2])
    assert (report["states_compared"], report["tensors_compared"], report["batches_compared"]) == (3, 63, 12)
    assert "resume_jobs says hello" in err
    assert "steps 3 to 12 in a fresh process are the same" in err

    order = [ast.literal_eval(line) for line in Path("trace").read_text().splitlines()]
    assert len(order) == 24
    assert order[:12] == order[12:]


def test_a_users_own_module_with_a_generator_of_its_own_is_not_exact(verify_resume: Verify) -> None:
    code, out, err = verify_resume(
        *("--steps", "2", "--chunks", "1", "--interruptions", "1", "--set", "job=mine:ModuleGenerator")
    )
    assert code == 1, err
    lines = out.splitlines()
    assert lines[0] == "NOT EXACT: mine:ModuleGenerator, 4 steps in 1 chunks"
    assert "  interrupted after steps: 1" in lines
    assert any(line.startswith("  first difference: model.0.weight (value): expected ") for line in lines)
    assert "  found: in the state after 4 steps, resumed after step 1" in lines
    assert "  batches: all the same" in lines
    assert "hello" not in out


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        pytest.param(
            [], {"deterministc": True}, "deterministc: unknown key; did you mean 'deterministic'?", id="a typo"
        ),
        pytest.param([], {"job": "nowhere:Job"}, "job nowhere:Job: nowhere can't be imported", id="no such module"),
        pytest.param(["--set", "job=mine:Nobody"], {}, "job mine:Nobody: mine has no class Nobody", id="no such class"),
        pytest.param([], {"job_params": {"width": 0}}, "job_params: width: 0 is not allowed", id="a bad parameter"),
        pytest.param(
            [],
            {"job": "jobs.alexnet:AlexNet", "job_params": {}, "training_source_dir": "gone"},
            "/work/gone is not a folder",
            id="no data",
        ),
        pytest.param(
            ["--set", "job=tests.integration.test_exact_resume:OwnTrainer"],
            {},
            "uses its own trainer",
            id="not a Job",
        ),
    ],
)
def test_a_mistake_is_one_error_and_exit_code_2(
    verify_resume: Verify, arguments: list[str], changes: dict[str, Any], message: str
) -> None:
    code, out, err = verify_resume(*arguments, **changes)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("orch: ")]
    assert message in line


class OwnTrainer:
    """A job class that does not derive from Job."""

    @staticmethod
    def open_trainer(settings: Settings, cores: int) -> Any:
        raise NotImplementedError
