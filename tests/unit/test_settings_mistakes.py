"""Mistakes in a settings file, and the message for each mistake."""

from __future__ import annotations

import json

import pytest

from orchestrator.profile import Profile
from orchestrator.settings.loading import freeze, load, thaw
from tests.support.settings_files import ALEX, LEAST, RON, mistakes

# --- mistakes

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
            'metric: "mse" is only a name; write {"name": "mse", "mode": "min"} if a lower value is better, "max" '
            "if a higher one is",
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
            "name: \"my run\" is not allowed; allowed: letters, digits, '.', '_' and '-'",
            id="a name with a space",
        ),
        pytest.param(
            {"name": "../run"},
            "name: \"../run\" is not allowed; allowed: letters, digits, '.', '_' and '-'",
            id="a name that is a path",
        ),
        pytest.param(
            {"job": "jobs/alexnet.py"},
            'job: "jobs/alexnet.py" is not allowed; allowed: "module:Class"',
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
            id="a repeat that differs",
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
            "metric.xyzzy: unknown key; allowed: mode, name",
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
def test_true_and_false_are_not_numbers(written, key, value):
    expected = f"{key}: {json.dumps(value)} is not allowed; input should be a number"
    assert mistakes(written(LEAST | {key: value})) == [expected]


def test_true_and_false_are_not_numbers_further_down(written):
    profile = ALEX | {"learning_rate": True}
    changes = {"training_profiles": [profile], "slurm": {"gpus": True, "mem_gb": False}}
    assert mistakes(written(LEAST | changes)) == [
        "training_profiles[0].learning_rate: true is not allowed; input should be a number",
        "slurm.gpus: true is not allowed; input should be a number",
        "slurm.mem_gb: false is not allowed; input should be a number",
    ]


@pytest.mark.parametrize(("key", "value"), [("deterministic", True), ("pretrained_features", [True] * 13)])
def test_true_and_false_are_allowed_where_they_are_asked_for(written, key, value):
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
            id="an extra comma",
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
def test_a_file_that_is_not_a_json_object_is_named_with_the_place(written, text, expected):
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


# --- mistakes in a profile

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
        ({"optimizer": "A dam"}, 'optimizer: \'A dam\' is not the name of a class; allowed: "SGD", "Adam"'),
        ({"optimizer": "a:b:c"}, "optimizer: 'a:b:c' is not the name of a class"),
        (
            {"optimizer_options": {"lr": 1}},
            "optimizer_options: 'lr' is the profile's own 'learning_rate'; give it there",
        ),
        ({"optimizer_options": {"momentum": 1}}, "optimizer_options: 'momentum' is the profile's own 'momentum'"),
        ({"schedule": {"step_size": 3}}, 'schedule: "name" is missing; it says which schedule'),
        ({"schedule": {"name": 3}}, 'schedule: 3 is not the name of a class; allowed: "StepLR"'),
        ({"schedule": {"name": "StepLR", "every": "batch"}}, "schedule: every: 'batch'; allowed: "),
        ({"schedule": SCHEDULE | {"epochs": 0}}, "schedule: epochs: 0; allowed: a number above 0"),
        (
            {"schedule": SCHEDULE | {"epochs": [0, 2, 2]}},
            "schedule: epochs: [0, 2, 2]; allowed: a number above 0, or",
        ),
        ({"schedule": SCHEDULE | {"epochs": True}}, "schedule: epochs: True; allowed: "),
        ({"schedule": "StepLR"}, 'schedule: "StepLR" is not allowed'),
        ({"optimiser": "SGD"}, "optimiser: unknown key; did you mean 'optimizer'?"),
    ],
    ids=str,
)
def test_a_mistake_in_a_profile_is_named(written, said, expected):
    (line,) = mistakes(written(LEAST | {"training_profiles": [ALEX | said]}))
    assert line.startswith(f"training_profiles[0].{expected}")


def test_a_repeat_with_another_schedule_is_a_mistake(written):
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
            "loggers[0]: 'tensorbord' is not a logger; allowed: tensorboard, wandb, mlflow and",
        ),
        ({"loggers": "wandb"}, 'loggers: "wandb" is not allowed'),
        (
            {"loggers": ["wandb", "mlflow", "wandb"]},
            "loggers: 'wandb' is named 2 times; name each logger once",
        ),
    ],
    ids=str,
)
def test_a_value_that_the_training_loop_does_not_support_is_named(written, said, expected):
    (line,) = mistakes(written(LEAST | said))
    assert line.startswith(expected)


def test_loggers_may_be_a_user_s_own(written):
    assert load(written(LEAST | {"loggers": ["mlflow", "my.logs:Mine"]}))[0].loggers == ["mlflow", "my.logs:Mine"]
