"""Any settings file and any --set gives settings that can be stored and used, or a SettingsError that says where."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import submitit
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli.launch import _print_plan
from orchestrator.cluster.sbatch import read_script, request
from orchestrator.cluster.slurm import SlurmQueue
from orchestrator.doctor.partition import need_of
from orchestrator.errors import SettingsError
from orchestrator.files import disk_budget
from orchestrator.messages import iso
from orchestrator.profile import Profile
from orchestrator.settings.loading import AMENDABLE, amend, difference, freeze, load, thaw
from orchestrator.settings.settings import Settings, SlurmSettings
from orchestrator.worker.job_main import job_main
from tests.support.fuzzing import ODD_TEXT, SECRET, VERBATIM, examples, json_values, mutate, odd_scalars, to_json

FOLDER = Path(__file__).resolve().parents[2] / "settings"
BASES = [json.loads((FOLDER / f"{name}.json").read_text()) for name in ("part1", "part3", "digits")]
ADAM = {"optimizer": "Adam", "optimizer_options": {"eps": 1e-8}, "schedule": {"name": "OneCycleLR", "epochs": 3}}
BASES.append(BASES[-1] | {"training_profiles": [{"name": "a", "learning_rate": 0.1} | ADAM], "loggers": ["wandb"]})
BASES.append(
    BASES[-1] | {"slurm": {"partition": "gpu", "setup": ["module load cuda"], "additional_parameters": {"hold": 1}}}
)
KEYS = (
    *Settings.model_fields,
    *SlurmSettings.model_fields,
    *(field.name for field in dataclasses.fields(Profile)),
    "name",
    "learning_rate",
    "job-name",
    "dependency",
    "mem",
    "a b",
)
LONGEST_LINE = 900  # the longest line lists all allowed keys; values from the input are shortened
# The options that are always in a script, in addition to the requested ones.
ALWAYS = {"array", "job-name", "nodes", "ntasks-per-node", "open-mode", "output", "signal", "time"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda _cls: 2))  # this machine may have no srun
        yield tmp_path_factory.mktemp("fuzz")


def check_refusal(error: SettingsError, *sources: str) -> None:
    text = str(error)
    assert SECRET not in text
    lines = text.split("\n")
    for line in lines:
        assert line.startswith(sources), line[:200]
        assert len(line) <= LONGEST_LINE, (len(line), line)
        assert line.isprintable() or not line.isascii(), line


def check_usable(settings: Settings, place: Path) -> None:
    assert thaw(freeze(settings)) == settings
    settings.policy(1)
    assert iso(time.time() + settings.total_lifetime)
    disk_budget.demand(settings.num_models, settings.workers, settings.max_disk_gb, 1000, place)
    asked = request(settings, None)
    need_of(asked, settings.gpus_per_worker)
    on_slurm = settings.model_copy(update={"executor": "slurm", "slurm_file": None})
    check_script(SlurmQueue(on_slurm, place / "run", job_main).script(2), settings.name, set(asked.options))
    few = on_slurm.model_copy(update={"workers": min(settings.workers, 3)})
    with redirect_stdout(io.StringIO()):
        _print_plan(few, place / "run", False, None, {}, json=True)


def check_script(script: str, name: str, asked: set[str]) -> None:
    """Check that the script has only the requested options and those that orch always sets."""
    lines = [line for line in script.split("\n") if line.startswith("#SBATCH")]
    options = {}
    for line in lines:
        (word,) = shlex.split(line.removeprefix("#SBATCH"))
        option, _, value = word.removeprefix("--").partition("=")
        options[option] = value
    assert len(options) == len(lines), lines
    assert set(options) == asked | ALWAYS
    assert options["job-name"] == f"orch-{name}-dry-run"
    assert options["array"] == "0-1%2" or options["array"].startswith("0-1%")


def attempt(place: Path, overrides: tuple[str, ...] = (), content: bytes | None = None) -> None:
    path = place / "settings.json"
    if content is not None:
        path.write_bytes(content)
    try:
        settings, notes = load(path, overrides)
    except SettingsError as error:
        check_refusal(error, str(path), "--set")
    else:
        check_usable(settings, place)
        assert all("\n" not in note and len(note) <= LONGEST_LINE for note in notes)


@examples(60)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_settings_or_refused(place: Path, content: bytes) -> None:
    attempt(place, content=content)


@examples(80)
@given(value=json_values)
def test_any_json_is_settings_or_refused(place: Path, value: Any) -> None:
    attempt(place, content=to_json(value).encode())


@examples(350)
@given(data=st.data(), base=st.sampled_from(BASES))
def test_settings_with_changes_anywhere_can_be_used_or_are_refused(
    place: Path, data: st.DataObject, base: dict[str, Any]
) -> None:
    changed = json.loads(json.dumps(base))
    for _ in range(data.draw(st.integers(1, 3))):
        if changed:
            mutate(data, changed, KEYS)
    attempt(place, content=to_json(changed).encode())


@examples(150)
@given(data=st.data())
def test_any_value_of_any_slurm_key_adds_no_sbatch_line(place: Path, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(list(SlurmSettings.model_fields)))
    one = odd_scalars | st.lists(odd_scalars, max_size=2)
    names = st.sampled_from(
        ["job-name", "job_name", "job-na", "dep", "time", "signal", "a b", "mem", "gpus", "hold", ""]
    )
    value = data.draw(st.dictionaries(names | st.sampled_from(ODD_TEXT), one, max_size=2) | one)
    attempt(place, content=to_json(BASES[2] | {"slurm": {key: value}}).encode())


sets = st.one_of(
    st.text(max_size=30),
    st.builds(
        lambda key, more, value: f"{key}{more}={value}",
        st.sampled_from(KEYS),
        st.sampled_from(["", ".", ".0", ".name", ".0.name", "." + "9" * 5000, ".-1", ".²", ".a.b.c", "..", ".\n"]),
        st.sampled_from(VERBATIM)
        | st.sampled_from(ODD_TEXT)
        | json_values.map(to_json)
        | st.sampled_from(["@", "@/", "@\x00"]),
    ),
)


@examples(200)
@given(overrides=st.lists(sets, min_size=1, max_size=2))
def test_any_text_after_set_is_taken_or_refused_at_launch(place: Path, overrides: list[str]) -> None:
    attempt(place, tuple(overrides), json.dumps(BASES[0]).encode())


@examples(150)
@given(overrides=st.lists(sets | sets.map(lambda text: f"slurm.{text}"), min_size=1, max_size=2))
def test_any_text_after_set_is_taken_or_refused_by_amend(place: Path, overrides: list[str]) -> None:
    before, _ = load(FOLDER / "digits.json")
    try:
        after = amend(before, overrides)
    except SettingsError as error:
        check_refusal(error, "--set", "amended settings")
    else:
        check_usable(after, place)
        assert all(re.split(r"[.:\[]", line)[0] in AMENDABLE for line in difference(before, after))


script_lines = st.one_of(
    st.text(max_size=30),
    st.text(max_size=30).map(lambda text: f"#SBATCH {text}"),
    st.builds(
        lambda dashes, name, join, value: f"#SBATCH {dashes}{name}{join}{value}",
        st.sampled_from(["--", "-"]),
        st.sampled_from(
            ["time", "t", "signal", "mem", "gpus", "gpus-per-node", "job-name", "job-n", "J", "gres", "c", "a b"]
        ),
        st.sampled_from(["=", " ", ""]),
        st.sampled_from(
            ["1", "a100:2", "9" * 30, "1-", "1-2:3", "USR1@60", "USR1@" + "9" * 400, "9" * 400, "'", "UNLIMITED"]
        )
        | st.sampled_from(ODD_TEXT),
    ),
)


@examples(300)
@given(lines=st.lists(script_lines, max_size=4))
def test_any_script_is_read_or_refused(place: Path, lines: list[str]) -> None:
    text = "\n".join(["#!/bin/sh", *lines])
    try:
        options, setup = read_script(text)
    except ValueError as error:
        check_refusal(SettingsError(str(error)), "")
    else:
        assert all(
            isinstance(name, str) and (value is True or isinstance(value, str)) for name, value in options.items()
        )
        assert all(isinstance(line, str) for line in setup)
    file = place / "job.sbatch"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    settings = load(FOLDER / "digits.json", [f"slurm_file={file}"], executor="slurm")[0]
    cluster = SlurmQueue(settings, place / "run", job_main)
    try:
        asked = cluster.request
    except SettingsError as error:
        check_refusal(error, "slurm_file: ", "slurm.time_min: ")
        return
    need_of(asked, 1)
    check_script(cluster.script(2), settings.name, set(asked.options))
    with redirect_stdout(io.StringIO()):
        _print_plan(settings, place / "run", False, None, {}, json=True)


@pytest.mark.parametrize("name", ["run\nfolder", "run\x1bfolder", "run\u2028"])
def test_a_folder_whose_name_breaks_the_script_in_two_is_refused(place: Path, name: str) -> None:
    settings = load(FOLDER / "digits.json", executor="slurm")[0]
    with pytest.raises(SettingsError, match="choose another --runs-dir"):
        SlurmQueue(settings, place / name, job_main).script(1)


def test_more_mistakes_than_a_screen_has_lines_are_counted(place: Path) -> None:
    path = place / "many.json"
    path.write_text(json.dumps({f"key{n}": n for n in range(5_000)} | {"training_profiles": []}))
    started = time.monotonic()
    with pytest.raises(SettingsError, match="more mistakes") as caught:
        load(path)
    assert str(caught.value).count("\n") == 40
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    "option", ["job-name", "job_name", "job-na", "dependency", "dep", "array", "open-m", "time", "signal"]
)
def test_options_that_orch_sets_itself_are_refused_as_additional_parameters(option: str) -> None:
    """orch would take a job with another name for gone, and a job without its dependency would not wait its turn."""
    with pytest.raises(SettingsError, match="leave it out"):
        load(FOLDER / "digits.json", [f'slurm={{"additional_parameters": {{"{option}": "x"}}}}'])


@pytest.mark.parametrize("line", ['#SBATCH --"a b"=c', "#SBATCH --comment=a\x1bb", "echo \x1b"])
def test_a_script_with_a_forbidden_option_or_character_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"not a long sbatch option|holds the character"):
        request(load(FOLDER / "digits.json")[0], f"#!/bin/sh\n{line}\n")


@pytest.mark.parametrize("before", ["#SBATCH --time=", "#SBATCH ", "#SBATCH '"])
def test_a_password_in_a_script_is_not_repeated(before: str) -> None:
    with pytest.raises(ValueError, match=r"me:[*]") as caught:
        request(load(FOLDER / "digits.json")[0], f"{before}postgresql+psycopg://me:{SECRET}@host/db")
    assert SECRET not in str(caught.value)
