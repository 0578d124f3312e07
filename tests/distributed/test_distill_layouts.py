"""A distillation over the teacher's top-k tokens is the same in every layout: split vocabulary, sequences, layers."""

from __future__ import annotations

import pytest
import torch

from helpers.spawn import run_cases
from helpers.tiny import write_tiny_model
from skyrl_mega.config.load import load_config
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.orchestration.layout_check import COMPARED_EPS, compare_results, run_updates
from skyrl_mega.parallel.topology import init_topology

LR = 1e-3
LAYOUTS = {"tp2": ["parallel=tp2"], "cp2": ["parallel=cp2"], "pp2": ["parallel=pp2"]}
SETTINGS = [
    *("algorithm.policy_loss=distill_topk", "teacher.topk=5", "algorithm.loss_options.beta=0.4", "algorithm.entropy_coef=0.01"),
    *(f"optimizer.lr={LR}", f"optimizer.eps={COMPARED_EPS}", "trainer.tokens_per_micro_batch=64", "rollout.max_model_len=64"),
]


def two_updates(config):
    topology = init_topology(config.parallel, torch.device("cpu"), seed=config.trainer.seed)
    try:
        return run_updates(config, topology, [random_samples(4, 3, seed=seed) for seed in (1, 2)])
    finally:
        topology.destroy()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(one process's result, rank 0's in every layout)."""
    folder = tmp_path_factory.mktemp("distill")
    path = write_tiny_model(folder / "model", "llama", tied=True)
    fixed = ["recipe=tiny", f"model.path={path}", f"trainer.run_dir={folder / 'run'}", *SETTINGS]
    configs = {layout: (load_config([*fixed, *overrides]),) for layout, overrides in LAYOUTS.items()}
    ranks = run_cases(two_updates, 2, configs, timeout_s=200)
    return two_updates(load_config(fixed)), ranks[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_towards_a_teacher_are_those_of_one_process(layout, results):
    expected, by_layout = results
    assert expected.metrics[0]["loss/policy"] > 1e-3
    wrong = [line for line in compare_results(expected, by_layout[layout], LR) if not line.agrees]
    assert not wrong, "\n".join(map(str, wrong))
