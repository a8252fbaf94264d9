"""The optimizer of a profile, and what is kept of its state when another profile takes over."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from jobs.errors import JobError
from orchestrator.records import Profile

# Of a parameter group: its learning rate and weight decay are the profile's, times these.
LR_FACTOR, DECAY_FACTOR = "lr_factor", "weight_decay_factor"
# Torch's own that don't fit, and why.
UNFIT = {
    "LBFGS": "it calls the model several times in one step, and orch's loop calls it once; write a loop of your own "
    "(train_chunk), as docs/your-own-job.md shows for it"
}
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)  # on CPUs and GPUs
# Hyperparameters that need no state of their own, so that they can be switched on at any time.
STATELESS = {"lr", "weight_decay", "nesterov", "maximize", "fused", "foreach", "capturable", "differentiable"}

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


def make(profile: Profile, parameters: Parameters, default: str = "SGD") -> Optimizer:
    """The profile's optimizer, or the default's class where the profile names none.

    parameters: tensors, or parameter groups as torch.optim takes them; those that need no gradient are left out.
    A group may carry "lr_factor" and "weight_decay_factor" (1 where it does not): its learning rate and weight decay
    are the profile's times these. The profile's momentum is the optimizer's `momentum`, or the first of its `betas`
    unless optimizer_options has `betas`; an optimizer with neither takes none. Torch's fused kernels are used where it
    has them (an option "fused" or "foreach" overrides it; gradients that are sparse need "fused": false).

    Raises JobError, which names what is wrong, for an unknown class, option or value.
    """
    spec = profile.optimizer or default
    found = find(spec, f"profile {profile.name!r}: optimizer", torch.optim, Optimizer, UNFIT)
    options = _options(profile, found)
    groups = [_with_factors(group, profile) for group in _groups(parameters)]
    if not groups:
        raise JobError(
            f"profile {profile.name!r}: no parameter of the model needs a gradient; there is nothing to train"
        )
    try:
        return complete(_made(found, groups, **options, **_fused(found, options, groups)))
    except Exception as error:  # a wrong type is noticed where the value is used
        raise JobError(f"profile {profile.name!r}: optimizer {spec}: {error}{given(options)}") from error


def given(options: Mapping[str, Any]) -> str:
    """For a message that does not name the value which is wrong."""
    return f" (given: {json.dumps(dict(options), default=str)})" if options else ""


def complete(optimizer: Optimizer) -> Optimizer:
    """Torch's fused SGD fails where one parameter has a momentum buffer and another, whose first gradient comes later,
    has none yet: let all have one. A first step from zeros is the same as one without a buffer, bit for bit."""
    if type(optimizer) is torch.optim.SGD:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["fused"] and group["momentum"] else ():
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def check_optimizer(profile: Profile, default: str = "SGD") -> Optimizer:
    """The profile's optimizer for one parameter, which shows all that can be wrong with it. Raises JobError."""
    return make(profile, [nn.Parameter(torch.zeros(2, 2, device="cpu"))], default)


def class_name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}:{type(optimizer).__qualname__}"


def take_over(optimizer: Optimizer, state: Mapping[str, Any], of_class: str) -> bool:
    """Give a new optimizer what another profile's has gathered (momentum and the like), but not its numbers.

    state: the other's state_dict(). Nothing is taken over from another class or other parameter groups, nor where the
    new profile switches on what needs state that the other has not kept (momentum, amsgrad, centered). Returns
    whether it was.
    """
    own = optimizer.state_dict()
    theirs: Sequence[dict[str, Any]] = state["param_groups"]
    if of_class != class_name(optimizer) or [g["params"] for g in own["param_groups"]] != [g["params"] for g in theirs]:
        return False
    if any(_switched_on(old, new) for old, new in zip(theirs, own["param_groups"], strict=True)):
        return False
    optimizer.load_state_dict({"state": state["state"], "param_groups": own["param_groups"]})
    return True


def find(spec: str, what: str, home: Any, base: type, unfit: Mapping[str, str], also: Sequence[str] = ()) -> Any:
    """The class that "Name" (of torch's module `home`) or "package.module:Class" means.

    unfit: classes of home that are refused, each with the reason. Raises JobError for these, and if there is none or it
    is not derived from base."""
    module, colon, name = spec.rpartition(":")
    try:
        found = getattr(importlib.import_module(module) if colon else home, name, None)
    except (Exception, SystemExit) as error:  # whatever the user's module does on import
        raise JobError(f"{what} {spec}: {module} can't be imported: {type(error).__name__}: {error}") from error
    for refused, why in unfit.items():
        if found is getattr(home, refused) or (not colon and name.lower() == refused.lower()):
            raise JobError(f"{what} {spec}: {why}")
    if isinstance(found, type) and issubclass(found, base) and found is not base:
        return found
    if colon:
        raise JobError(f"{what} {spec}: {module} has no class {name} that is derived from torch's {base.__qualname__}")
    classes = {n: c for n, c in vars(home).items() if isinstance(c, type) and issubclass(c, base) and c is not base}
    known = sorted({*also, *(n for n in classes if not n.startswith("_") and n not in unfit)})
    by_lower = {n.lower(): n for n in reversed(known)}
    near = [by_lower[n] for n in get_close_matches(name.lower(), by_lower, n=1)]
    allowed = f"did you mean {near[0]!r}? Allowed is torch's" if near else f"allowed are {', '.join(known)}"
    raise JobError(f'{what} {spec}: torch has none of that name that fits here; {allowed}, or "package.module:Class"')


def accepted(found: Any) -> dict[str, inspect.Parameter]:
    """The arguments of a class but the first: by name, with what stands for them if they are left out."""
    parameters = list(inspect.signature(found).parameters.values())
    return {p.name: p for p in parameters[1:]}


def check_options(options: Mapping[str, Any], found: Any, what: str, taken: Sequence[str] = ()) -> None:
    """Raises JobError for an option that the class does not take."""
    known = accepted(found)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return
    names = sorted(set(known) - set(taken))
    for option in options:
        if option not in names:
            near = get_close_matches(option, names, n=1)
            allowed = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(names)}"
            raise JobError(f"{what}: {option!r} is no option of it; {allowed}")


def _made(found: Any, groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    optimizer: Optimizer = found(groups, **options)
    return optimizer


def _options(profile: Profile, found: Any) -> dict[str, Any]:
    """The arguments of the class: what the profile says in its own keys, and its further options."""
    known = accepted(found)
    check_options(
        profile.optimizer_options,
        found,
        f"profile {profile.name!r}: optimizer {found.__name__}",
        taken=("lr", "momentum", "weight_decay"),
    )
    options = {"lr": profile.learning_rate, **profile.optimizer_options}
    if "momentum" in known:
        options["momentum"] = profile.momentum
    elif "betas" in known and "betas" not in options:
        default = known["betas"].default
        options["betas"] = (profile.momentum, *default[1:])
    if "weight_decay" in known:
        options["weight_decay"] = profile.weight_decay
    elif profile.weight_decay:
        raise JobError(
            f"profile {profile.name!r}: weight_decay: {profile.weight_decay:g}, but the optimizer {found.__name__} "
            "has none; leave it out or set it to 0"
        )
    return {name: tuple(value) if name == "betas" else value for name, value in options.items()}


def _groups(parameters: Parameters) -> list[dict[str, Any]]:
    """Parameter groups of what needs a gradient, none of them empty."""
    listed: list[Any] = list(parameters)
    groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    found = []
    for group in groups:
        given = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        wanted = [p for p in given if p.requires_grad]
        if wanted:
            found.append({**group, "params": wanted})
    return found


def _with_factors(group: dict[str, Any], profile: Profile) -> dict[str, Any]:
    numbers = {}
    if LR_FACTOR in group:
        numbers["lr"] = profile.learning_rate * group[LR_FACTOR]
    if DECAY_FACTOR in group:
        numbers["weight_decay"] = profile.weight_decay * group[DECAY_FACTOR]
    return group | numbers


def _fused(found: Any, options: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """The option for torch's fused kernels, where it has them; it would notice at the first step only."""
    own_choice = {"fused", "foreach", "capturable", "differentiable"} & set(options)
    dampened = options.get("dampening")  # the first step is not, which `complete` would get wrong
    if found not in FUSED or own_choice or dampened:
        return {}
    parameters = [parameter for group in groups for parameter in group["params"]]
    fit = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return {"fused": True} if fit else {}


def _switched_on(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Does the new group use a hyperparameter that the old one did not?"""
    return any(
        bool(value) and not old.get(key)
        for key, value in new.items()
        if key not in STATELESS and isinstance(value, bool | int | float)
    )
