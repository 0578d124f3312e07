"""The experts that vLLM chose are those that are trained: what the engine tells, what that does to the mismatch, a whole run."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
import torch

from helpers import even_env
from helpers.spawn import free_port, run_ranks
from helpers.tiny import write_tiny_model
from skyrl_mega.telemetry.metrics import read_metrics

PROMPTS = [[(7 * i) % 250 + 5 for i in range(length)] for length in (70, 40, 9)] * 4
#: Sizes that vLLM's CPU experts take: multiples of 32.
SIZES = {"hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 3}


def make_routers_undecided(chunks) -> None:
    """Four experts each look nearly alike to a router, which therefore chooses two of them by the last bits of what it sees."""
    from skyrl_mega.models.router import routers

    with torch.no_grad():
        for router in routers(chunks):
            alike = router.weight[::4].repeat_interleave(4, 0)
            router.weight.copy_(alike + 0.001 * torch.randn_like(alike))


def make_experts_alike(chunks) -> None:
    """Which expert computes a token is then all the same, as in a dense model."""
    with torch.no_grad():
        for layer in chunks[0].decoder.layers:
            first, *others = layer.mlp.experts.local_experts
            for expert in others:
                expert.load_state_dict(first.state_dict())


def observe(rank: int, folder) -> dict:
    """Runs in a process of its own: a bfloat16 engine and a float32 policy with the same weights.

    For experts that differ and for experts that are alike: the mean |engine logprob - policy logprob| with free and with replayed
    routing, and how often the routers disagree.
    """
    from helpers.routing import own_routing
    from helpers.weight_fleet import one_engine_sink
    from skyrl_mega.config.load import load_config
    from skyrl_mega.config.schema import RolloutConfig
    from skyrl_mega.data.packing import balance_and_pack, unpack
    from skyrl_mega.data.routing import RoutedTokens
    from skyrl_mega.models.hf_io import HFExporter
    from skyrl_mega.parallel.topology import init_topology
    from skyrl_mega.rollout.vllm_engine import VLLMEngine
    from skyrl_mega.training.policy import Policy
    from skyrl_mega.types import GenerationRequest, SamplingParams, TrainSample
    from skyrl_mega.weights.publish import publish

    path = write_tiny_model(folder, "qwen3_moe", tied=False, num_experts=8, **SIZES)
    settings = ["recipe=tiny", f"model.path={path}", f"trainer.run_dir={folder / 'run'}", "model.router_replay=rollout"]
    config = load_config([*settings, "trainer.tokens_per_micro_batch=256"])
    topology = init_topology(config.parallel, torch.device("cpu"), seed=0)
    rollout = RolloutConfig(dtype="bfloat16", max_model_len=128, max_num_seqs=16)
    start = dict(model_path=str(path), seed=0, threads=1, in_process=True, device="cpu", routed_experts=True)
    engine = VLLMEngine.start(rollout, **start)
    policy = Policy.from_hf(config, topology)
    sink = one_engine_sink(engine)

    def generate() -> list:
        sampling = [SamplingParams(24, seed=i) for i in range(len(PROMPTS))]
        return engine.generate([GenerationRequest(str(i), p, s) for i, (p, s) in enumerate(zip(PROMPTS, sampling, strict=True))])

    def sample(index: int, completion) -> TrainSample:
        unsampled = [0.0] * len(PROMPTS[index])
        mask = torch.tensor([*unsampled, *[1.0] * len(completion.token_ids)])
        rows = RoutedTokens()
        rows.add(completion.routed_experts)
        return TrainSample(
            sample_index=index,
            group_index=index,
            group_id=str(index),
            token_ids=torch.tensor([*PROMPTS[index], *completion.token_ids]),
            loss_mask=mask.bool(),
            rollout_logprobs=torch.tensor([*unsampled, *completion.logprobs]),
            reward=0.0,
            advantages=mask,
            routed_experts=torch.tensor(rows.padded(len(mask))),
        )

    def pack(samples):
        return balance_and_pack(samples, tokens_per_micro_batch=256, dp_rank=0, dp_size=1, skip_zero_advantage=False)

    def mismatch(samples, *, replays: bool) -> float:
        given = samples if replays else [dataclasses.replace(s, routed_experts=None) for s in samples]
        computed = unpack(policy.compute_logprobs(pack(given)), pack(given), given)
        differences = [(c - s.rollout_logprobs)[s.loss_mask].abs() for c, s in zip(computed, given, strict=True)]
        return float(torch.cat(differences).mean())

    observed = {}
    for version, change in enumerate((make_routers_undecided, make_experts_alike), start=1):
        change(policy.chunks)
        with torch.no_grad():
            for parameter in policy.chunks[0].parameters():
                parameter.copy_(parameter.bfloat16())  # the policy has what the engine gets
        publish(HFExporter(policy.chunks, topology), sink, version, torch.bfloat16, bucket_bytes=2**20)
        first, again = generate(), generate()
        samples = [sample(i, completion) for i, completion in enumerate(again)]
        own = own_routing(policy, pack(samples))
        differs = [(own[i].sort(-1).values != s.routed_experts.sort(-1).values).any(-1)[:-1] for i, s in enumerate(samples)]
        observed[change.__name__] = {
            "free": mismatch(samples, replays=False),
            "replayed": mismatch(samples, replays=True),
            "disagreement": float(torch.cat(differs).double().mean()),
            # The second time most prompts come from the prefix cache.
            "told alike": [
                torch.tensor(a.routed_experts == b.routed_experts).all().item() for a, b in zip(first, again, strict=True)
            ],
        }
    sink.close()
    engine.close()
    return observed


def test_replay_takes_the_routing_out_of_the_mismatch_of_engine_and_policy(tmp_path):
    (observed,) = run_ranks(observe, 1, tmp_path / "model", timeout_s=200)
    routed, dense = observed["make_routers_undecided"], observed["make_experts_alike"]
    assert all(routed["told alike"])
    assert routed["disagreement"] > 0.02
    # What is left is rounding: as much as where routing makes no difference.
    assert dense["free"] == pytest.approx(dense["replayed"], rel=0.2)
    assert routed["replayed"] < 1.5 * dense["free"], observed
    assert routed["free"] > 3 * routed["replayed"], observed


def test_a_mixture_of_experts_trains_on_two_expert_ranks_by_the_engines_routing(tmp_path):
    """As a user starts it: vLLM in a child process of rank 0, experts over both ranks, weights and routing between them."""
    write_tiny_model(tmp_path / "model", "qwen3_moe", tied=False, num_experts=8, **SIZES)
    shutil.copy(even_env.__file__, tmp_path)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"),
        *("-m", "skyrl_mega.train", "recipe=tiny", "parallel=ep2", "rollout=child_process", "model.router_replay=rollout"),
        *(f"model.path={tmp_path / 'model'}", f"trainer.run_dir={tmp_path / 'run'}", "env.name=even_env:EvenEnv"),
        *("trainer.max_steps=2", "evaluation.num_prompts=0", "checkpoint.export_hf=false", "telemetry.trackers=[]"),
        *("trainer.record_steps=[2]", "model.moe_z_loss_coef=0.001", "checkpoint.interval_steps=2", "trainer.updates_per_step=2"),
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "RANK", "WORLD_SIZE"))}
    environment = clean | {"PYTHONPATH": f"{tmp_path}:{clean.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, f"{ended.stdout[-3000:]}\n{ended.stderr[-6000:]}"
    rows = [row for row in read_metrics(tmp_path / "run") if row["step"] > 0]
    assert [row["update/skipped"] for row in rows] == [0.0, 0.0]
    for row in rows:
        # Nobody knows the experts of a sequence's last token, which is computed only where its prompt is not shared.
        assert 0.9 < row["moe/replayed"] <= 1
        # In float32 engine and policy choose alike, but for the second update of a step.
        assert row["moe/replay_disagreement"] < 0.05
        assert row["mismatch/abs_logprob_diff_mean"] < 1e-3
    command = [
        sys.executable,
        "-m",
        "skyrl_mega",
        "replay",
        str(tmp_path / "run"),
        "2",
        "parallel=single",
        "rollout.placement=auto",
    ]
    replay = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert replay.returncode == 0, f"{replay.stdout[-3000:]}\n{replay.stderr[-3000:]}"
