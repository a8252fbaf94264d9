"""Any output of Slurm's commands can be read, or counts as no answer. It never makes a live job count as gone."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.cluster import slurm
from orchestrator.cluster.live_jobs import slurm_jobs
from orchestrator.cluster.probe import ProbeJob
from orchestrator.cluster.slurm import GONE, WAITING, WORKING, SlurmQueue, judge, queue, read_queue, run_slurm
from orchestrator.doctor import limits, slurm_facts
from orchestrator.doctor.partition import max_minutes, need_of, read_config, read_nodes, read_pairs
from orchestrator.records import ChainJob, Evidence, JobState
from orchestrator.settings.settings import Settings
from orchestrator.worker.job_main import job_main
from tests.support.fuzzing import ODD_TEXT, examples

BASE = "0123456789abcdef"
SETTINGS = Settings.model_validate(
    {"name": "run", "training_profiles": [{"name": "a", "learning_rate": 0.1}], "executor": "slurm"}
)


def job(cluster_id: str = "7_0") -> ChainJob:
    return ChainJob(job_id=1, worker_id=0, link=0, token=f"{BASE}-0", state=JobState.RUNNING, cluster_id=cluster_id)


states = st.sampled_from(sorted(GONE | WORKING | WAITING | {"COMPLETING", "REVOKED", "NEW_IN_SLURM_99", "RUNNI", ""}))
words = st.sampled_from(ODD_TEXT) | st.text(max_size=15) | st.text(string.printable, max_size=15) | states
good_lines = st.builds(
    lambda number, state, name: f"{number}|{state}|N/A|{name}",
    st.sampled_from(["1", "7_0", "7_1", "8_[2-9%3]", "9+1"]),
    states.filter(bool),
    st.sampled_from(["sbatch", "a|b|c", f"orch-run-{BASE}", f"orch-run-{BASE[::-1]}", "ü", ""]),
)
lines = good_lines | words | st.lists(words, max_size=6).map("|".join)
answers = st.lists(lines, max_size=5).map("\n".join) | st.builds(
    lambda found, end: "".join(f"{line}\n" for line in found) + end, st.lists(lines, max_size=5), words
)
ALIVE = f"7_0|RUNNING|2026-01-01T00:00:00|orch-run-{BASE}\n"


def evidence_in(answer: str) -> Evidence:
    listed = read_queue(answer)
    return Evidence.UNKNOWN if listed is None else judge(job(), listed.get("7_0"), 1.0)


@examples(400)
@given(before=st.lists(good_lines.filter(lambda line: not line.startswith("7_0"))), cut=st.integers(0, 60))
def test_an_incomplete_listing_proves_nothing_about_a_live_job(before: list[str], cut: int) -> None:
    whole = "".join(f"{line}\n" for line in before) + ALIVE
    assert evidence_in(whole) is Evidence.RUNNING
    broken = whole[: max(0, len(whole) - 1 - cut)]
    if broken and not broken.endswith("\n"):  # output cut between two lines is known only by squeue's exit code
        assert evidence_in(broken) is Evidence.UNKNOWN


@examples(400)
@given(answer=answers)
@example("slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n")
@example("CLUSTER: other\n")
@example("7_0|RUNNING|N/A\n")
@example("7_0\n")
@example("\n")
def test_a_job_is_gone_only_if_every_line_could_be_read(answer: str) -> None:
    listed = read_queue(answer)
    if listed is None:
        return
    assert answer == "" or answer.endswith("\n")
    assert all(line.count("|") >= 3 and line[0].isdigit() for line in answer.split("\n")[:-1])
    assert len(listed) == len({line.split("|")[0] for line in answer.split("\n")[:-1]})


@examples(200)
@given(garbage=lines, place=st.booleans())
def test_one_unreadable_line_makes_the_whole_listing_prove_nothing(garbage: str, place: bool) -> None:
    """The unreadable line may be that of the job in question."""
    if read_queue(f"{garbage}\n") is not None:
        return
    other = "1|RUNNING|N/A|sbatch"
    assert evidence_in(f"{garbage}\n{other}\n" if place else f"{other}\n{garbage}\n") is Evidence.UNKNOWN


@pytest.mark.parametrize("state", ["REVOKED", "NEW_IN_SLURM_99", "RUNNI"])
def test_a_state_that_orch_does_not_know_proves_nothing(state: str) -> None:
    assert evidence_in(f"7_0|{state}|N/A|orch-run-{BASE}\n") is Evidence.UNKNOWN


@pytest.mark.parametrize("first", [True, False])
def test_a_job_that_one_cluster_of_a_federation_revoked_runs_on_another(first: bool) -> None:
    mine, other = ALIVE, f"7_0|CANCELLED|N/A|orch-run-{BASE}\n"
    assert evidence_in(mine + other if first else other + mine) is Evidence.RUNNING


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replaces a Slurm command by a script."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return write


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2", id="an error, and exit code 0"
        ),
        pytest.param(
            "echo 'slurm_load_jobs error: Protocol error' >&2; echo '1|RUNNING|N/A|x'", id="and some of the jobs"
        ),
        pytest.param("echo 'squeue: error: Connection refused' >&2", id="no connection, and exit code 0"),
        pytest.param("printf '1|RUNNING|N/A|orch-run'", id="a line without its end"),
        pytest.param("exit 1", id="a failure"),
    ],
)
def test_no_answer_from_slurm_proves_nothing_about_jobs(command, script: str) -> None:
    command("squeue", script)
    assert queue() is None
    assert SlurmQueue(SETTINGS, Path("/run"), job_main).evidence([job()]) == {1: Evidence.UNKNOWN}
    assert slurm_jobs("run", Path("/run")) is None
    assert not ProbeJob("1").state().over


def test_names_of_other_jobs_in_any_encoding_do_not_hide_a_job(command) -> None:
    command("squeue", r"printf '1|RUNNING|N/A|caf\351\r\302\205\013\n7_0|RUNNING|N/A|orch-run-" + BASE + r"\n'")
    assert SlurmQueue(SETTINGS, Path("/run"), job_main).evidence([job()]) == {1: Evidence.RUNNING}


@pytest.mark.parametrize(
    "name", ["SQUEUE_PARTITION", "SQUEUE_STATES", "SLURM_TIME_FORMAT", "SACCT_FORMAT", "SCANCEL_STATE"]
)
def test_the_users_own_filters_do_not_hide_jobs(command, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "something")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    command("squeue", "env")
    shown = run_slurm(["squeue"]) or ""
    assert f"{name}=" not in shown
    assert "SLURM_CONF=/etc/slurm.conf" in shown


def test_jobs_in_hidden_partitions_are_asked_for_too(command) -> None:
    command("squeue", 'case " $* " in *" --all "*) echo "7_0|RUNNING|N/A|orch-run-' + BASE + '";; esac')
    assert SlurmQueue(SETTINGS, Path("/run"), job_main).evidence([job()]) == {1: Evidence.RUNNING}


@examples(300)
@given(answer=answers | st.none())
@example(f"7_0|FAILED|1:0|orch-a|b-{BASE}\n")
@example("7_0\n7_0|\n7_0||||\n")
def test_any_answer_of_sacct_gives_endings_or_none(answer: str | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm, "run_slurm", lambda _command: answer)
        patch.setattr(slurm.shutil, "which", lambda name: name)
        endings = SlurmQueue(SETTINGS, Path("/run"), job_main).endings([job()])
    assert all(isinstance(ending, str) and ending for ending in endings.values())
    if answer is not None and answer.startswith("7_0|FAILED|1:0|orch-a|b"):
        assert endings == {1: "FAILED (1:0)"}


@examples(300)
@given(answer=answers, listed=st.booleans())
def test_any_answer_leaves_the_doctors_job_in_some_state(answer: str, listed: bool) -> None:
    answer = f"{answer}\n123|RUNNING|None\n" if listed else answer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.cluster.probe.run_slurm", lambda _command: answer)
        state = ProbeJob("123").state()
    assert not (listed and state.over)


pairs = st.builds(
    lambda key, value: f"{key}={value}", st.sampled_from(["PartitionName", "MaxTime", "Default"]) | words, words
)


@examples(400)
@given(
    text=answers | st.lists(pairs, max_size=4).map(" ".join),
    size=words | st.sampled_from(["9" * 400 + "K", "²", "a100:²"]),
)
def test_any_output_of_the_commands_that_the_doctor_gives_is_read(text: str, size: str) -> None:
    nodes = read_nodes(text)
    assert all(node.cpus >= 0 for node in nodes)
    assert all(isinstance(value, str) for value in (read_config(text) | read_pairs(text)).values())
    max_minutes(read_pairs(text))
    max_minutes({"MaxTime": size})
    assert all(set(row) == {"a", "b"} for row in limits.rows(text, ("a", "b")))
    limits.number(size)
    asked = slurm.Request({"mem": size, "gres": size, "cpus-per-task": size, "gpus-per-node": size}, 1, 1, ())
    need_of(asked, 2)


@examples(100)
@given(answer=answers, partitions=st.lists(pairs, max_size=4).map(" ".join))
def test_the_doctor_takes_any_answer_of_any_command(answer: str, partitions: str) -> None:
    def printed(command: list[str]) -> str:
        if command[-1] == "config":
            return "ClusterName = c\nAccountingStorageType = accounting_storage/slurmdbd\n"
        return partitions if command[-1] == "partition" else answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm_facts, "run_slurm", printed)
        patch.setattr(slurm_facts, "ask_sbatch", lambda _script: slurm_facts.Answer(False, answer))
        patch.setattr(slurm_facts, "job_names", lambda: None)
        patch.setattr(slurm_facts.shutil, "which", lambda name: name)
        patch.setattr(SlurmQueue, "script", lambda _self, _jobs: "")
        facts = slurm_facts.ask_slurm(SlurmQueue(SETTINGS, Path("/run"), job_main), "run", 2)
    assert facts.accounting is not None
    limits.judge_submission(limits.submit_limits(facts.accounting), 2, facts.others, True)
    limits.judge_running(facts.accounting, 2, 1, True)
