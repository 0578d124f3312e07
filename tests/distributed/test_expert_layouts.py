"""Expert load is counted once in every layout, the routers' losses split, and padding is harmless.

That expert parallelism changes nothing else is in `test_layout_matrix`.
"""

import pytest
from safetensors.torch import load_file

from helpers.policy import make_policy, tiny_config
from helpers.spawn import run_cases, run_ranks
from helpers.updates import clones, update
from skyrl_mega.config.load import load_config
from skyrl_mega.models.router import routers

SETTINGS = ["optimizer.lr=1e-3", "optimizer.eps=1e-4"]
BALANCED = ["model.moe_aux_loss_coef=0.05", "model.moe_z_loss_coef=0.001"]
#: With one data-parallel rank the micro-batches are those of one process. Of six experts two ranks hold three each.
#: Model -> its shape, layout and settings.
MODELS = {
    "balanced": ({"num_experts": 6}, "parallel=ep2_tp2", BALANCED),
    "half_dense": ({"mlp_only_layers": [0], "norm_topk_prob": False}, "parallel=pp2", []),
    "biased": ({"family": "glm4_moe", "n_routed_experts": 6}, "parallel=ep2_tp2", ["model.moe_bias_update_rate=0.01"]),
}


def two_updates(config, pad_to_multiple: int = 2) -> dict:
    """Metrics of two updates on samples of uneven lengths, and the weights after them."""
    with make_policy(config) as policy:
        updates = [update(policy, seed, num_groups=5, pad_to_multiple=pad_to_multiple) for seed in (1, 2)]
        weights = clones(policy)
    return {"updates": updates, "weights": weights}


def routed_tokens(rank: int, config) -> tuple[list[int], list[int]]:
    """Tokens that this rank's routers saw in an update, and what they were told of the whole batch; a number per layer."""
    from skyrl_mega.training import policy as policy_module

    seen: tuple = ()

    def look(chunks, topology) -> dict:
        nonlocal seen
        seen = [r.take_counts().num_tokens for r in routers(chunks)], [r.batch_tokens for r in routers(chunks)]
        return {}

    policy_module.expert_load_metrics = look
    two_updates(config)
    return seen


@pytest.mark.parametrize("layout", [["parallel=cp2", "parallel.expert=2"], ["parallel=ep2"]], ids=["context", "data"])
def test_the_balancing_loss_is_weighed_by_all_the_tokens_that_are_routed(paths, layout):
    """Context-parallel ranks pad their parts themselves: those tokens are routed too."""
    first, second = run_ranks(routed_tokens, 2, config_of(paths["balanced"], *layout, *BALANCED))
    assert [a + b for a, b in zip(first[0], second[0], strict=True)] == first[1] == second[1]


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict:
    return {
        name: tiny_config(tmp_path_factory.mktemp(name), **{"family": "qwen3_moe", "tied": False, **shape}).model.path
        for name, (shape, _, _) in MODELS.items()
    }


def config_of(path: str, *overrides: str):
    return load_config(["recipe=tiny", f"model.path={path}", "trainer.run_dir=runs/unused", *SETTINGS, *overrides])


@pytest.fixture(scope="module")
def single(paths) -> dict:
    return {name: two_updates(config_of(path, *MODELS[name][2])) for name, path in paths.items()}


@pytest.fixture(scope="module")
def sharded(paths) -> list[dict]:
    configs = {name: (config_of(path, MODELS[name][1], *MODELS[name][2]),) for name, path in paths.items()}
    return run_cases(two_updates, 2, configs)


@pytest.mark.parametrize("model", MODELS)
def test_load_balancing_loss_and_biases_are_those_of_one_process(paths, single, sharded, model):
    for results in sharded:
        for metrics, reference in zip(results[model]["updates"], single[model]["updates"], strict=True):
            for name in (
                "load_max_over_mean",
                "load_max_over_mean_worst_layer",
                "idle_experts",
                "router_entropy",
                "aux_loss",
                "z_loss",
            ):
                assert metrics[f"moe/{name}"] == pytest.approx(reference[f"moe/{name}"], rel=1e-5), name
            assert metrics["update/grad_norm"] == pytest.approx(reference["update/grad_norm"], rel=1e-5)
        for name, value in results[model]["weights"].items():
            difference = (value - single[model]["weights"][name]).abs()
            assert difference.max() < 5e-5, name  # a twentieth of the learning rate
    start = {name: value for name, value in load_file(f"{paths['biased']}/model.safetensors").items() if "bias" in name}
    moved = [(single["biased"]["weights"][name] - value).abs().max() for name, value in start.items() if "e_score" in name]
    assert min(moved) > 0.009  # or a bias that stays would pass
    assert all(update["moe/aux_loss"] > 2 * 0.99 for update in single["balanced"]["updates"])
    assert all(update["moe/aux_loss"] == 0 for update in single["half_dense"]["updates"])
    assert 1 < sharded[0]["balanced"]["updates"][0]["moe/rank_load_max_over_mean"] <= 2


def test_padding_tokens_are_routed_and_change_nothing(paths, single):
    """Padding fills the experts with tokens that the loss never sees; none is dropped to make room."""
    expected = single["half_dense"]
    result = two_updates(config_of(paths["half_dense"]), pad_to_multiple=16)
    assert result["updates"][0]["packing/padding_fraction"] > expected["updates"][0]["packing/padding_fraction"] + 0.05
    for metrics, reference in zip(result["updates"], expected["updates"], strict=True):
        assert metrics["loss/total"] == pytest.approx(reference["loss/total"], abs=1e-6)
        assert metrics["update/grad_norm"] == pytest.approx(reference["update/grad_norm"], rel=1e-5)
    for name, value in result["weights"].items():
        assert (value - expected["weights"][name]).abs().max() < 5e-5, name
