"""Which environment a name means. Modules are imported when their name is looked up, not before."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from skyrl_mega.envs.base import TextEnvBase, nearest
from skyrl_mega.errors import EnvError

_BUILT_IN = {
    "arithmetic": "skyrl_mega.envs.arithmetic",
    "gsm8k": "skyrl_mega.envs.gsm8k",
    "reasoning_gym": "skyrl_mega.envs.reasoning_gym",
}
_registered: dict[str, type[TextEnvBase]] = {}

EnvClass = TypeVar("EnvClass", bound=type[TextEnvBase])


def register_env(name: str) -> Callable[[EnvClass], EnvClass]:
    """A class decorator that makes the environment available as `env.name=<name>`.

    Raises EnvError if the name is taken by another class.
    """

    def register(env_class: EnvClass) -> EnvClass:
        taken = _registered.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (env_class.__module__, env_class.__qualname__):
            raise EnvError(
                f"environment name {name!r} is taken by {taken.__module__}:{taken.__qualname__}; choose another for "
                f"{env_class.__module__}:{env_class.__qualname__}."
            )
        _registered[name] = env_class
        return env_class

    return register


def get_env_class(name: str) -> type[TextEnvBase]:
    """The class of a registered name, or of `module:Class`.

    Raises EnvError for an unknown name, module or class (naming the nearest), or a class that is no TextEnvBase.
    """
    if ":" in name:
        return _import_class(name)
    if name not in _registered and name in _BUILT_IN:
        importlib.import_module(_BUILT_IN[name])
    if name not in _registered:
        raise EnvError(
            f"no environment is named {name!r}{nearest(name, {*_registered, *_BUILT_IN})} "
            "Your own is given as env.name=module:Class."
        )
    return _registered[name]


def make_env(name: str, options: Mapping[str, Any] | None = None) -> TextEnvBase:
    """A new environment of that name, constructed with `options` as keyword arguments.

    Raises EnvError for an unknown name or option, and whatever the constructor raises for a bad value.
    """
    env_class = get_env_class(name)
    options = dict(options or {})
    env_class.check_options(options)
    return env_class(**options)


def _import_class(name: str) -> type[TextEnvBase]:
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the user's module exists, and something that it imports does not: that message is the useful one
        raise EnvError(
            f"env.name={name!r}: no module {error.name!r} can be imported. Install its package, or put its directory on "
            "PYTHONPATH (PYTHONPATH=. for the current one)."
        ) from error
    candidate = vars(module).get(class_name)
    if candidate is None:
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, TextEnvBase)]
        raise EnvError(f"env.name={name!r}: module {module_name!r} has no {class_name!r}{nearest(class_name, classes)}")
    if not (isinstance(candidate, type) and issubclass(candidate, TextEnvBase)):
        raise EnvError(f"env.name={name!r} must be a class derived from skyrl_mega.envs.base.TextEnvBase, but is {candidate!r}.")
    return candidate
