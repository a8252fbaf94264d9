"""Messages for mistakes in settings, one line for each mistake."""

from __future__ import annotations

import dataclasses
import json
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from orchestrator.messages import shown

PATTERNS = {"name": "allowed: letters, digits, '.', '_' and '-'", "job": 'allowed: "module:Class"'}
MOST_LINES = 40  # about one screen


def explain(source: str, error: ValidationError, model: type[BaseModel]) -> str:
    """Return a line for each mistake: the source, the key's path, the value, and what is allowed."""
    details = error.errors(include_url=False)
    lines = list(dict.fromkeys(f"{source}: {_explain_one(detail, model)}" for detail in details))
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"{source}: and {len(lines) - MOST_LINES} more mistakes"]
    return "\n".join(lines)


def _explain_one(detail: ErrorDetails, model: type[BaseModel]) -> str:
    place, context = _place(detail["loc"]), detail.get("ctx") or {}
    if detail["type"] == "json_invalid":
        return f"not JSON: {context['error']}"
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model or a dataclass
        known = _keys_at(detail["loc"][:-1], model)
        near = get_close_matches(str(detail["loc"][-1])[:100], known, n=1, cutoff=0.5)
        allowed = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(known)}"
        return f"{place}: unknown key; {allowed}"
    if detail["type"] == "missing":
        return f"{place}: is missing and has no default"
    if detail["type"] == "value_error":  # raised by orch's own validators; their messages name the value
        return f"{place}: {_sentence(str(context['error']))}"
    message = _sentence(detail["msg"])
    if detail["type"] == "string_pattern_mismatch":
        message = PATTERNS.get(place, message)
    if place.startswith("database"):  # never show the value: it may hold a password
        return f"{place}: {message}"
    return f"{place}: {_short(detail['input'])} is not allowed; {message}"


def _sentence(message: str) -> str:
    message = shown(message, 300)
    return message[0].lower() + message[1:]


def _place(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in ("bool", "list[bool]", "constrained-int") and not part.startswith("literal["):
            # The names left out are pydantic's, for the members of a union.
            text += f".{shown(part, 60)}" if text else shown(part, 60)
    return text


def _keys_at(loc: tuple[int | str, ...], model: Any) -> list[str]:
    for part in loc:
        if isinstance(part, str) and isinstance(model, type) and issubclass(model, BaseModel):
            annotation = model.model_fields[part].annotation
            nested = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and _fields_of(a)]
            model = nested[0] if nested else None
    return _fields_of(model)


def _fields_of(kind: Any) -> list[str]:
    """Return the sorted keys of an object in the settings; an empty list for a plain value."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return sorted(kind.model_fields)
    return sorted(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else []


def _short(value: Any) -> str:
    try:
        return shown(json.dumps(value, default=str))
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deep"
