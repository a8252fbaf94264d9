"""A fixture that makes sessions for the tests of training."""

from __future__ import annotations

import logging

import pytest

from tests.support.short_training import Fresh, digits_session, picture_sessions


@pytest.fixture(scope="module", params=["digits in memory", "pictures from files"])
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """Makes Sessions that share nothing, as the jobs of a chain do."""
    if request.param == "digits in memory":
        return digits_session
    return picture_sessions(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(autouse=True)
def _log_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job in this process may have turned this off."""
    monkeypatch.setattr(logging.getLogger("orch"), "propagate", True)
