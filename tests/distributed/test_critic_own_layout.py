"""A critic with a layout of its own beside the policy's: both compute what one process does, and so does who resumes."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from helpers.critic import critic_batch, make_critic
from helpers.policy import make_policy
from helpers.spawn import run_cases
from helpers.tiny import write_tiny_model
from skyrl_mega.checkpoint import state as checkpoint
from skyrl_mega.checkpoint import store
from skyrl_mega.config.load import load_config
from skyrl_mega.errors import ConfigError
from skyrl_mega.orchestration.layout_check import COMPARED_EPS
from skyrl_mega.types import TrainState

LR = 1e-3
SETTINGS = [
    *(f"{section}optimizer.{name}" for section in ("", "critic.") for name in (f"lr={LR}", f"eps={COMPARED_EPS}")),
    "critic.value_clip=0.5",
    "trainer.tokens_per_micro_batch=64",
    "rollout.max_model_len=64",
]
MODELS = {
    "llama": {"family": "llama", "tied": True, "num_hidden_layers": 4},
    "qwen3_moe": {"family": "qwen3_moe", "tied": False},
}
STATE = TrainState(2, 2, {}, num_trained_groups=10, num_optimizer_steps=2, num_critic_updates=2)
#: Layouts -> (ranks, model, overrides).
LAYOUTS: dict[str, tuple[int, str, list[str]]] = {
    "policy tp2, critic dp2": (2, "llama", ["parallel=tp2", "critic.parallel.tensor=1"]),
    "policy dp2, critic tp2": (2, "llama", ["parallel=dp2", "critic.parallel.tensor=2"]),
    "policy pp2 interleaved, critic cp2": (
        2,
        "llama",
        ["parallel=pp2_vpp2", "critic.parallel.pipeline=1", "critic.parallel.virtual_pipeline=1", "critic.parallel.context=2"],
    ),
    "policy ep2, critic tp2 with experts of its own": (
        2,
        "qwen3_moe",
        ["parallel=ep2", "critic.parallel.tensor=2", "critic.parallel.expert=1"],
    ),
    "policy tp2 pp2, critic cp2 dp2": (
        4,
        "llama",
        ["parallel=tp2_pp2", "critic.parallel.tensor=1", "critic.parallel.pipeline=1", "critic.parallel.context=2"],
    ),
}


def play(config, *, first: int = 1, last: int = 2, resume: bool = False, save: bool = False) -> dict:
    """Updates `first` to `last` of policy and critic by turns: metrics, and the weights that they leave."""
    with make_policy(config) as policy, make_critic(config, topology=policy.topology) as critic:
        if resume:
            path = store.find_checkpoint(config.trainer.run_dir)
            assert checkpoint.load(path, policy, policy.topology, critic=critic) == STATE
        has_own = critic.topology is not policy.topology
        metrics = []
        for seed in range(first, last + 1):
            of_policy, _ = critic_batch(config, policy.topology, seed)
            of_critic, _ = critic_batch(critic.config, critic.topology, seed)
            metrics.append(critic.train_step(of_critic) | policy.train_step(of_policy))
        if save:
            checkpoint.save(config.trainer.run_dir, policy, STATE, policy.topology, keep_last=1, critic=critic)
        weights = {name: value.clone() for name, value in policy.iter_weights(torch.float32)}
        with critic.topology.in_force():
            weights |= {f"critic {name}": value.clone() for name, value in critic.iter_weights(torch.float32)}
        return {"metrics": metrics, "weights": weights, "has_own": has_own}


@pytest.fixture(scope="module")
def config_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critics")
    paths = {name: write_tiny_model(folder / name, **settings) for name, settings in MODELS.items()}

    def make(model: str, overrides: list[str], run: str):
        return load_config(
            [
                "recipe=tiny",
                f"model.path={paths[model]}",
                f"trainer.run_dir={folder / run.replace(',', '')}",
                *SETTINGS,
                *overrides,
            ]
        )

    return make


@pytest.fixture(scope="module")
def expected(config_of):
    """What one process computes, which also leaves a checkpoint after two updates; and its third update."""
    configs = {model: config_of(model, [], f"one process {model}") for model in MODELS}
    two = {model: play(config, save=True) for model, config in configs.items()}
    third = {model: play(config, first=3, last=3, resume=True) for model, config in configs.items()}
    return two, third


@pytest.fixture(scope="module")
def results(config_of):
    """Results by rank and layout, for all layouts of a number of ranks at the first request for one of them."""

    @functools.cache
    def get(ranks: int) -> list[dict] | AssertionError:
        configs = {name: (config_of(model, changes, name),) for name, (n, model, changes) in LAYOUTS.items() if n == ranks}
        try:
            return run_cases(functools.partial(play, save=True), ranks, configs, timeout_s=300)
        except AssertionError as failure:
            return failure

    return get


def assert_alike(got: dict, right: dict) -> None:
    for before, after in zip(right["metrics"], got["metrics"], strict=True):
        for name in ("loss/total", "critic/loss", "critic/explained_variance", "critic/value_mean"):
            assert after[name] == pytest.approx(before[name], abs=1e-5), name
        for name in ("update/grad_norm", "critic/grad_norm"):
            assert after[name] == pytest.approx(before[name], rel=1e-4), name
    assert got["weights"].keys() == right["weights"].keys()
    for name, weight in right["weights"].items():
        difference = (got["weights"][name] - weight).abs()
        assert difference.max() < 0.05 * LR, name
        assert difference.mean() < 1e-3 * LR, name


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_policy_and_critic_compute_what_one_process_computes(layouts, expected, results):
    ranks, model, _ = LAYOUTS[layouts]
    everyone = results(ranks)
    if isinstance(everyone, AssertionError):
        raise everyone
    assert all(rank[layouts]["has_own"] for rank in everyone)
    for rank in everyone:
        assert_alike(rank[layouts], expected[0][model])


@pytest.mark.parametrize("layouts", [name for name, (ranks, _, _) in LAYOUTS.items() if ranks == 2])
def test_a_checkpoint_of_two_layouts_goes_on_in_one_process(layouts, config_of, expected, results):
    everyone = results(2)
    if isinstance(everyone, AssertionError):
        raise everyone
    _, model, _ = LAYOUTS[layouts]
    assert_alike(play(config_of(model, [], layouts), first=3, last=3, resume=True), expected[1][model])


def test_a_checkpoint_of_one_process_goes_on_in_two_layouts(config_of, expected):
    cases = {name: (model, changes) for name, (ranks, model, changes) in LAYOUTS.items() if ranks == 2}
    configs = {name: (config_of(model, changes, f"one process {model}"),) for name, (model, changes) in cases.items()}
    third = functools.partial(play, first=3, last=3, resume=True)
    for rank in run_cases(third, 2, configs, timeout_s=300):
        for name, (model, _) in cases.items():
            assert_alike(rank[name], expected[1][model])


def test_sizes_that_do_not_divide_the_world_are_refused(config_of):
    config = config_of("llama", [], "refused")
    words = r"world size \(1\) must be a multiple of .* \(2 x 1 x 1 = 2\)"
    with make_policy(config) as policy, pytest.raises(ConfigError, match=words):
        policy.topology.lay_out(replace(config.parallel, tensor=2), seed=0)
