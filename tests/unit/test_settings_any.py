"""Any text in a settings file is settings or a proper error, and settings survive freezing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from orchestrator.errors import SettingsError
from orchestrator.settings.changes import changes
from orchestrator.settings.loading import freeze, load, thaw
from orchestrator.settings.settings import Settings
from tests.support.settings_files import ALEX, LEAST

PROPERTY = hypothesis_settings(
    derandomize=True, deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow]
)


# --- arbitrary content

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
    assume("NaN" not in json.dumps([old, new]))  # NaN is not equal to itself, and settings never contain it
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
        pytest.param('"training_source_dir": "~no.such.user/images"', id="the home of an unknown user"),
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
        pytest.param("training_source_dir=~no.such.user/images", id="the home of an unknown user"),
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


def test_a_runs_settings_that_end_too_early_are_not_json() -> None:
    frozen = freeze(Settings.model_validate({"name": "run"} | LEAST))
    with pytest.raises(SettingsError, match=r"^the run's settings: not JSON: EOF while parsing [^{]*$"):
        thaw(frozen[: len(frozen) // 2])
