"""scripts/test.sh, with tools that do nothing: its exit code is that of what it ran."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "test.sh"
#: Stands in for every tool: fails where the word in FAILS is among its name and arguments.
TOOL = """#!/usr/bin/env bash
echo "$(basename "$0") $*"
[[ -z "${FAILS:-}" || " $(basename "$0") $* " != *" $FAILS "* ]]
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose set-up does nothing, with tools that do nothing either."""
    for name in ("scripts/setup.sh", ".venv/bin/python", ".venv/bin/ruff", ".venv/bin/mypy"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TOOL)
        path.chmod(0o755)
    shutil.copy(SCRIPT, tmp_path / "scripts")
    return tmp_path


def run(checkout, fails=""):
    environment = {**os.environ, "FAILS": fails}
    environment.pop("SKYRL_MEGA_VENV", None)
    command = ["bash", checkout / "scripts" / "test.sh"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_what_passes_ends_with_0_and_both_halves_are_shown(checkout):
    done = run(checkout)
    assert done.returncode == 0, done.stderr
    assert "python -m pytest --reruns 1 -rfER tests/e2e" in done.stdout
    assert "-p no:cacheprovider tests/unit tests/peers tests/kernels tests/distributed" in done.stdout


@pytest.mark.parametrize("fails", ["tests/e2e", "tests/unit", "ruff", "mypy", "setup.sh"])
def test_what_fails_ends_with_another_code(checkout, fails):
    assert run(checkout, fails).returncode == 1
