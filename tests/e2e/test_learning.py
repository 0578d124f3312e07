"""Every family of algorithms learns two-digit addition with SmolLM2: minutes each, nightly."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
STEPS = 26


def leaderboard():
    spec = importlib.util.spec_from_file_location("leaderboard", ROOT / "scripts" / "bench" / "leaderboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("leaderboard")


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no {MODEL}: run scripts/prepare_smollm2.py")
@pytest.mark.parametrize("family", leaderboard().FAMILIES)
def test_a_family_learns_the_quickstarts_task(family, runs):
    bench = leaderboard()
    where = [f"model.path={MODEL}"]
    if family.startswith("distill"):
        bench.run_family("grpo", runs, steps=STEPS, overrides=where)  # their teacher; already there after its own test
    result = bench.run_family(family, runs, steps=STEPS, overrides=where)
    # Four standard errors of the difference of two accuracies over 128 problems.
    assert result["accuracy_after"] > result["accuracy_before"] + 0.2
