"""A level imports only lower levels, and the light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: docs/architecture.md, "Arrows". Rooms that do not exist yet are listed too: they are held to their level from their first day.
LEVELS: dict[str, int] = {
    **dict.fromkeys(("skyrl_mega", "types", "protocols", "errors"), 0),
    **dict.fromkeys(("config", "telemetry", "skyrl_mega_kernels"), 1),
    **dict.fromkeys(("algorithms", "data", "envs", "parallel", "planner", "rewards"), 2),
    **dict.fromkeys(("models", "rollout", "agents"), 3),
    **dict.fromkeys(("training", "weights", "checkpoint"), 4),
    "orchestration": 5,
    **dict.fromkeys(("serving", "launch"), 6),
    **dict.fromkeys(("train", "__main__"), 7),
}
#: What a room may never import, whatever its level.
FORBIDDEN: dict[str, set[str]] = {
    "algorithms": {"ray", "megatron", "vllm"},
    "weights": {"vllm", "skyrl_mega.training", "skyrl_mega.rollout"},
    "planner": {"torch"},
    **{name: {"torch", "transformers", "vllm", "megatron", "ray", "hydra"} for name in ("types", "protocols", "errors")},
}
HEAVY = ("torch", "vllm", "megatron", "ray", "transformers", "hydra", "omegaconf")


def room_of(module: str) -> str:
    """`skyrl_mega.data.packing` -> `data`; `skyrl_mega` itself and `skyrl_mega_kernels` are rooms of their own."""
    parts = module.split(".")
    return parts[1] if parts[0] == "skyrl_mega" and len(parts) > 1 else parts[0]


def module_name(file: Path) -> str:
    base = ROOT / "kernels" if (ROOT / "kernels") in file.parents else ROOT
    parts = list(file.relative_to(base).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> list[Path]:
    return sorted([*(ROOT / "skyrl_mega").rglob("*.py"), *(ROOT / "kernels" / "skyrl_mega_kernels").rglob("*.py")])


def imports(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import that runs, inside functions too; `if TYPE_CHECKING:` bodies do not run.

    `from a import b` yields both `a` and `a.b`, since b may be a module.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            for other in node.orelse:
                yield from imports(ast.Module([other], []), module, is_package=is_package)
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        yield from imports(node, module, is_package=is_package)


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parents = module.split(".")
    parents = parents[: len(parents) - node.level + (1 if is_package else 0)]
    return ".".join([*parents, *([node.module] if node.module else [])])


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What `module` imports against the rules, one line each."""
    room = room_of(module)
    found = []
    for line, imported in imports(ast.parse(source), module, is_package=is_package):
        target = room_of(imported)
        is_ours = imported.split(".")[0] in ("skyrl_mega", "skyrl_mega_kernels")
        is_neighbour = target == room or LEVELS.get(target) == LEVELS[room] == 0  # level 0 is one room in three files
        if is_ours and target in LEVELS and not is_neighbour and LEVELS[target] >= LEVELS[room]:
            found.append(f"{module}:{line} (level {LEVELS[room]}) imports {imported} (level {LEVELS[target]})")
        if room == "planner" and is_ours and target not in ("planner", "config") and LEVELS.get(target) != 0:
            found.append(f"{module}:{line} imports {imported}; the planner may use level 0 and config only")
        found.extend(
            f"{module}:{line} imports {imported}, which {room} may never do"
            for name in FORBIDDEN.get(room, ())
            if imported == name or imported.startswith(f"{name}.")
        )
    return sorted(set(found))


def test_every_level_imports_only_lower_levels():
    found = [
        line
        for file in source_files()
        for line in violations(file.read_text(encoding="utf-8"), module_name(file), is_package=file.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_every_room_has_a_level():
    unknown = {room_of(module_name(file)) for file in source_files()} - LEVELS.keys()
    assert not unknown, f"give {sorted(unknown)} a level here and in docs/architecture.md"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("skyrl_mega.types", "from skyrl_mega import config"),
        ("skyrl_mega.config.schema", "def f():\n    from skyrl_mega.rollout import engine"),
        ("skyrl_mega.data.packing", "import skyrl_mega.envs.base"),
        ("skyrl_mega.data.packing", "from ..envs import base"),
        ("skyrl_mega.algorithms.kl", "from megatron.core import parallel_state"),
        ("skyrl_mega.weights.plan", "try:\n    import vllm\nexcept ImportError:\n    vllm = None"),
        ("skyrl_mega.weights.plan", "class A:\n    def f(self):\n        import skyrl_mega.rollout.vllm_engine"),
        ("skyrl_mega.launch.cli", "from skyrl_mega.train import x"),
        ("skyrl_mega.planner.flops", "from skyrl_mega.telemetry import metrics"),
        ("skyrl_mega_kernels.rope.api", "import skyrl_mega.parallel"),
        ("skyrl_mega.types", "if TYPE_CHECKING:\n    pass\nelse:\n    import torch"),
    ],
)
def test_an_upward_or_forbidden_import_is_found(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("skyrl_mega.types", "if TYPE_CHECKING:\n    import torch\n    from skyrl_mega.rollout import engine"),
        ("skyrl_mega.data.packing", "from skyrl_mega.types import TrainBatch\nfrom .balance import pack"),
        ("skyrl_mega.training.policy", "import skyrl_mega_kernels.linear_logprobs\nfrom skyrl_mega.models import build"),
        ("skyrl_mega_kernels.rope.api", "import skyrl_mega_kernels.rope.reference\nfrom skyrl_mega.errors import ConfigError"),
        ("skyrl_mega.train", "from skyrl_mega.launch.cli import main"),
    ],
)
def test_a_downward_import_is_allowed(module, source):
    assert violations(source, module) == []


def test_light_modules_load_nothing_heavy():
    code = (
        "import sys, skyrl_mega, skyrl_mega.types, skyrl_mega.protocols, skyrl_mega.errors, skyrl_mega.config,"
        " skyrl_mega.config.schema, skyrl_mega.config.validate, skyrl_mega.launch.cli, skyrl_mega.train\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
