"""The settings file: the report's keys and what they mean, and what is said of a mistake."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from orchestrator.errors import SettingsError
from orchestrator.records import Metric, Policy, Profile, StopRules
from orchestrator.settings import loading
from orchestrator.settings.changes import changes
from orchestrator.settings.loading import difference, freeze, load, thaw
from orchestrator.settings.settings import Settings

SETTINGS_FOLDER = Path(__file__).resolve().parents[2] / "settings"
PROPERTY = hypothesis_settings(
    derandomize=True, deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow]
)

ALEX = {"name": "alex", "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0005}
RON = {"name": "ron", "learning_rate": 0.0001, "momentum": 0.1, "weight_decay": 0.0005}
LEAST: dict[str, Any] = {"training_profiles": [ALEX]}


@pytest.fixture
def written(tmp_path: Path):
    """Write a settings file and return its path; a dict or list becomes JSON, text is taken as it is."""

    def write(content: object, name: str = "some.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def mistakes(path: Path, *overrides: str, **fixed: Any) -> list[str]:
    """The lines of the error, without the file's name that each of them begins with."""
    with pytest.raises(SettingsError) as caught:
        load(path, overrides, **fixed)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(str(path)) for line in lines), lines
    return [line.removeprefix(str(path)).removeprefix(": ") for line in lines]


# --- the report's three files ------------------------------------------------------------------------

# As the report prints them: learning rate, momentum. Weight decay is 0.0005 in all of them.
PROFILES = {
    "alex": (0.01, 0.9),
    "alexa": (0.01, 0.5),
    "bond": (0.007, 0.5),
    "handy": (0.007, 0.1),
    "hank": (0.001, 0.9),
    "harrold": (0.001, 0.1),
    "rachael": (7e-4, 0.1),
    "ricky": (1e-4, 0.9),
    "ron": (1e-4, 0.1),
    "vicky": (7e-5, 0.1),
    "vallary": (1e-5, 0.9),
    "vince": (1e-5, 0.1),
    "walter": (1e-6, 0.1),
}
PLAN = (
    "alex alexa bond hank handy harrold alex ron hank alexa",
    "rachael handy bond ricky harrold hank vince ron handy vicky",
    "rachael harrold vallary ricky ron walter vince rachael walter vicky",
    "ricky walter vallary vince walter walter vicky walter vallary walter",
)
ORDER = [name for line in PLAN for name in line.split()]

PARTS = ["part1", "part2", "part3"]


@pytest.fixture(params=PARTS)
def part(request: pytest.FixtureRequest) -> Settings:
    settings, notes = load(SETTINGS_FOLDER / f"{request.param}.json")
    assert notes == []
    return settings


def test_a_part_has_the_planned_40_profiles_in_order_with_their_repeats(part):
    assert len(ORDER) == 40
    planned = tuple(Profile(name, *PROFILES[name], weight_decay=0.0005) for name in ORDER)
    assert part.policy(1).cycle == planned


def test_a_part_has_13_distinct_profiles(part):
    assert len(set(part.policy(1).cycle)) == len(PROFILES) == 13
    assert Counter(p.name for p in part.training_profiles)["walter"] == 7


def test_a_part_has_the_sizes_and_lifetimes_of_the_report(part):
    assert (part.num_models, part.max_batch_size, part.epochs_per_chunk) == (5, 100, 1)
    assert (part.total_lifetime, part.eon_lifetime) == (3 * 24 * 3600, 40 * 60)


def test_a_part_converges_after_each_profile_was_tried_on_each_model(part):
    assert part.policy(1).stop.stale_chunks == 40 * 5


def test_a_part_chooses_its_models_on_validation_images(part):
    assert part.select_on == "validation"
    assert part.policy(1).metric == Metric("accuracy", "max")


def test_a_part_trains_alexnet_on_folders_of_images(part):
    assert part.job == "jobs.alexnet:AlexNet"
    assert Path(part.training_source_dir).is_absolute()
    assert Path(part.training_source_dir).parent == Path(part.testing_source_dir).parent


def test_a_part_names_a_slurm_file_that_is_there(part, monkeypatch):
    monkeypatch.chdir(SETTINGS_FOLDER.parent)
    settings, _ = load(SETTINGS_FOLDER / f"{part.name}.json")
    assert Path(settings.slurm_file).is_file()


@pytest.mark.parametrize(
    ("name", "pretrained_features", "pretrained_classifier", "trainable_features", "trainable_classifier"),
    [
        pytest.param("part1", [False] * 13, [False] * 7, [True] * 13, [True] * 7, id="from scratch"),
        pytest.param("part2", [True] * 13, [False] * 7, [False] * 13, [True] * 7, id="frozen pretrained features"),
        pytest.param(
            "part3",
            [True] * 13,
            [True] * 6 + [False],
            [False] + [True] * 12,
            [True] * 7,
            id="all but the first convolution fine-tuned",
        ),
    ],
)
def test_the_parts_differ_in_what_is_pretrained_and_what_is_trained(
    name, pretrained_features, pretrained_classifier, trainable_features, trainable_classifier
):
    settings, _ = load(SETTINGS_FOLDER / f"{name}.json")
    assert settings.pretrained_features == pretrained_features
    assert settings.pretrained_classifier == pretrained_classifier
    assert settings.trainable_features == trainable_features
    assert settings.trainable_classifier == trainable_classifier


@pytest.mark.parametrize("path", sorted(SETTINGS_FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_every_settings_file_of_the_project_loads_without_a_word(path):
    settings, notes = load(path)
    assert notes == []
    assert settings.name == path.stem


# --- the report's keys -------------------------------------------------------------------------------

REPORT = {
    "num_models": 5,
    "pretrained_features": [True] * 13,
    "pretrained_classifier": [True] * 6 + [False],
    "trainable_features": [False] + [True] * 12,
    "trainable_classifier": [True] * 7,
    "training_profiles": [ALEX, RON, ALEX],
    "max_batch_size": 50,
    "total_lifetime": 1000,
    "eon_lifetime": 100,
    "slurm_file": "slurm/gpu.sbatch",
    "training_source_dir": "sketches/train",
    "testing_source_dir": "/sketches/test",
    "lock_file": "part3.lock",
    "lock_timeout": 30,
    "state_file": "part3_state.json",
    "log_file": "part3.log",
    "model_name_format": "part3_{}.pth",
}


def test_a_file_of_the_reports_own_system_is_valid_as_it_is(written):
    settings, _ = load(written(REPORT, "part3.json"))
    assert settings.name == "part3"
    assert settings.job == "jobs.alexnet:AlexNet"
    assert settings.epochs_per_chunk == 1


def test_what_the_database_and_the_run_folder_do_now_is_noted_and_ignored(written):
    path = written(REPORT)
    settings, notes = load(path)
    dropped = ["lock_file", "lock_timeout", "state_file", "log_file", "model_name_format"]
    assert notes == [f"{path}: {key} is no longer needed and ignored" for key in dropped]
    assert settings == load(written({k: v for k, v in REPORT.items() if k not in dropped}))[0]


def test_the_reports_keys_become_the_policy_of_the_board(written):
    policy = load(written(REPORT))[0].policy(version=7)
    alex = Profile("alex", 0.01, 0.9, 0.0005)
    assert policy == Policy(
        version=7,
        metric=Metric("accuracy", "max"),
        num_models=5,
        cycle=(alex, Profile("ron", 0.0001, 0.1, 0.0005), alex),
        stop=StopRules(stale_chunks=15, score=None, epochs=None),
        max_chunk_attempts=3,
    )


@pytest.mark.parametrize(
    ("key", "meaning"),
    [
        pytest.param("pretrained_features", [True] * 13, id="pretrained_features: a flag for each layer"),
        pytest.param("pretrained_classifier", [True] * 6 + [False], id="pretrained_classifier: a flag for each layer"),
        pytest.param("trainable_features", [False] + [True] * 12, id="trainable_features: a flag for each layer"),
        pytest.param("trainable_classifier", [True] * 7, id="trainable_classifier: a flag for each layer"),
        pytest.param("max_batch_size", 50, id="max_batch_size: images"),
        pytest.param("total_lifetime", 1000.0, id="total_lifetime: seconds"),
        pytest.param("eon_lifetime", 100.0, id="eon_lifetime: seconds"),
        pytest.param("slurm_file", "HERE/slurm/gpu.sbatch", id="slurm_file: from where the command is given"),
        pytest.param("training_source_dir", "HERE/sketches/train", id="training_source_dir: likewise"),
        pytest.param("testing_source_dir", "/sketches/test", id="testing_source_dir: absolute stays absolute"),
    ],
)
def test_a_key_of_the_report_keeps_its_meaning(written, monkeypatch, tmp_path_factory, key, meaning):
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    found = getattr(load(written(REPORT))[0], key)
    assert found == (meaning.replace("HERE", str(here)) if isinstance(meaning, str) else meaning)


def test_a_folder_may_be_given_from_the_users_home(written, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings, _ = load(written(LEAST | {"training_source_dir": "~/images"}))
    assert settings.training_source_dir == str(tmp_path / "images")


@pytest.mark.parametrize("flags", [True, False, [True, False]], ids=["all", "none", "each"])
def test_flags_hold_for_all_layers_or_for_each(written, flags):
    assert load(written(LEAST | {"trainable_features": flags}))[0].trainable_features == flags


# --- defaults ----------------------------------------------------------------------------------------


def test_only_the_profiles_have_no_default(written):
    settings, notes = load(written({"training_profiles": [{"name": "plain", "learning_rate": 0.1}]}))
    assert notes == []
    assert settings.policy(1).cycle == (Profile("plain", 0.1, momentum=0.9, weight_decay=0.0),)


@pytest.mark.parametrize(
    ("file_name", "name"),
    [
        pytest.param("part3.json", "part3", id="the file's name"),
        pytest.param("my first run.json", "my-first-run", id="without spaces"),
        pytest.param("a..b_c-1.2.json", "a..b_c-1.2", id="with what is allowed"),
        pytest.param("é.json", "run", id="some name if nothing is left"),
        pytest.param(".hidden.json", "hidden", id="without a dot in front"),
        pytest.param("_draft.json", "draft", id="without an underscore in front"),
        pytest.param("x" * 120 + ".json", "x" * 100, id="no longer than allowed"),
    ],
)
def test_a_run_without_a_name_is_named_after_its_file(written, file_name, name):
    assert load(written(LEAST, file_name))[0].name == name


def test_a_board_chosen_on_the_test_set_is_noted(written):
    settings, notes = load(written(LEAST | {"select_on": "test"}))
    assert settings.select_on == "test"
    assert len(notes) == 1
    assert "no estimate of how good the models are" in notes[0]


@pytest.mark.parametrize(
    ("changes", "stop"),
    [
        pytest.param({}, StopRules(10, None, None), id="one stale cycle"),
        pytest.param({"stop_after_stale_cycles": 2}, StopRules(20, None, None), id="two"),
        pytest.param({"stop_after_stale_cycles": None}, StopRules(None, None, None), id="never"),
        pytest.param({"stop_at_score": 0.9}, StopRules(10, 0.9, None), id="at a score"),
        pytest.param({"stop_after_epochs": 7}, StopRules(10, None, 7), id="after so many epochs"),
    ],
)
def test_a_run_ends_early(written, changes, stop):
    settings, _ = load(written({"training_profiles": [ALEX, RON]} | changes))
    assert settings.policy(1).stop == stop


# --- mistakes ----------------------------------------------------------------------------------------

REPEATED = [ALEX, RON, ALEX | {"momentum": 0.8}]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            {"num_models": 0},
            "num_models: 0 is not allowed; input should be greater than or equal to 1",
            id="too small",
        ),
        pytest.param(
            {"workers": 2.5},
            "workers: 2.5 is not allowed; input should be a valid integer, got a number with a fractional part",
            id="not whole",
        ),
        pytest.param(
            {"workers": "many"},
            'workers: "many" is not allowed; input should be a valid integer, unable to parse string as an integer',
            id="not a number",
        ),
        pytest.param(
            {"eon_lifetime": 0},
            "eon_lifetime: 0 is not allowed; input should be greater than or equal to 0.001",
            id="no time",
        ),
        pytest.param(
            {"validation_fraction": 1},
            "validation_fraction: 1 is not allowed; input should be less than 1",
            id="nothing left to train on",
        ),
        pytest.param(
            {"metric": {"mode": "up"}},
            "metric.mode: \"up\" is not allowed; input should be 'max' or 'min'",
            id="a choice inside",
        ),
        pytest.param(
            {"metric": "mse"},
            'metric: "mse" is a name alone; write {"name": "mse", "mode": "min"} if less of it is better, "max" in its '
            "place if more of it is",
            id="a metric's name alone",
        ),
        pytest.param(
            {"select_on": "train"},
            "select_on: \"train\" is not allowed; input should be 'validation' or 'test'",
            id="a choice",
        ),
        pytest.param(
            {"executor": "pbs"},
            "executor: \"pbs\" is not allowed; input should be 'slurm', 'local' or 'inline'",
            id="a choice that may be left out",
        ),
        pytest.param(
            {"name": "my run"},
            "name: \"my run\" is not allowed; allowed are letters, digits, '.', '_' and '-'",
            id="a name with a space",
        ),
        pytest.param(
            {"name": "../run"},
            "name: \"../run\" is not allowed; allowed are letters, digits, '.', '_' and '-'",
            id="a name that is a path",
        ),
        pytest.param(
            {"job": "jobs/alexnet.py"},
            'job: "jobs/alexnet.py" is not allowed; allowed is "module:Class"',
            id="a job that is a file",
        ),
        pytest.param(
            {"training_profiles": []},
            "training_profiles: [] is not allowed; list should have at least 1 item after validation, not 0",
            id="no profile",
        ),
        pytest.param(
            {"training_profiles": [ALEX, ALEX | {"learning_rate": 0}]},
            "training_profiles[1].learning_rate: 0 is not allowed; input should be greater than 0",
            id="in the second profile",
        ),
        pytest.param(
            {"training_profiles": [ALEX | {"momentum": 1}]},
            "training_profiles[0].momentum: 1 is not allowed; input should be less than 1",
            id="momentum of 1",
        ),
        pytest.param(
            {"training_profiles": [{"name": "alex"}]},
            "training_profiles[0].learning_rate: is missing and has no default",
            id="a profile without a learning rate",
        ),
        pytest.param(
            {"training_profiles": REPEATED},
            "training_profiles: two profiles are named 'alex' but differ; a repeat must be the same",
            id="a repeat that is none",
        ),
        pytest.param(
            {"slurm": {"signal_delay_s": 0}},
            "slurm.signal_delay_s: 0 is not allowed; input should be greater than or equal to 1",
            id="inside slurm",
        ),
        pytest.param({"num_model": 3}, "num_model: unknown key; did you mean 'num_models'?", id="the nearest key"),
        pytest.param({"NUM_MODELS": 3}, "NUM_MODELS: unknown key; ", id="capitals matter"),
        pytest.param(
            {"slurm": {"partitoin": "gpu"}},
            "slurm.partitoin: unknown key; did you mean 'partition'?",
            id="the nearest key inside slurm",
        ),
        pytest.param(
            {"training_profiles": [ALEX | {"wieght_decay": 0}]},
            "training_profiles[0].wieght_decay: unknown key; did you mean 'weight_decay'?",
            id="the nearest key of a profile",
        ),
        pytest.param(
            {"metric": {"xyzzy": 1}},
            "metric.xyzzy: unknown key; allowed are mode, name",
            id="no key is near, so all are named",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place_its_value_and_what_is_allowed(written, changes, expected):
    (line,) = mistakes(written(LEAST | changes))
    assert line.startswith(expected) if expected.endswith("; ") else line == expected


def test_a_lifetime_without_end_is_named(written):
    text = f'{{"training_profiles": [{json.dumps(ALEX)}], "total_lifetime": 1e999}}'
    assert mistakes(written(text)) == ["total_lifetime: Infinity is not allowed; input should be a finite number"]


def test_a_long_value_is_cut(written):
    (line,) = mistakes(written(LEAST | {"workers": "9" * 500 + "x"}))
    assert line.startswith('workers: "999')
    assert len(line) < 200


def test_a_wrong_flag_is_named_by_its_place_in_the_list(written):
    lines = mistakes(written(LEAST | {"pretrained_features": [True, "perhaps"]}))
    assert 'pretrained_features[1]: "perhaps" is not allowed; ' in "\n".join(lines)
    assert not any("bool]" in line for line in lines), "no names of Python types"


@pytest.mark.parametrize(
    "key",
    [
        "workers", "num_models", "max_batch_size", "total_lifetime", "seed", "validation_fraction", "stop_after_epochs",
        "stop_at_score", "cores_per_worker",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [True, False])
def test_true_and_false_are_no_numbers(written, key, value):
    expected = f"{key}: {json.dumps(value)} is not allowed; input should be a number"
    assert mistakes(written(LEAST | {key: value})) == [expected]


def test_true_and_false_are_no_numbers_further_down(written):
    profile = ALEX | {"learning_rate": True}
    changes = {"training_profiles": [profile], "slurm": {"gpus": True, "mem_gb": False}}
    assert mistakes(written(LEAST | changes)) == [
        "training_profiles[0].learning_rate: true is not allowed; input should be a number",
        "slurm.gpus: true is not allowed; input should be a number",
        "slurm.mem_gb: false is not allowed; input should be a number",
    ]


@pytest.mark.parametrize(("key", "value"), [("deterministic", True), ("pretrained_features", [True] * 13)])
def test_true_and_false_are_what_they_are_where_they_are_asked_for(written, key, value):
    settings, _ = load(written(LEAST | {key: value}))
    assert getattr(settings, key) == value


def test_the_lock_is_one_of_three(written):
    assert load(written(LEAST))[0].lock == "auto"
    assert load(written(LEAST | {"lock": "soft"}))[0].lock == "soft"
    assert mistakes(written(LEAST | {"lock": "hard"})) == [
        "lock: \"hard\" is not allowed; input should be 'auto', 'flock' or 'soft'"
    ]


def test_all_mistakes_are_reported_at_once(written):
    content = {"num_models": 0, "wrokers": 2, "metric": {"mode": "up"}, "training_profiles": [{"name": "a"}]}
    assert [line.split(":")[0] for line in mistakes(written(content))] == [
        "num_models",
        "training_profiles[0].learning_rate",
        "metric.mode",
        "wrokers",
    ]


def test_a_file_without_profiles_says_so(written):
    assert mistakes(written({})) == ["training_profiles: is missing and has no default"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param('{"a": 1,\n "b" 2}', ":2:6: not JSON: Expecting ':' delimiter", id="a colon is missing"),
        pytest.param(
            '{\n  "a": 1,\n}',
            ":3:1: not JSON: Expecting property name enclosed in double quotes",
            id="a comma too much",
        ),
        pytest.param("", ":1:1: not JSON: Expecting value", id="an empty file"),
        pytest.param("# settings\n{}", ":1:1: not JSON: Expecting value", id="a comment"),
        pytest.param('{"a": 1} {}', ":1:10: not JSON: Extra data", id="two objects"),
        pytest.param("[]", "settings are a JSON object {...}, not list", id="a list"),
        pytest.param("null", "settings are a JSON object {...}, not NoneType", id="null"),
        pytest.param('{"seed": 1, "seed": 2}', "the key 'seed' is given twice", id="a key twice"),
        pytest.param('{"slurm": {"qos": "a", "qos": "a"}}', "the key 'qos' is given twice", id="a key twice, inside"),
        pytest.param("[" * 100_000, "not JSON: ", id="too deep to read"),
    ],
)
def test_a_file_that_is_no_json_object_is_named_with_the_place(written, text, expected):
    (line,) = mistakes(written(text))
    assert line.startswith(expected) if expected.endswith(": ") else line == expected


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(b'{"name": "\xff"}')
    (line,) = mistakes(path)
    assert line.startswith("not JSON: ")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        pytest.param(lambda path: None, "No such file or directory", id="missing"),
        pytest.param(lambda path: path.mkdir(), "Is a directory", id="a folder"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, make, expected):
    path = tmp_path / "some.json"
    make(path)
    assert mistakes(path) == [expected]


# --- --set and options -------------------------------------------------------------------------------


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
        pytest.param("workers", "--set 'workers': allowed is key=value, e.g. --set workers=4", id="no value"),
        pytest.param("=4", "--set '=4': allowed is key=value, e.g. --set workers=4", id="no key"),
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
            id="a digit that is no decimal",
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


# --- what a profile may say

SCHEDULE = {"name": "OneCycleLR", "epochs": 5}


def test_a_profile_s_optimizer_and_schedule_reach_the_board_s_policy(written):
    said = {"optimizer": "AdamW", "optimizer_options": {"eps": 1e-6}, "schedule": SCHEDULE}
    settings, _ = load(written(LEAST | {"training_profiles": [ALEX | said]}))
    (profile,) = thaw(freeze(settings)).policy(1).cycle
    assert (profile.optimizer, profile.optimizer_options, profile.schedule) == ("AdamW", {"eps": 1e-6}, SCHEDULE)
    assert hash(profile) == hash(Profile("alex", 0.01, 0.9, 0.0005, "AdamW"))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"optimizer": "A dam"}, 'optimizer: \'A dam\' is not the name of a class; allowed are "SGD", "Adam"'),
        ({"optimizer": "a:b:c"}, "optimizer: 'a:b:c' is not the name of a class"),
        (
            {"optimizer_options": {"lr": 1}},
            "optimizer_options: 'lr' is the profile's own 'learning_rate'; give it there",
        ),
        ({"optimizer_options": {"momentum": 1}}, "optimizer_options: 'momentum' is the profile's own 'momentum'"),
        ({"schedule": {"step_size": 3}}, 'schedule: "name" is missing; it says which schedule'),
        ({"schedule": {"name": 3}}, 'schedule: 3 is not the name of a class; allowed are "StepLR"'),
        ({"schedule": {"name": "StepLR", "every": "batch"}}, "schedule: every: 'batch'; allowed are"),
        ({"schedule": SCHEDULE | {"epochs": 0}}, "schedule: epochs: 0; allowed is a number above 0"),
        (
            {"schedule": SCHEDULE | {"epochs": [0, 2, 2]}},
            "schedule: epochs: [0, 2, 2]; allowed is a number above 0, or",
        ),
        ({"schedule": SCHEDULE | {"epochs": True}}, "schedule: epochs: True; allowed is"),
        ({"schedule": "StepLR"}, 'schedule: "StepLR" is not allowed'),
        ({"optimiser": "SGD"}, "optimiser: unknown key; did you mean 'optimizer'?"),
    ],
    ids=str,
)
def test_what_a_profile_can_t_say_is_named(written, said, expected):
    (line,) = mistakes(written(LEAST | {"training_profiles": [ALEX | said]}))
    assert line.startswith(f"training_profiles[0].{expected}")


def test_a_repeat_with_another_schedule_is_no_repeat(written):
    (line,) = mistakes(written(LEAST | {"training_profiles": [ALEX, ALEX | {"schedule": SCHEDULE}]}))
    assert "two profiles are named 'alex' but differ" in line


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"precision": "fp8"}, "precision: \"fp8\" is not allowed; input should be 'auto', 'fp32', 'bf16' or 'fp16'"),
        ({"channels_last": "yes"}, "channels_last: \"yes\" is not allowed; input should be 'auto', True or False"),
        ({"compile": "fast"}, 'compile: "fast" is not allowed'),
        (
            {"loggers": ["tensorbord"]},
            "loggers[0]: 'tensorbord' is no logger; allowed are tensorboard, wandb, mlflow and",
        ),
        ({"loggers": "wandb"}, 'loggers: "wandb" is not allowed'),
        (
            {"loggers": ["wandb", "mlflow", "wandb"]},
            "loggers: 'wandb' is named 2 times; name each logger once",
        ),
    ],
    ids=str,
)
def test_what_the_loop_can_t_do_is_named(written, said, expected):
    (line,) = mistakes(written(LEAST | said))
    assert line.startswith(expected)


def test_loggers_may_be_a_user_s_own(written):
    assert load(written(LEAST | {"loggers": ["mlflow", "my.logs:Mine"]}))[0].loggers == ["mlflow", "my.logs:Mine"]


# --- what may change in a run ------------------------------------------------------------------------

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
def test_a_run_is_amended_and_what_changed_in_it_is_told(override, changed):
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


# --- frozen settings ---------------------------------------------------------------------------------


def test_frozen_settings_spell_out_every_default(written):
    frozen = json.loads(freeze(load(written(LEAST))[0]))
    assert set(frozen) == set(Settings.model_fields)
    assert frozen["num_models"] == 5


def test_thawed_settings_are_those_that_were_frozen(part):
    assert thaw(freeze(part)) == part


def test_the_policy_is_read_from_frozen_settings(part):
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
def test_a_change_is_told_with_its_place_and_nothing_of_what_stays(old, new, lines):
    assert changes(old, new) == lines


def test_the_difference_of_settings_is_a_line_for_each_key():
    old = Settings(name="a", training_profiles=[ALEX], workers=2, metric={"name": "loss", "mode": "min"})
    new = old.model_copy(update={"workers": 4, "stop_at_score": 0.9})
    assert difference(old, new) == ["workers: 2 -> 4", "stop_at_score: null -> 0.9"]
    assert difference(old, old) == []


# --- anything at all ---------------------------------------------------------------------------------

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(sorted(Settings.model_fields))


@PROPERTY
@given(old=values, new=values)
def test_only_equal_values_have_no_changes(old, new):
    assume("NaN" not in json.dumps([old, new]))  # which equals nothing, and is in no settings
    assert bool(changes(old, new)) == (old != new)


profile_like = st.fixed_dictionaries({}, optional={key: values for key in ALEX}) | st.just(ALEX)
settings_like = st.builds(
    dict.__or__,
    st.just(LEAST) | st.fixed_dictionaries({"training_profiles": st.lists(profile_like, max_size=3)}),
    st.dictionaries(keys, values, max_size=2),
)


def loaded(folder: Path, text: str | bytes) -> Settings | None:
    """The settings in a file with this text, or None if it is refused with a proper error."""
    path = folder / "some.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        settings, _ = load(path)
    except SettingsError as error:
        message = str(error)
    else:
        return settings
    assert message.startswith(str(path)), "every error names the file"
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@PROPERTY
@given(content=settings_like | st.dictionaries(keys, values) | values)
def test_any_json_is_settings_or_a_proper_error(folder, content):
    settings = loaded(folder, json.dumps(content))
    assert settings is None or isinstance(settings, Settings)


@PROPERTY
@given(content=st.text() | st.binary())
def test_anything_else_is_a_proper_error(folder, content):
    assert loaded(folder, content) is None


# One field at a time, so that many examples are valid.
single = st.tuples(
    keys, st.integers(1, 9) | st.floats(0.01, 0.99) | st.booleans() | st.sampled_from(["a", "test", "a:B"])
)


@PROPERTY
@given(change=single, params=st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=2))
def test_what_is_loaded_survives_freezing(folder, change, params):
    settings = loaded(folder, json.dumps(LEAST | {"job_params": params} | dict([change])))
    if settings is not None:
        assert thaw(freeze(settings)) == settings


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(f'"seed": {"1" * 5000}', id="a number of 5000 digits"),
        pytest.param(f'"total_lifetime": {10**400}', id="a number that no float can hold"),
        pytest.param('"total_lifetime": 1e999', id="a number that overflows"),
        pytest.param('"training_source_dir": "~no.such.user/images"', id="the home of nobody"),
        pytest.param('"training_source_dir": "a\\u0000b"', id="a path with a null character"),
        pytest.param('"job_params": {"a": NaN}', id="NaN, which JSON does not have"),
        pytest.param('"job_params": {"a": [-Infinity]}', id="infinity, which JSON does not have"),
        pytest.param('"job_params": {"a": "\\ud800"}', id="half a character"),
        pytest.param('"job_params": {"\\ud800": 1}', id="half a character as a key"),
        pytest.param('"\\ud800": 1', id="half a character as an unknown key"),
        pytest.param('"slurm": {"partition": "\\ud800"}', id="half a character as a name"),
        pytest.param(f'"job_params": {{"a": {nested(400)}}}', id="400 lists in each other"),
    ],
)
def test_a_hostile_file_is_refused_or_is_frozen_and_thawed_without_loss(folder, extra):
    settings = loaded(folder, f'{{"training_profiles": [{json.dumps(ALEX)}], {extra}}}')
    if settings is not None:
        assert thaw(freeze(settings)) == settings


@pytest.mark.parametrize(
    "override",
    [
        pytest.param("seed=" + "1" * 5000, id="a number of 5000 digits"),
        pytest.param("job_params.a=" + "[" * 100_000, id="too deep to read"),
        pytest.param("job_params.a=NaN", id="NaN, which JSON does not have"),
        pytest.param("training_source_dir=~no.such.user/images", id="the home of nobody"),
        pytest.param("..=1", id="nothing but dots"),
        pytest.param("training_profiles=1", id="over the profiles"),
    ],
)
def test_a_hostile_override_is_refused_or_taken_without_loss(written, override):
    try:
        settings, _ = load(written(LEAST), [override])
    except SettingsError:
        return
    assert thaw(freeze(settings)) == settings


def test_a_file_as_windows_editors_write_it_is_read(written) -> None:
    assert load(written("\ufeff" + json.dumps(LEAST)))[0].training_profiles[0].name == "alex"


def test_a_runs_settings_that_end_too_early_are_said_to_be_no_json() -> None:
    frozen = freeze(Settings.model_validate({"name": "run"} | LEAST))
    with pytest.raises(SettingsError, match=r"^the run's settings: not JSON: EOF while parsing [^{]*$"):
        thaw(frozen[: len(frozen) // 2])
