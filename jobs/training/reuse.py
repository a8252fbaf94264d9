"""Whether a model object may train another chunk, or a new one must be made.

A chunk must give the same result wherever it is trained. So an object may go on only if everything in it that may have
changed since it was made is in its state_dict, which a checkpoint contains.
"""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

_OWN = set(vars(nn.Module())) - {"_non_persistent_buffers_set"}  # attributes of every module
_HOOKS = [name for name in _OWN if "hooks" in name]
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type, BuiltinFunctionType)


class _NotPlainError(Exception):
    """A value may hold state that can't be compared."""


def description(model: nn.Module) -> Any:
    """Describe everything in a model but the values of its parameters and buffers. Two equal descriptions: nothing
    else has changed in between. None: the model holds something that can't be compared, so it must not be reused."""
    try:
        return [(name, *_of_module(module)) for name, module in model.named_modules()]
    except _NotPlainError:
        return None


def _of_module(module: nn.Module) -> tuple[Any, ...]:
    values = vars(module)
    if values.get("_non_persistent_buffers_set") or any(values.get(name) for name in _HOOKS):
        raise _NotPlainError
    own = {name: _plain(value) for name, value in values.items() if name not in _OWN}
    trained = [(name, p is not None and p.requires_grad) for name, p in module._parameters.items()]
    return type(module), own, trained, list(module._buffers), list(module._modules)


def _plain(value: Any) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, FunctionType) and value.__closure__ is None:
        return value
    if isinstance(value, set | frozenset):
        return frozenset(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return type(value), [_plain(item) for item in value]
    if isinstance(value, dict):
        return [(_plain(key), _plain(item)) for key, item in value.items()]
    raise _NotPlainError
