"""Every setting of AdamW and Muon changes the update as its formula says: float64, gradients given, one process and several.

The gradients are written into Megatron's buffers, so that nothing but the optimizer is computed.
"""

import math
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.policy import make_policy
from helpers.spawn import run_cases
from helpers.tiny import write_tiny_model
from skyrl_mega.checkpoint.state import load, save
from skyrl_mega.checkpoint.store import find_checkpoint
from skyrl_mega.config.learning_rate import learning_rate
from skyrl_mega.config.load import load_config
from skyrl_mega.errors import CheckpointError
from skyrl_mega.training.muon import COEFFICIENTS, newton_schulz, scale
from skyrl_mega.types import TrainState

UPDATES = 3
BASE = ["optimizer.lr=1e-2", "optimizer.clip_grad_norm=0", "optimizer.weight_decay=0", "optimizer.eps=1e-3"]
ADAMW = {
    "base": [],
    "lr": ["optimizer.lr=2e-2"],
    "schedule": ["optimizer.schedule=linear", "optimizer.total_updates=4", "optimizer.warmup_updates=1"],
    "beta1": ["optimizer.beta1=0.5"],
    "beta2": ["optimizer.beta2=0.9"],
    "eps": ["optimizer.eps=1e-1"],
    "weight_decay": ["optimizer.weight_decay=0.5"],
    "clip_grad_norm": ["optimizer.clip_grad_norm=0.5"],
}
MUON_BASE = ["optimizer.name=muon", "parallel.distributed_optimizer=false"]
MUON = {
    "base": [],
    "lr": ["optimizer.lr=2e-2"],
    "weight_decay": ["optimizer.weight_decay=0.5"],
    "clip_grad_norm": ["optimizer.clip_grad_norm=0.5", "optimizer.schedule=cosine", "optimizer.total_updates=5"],
    "momentum": ["optimizer.muon.momentum=0.5"],
    "nesterov": ["optimizer.muon.nesterov=false"],
    "steps": ["optimizer.muon.steps=3"],
    "scale": ["optimizer.muon.scale=spectral"],
    "beta1": ["optimizer.beta1=0.5"],
}
CASES = {f"adamw {name}": [*BASE, *changes] for name, changes in ADAMW.items()}
CASES |= {f"muon {name}": [*BASE, *MUON_BASE, *changes] for name, changes in MUON.items()}


def gradient(name: str, shape: tuple[int, ...], update: int) -> np.ndarray:
    """The gradient of a Hugging Face tensor in an update, float32 values as float64."""
    random = np.random.default_rng([zlib.crc32(name.encode()), update])
    return (0.05 * random.standard_normal(shape)).astype(np.float32).astype(np.float64)


def hf_gradients(policy, update: int) -> dict[str, torch.Tensor]:
    shapes = policy.weights.exporter.shapes
    return {name: torch.from_numpy(gradient(name, shape, update)).float() for name, shape in shapes.items()}


def updated(config, saved_after: int = 0, *, loaded_from: Path | None = None) -> dict:
    """Weights by Hugging Face names, gradient norms and rates after UPDATES updates by given gradients.

    `saved_after`: writes a checkpoint after so many and ends; `loaded_from`: goes on from one.
    """
    with make_policy(config) as policy:
        if loaded_from is not None:
            load(loaded_from, policy, policy.topology)
        first, last = policy.num_updates, saved_after or UPDATES
        # The loader puts Hugging Face tensors where they belong in a model: so it puts gradients, in a model of its own.
        carriers = [make_gradients(config, policy, update) for update in range(first, last)]
        results = []
        for carrier in carriers:
            for ddp in policy.ddps:
                ddp.zero_grad_buffer()
            policy.optimizer.zero_grad()
            for chunk, given in zip(policy.chunks, carrier, strict=True):
                for parameter, value in zip(chunk.parameters(), given, strict=True):
                    parameter.main_grad.copy_(value)
            results.append(policy._apply_gradients())
        if saved_after:
            state = TrainState(saved_after, saved_after, {}, 1, num_optimizer_steps=policy.num_updates)
            save(config.trainer.run_dir, policy, state, policy.topology, keep_last=1)
        weights = {name: value.clone() for name, value in policy.iter_weights(torch.float32)}
        return {"weights": weights, "results": results}


def make_gradients(config, policy, update: int) -> list[list[torch.Tensor]]:
    """The gradients of an update as each chunk's parameters hold them."""
    from safetensors.torch import save_file

    from skyrl_mega.models.build import build_model
    from skyrl_mega.models.hf_io import load_hf_weights

    folder = f"{config.model.path}_gradients_{update}_{os.environ.get('RANK', 'alone')}"
    if not os.path.isdir(folder):
        os.makedirs(folder)
        os.link(f"{config.model.path}/config.json", f"{folder}/config.json")
        save_file(hf_gradients(policy, update), f"{folder}/model.safetensors", metadata={"format": "pt"})
    chunks = build_model(load_config([*base_overrides(folder, config.trainer.run_dir), *layout_of(config)]), policy.topology)
    load_hf_weights(chunks, folder, policy.topology)
    return [[parameter.detach() for parameter in chunk.parameters()] for chunk in chunks]


def base_overrides(path, run_dir) -> list[str]:
    return [
        "recipe=tiny",
        f"model.path={path}",
        f"trainer.run_dir={run_dir}",
        "trainer.max_steps=10",
        "trainer.updates_per_step=1",
    ]


def layout_of(config) -> list[str]:
    parallel = config.parallel
    sequence = str(parallel.sequence_parallel).lower()
    sizes = [f"parallel.{axis}={getattr(parallel, axis)}" for axis in ("tensor", "pipeline", "expert")]
    return [*sizes, f"parallel.sequence_parallel={sequence}"]


# ---- the formulas ---------------------------------------------------------------------------------------------------------


def is_muons(name: str, shape: tuple[int, ...]) -> bool:
    is_gate = name.endswith(("mlp.gate.weight", "mlp.shared_expert_gate.weight"))
    return len(shape) == 2 and ".layers." in name and not is_gate


def expected(config, before: dict[str, np.ndarray]) -> dict:
    """AdamW (arXiv:1711.05101, algorithm 2) and Muon (arXiv:2502.16982) in float64."""
    settings = config.optimizer
    weights = {name: value.copy() for name, value in before.items()}
    first = {name: np.zeros_like(value) for name, value in weights.items()}
    second = {name: np.zeros_like(value) for name, value in weights.items()}
    results = []
    for update in range(UPDATES):
        gradients = {name: gradient(name, value.shape, update) for name, value in weights.items()}
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        factor = min(1.0, settings.clip_grad_norm / (norm + 1e-6)) if settings.clip_grad_norm > 0 else 1.0
        lr = learning_rate(settings, update, planned_updates=10)
        results.append((norm, lr))
        for name, weight in weights.items():
            g = factor * gradients[name]
            decay = settings.weight_decay if weight.ndim > 1 else 0.0
            if settings.name == "muon" and is_muons(name, weight.shape):
                mu = settings.muon.momentum
                first[name] = mu * first[name] + g
                direction = g + mu * first[name] if settings.muon.nesterov else first[name]
                step = muon_scale(weight.shape, settings.muon.scale) * polynomial_of(direction, settings.muon.steps)
            else:
                first[name] = settings.beta1 * first[name] + (1 - settings.beta1) * g
                second[name] = settings.beta2 * second[name] + (1 - settings.beta2) * g**2
                corrected = second[name] / (1 - settings.beta2 ** (update + 1))
                step = first[name] / (1 - settings.beta1 ** (update + 1)) / (np.sqrt(corrected) + settings.eps)
            weights[name] = weight - lr * decay * weight - lr * step
    return {"weights": weights, "results": results}


def muon_scale(shape, kind):
    return 0.2 * math.sqrt(max(shape)) if kind == "rms" else math.sqrt(max(1.0, shape[0] / shape[1]))


def polynomial_of(matrix: np.ndarray, steps: int) -> np.ndarray:
    """U f(S) V^T: what Newton-Schulz does to singular values, done to them alone."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


# ---- tests ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("optimizers")
    path = write_tiny_model(folder / "model", "qwen2", tied=False)
    experts = write_tiny_model(folder / "experts", "qwen2_moe", tied=False)

    def make(*overrides, has_experts=False):
        return load_config([*base_overrides(experts if has_experts else path, folder / "run"), *overrides])

    return make


def weights_before(config) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file

    return {name: value.double().numpy() for name, value in load_file(f"{config.model.path}/model.safetensors").items()}


def agree(got: dict, right: dict, lr: float) -> None:
    assert [norm for norm, _ in got["results"]] == pytest.approx([norm for norm, _ in right["results"]], rel=1e-5)
    assert [rate for _, rate in got["results"]] == pytest.approx([rate for _, rate in right["results"]])
    assert got["weights"].keys() == right["weights"].keys()
    for name, weight in right["weights"].items():
        np.testing.assert_allclose(got["weights"][name].double().numpy(), weight, atol=2e-3 * lr, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_setting_changes_the_update_as_its_formula_says(case, make_config):
    config = make_config(*CASES[case])
    before = weights_before(config)
    right = expected(config, before)
    agree(updated(config), right, config.optimizer.lr)
    base = f"{case.split()[0]} base"
    if case != base:
        usual = expected(make_config(*CASES[base]), before)["weights"]
        moved = max(np.abs(right["weights"][name] - usual[name]).max() for name in usual)
        assert moved > 0.05 * config.optimizer.lr, "the setting must show"
    if case == "adamw weight_decay":
        usual = expected(make_config(*CASES[base]), before)["weights"]
        assert all(np.array_equal(right["weights"][n], usual[n]) for n in usual if usual[n].ndim == 1), "norms and biases: none"


def test_small_updates_of_bfloat16_weights_add_up_in_float32_masters(make_config):
    # Each update is less than half of what bfloat16 can tell apart at these weights; three of them are more.
    for name in ("adamw", "muon"):
        config = make_config("precision=bfloat16", *CASES[f"{name} base"], "optimizer.lr=1e-4")
        before = {n: torch.from_numpy(w).bfloat16().double().numpy() for n, w in weights_before(config).items()}
        right = expected(config, before)["weights"]
        got = updated(config)["weights"]
        for key, weight in right.items():
            rounded = torch.from_numpy(weight).bfloat16().double()
            assert (got[key].double() != rounded).double().mean() < 0.01, f"{name} {key}: only ties may round otherwise"


RANKS = {
    "dp2 adamw": ["parallel=dp2", *BASE, "optimizer.weight_decay=0.1", "optimizer.clip_grad_norm=0.5"],
    "dp2 adamw, overlapped": ["parallel=dp2", *BASE, "optimizer.beta1=0.5", "parallel.overlap_param_gather=true"],
    "dp2 adamw, replicated": ["parallel=dp2", *BASE, "parallel.distributed_optimizer=false", "optimizer.beta2=0.9"],
    "dp2 muon": ["parallel=dp2", *BASE, *MUON_BASE, "optimizer.weight_decay=0.1"],
    "tp2 muon": ["parallel=tp2", *BASE, *MUON_BASE, "optimizer.clip_grad_norm=0.5", "optimizer.muon.nesterov=false"],
    "tp2 muon, saved": ["parallel=tp2", *BASE, *MUON_BASE, "optimizer.beta1=0.5"],
    "pp2 muon": ["parallel=pp2", *BASE, *MUON_BASE, "optimizer.weight_decay=0.1"],
    "ep2 muon, experts": ["parallel=ep2", *BASE, *MUON_BASE, "optimizer.clip_grad_norm=0.5"],
    "tp2 adamw": ["parallel=tp2", *BASE, "optimizer.weight_decay=0.1"],
}


SAVED = "tp2 muon, saved"


def test_several_ranks_make_the_update_of_the_formula_and_one_goes_on_from_their_checkpoint(make_config):
    configs = {case: make_config(*overrides, has_experts="experts" in case) for case, overrides in RANKS.items()}
    cases = {case: (config, UPDATES - 1 if case == SAVED else 0) for case, config in configs.items()}
    for results in run_cases(updated, 2, cases, timeout_s=200):
        for case, config in configs.items():
            if case != SAVED:
                agree(results[case], expected(config, weights_before(config)), config.optimizer.lr)
    alone = make_config(*RANKS[SAVED][1:])
    right = expected(alone, weights_before(alone))
    got = updated(alone, loaded_from=find_checkpoint(alone.trainer.run_dir))
    agree(got, {**right, "results": right["results"][-1:]}, alone.optimizer.lr)
    with pytest.raises(CheckpointError, match=r"saved with `optimizer\.name=muon`, and this run asks for adamw"):
        updated(make_config(*BASE), loaded_from=find_checkpoint(alone.trainer.run_dir))


@pytest.mark.parametrize("shape", [(32, 32), (24, 80), (80, 24)])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    got = newton_schulz(matrix, 5).double().numpy()
    np.testing.assert_allclose(got, polynomial_of(matrix.double().numpy(), 5), atol=1e-4)
    u, _, vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    values = np.linalg.svd(got, compute_uv=False)
    assert 0.6 < values.min() < values.max() < 1.25
    assert np.abs(got - u @ vt).max() < 0.4
    assert torch.equal(newton_schulz(torch.zeros(shape), 5), torch.zeros(shape))
    assert scale(torch.Size(shape), "rms") == 0.2 * math.sqrt(max(shape))
