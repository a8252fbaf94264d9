"""Odd input for everything that orch reads but did not write itself. The examples are the same in every run; with
ORCH_FUZZ_EXAMPLES=20 (`make fuzz`), there are 20 times as many, and they are new in every run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("ORCH_FUZZ_EXAMPLES", "1"))
SECRET = "s3cret"

# Text that json.dumps would never write; `to_json` copies it unchanged.
VERBATIM = ("NaN", "Infinity", "-Infinity", "1e999", "-0.0", "1" * 5000, "9" * 400, "[" * 300 + "]" * 300, "[" * 99_999)
ODD_TEXT = (
    "", " ", "\x00", "a\nb", "gpu\n#SBATCH --dependency=singleton", "#SBATCH --array=0-9", "\r", "\u2028", "\x85",
    "\ud800", "x" * 100_000, "é日本😀", "..", "../../etc/passwd", "/", "~nobody-here/x", "~\x00", "true", "null", "-",
    "--", "1e999", "%s %(a)s {0} %j", "$(touch x)", "'", '"', "\\", "²", "٣", f"postgresql+psycopg://me:{SECRET}@host/db",
    f"postgresql+psycopg://host/db?password={SECRET}", f"mysql://me:{SECRET}@host/db", "sqlite://", "http://[",
    "postgresql+psycopg://host:port/db", "postgresql+psycopg://host:999999/db",
)  # fmt: skip
ODD_NUMBERS = (0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 1e-320, 1e300, -1e300, 0.5, -0.0)


def examples(count: int) -> Callable[[Any], Any]:
    """Return a decorator that sets the number of examples."""
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


verbatim = st.sampled_from(VERBATIM).map(lambda text: {"VERBATIM": text})
numbers = st.sampled_from(ODD_NUMBERS) | st.integers() | st.floats()
odd_scalars = st.none() | st.booleans() | numbers | st.sampled_from(ODD_TEXT) | st.text()
keys = st.one_of(st.sampled_from(ODD_TEXT), st.text(max_size=20))
json_values = st.recursive(
    odd_scalars | verbatim,
    lambda some: st.lists(some, max_size=4) | st.dictionaries(keys, some, max_size=4),
    max_leaves=8,
)


def to_json(value: Any) -> str:
    """Convert to JSON, but replace {"VERBATIM": text} by the text, which need not be valid JSON."""
    if isinstance(value, dict):
        if list(value) == ["VERBATIM"]:
            return str(value["VERBATIM"])
        return "{" + ", ".join(f"{json.dumps(key)}: {to_json(one)}" for key, one in value.items()) + "}"
    return f"[{', '.join(map(to_json, value))}]" if isinstance(value, list) else json.dumps(value)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) in a JSON value."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(value, key) for key, _ in items] + [place for _, inner in items for place in places(inner)]


def mutate(data: st.DataObject, value: Any, known_keys: tuple[str, ...] = (), values: Any = json_values) -> None:
    """Change a JSON value at one random place."""
    container, key = data.draw(st.sampled_from(places(value)), label="place")
    how = data.draw(st.sampled_from(["replace", "delete", "insert", "copy"]), label="how")
    if how == "delete":
        del container[key]
    elif how == "copy":  # a value from another place
        other, other_key = data.draw(st.sampled_from(places(value)))
        container[key] = json.loads(json.dumps(other[other_key]))
    elif how == "replace" or isinstance(container, list):
        container[key] = data.draw(values, label="value")
    else:
        new = st.sampled_from(known_keys) | keys if known_keys else keys
        container[data.draw(new, label="key")] = data.draw(values, label="value")
