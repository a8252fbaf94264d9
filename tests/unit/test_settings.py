"""The keys of a settings file and their meaning, and the report's three files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from orchestrator.profile import Metric, Profile
from orchestrator.records import Policy, StopRules
from orchestrator.settings.loading import load
from orchestrator.settings.settings import Settings, SlurmSettings
from tests.support.settings_files import ALEX, FOLDER, LEAST, RON

# --- the report's three files

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
    settings, notes = load(FOLDER / f"{request.param}.json")
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
    monkeypatch.chdir(FOLDER.parent)
    settings, _ = load(FOLDER / f"{part.name}.json")
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
    settings, _ = load(FOLDER / f"{name}.json")
    assert settings.pretrained_features == pretrained_features
    assert settings.pretrained_classifier == pretrained_classifier
    assert settings.trainable_features == trainable_features
    assert settings.trainable_classifier == trainable_classifier


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_every_settings_file_of_the_project_loads_without_notes(path):
    settings, notes = load(path)
    assert notes == []
    assert settings.name == path.stem


# --- the report's keys

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


def test_keys_that_the_database_and_the_run_folder_replace_are_noted_and_ignored(written):
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
        stop=StopRules(stale_chunks=20, score=None, epochs=None),
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


# --- defaults


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
    assert "these scores are too optimistic" in notes[0]


@pytest.mark.parametrize(
    ("changes", "stop"),
    [
        pytest.param({}, StopRules(20, None, None), id="one stale cycle, and 20 chunks"),
        pytest.param({"num_models": 15}, StopRules(30, None, None), id="one stale cycle of a large board"),
        pytest.param({"stop_after_stale_cycles": 1}, StopRules(10, None, None), id="one stale cycle, as asked for"),
        pytest.param({"stop_after_stale_cycles": 2}, StopRules(20, None, None), id="two"),
        pytest.param({"stop_after_stale_cycles": None}, StopRules(None, None, None), id="never"),
        pytest.param({"stop_at_score": 0.9}, StopRules(20, 0.9, None), id="at a score"),
        pytest.param({"stop_after_epochs": 7}, StopRules(20, None, 7), id="after so many epochs"),
    ],
)
def test_a_run_ends_early(written, changes, stop):
    settings, _ = load(written({"training_profiles": [ALEX, RON]} | changes))
    assert settings.policy(1).stop == stop


@pytest.mark.parametrize("model", [Settings, SlurmSettings])
def test_every_key_has_a_description(model):
    assert [name for name, field in model.model_fields.items() if not field.description] == []
