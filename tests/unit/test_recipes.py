"""The recipes that follow a paper compose over the quickstart, and name algorithms that exist."""

from __future__ import annotations

import pytest

from skyrl_mega.algorithms.advantages import ADVANTAGES
from skyrl_mega.algorithms.check import check_algorithm
from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES
from skyrl_mega.config.load import load_config
from skyrl_mega.config.validate import validate
from skyrl_mega.orchestration.teacher import check_teacher


@pytest.mark.parametrize("name", ["dapo", "rloo", "gspo", "cispo", "distill"])
def test_a_recipe_runs_the_quickstarts_task_by_another_algorithm(name):
    recipe, quickstart = load_config([f"recipe={name}"]), load_config(["recipe=quickstart"])
    assert recipe.trainer.run_dir == f"runs/{name}"
    assert recipe.algorithm != quickstart.algorithm
    for section in ("model", "env", "rollout", "optimizer", "evaluation"):
        assert getattr(recipe, section) == getattr(quickstart, section)
    # Runs are compared by what they sample.
    samples = [c.trainer.prompts_per_step * c.trainer.samples_per_prompt for c in (recipe, quickstart)]
    assert samples[0] == samples[1]
    assert validate(recipe, check_files=False) == []
    if recipe.algorithm.advantage not in ADVANTAGES or recipe.algorithm.policy_loss not in POLICY_LOSSES:
        pytest.skip(f"{recipe.algorithm.advantage} or {recipe.algorithm.policy_loss} has no function yet")
    check_algorithm(recipe.algorithm)
    check_teacher(recipe)


def test_recipe_lora_is_the_quickstart_with_adapters_and_a_larger_step():
    recipe, quickstart = load_config(["recipe=lora"]), load_config(["recipe=quickstart"])
    assert quickstart.lora.rank == 0 < recipe.lora.rank
    assert recipe.optimizer.lr == pytest.approx(10 * quickstart.optimizer.lr)
    for section in ("model", "env", "rollout", "algorithm", "evaluation"):
        assert getattr(recipe, section) == getattr(quickstart, section)
    assert recipe.trainer.max_steps == quickstart.trainer.max_steps
    assert validate(recipe, check_files=False) == []
