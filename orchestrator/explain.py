"""What is wrong in JSON that people write: a line for each mistake."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


def explain(source: str, error: ValidationError, model: type[BaseModel]) -> str:
    """A line for each mistake: the source, the key's path, the value, and what is allowed."""
    lines = []
    for detail in error.errors(include_url=False):
        line = f"{source}: {_explain_one(detail, model)}"
        if line not in lines:  # a union (true or a list of them) reports each of its sides
            lines.append(line)
    return "\n".join(lines)


def _explain_one(detail: ErrorDetails, model: type[BaseModel]) -> str:
    place = _place(detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = _keys_at(detail["loc"][:-1], model)
        near = get_close_matches(str(detail["loc"][-1]), known, n=1, cutoff=0.5)
        allowed = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(known)}"
        return f"{place}: unknown key; {allowed}"
    if detail["type"] == "missing":
        return f"{place}: is missing and has no default"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    context: Mapping[str, Any] = detail.get("ctx") or {}
    if "pattern" in context:
        message = {
            "name": "allowed are letters, digits, '.', '_' and '-'",
            "job": 'allowed is "module:Class"',
        }.get(place, message)
    if detail["type"] == "value_error":
        return f"{place}: {message}"
    return f"{place}: {_short(detail['input'])} is not allowed; {message}"


def _place(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in ("bool", "list[bool]"):  # pydantic's names for the sides of a union
            text += f".{part}" if text else part
    return text


def _keys_at(loc: tuple[int | str, ...], model: Any) -> list[str]:
    for part in loc:
        if isinstance(part, str) and isinstance(model, type) and issubclass(model, BaseModel):
            annotation = model.model_fields[part].annotation
            nested = [
                a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)
            ]
            model = nested[0] if nested else None
    return sorted(model.model_fields) if model else []


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
