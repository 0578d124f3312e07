"""The critic's values, losses, gradient norms and weights are those of one process in every layout."""

import functools

import pytest
import torch

from helpers.critic import critic_batch, make_critic
from helpers.spawn import run_cases
from helpers.tiny import write_tiny_model
from skyrl_mega.config.load import load_config
from skyrl_mega.orchestration.layout_check import COMPARED_EPS
from skyrl_mega.orchestration.step_recorder import gather_rows

LR = 1e-3
SETTINGS = [
    f"critic.optimizer.lr={LR}",
    f"critic.optimizer.eps={COMPARED_EPS}",
    "critic.value_clip=0.5",
    "trainer.tokens_per_micro_batch=64",
    "rollout.max_model_len=64",
]
MODELS = {
    "llama": {"family": "llama", "tied": True, "num_hidden_layers": 4},
    "qwen3": {"family": "qwen3", "tied": False, "num_hidden_layers": 4},
    "qwen3_moe": {"family": "qwen3_moe", "tied": False},
}
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
#: Layout -> (ranks, model, overrides).
LAYOUTS: dict[str, tuple[int, str, list[str]]] = {
    "tp2": (2, "llama", ["parallel=tp2"]),
    "tp2_sp": (2, "qwen3", ["parallel=tp2_sp"]),
    "pp2": (2, "llama", ["parallel=pp2"]),
    "pp2_vpp2": (2, "llama", ["parallel=pp2_vpp2"]),
    "dp2": (2, "qwen3", ["parallel.distributed_optimizer=false"]),
    "dp2_overlap": (2, "llama", ["parallel=dp2", *OVERLAP]),
    "cp2": (2, "llama", ["parallel=cp2"]),
    "ep2": (2, "qwen3_moe", ["parallel=ep2"]),
    "tp2_sp_pp2": (4, "qwen3", ["parallel=tp2_pp2"]),
    "cp2_dp2": (4, "llama", ["parallel=cp2"]),
}


def two_updates(config) -> dict:
    """Values before, between and after two updates, their metrics, and the weights that they leave."""
    with make_critic(config) as critic:
        values, metrics = [], []
        for seed in (1, 2):
            batch, samples = critic_batch(config, critic.topology, seed)
            values.append(gather_rows(critic.compute_values(batch), batch, samples, critic.topology))
            metrics.append(critic.train_step(batch))
        values.append(gather_rows(critic.compute_values(batch), batch, samples, critic.topology))
        weights = {name: value.clone() for name, value in critic.iter_weights(torch.float32)}
        return {"values": values, "metrics": metrics, "weights": weights}


@pytest.fixture(scope="module")
def config_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critics")
    paths = {name: write_tiny_model(folder / name, **settings) for name, settings in MODELS.items()}

    def make(model: str, overrides: list[str]):
        return load_config(
            ["recipe=tiny", f"model.path={paths[model]}", f"trainer.run_dir={folder / 'run'}", *SETTINGS, *overrides]
        )

    return make


@pytest.fixture(scope="module")
def expected(config_of):
    return {model: two_updates(config_of(model, [])) for model in MODELS}


@pytest.fixture(scope="module")
def results(config_of):
    """Results by rank and layout, for all layouts of a number of ranks at the first request for one of them."""

    @functools.cache
    def get(ranks: int) -> list[dict] | AssertionError:
        configs = {name: (config_of(model, changes),) for name, (size, model, changes) in LAYOUTS.items() if size == ranks}
        try:
            return run_cases(two_updates, ranks, configs, timeout_s=300)
        except AssertionError as failure:
            return failure

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_computes_what_one_process_computes(layout, expected, results):
    ranks, model, _ = LAYOUTS[layout]
    everyone = results(ranks)
    if isinstance(everyone, AssertionError):
        raise everyone
    right = expected[model]
    assert any(row.abs().max() > 1e-3 for row in right["values"][2].values()), "the head has not moved: nothing is compared"
    for got in (rank[layout] for rank in everyone):
        for before, after in zip(right["values"], got["values"], strict=True):
            assert before.keys() == after.keys()
            assert max(float((row - after[index]).abs().max()) for index, row in before.items()) < 1e-4
        for before, after in zip(right["metrics"], got["metrics"], strict=True):
            for name in ("critic/loss", "critic/explained_variance", "critic/clip_fraction", "critic/value_mean"):
                assert after[name] == pytest.approx(before[name], abs=1e-5), name
            assert after["critic/grad_norm"] == pytest.approx(before["critic/grad_norm"], rel=1e-4)
        assert got["weights"].keys() == right["weights"].keys()
        for name, weight in right["weights"].items():
            difference = (got["weights"][name] - weight).abs()
            assert difference.max() < 0.05 * LR, name
            assert difference.mean() < 1e-3 * LR, name
