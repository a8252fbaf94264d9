"""Settings that change: --set, `orch amend`, freezing and thawing."""

from __future__ import annotations

import json

import pytest

from orchestrator.errors import SettingsError
from orchestrator.profile import Metric
from orchestrator.settings import loading
from orchestrator.settings.changes import changes
from orchestrator.settings.loading import difference, freeze, load, thaw
from orchestrator.settings.settings import Settings
from tests.support.settings_files import ALEX, FOLDER, LEAST, RON, mistakes

# --- --set and options


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        pytest.param("workers=4", lambda s: s.workers, 4, id="a number"),
        pytest.param("deterministic=true", lambda s: s.deterministic, True, id="a truth"),
        pytest.param("stop_after_stale_cycles=null", lambda s: s.stop_after_stale_cycles, None, id="nothing"),
        pytest.param("executor=local", lambda s: s.executor, "local", id="a bare word is a string"),
        pytest.param('executor="local"', lambda s: s.executor, "local", id="a JSON string"),
        pytest.param("job_params={}", lambda s: s.job_params, {}, id="a JSON object"),
        pytest.param("metric.mode=min", lambda s: s.metric, Metric(mode="min"), id="inside"),
        pytest.param("slurm.qos=a=b", lambda s: s.slurm.qos, "a=b", id="only the first = counts"),
        pytest.param("slurm.setup=[]", lambda s: s.slurm.setup, [], id="into an object that the file lacks"),
        pytest.param("job_params.a.b=1", lambda s: s.job_params, {"a": {"b": 1}}, id="deep"),
        pytest.param(
            "training_profiles.0.momentum=0.5", lambda s: s.training_profiles[0].momentum, 0.5, id="in a list"
        ),
        pytest.param("seed=2", lambda s: s.seed, 2, id="over what the file says"),
    ],
)
def test_a_value_is_set_from_the_command_line(written, override, read, expected):
    settings, _ = load(written(LEAST | {"seed": 1, "job_params": {"a": {}}}), [override])
    assert read(settings) == expected


def test_a_later_override_wins_over_an_earlier_and_an_option_over_both(written):
    path = written(LEAST)
    assert load(path, ["workers=2", "workers=3"])[0].workers == 3
    assert load(path, ["workers=2"], workers=4)[0].workers == 4
    assert load(path, ["workers=2"], workers=None)[0].workers == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        pytest.param("workers", "--set 'workers': write key=value, e.g. --set workers=4", id="no value"),
        pytest.param("=4", "--set '=4': write key=value, e.g. --set workers=4", id="no key"),
        pytest.param(
            "training_profiles.1.momentum=0",
            "--set 'training_profiles.1.momentum=0': there is nothing at 'training_profiles.1.momentum' to set",
            id="past the end of a list",
        ),
        pytest.param(
            "training_profiles.-1=0",
            "--set 'training_profiles.-1=0': there is nothing at 'training_profiles.-1' to set",
            id="no counting from the end",
        ),
        pytest.param("seed.x=0", "--set 'seed.x=0': there is nothing at 'seed.x' to set", id="inside a number"),
        pytest.param(
            "training_profiles.²=0",
            "--set 'training_profiles.²=0': there is nothing at 'training_profiles.²' to set",
            id="a digit that is not a decimal",
        ),
    ],
)
def test_an_override_that_cannot_be_done_is_named(written, override, expected):
    with pytest.raises(SettingsError) as caught:
        load(written(LEAST | {"seed": 1}), [override])
    assert str(caught.value) == expected


def test_an_override_is_checked_like_the_file(written):
    assert mistakes(written(LEAST), "wrokers=2") == ["wrokers: unknown key; did you mean 'workers'?"]


def test_a_value_is_read_from_a_file_of_its_own(written, tmp_path):
    (tmp_path / "profiles.json").write_text(json.dumps([RON, ALEX]), encoding="utf-8")
    settings, _ = load(written(LEAST), [f"training_profiles=@{tmp_path / 'profiles.json'}"])
    assert [profile.name for profile in settings.training_profiles] == ["ron", "alex"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(None, id="missing"),
        pytest.param("", id="empty"),
        pytest.param("[1, 2", id="broken"),
        pytest.param("[" * 100_000, id="too deep to read"),
        pytest.param("1" * 5000, id="a number of 5000 digits"),
        pytest.param('{"a": 1, "a": 2}', id="a key twice"),
    ],
)
def test_a_value_that_cannot_be_read_from_its_file_is_named_with_the_file(written, tmp_path, text):
    path = tmp_path / "value.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        load(written(LEAST), [f"job_params=@{path}"])
    assert str(caught.value).startswith(f"--set 'job_params=@{path}': {path}:")


# --- what may change in a run

LAUNCHED = Settings(name="a", training_profiles=[ALEX, RON], workers=2)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        pytest.param("workers=4", "workers: 2 -> 4", id="how many workers"),
        pytest.param("total_lifetime=60", "total_lifetime: 259200.0 -> 60.0", id="how long"),
        pytest.param("stop_after_epochs=9", "stop_after_epochs: null -> 9", id="when it ends"),
        pytest.param("slurm.partition=gpu", 'slurm.partition: null -> "gpu"', id="where"),
        pytest.param(
            "training_profiles.0.learning_rate=0.5",
            "training_profiles[0].learning_rate: 0.01 -> 0.5",
            id="the cycle",
        ),
        pytest.param("loggers=[]", 'loggers[0]: removed "tensorboard"', id="who is told of it"),
    ],
)
def test_a_run_is_amended_and_what_changed_is_shown(override, changed):
    assert difference(LAUNCHED, loading.amend(LAUNCHED, [override])) == [changed]


@pytest.mark.parametrize(
    "override",
    ["name=b", "seed=1", "num_models=3", "metric.mode=min", "select_on=test", 'job_params={"a": 1}', "database=x"],
)
def test_what_earlier_results_depend_on_is_fixed(override):
    key = override.split("=")[0].split(".")[0]
    with pytest.raises(SettingsError, match=f"^--set .*: {key} is fixed at launch; what can change: .*workers"):
        loading.amend(LAUNCHED, [override])


def test_a_mistake_in_an_amendment_is_named_like_any_other():
    with pytest.raises(SettingsError) as caught:
        loading.amend(LAUNCHED, ["workers=0", "wrokers=1"])
    assert str(caught.value).splitlines() == [
        "amended settings: workers: 0 is not allowed; input should be greater than or equal to 1",
        "amended settings: wrokers: unknown key; did you mean 'workers'?",
    ]


# --- frozen settings


def test_frozen_settings_spell_out_every_default(written):
    frozen = json.loads(freeze(load(written(LEAST))[0]))
    assert set(frozen) == set(Settings.model_fields)
    assert frozen["num_models"] == 5


@pytest.mark.parametrize("name", ["part1", "part2", "part3"])
def test_thawed_settings_are_those_that_were_frozen(name):
    part, _ = load(FOLDER / f"{name}.json")
    assert thaw(freeze(part)) == part
    assert thaw(freeze(part)).policy(3) == part.policy(3)


def test_frozen_settings_that_were_damaged_are_named():
    with pytest.raises(SettingsError, match="the run's settings: num_models: 0 is not allowed"):
        thaw(freeze(Settings(name="a", training_profiles=[ALEX])).replace('"num_models": 5', '"num_models": 0'))


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        pytest.param({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, ["a.c: 2 -> 3"], id="deep inside"),
        pytest.param({"a": {"b": 1}}, {"a": {"c": [2]}}, ["a.b: removed 1", "a.c: added [2]"], id="another key"),
        pytest.param({"a": None}, {"a": {"b": 1}}, ['a: null -> {"b": 1}'], id="of another kind"),
        pytest.param({"a": [1, 2, 3]}, {"a": [9, 1, 2, 3]}, ["a[0]: added 9"], id="one more at the beginning"),
        pytest.param({"a": [1, 2, 1, 3]}, {"a": [1, 2, 3]}, ["a[2]: removed 1"], id="a repeat less"),
        pytest.param({"a": [1, 2]}, {"a": [3]}, ["a[0]: 1 -> 3", "a[1]: removed 2"], id="fewer and others"),
        pytest.param({"a": [{"b": 1}, 2]}, {"a": [{"b": 4}, 2]}, ["a[0].b: 1 -> 4"], id="inside a list"),
        pytest.param({"a": [{"b": 1, "c": 2}]}, {"a": [{"c": 2, "b": 1}]}, [], id="another order of keys"),
    ],
)
def test_a_change_is_shown_with_its_place_and_without_what_stays(old, new, lines):
    assert changes(old, new) == lines


def test_the_difference_of_settings_is_a_line_for_each_key():
    old = Settings(name="a", training_profiles=[ALEX], workers=2, metric={"name": "loss", "mode": "min"})
    new = old.model_copy(update={"workers": 4, "stop_at_score": 0.9})
    assert difference(old, new) == ["workers: 2 -> 4", "stop_at_score: null -> 0.9"]
    assert difference(old, old) == []
