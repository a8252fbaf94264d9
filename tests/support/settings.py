"""Settings for tests that need only a few particular values."""

from __future__ import annotations

from typing import Any

from orchestrator.settings.settings import Settings

PROFILE = {"name": "only", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.0}


def settings(**changes: Any) -> Settings:
    """Return valid settings named "test" with one profile; the changes replace defaults."""
    return Settings.model_validate({"name": "test", "training_profiles": [PROFILE]} | changes)
