"""The proof that sharding changes nothing: losses, per-token logprobs, gradient norms and weights of one process in every layout.

Layouts of one number of ranks run one after the other in the same processes: starting those is most of the time.
"""

import functools

import pytest
import torch

from helpers.policy import make_policy
from helpers.spawn import run_cases
from helpers.tiny import write_tiny_model
from skyrl_mega.config.load import load_config
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.orchestration.layout_check import COMPARED_EPS, LayoutResult, compare_results, run_updates
from skyrl_mega.orchestration.loop import pack
from skyrl_mega.parallel.topology import init_topology

LR = 1e-3
#: With an entropy bonus no sample is skipped; 64 tokens make several micro-batches of uneven length.
SETTINGS = [
    "algorithm.entropy_coef=0.01",
    f"optimizer.lr={LR}",
    f"optimizer.eps={COMPARED_EPS}",
    "trainer.tokens_per_micro_batch=64",
    "rollout.max_model_len=64",
]
#: Model -> what is passed to `write_tiny_model`.
MODELS = {
    "llama": {"family": "llama", "tied": True, "num_hidden_layers": 4},
    "qwen3": {"family": "qwen3", "tied": False, "num_hidden_layers": 4},
    # Windows of 12 in every second layer, sequences of up to 64 tokens with shared prompts.
    "gemma3_text": {
        "family": "gemma3_text",
        "tied": True,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    # Of six experts two ranks hold three each.
    "qwen3_moe": {"family": "qwen3_moe", "tied": False, "num_experts": 6},
    "qwen2_moe": {"family": "qwen2_moe", "tied": True},
    "mixtral": {"family": "mixtral", "tied": False},
    # The first of two stages has no experts.
    "half_dense": {"family": "qwen3_moe", "tied": False, "num_hidden_layers": 4, "mlp_only_layers": [0, 1]},
    # Multi-latent attention in a dense layer and in one with experts.
    "deepseek_v3": {"family": "deepseek_v3", "tied": False},
    "latent_dense": {"family": "deepseek_v3", "tied": True, "first_k_dense_replace": 2},
    "glm4_moe": {"family": "glm4_moe", "tied": False},
}
DENSE = ("llama", "qwen3")
#: A loss that looks at whole sequences, with ratios to the engine that are far from 1; the model is llama's.
GSPO = [
    "algorithm.policy_loss=gspo",
    "algorithm.reduction=sequence_mean",
    "algorithm.old_logprobs=rollout",
    "algorithm.loss_options={clip_low: 1.0, clip_high: 1.0}",
]

#: Layout -> (ranks, the models that run in it, overrides). Four ranks on two cores take their time: one model each.
LAYOUTS: dict[str, tuple[int, tuple[str, ...], list[str]]] = {
    "tp2": (2, (*DENSE, "gspo", "latent_dense"), ["parallel=tp2"]),
    "tp2_sp": (2, (*DENSE, "qwen2_moe", "glm4_moe"), ["parallel=tp2_sp"]),  # experts whole beside split attention
    "tp2_sp_plain": (2, ("mixtral",), ["parallel=tp2_sp", "parallel.distributed_optimizer=false"]),
    "pp2": (2, (*DENSE, "half_dense", "gspo", "deepseek_v3", "glm4_moe"), ["parallel=pp2"]),
    "pp2_vpp2": (2, (*DENSE, "half_dense", "gemma3_text"), ["parallel=pp2_vpp2"]),
    "dp2": (2, DENSE, ["parallel.distributed_optimizer=false"]),
    "dp2_distopt": (2, (*DENSE, "qwen3_moe", "gspo"), ["parallel=dp2"]),
    "dp2_overlap": (2, DENSE, ["parallel=dp2", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
    "pp2_vpp2_overlap": (4, ("llama",), ["parallel=pp2_vpp2", "parallel.overlap_grad_reduce=true"]),
    "full_recompute": (2, ("llama", "gemma3_text"), ["parallel=tp2_sp", "model.recompute=full", "model.recompute_layers=2"]),
    "selective_recompute": (
        2,
        ("qwen3", "latent_dense"),
        ["parallel=tp2", "model.recompute=selective", "model.recompute_modules=[core_attn,mlp]"],
    ),
    "cp2": (2, (*DENSE, "gemma3_text", "latent_dense"), ["parallel=cp2"]),
    "cp2_whole_sequences": (2, ("llama", "gspo"), ["parallel=cp2", "trainer.share_prompts=off"]),
    "cp2_ep2": (2, ("qwen3_moe",), ["parallel=cp2", "parallel.expert=2"]),
    "ep2": (2, ("qwen3_moe", "mixtral", "glm4_moe"), ["parallel=ep2"]),
    "ep2_plain": (2, ("qwen2_moe",), ["parallel=ep2", "parallel.distributed_optimizer=false"]),
    "ep2_tp2": (2, ("qwen2_moe", "deepseek_v3"), ["parallel=ep2_tp2"]),
    "ep2_overlap": (
        2,
        ("qwen3_moe",),
        ["parallel=ep2", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
    ),
    "ep2_recompute": (2, ("qwen2_moe",), ["parallel=ep2", "model.recompute=selective", "model.recompute_modules=[mlp,moe]"]),
    "ep2_pp2": (4, ("qwen3_moe",), ["parallel=ep2", "parallel.pipeline=2"]),
    "ep2_tp2_dp2": (4, ("qwen2_moe",), ["parallel=ep2_tp2"]),
    "tp2_dp2": (4, ("llama",), ["parallel=tp2"]),
    "pp2_dp2": (4, ("llama",), ["parallel=pp2"]),
    "pp2_vpp2_dp2": (4, ("qwen3",), ["parallel=pp2_vpp2"]),
    "tp2_sp_pp2": (4, ("qwen3",), ["parallel=tp2_pp2"]),
    "cp4": (4, ("llama",), ["parallel.context=4", "parallel.distributed_optimizer=false"]),
    "cp2_tp2": (4, ("qwen3",), ["parallel=cp2", "parallel.tensor=2", "trainer.share_prompts=off"]),
    "cp2_tp2_sp": (4, ("llama",), ["parallel=cp2_tp2"]),
    "cp2_pp2": (4, ("llama",), ["parallel=cp2", "parallel.pipeline=2"]),
    "cp2_pp2_vpp2": (4, ("qwen3",), ["parallel=pp2_vpp2", "parallel.context=2"]),
    "cp2_dp2": (4, ("qwen3",), ["parallel=cp2"]),
}
CASES = [(layout, model) for layout, (_, models, _) in LAYOUTS.items() for model in models]


def two_updates(config) -> LayoutResult:
    topology = init_topology(config.parallel, torch.device("cpu"), seed=config.trainer.seed)
    try:
        return run_updates(config, topology, [random_samples(5, 3, seed=seed) for seed in (1, 2)])
    finally:
        topology.destroy()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write_tiny_model(folder / name, **settings) for name, settings in MODELS.items()}


@pytest.fixture(scope="module")
def config_of(models, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs")

    def make(model: str, overrides: list[str]):
        path = models["llama" if model == "gspo" else model]
        fixed = ["recipe=tiny", f"model.path={path}", f"trainer.run_dir={run_dir}"]
        return load_config([*fixed, *SETTINGS, *(GSPO if model == "gspo" else []), *overrides])

    return make


@pytest.fixture(scope="module")
def expected(config_of):
    return {model: two_updates(config_of(model, [])) for model in (*MODELS, "gspo")}


@pytest.fixture(scope="module")
def results(config_of):
    """Results by rank and case, for all cases of a number of ranks at the first request for one of them."""

    @functools.cache
    def get(ranks: int) -> list[dict] | AssertionError:
        cases = [(layout, model) for layout, model in CASES if LAYOUTS[layout][0] == ranks]
        configs = {(layout, model): (config_of(model, LAYOUTS[layout][2]),) for layout, model in cases}
        try:
            return run_cases(two_updates, ranks, configs, timeout_s=300)
        except AssertionError as failure:
            return failure

    return get


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_a_layout_computes_what_one_process_computes(layout, model, expected, results):
    ranks = results(LAYOUTS[layout][0])
    if isinstance(ranks, AssertionError):
        raise ranks
    everyone = [rank[layout, model] for rank in ranks]
    lines = list(compare_results(expected[model], everyone[0], LR))
    assert len(lines) == 10
    wrong = [line for line in lines if not line.agrees]
    assert not wrong, "\n".join(map(str, wrong))
    for other in everyone[1:]:  # what is reported must be the same wherever it is read
        assert [metrics["loss/total"] for metrics in other.metrics] == [metrics["loss/total"] for metrics in everyone[0].metrics]


def test_a_wrong_weight_is_found(expected):
    right = expected["llama"]
    name = "model.layers.1.mlp.up_proj.weight"
    weights = {**right.weights, name: right.weights[name] + 0.1 * LR * (torch.arange(64) == 5)}
    wrong = [
        line.name for line in compare_results(right, LayoutResult(right.logprobs, right.metrics, weights), LR) if not line.agrees
    ]
    assert wrong == [f"weights after the updates (most: {name})", f"mean weight difference (most: {name})"]


def updates_in_a_row(config) -> dict[str, torch.Tensor]:
    """Weights after three updates with nothing in between."""
    with make_policy(config) as policy:
        for seed in (1, 2, 3):
            policy.train_step(pack(config, policy.topology, random_samples(5, 3, seed=seed), share_prompts=True))
        return {name: value.clone() for name, value in policy.iter_weights(torch.float32)}


@pytest.mark.parametrize("model", DENSE)
def test_weights_gathered_during_the_next_forward_are_the_updated_ones(model, config_of):
    """The head's weight is used by no module's forward, so no hook of Megatron's waits for it."""
    plain = ["parallel=dp2"]
    overlap = [*plain, "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
    configs = {"plain": (config_of(model, plain),), "overlap": (config_of(model, overlap),)}
    for weights in run_cases(updates_in_a_row, 2, configs):
        for name, value in weights["plain"].items():
            assert torch.allclose(value, weights["overlap"][name], atol=1e-6), name
