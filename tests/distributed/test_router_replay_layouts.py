"""Every layout sends each token to the experts that are replayed for it, also where backward computes activations again."""

from __future__ import annotations

import pytest
import torch

from helpers.policy import make_policy, tiny_config
from helpers.routing import own_routing, with_random_routing
from helpers.spawn import run_cases
from helpers.updates import clones, variant
from skyrl_mega.data.packing import balance_and_pack
from skyrl_mega.data.synthetic import random_samples

SHAPE = {"num_hidden_layers": 4, "num_experts": 6, "mlp_only_layers": [1]}
REPLAY = ("model.router_replay=rollout", "optimizer.lr=1e-3", "optimizer.eps=1e-4")
LAYOUTS = {
    "experts and tensor": ["parallel=ep2_tp2"],
    "context": ["parallel=cp2"],
    "interleaved pipeline": ["parallel=pp2_vpp2", "model.recompute=full"],
    "pipeline, experts again": ["parallel=pp2", "model.recompute=selective", "model.recompute_modules=[moe]"],
}


def replayed_update(config) -> dict:
    """Metrics of an update that replays random routing, the weights after it, and what the routers would have chosen before."""
    samples = with_random_routing(random_samples(6, 3, seed=1), num_layers=4, num_experts=6, seed=2)
    with make_policy(config) as policy:
        topology = policy.topology

        def packed():
            return balance_and_pack(
                samples,
                tokens_per_micro_batch=64,
                dp_rank=topology.dp_rank,
                dp_size=topology.dp_size,
                skip_zero_advantage=False,
                share_prompts=True,
                micro_batch_multiple=2,
            )

        return {"own": own_routing(policy, packed()), "metrics": policy.train_step(packed()), "weights": clones(policy)}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[dict, list[dict]]:
    config = tiny_config(tmp_path_factory.mktemp("moe"), family="qwen3_moe", tied=False, **SHAPE)
    configs = {name: (variant(config, *REPLAY, *layout),) for name, layout in LAYOUTS.items()}
    sharded = run_cases(replayed_update, 2, configs)
    return replayed_update(variant(config, *REPLAY)), sharded


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_replayed_update_is_that_of_one_process(results, layout):
    single, sharded = results
    for result in (ranks[layout] for ranks in sharded):
        for name in ("update/grad_norm", "loss/policy", "moe/replay_disagreement", "moe/replayed", "moe/idle_experts"):
            # Padding of a layout's own is routed freely: a few tokens more in the denominator.
            tolerance = 0.05 if name == "moe/replayed" else 1e-4
            assert result["metrics"][name] == pytest.approx(single["metrics"][name], rel=tolerance, abs=1e-7), name
        for name, value in result["weights"].items():
            assert (value - single["weights"][name]).abs().max() < 5e-5, name
    assert single["metrics"]["moe/replay_disagreement"] > 0.5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pass_records_the_whole_routing_on_every_rank(results, layout):
    single, sharded = results
    seen = set()
    for ranks in sharded:
        for index, rows in ranks[layout]["own"].items():
            expected = single["own"][index]
            experts = torch.tensor([0, 2, 3])  # the other layer has none
            assert torch.equal(rows[:, experts].sort(-1).values, expected[:, experts].sort(-1).values)
            seen.add(index)
    assert seen == set(single["own"])
    assert len(seen) == 18
