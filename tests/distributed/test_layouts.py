"""TP=2, TP=2 with sequence parallelism, and DP=2 change nothing: the same losses, gradient norms and weights as one process."""

import pytest
import torch

from helpers.policy import make_policy, tiny_config
from helpers.samples import random_samples
from helpers.spawn import run_ranks
from skyrl_mega.data.packing import balance_and_pack

LAYOUTS = {
    "tensor": ["parallel.tensor=2"],
    "tensor_sequence": ["parallel.tensor=2", "parallel.sequence_parallel=true"],
    "data": [],
    "data_plain_optimizer": ["parallel.distributed_optimizer=false"],
}
SETTINGS = ["algorithm.entropy_coef=0.01", "optimizer.lr=1e-3"]


def two_updates(config) -> dict:
    """Losses and gradient norms of two updates on samples of uneven lengths, and the weights after them."""
    with make_policy(config) as policy:
        topology, updates = policy.topology, []
        for seed in (1, 2):
            batch = balance_and_pack(
                random_samples(5, 3, seed=seed),
                tokens_per_micro_batch=64,
                dp_rank=topology.dp_rank,
                dp_size=topology.dp_size,
                skip_zero_advantage=False,
                share_prompts=True,
                pad_to_multiple=topology.tp_size if config.parallel.sequence_parallel else 1,
            )
            updates.append(policy.train_step(batch))
        weights = {name: value.clone() for name, value in policy.iter_weights(torch.float32)}
    return {"updates": updates, "weights": weights}


def on_rank(rank: int, config) -> dict:
    return two_updates(config)


@pytest.fixture(scope="module", params=["llama-tied", "qwen3-untied"])
def single(request, tmp_path_factory):
    family, heads = request.param.split("-")
    config = tiny_config(tmp_path_factory.mktemp("layouts"), *SETTINGS, family=family, tied=heads == "tied")
    return family, config, two_updates(config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_compute_what_one_process_computes(single, layout):
    from skyrl_mega.config.load import load_config

    _, config, expected = single
    overrides = ["recipe=tiny", f"model.path={config.model.path}", f"trainer.run_dir={config.trainer.run_dir}"]
    for result in run_ranks(on_rank, 2, load_config([*overrides, *SETTINGS, *LAYOUTS[layout]])):
        for update, reference in zip(result["updates"], expected["updates"], strict=True):
            assert update["loss/total"] == pytest.approx(reference["loss/total"], abs=1e-5)
            assert update["update/grad_norm"] == pytest.approx(reference["update/grad_norm"], rel=1e-4)
            assert update["policy/entropy"] == pytest.approx(reference["policy/entropy"], rel=1e-5)
        assert result["weights"].keys() == expected["weights"].keys()
        for name, value in result["weights"].items():
            difference = (value - expected["weights"][name]).abs()
            assert difference.max() < 1e-4, name  # a tenth of the learning rate; see test_policy_oracle on Adam
            assert difference.mean() < 1e-6, name
