"""Create a profile's optimizer, and keep part of the optimizer's state when the profile changes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from jobs.errors import JobError
from jobs.imports import find_class
from orchestrator.profile import Profile

# Parameter-group keys whose values multiply the profile's learning rate and weight decay.
LR_FACTOR, DECAY_FACTOR = "lr_factor", "weight_decay_factor"
# torch's optimizers that orch's loop does not support, and why.
UNFIT = {
    "LBFGS": "it calls the model several times per step, but orch's loop calls it once; write your own loop "
    "(train_chunk), like the LBFGS example in docs/your-own-job.md"
}
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)  # have fused kernels for both CPUs and GPUs
# Hyperparameters that need no optimizer state, so they can be turned on at any time.
STATELESS = {"lr", "weight_decay", "nesterov", "maximize", "fused", "foreach", "capturable", "differentiable"}

# Left out of a description: what is not a hyperparameter, or does not change the result.
HIDDEN = {
    "params",
    "param_names",
    "fused",
    "foreach",
    "maximize",
    "capturable",
    "differentiable",
    "initial_lr",
    "decoupled_weight_decay",
    LR_FACTOR,
    DECAY_FACTOR,
}

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


def make(profile: Profile, parameters: Parameters) -> Optimizer:
    """Return the profile's optimizer; SGD if the profile names none (a job's `optimizer` method gets a profile that
    names the job's default_optimizer). Raises JobError, naming the mistake, for an unknown class, option or value.

    parameters: tensors or parameter groups, as for torch.optim. Parameters that need no gradient are left out. A
    group's "lr_factor" and "weight_decay_factor" multiply the profile's learning rate and weight decay. The profile's
    momentum becomes the optimizer's `momentum`, or the first of its `betas` unless optimizer_options sets `betas`. By
    default, torch's fused kernels are used; sparse gradients need the option "fused": false.
    """
    spec = profile.optimizer or "SGD"
    kind = find(spec, f"profile {profile.name!r}: optimizer {spec}", torch.optim, Optimizer, UNFIT, {})
    options = _options(profile, kind)
    groups = _groups(parameters, profile)
    if not groups:
        raise JobError(
            f"profile {profile.name!r}: no parameter of the model requires a gradient, so there is nothing to train"
        )
    try:
        optimizer: Optimizer = kind(groups, **options, **_fused(kind, options, groups))
        return complete(optimizer)
    except Exception as error:  # of any class: torch notices a wrong type only when it uses the value
        raise JobError(f"profile {profile.name!r}: optimizer {spec}: {error}{given(options)}") from error


def given(options: Mapping[str, Any]) -> str:
    """Format the options as a suffix for messages that may not name the wrong value."""
    return f" (given: {json.dumps(dict(options), default=str)})" if options else ""


def complete(optimizer: Optimizer) -> Optimizer:
    """Give every parameter a momentum buffer. torch's fused SGD fails if only some parameters have one, as happens
    when the others get their first gradient in a later step. With a zero buffer, the first step is bitwise the same."""
    if type(optimizer) is torch.optim.SGD:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["fused"] and group["momentum"] else ():
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def check_optimizer(profile: Profile) -> Optimizer:
    """Create the profile's optimizer for one dummy parameter. Raises JobError for any mistake in the profile."""
    return make(profile, [nn.Parameter(torch.zeros(2, 2, device="cpu"))])


def described(optimizer: Optimizer) -> str:
    """Return the optimizer and its hyperparameters in one line, for the plan and the log. What differs between
    parameter groups is given for each."""
    groups = optimizer.param_groups
    names = [name for name in groups[0] if name not in HIDDEN and not name.startswith("_")]
    shown = []
    for name in names:
        values = [_shown(group.get(name)) for group in groups]
        shown.append(f"{name}={values[0] if len(set(values)) == 1 else '/'.join(values)}")
    sets = f", {len(groups)} groups of parameters" if len(groups) > 1 else ""
    return f"{type(optimizer).__name__}({', '.join(shown)}){sets}"


def parameter_names(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """Return the names of the parameters in each group, in order; "?" for one that is not the model's."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names.get(id(parameter), "?") for parameter in group["params"]] for group in optimizer.param_groups]


def class_name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}:{type(optimizer).__qualname__}"


def take_over(optimizer: Optimizer, state: Mapping[str, Any], of_class: str) -> bool:
    """Load the per-parameter state (such as momentum) of an old optimizer, but keep the new hyperparameters. Returns
    False and changes nothing if the class or the parameter groups differ, or if the new profile turns on an option that
    needs missing state (momentum, amsgrad, centered). state, of_class: the old optimizer's state_dict() and class."""
    new_groups, old_groups = optimizer.state_dict()["param_groups"], state["param_groups"]
    if of_class != class_name(optimizer) or [g["params"] for g in new_groups] != [g["params"] for g in old_groups]:
        return False
    for old, new in zip(old_groups, new_groups, strict=True):
        needs_state = {key for key, value in new.items() if isinstance(value, bool | int | float)} - STATELESS
        if any(new[key] and not old.get(key) for key in needs_state):
            return False
    optimizer.load_state_dict({"state": state["state"], "param_groups": new_groups})
    return True


def find(spec: str, what: str, home: Any, base: type, unfit: Mapping[str, str], also: Mapping[str, type]) -> type[Any]:
    """Return the class named by "Name" (in torch's module `home` or in `also`) or by "package.module:Class".
    what: prefix of the error message. unfit: classes of `home` that are refused, and why. Raises JobError if the class
    is refused, missing, or not derived from `base`."""
    module, colon, name = spec.rpartition(":")
    named = find_class(spec, what) if colon else also.get(name, getattr(home, name, None))
    for refused, why in unfit.items():
        if named is getattr(home, refused) or (not colon and name.lower() == refused.lower()):
            raise JobError(f"{what}: {why}")
    if isinstance(named, type) and issubclass(named, base) and named is not base:
        return named
    if colon:
        raise JobError(f"{what}: {module} has no class {name} that is derived from torch's {base.__qualname__}")
    classes = {n for n, c in vars(home).items() if isinstance(c, type) and issubclass(c, base) and c is not base}
    known = sorted({*also, *(n for n in classes if not n.startswith("_") and n not in unfit)})
    by_lower = {n.lower(): n for n in reversed(known)}
    near = [by_lower[n] for n in get_close_matches(name.lower(), by_lower, n=1)]
    allowed = f"did you mean {near[0]!r}? Allowed: torch's classes" if near else f"allowed: {', '.join(known)}"
    raise JobError(f'{what}: torch has no suitable class of that name; {allowed}, or "package.module:Class"')


def accepted(kind: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class's constructor by name, without the first (parameters or optimizer)."""
    parameters = list(inspect.signature(kind).parameters.values())
    return {p.name: p for p in parameters[1:]}


def check_options(options: Iterable[str], kind: Any, what: str, taken: Sequence[str] = ()) -> None:
    """Raise JobError for an option that the class does not accept. taken: options refused because orch sets them."""
    known = accepted(kind)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return
    names = sorted(set(known) - set(taken))
    for option in options:
        if option not in names:
            near = get_close_matches(option, names, n=1)
            allowed = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(names)}"
            raise JobError(f"{what}: it has no option {option!r}; {allowed}")


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _options(profile: Profile, kind: Any) -> dict[str, Any]:
    """Return the keyword arguments of the optimizer: the profile's hyperparameters and its optimizer_options."""
    known = accepted(kind)
    what = f"profile {profile.name!r}: optimizer {kind.__name__}"
    check_options(profile.optimizer_options, kind, what, taken=("lr", "momentum", "weight_decay"))
    options = {"lr": profile.learning_rate, **profile.optimizer_options}
    if "momentum" in known:
        options["momentum"] = profile.momentum
    elif "betas" in known:
        options.setdefault("betas", (profile.momentum, *known["betas"].default[1:]))
    if "weight_decay" in known:
        options["weight_decay"] = profile.weight_decay
    elif profile.weight_decay:
        raise JobError(
            f"profile {profile.name!r}: weight_decay: {profile.weight_decay:g}, but the optimizer {kind.__name__} "
            "does not support it; leave it out or set it to 0"
        )
    return {name: tuple(value) if name == "betas" else value for name, value in options.items()}


def _groups(parameters: Parameters, profile: Profile) -> list[dict[str, Any]]:
    """Return non-empty groups of the parameters that need a gradient, with each group's factors applied."""
    listed: list[Any] = list(parameters)
    trained = []
    for group in listed if listed and isinstance(listed[0], dict) else [{"params": listed}]:
        params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        own: dict[str, Any] = {**group, "params": [p for p in params if p.requires_grad]}
        if LR_FACTOR in own:
            own["lr"] = profile.learning_rate * own[LR_FACTOR]
        if DECAY_FACTOR in own:
            own["weight_decay"] = profile.weight_decay * own[DECAY_FACTOR]
        if own["params"]:
            trained.append(own)
    return trained


def _fused(kind: Any, options: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Return the option that enables torch's fused kernels, or {} if they can't be used. This is checked here, because
    torch would raise an error only at the first step."""
    own_choice = {"fused", "foreach", "capturable", "differentiable"} & set(options)
    dampened = options.get("dampening")  # torch dampens the first step if a momentum buffer exists (see `complete`)
    if kind not in FUSED or own_choice or dampened:
        return {}
    parameters = [parameter for group in groups for parameter in group["params"]]
    fit = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return {"fused": True} if fit else {}
