"""Tensor, sequence, pipeline and data parallelism change nothing: the losses, gradient norms and weights of one process."""

import pytest
import torch

from helpers.policy import make_policy, tiny_config
from helpers.samples import random_samples
from helpers.spawn import run_ranks
from skyrl_mega.data.packing import balance_and_pack

#: ranks, overrides
LAYOUTS = {
    "tensor": (2, ["parallel.tensor=2"]),
    "tensor_sequence": (2, ["parallel.tensor=2", "parallel.sequence_parallel=true"]),
    "data": (2, []),
    "data_plain_optimizer": (2, ["parallel.distributed_optimizer=false"]),
    "pipeline": (2, ["parallel.pipeline=2"]),
    "pipeline_data": (4, ["parallel.pipeline=2"]),
    "pipeline_tensor_sequence": (4, ["parallel.pipeline=2", "parallel.tensor=2", "parallel.sequence_parallel=true"]),
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
            logprobs = torch.cat(policy.compute_logprobs(batch))
            updates.append(policy.train_step(batch) | {"logprobs": float(logprobs.sum()) if topology.dp_size == 1 else 0.0})
        weights = {name: value.clone() for name, value in policy.iter_weights(torch.float32)}
    return {"updates": updates, "weights": weights}


def on_rank(rank: int, config) -> dict:
    return two_updates(config)


@pytest.fixture(scope="module", params=["llama-tied", "qwen3-untied"])
def single(request, tmp_path_factory):
    family, heads = request.param.split("-")
    config = tiny_config(tmp_path_factory.mktemp("layouts"), *SETTINGS, family=family, tied=heads == "tied")
    return family, config, two_updates(config)


#: Four ranks on two cores take their time: one family each.
ONLY = {"pipeline_data": "llama", "pipeline_tensor_sequence": "qwen3"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_ranks_compute_what_one_process_computes(single, layout):
    from skyrl_mega.config.load import load_config

    family, config, expected = single
    if ONLY.get(layout, family) != family:
        pytest.skip(f"{layout} runs on {ONLY[layout]}")
    overrides = ["recipe=tiny", f"model.path={config.model.path}", f"trainer.run_dir={config.trainer.run_dir}"]
    ranks, sharding = LAYOUTS[layout]
    for result in run_ranks(on_rank, ranks, load_config([*overrides, *SETTINGS, *sharding])):
        for update, reference in zip(result["updates"], expected["updates"], strict=True):
            assert update["loss/total"] == pytest.approx(reference["loss/total"], abs=1e-5)
            assert update["update/grad_norm"] == pytest.approx(reference["update/grad_norm"], rel=1e-4)
            assert update["policy/entropy"] == pytest.approx(reference["policy/entropy"], rel=1e-5)
            if update["logprobs"] != 0:
                assert update["logprobs"] == pytest.approx(reference["logprobs"], rel=1e-5)
        assert result["weights"].keys() == expected["weights"].keys()
        for name, value in result["weights"].items():
            difference = (value - expected["weights"][name]).abs()
            assert difference.max() < 1e-4, name  # a tenth of the learning rate; see test_policy_oracle on Adam
            assert difference.mean() < 1e-6, name
