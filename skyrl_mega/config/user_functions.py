"""Functions of the user's own, by where they are: `module:function`, or `file.py:function`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from skyrl_mega.config.settings import nearest
from skyrl_mega.errors import ConfigError


def load_function(path: str, setting: str) -> Any:
    """The function that `path` names. Raises ConfigError naming `setting`, and whatever the user's module raises."""
    where, _, name = path.rpartition(":")
    module = _module_of_file(Path(where), setting) if where.endswith(".py") else _module_named(where, setting)
    function = getattr(module, name, None)
    if not callable(function):
        guess = nearest(name, [key for key, value in vars(module).items() if inspect.isfunction(value)])
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise ConfigError(f"{setting}={path}: {where} has no function {name!r}.{hint}")
    return function


def _module_of_file(file: Path, setting: str) -> ModuleType:
    """A file is imported once, whatever names it; in every process under the same name, so that its functions can be pickled."""
    if not file.is_file():
        raise ConfigError(
            f"{setting}: there is no file {file} (looked in {Path.cwd()}). Give its path from there, or an absolute one."
        )
    file = file.resolve()
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) and Path(str(module.__file__)) == file:
            return module
    name = file.stem
    if name in sys.modules:
        name = f"{name}_{hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_named(name: str, setting: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the user's module exists, and something that it imports does not: that message is the useful one
        raise ConfigError(
            f"{setting}: no module {error.name!r} can be imported. Put its directory on PYTHONPATH (PYTHONPATH=. for the current "
            "one), or name the file: `my_file.py:function`."
        ) from error
