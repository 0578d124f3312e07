"""Versions of an adapter to a real engine beside a policy: `python -m helpers.lora_engine MODEL FOLDER PLACEMENT TRANSPORT`.

PLACEMENT: in_process, child_process or ray; an engine on Ray is killed once, and the one in its place is brought up to date.
The last line that it prints is what was seen, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch

from helpers.hf_oracle import make_micro_batch
from helpers.loop_thread import LoopThread
from helpers.lora import randomise
from helpers.policy import make_policy
from helpers.weight_fleet import one_engine_sink
from skyrl_mega.config.load import load_config
from skyrl_mega.config.lora_rules import engine_rank, syncs_adapter
from skyrl_mega.errors import RolloutError, WeightSyncError
from skyrl_mega.rollout.transport.choose import make_transport
from skyrl_mega.training.policy import forward_logprobs
from skyrl_mega.types import GenerationRequest, SamplingParams, TrainBatch
from skyrl_mega.weights.fleet_sink import FleetSink
from skyrl_mega.weights.publish import publish

PROMPT = list(b"what is 12 + 34?")


class EngineInProcess:
    """The engine that a run of one process has."""

    def __init__(self, settings, rollout, transport):
        from skyrl_mega.rollout.vllm_engine import VLLMEngine

        self._engine = VLLMEngine.start(rollout, in_process=True, **settings)
        self.sink = one_engine_sink(self._engine, transport)

    def generate(self, request):
        return self._engine.generate([request])[0]

    def score(self, sequences):
        return self._engine.score(sequences)

    def version(self):
        return self._engine.policy_version

    def arrived(self, version):
        """Nobody else asks."""

    def close(self):
        self.sink.close()
        self._engine.close()


class FleetOfOne:
    """One engine in a process of its own, as a member of a fleet that replaces it when it dies."""

    def __init__(self, settings, rollout, transport, *, on_ray):
        from skyrl_mega.rollout import ray_cluster
        from skyrl_mega.rollout.fleet import Fleet
        from skyrl_mega.rollout.local_engines import ChildProcessEngineFactory
        from skyrl_mega.rollout.ray_engine import RayEngineFactory

        self._cluster = ray_cluster.connect("local", timeout_s=120) if on_ray else None
        self._loop = LoopThread()
        make = RayEngineFactory if on_ray else ChildProcessEngineFactory
        self.fleet = Fleet(rollout, {"e0": make(rollout, **settings)})
        self._loop.run(self.fleet.start(), timeout_s=250)
        half = make_transport(transport, delta=False, timeout_s=60.0)
        self.sink = FleetSink(lambda: self.fleet.receivers(), half, timeout_s=60.0)

    @property
    def _engine(self):
        return self.fleet._members["e0"].engine

    def generate(self, request):
        return self._loop.run(self._engine.generate(request))

    def score(self, sequences):
        return self._loop.run(self._engine.score(sequences))

    def version(self):
        return self._loop.run(self._engine.policy_version())

    def arrived(self, version):
        self._loop.run(self.fleet.weights_arrived(version, ["e0"]))

    def replace(self):
        """Kills the engine's actor; returns once another one is up, without the current weights."""
        os.kill(self._loop.run(self._engine.process_ids())["actor"], signal.SIGKILL)
        deadline = time.monotonic() + 250
        while self.fleet.needs_weights() != ("e0",):
            assert time.monotonic() < deadline, "no engine came in the place of the one that was killed"
            time.sleep(0.1)

    def close(self):
        self.sink.close()
        self._loop.run(self.fleet.close())
        self._loop.close()
        if self._cluster is not None:
            self._cluster.close()


class Foreign:
    """Names that this model has no projection for."""

    def fused_groups(self):
        return [tuple(f"base_model.model.model.layers.7.mlp.up_proj.lora_{part}.weight" for part in "AB")]

    def iter_weights(self, dtype):
        a, b = self.fused_groups()[0]
        yield a, torch.zeros(4, 64)
        yield b, torch.zeros(128, 4)


def error(engine, policy, *, adapted: bool = True) -> float:
    """Largest |engine - policy| over a sampled turn and over the scored whole."""
    done = engine.generate(GenerationRequest("probe", PROMPT, SamplingParams(max_new_tokens=12, seed=1)))
    sequence = [*PROMPT, *done.token_ids]
    batch = TrainBatch([make_micro_batch([torch.tensor(sequence)])], 1, 1, 1)
    with policy.weights.on() if adapted else policy.weights.off():
        (expected,) = forward_logprobs(policy.chunks, batch, policy.config, policy.topology)
    expected = expected[:-1]
    sampled = (torch.tensor(done.logprobs) - expected[len(PROMPT) - 1 :]).abs().max()
    # Two at once: of one alone vLLM's LM head would hide a mistake in how tokens and adapters are counted.
    whole, beginning = engine.score([sequence, sequence[:9]])
    assert max(abs(a - b) for a, b in zip(whole, beginning, strict=False)) < 1e-4
    scored = (torch.tensor(whole[1:]) - expected).abs().max()
    return max(float(sampled), float(scored))


def push(engine, source, version):
    proof = publish(source, engine.sink, version, torch.float32, bucket_bytes=8_000)
    engine.arrived(version)
    return proof


def main(model_path: str, folder: str, placement: str, transport: str) -> None:
    overrides = ["recipe=tiny", f"model.path={model_path}", f"trainer.run_dir={folder}/run", "lora.rank=4", "lora.alpha=6"]
    config = load_config([*overrides, "rollout.health_interval_s=3", "rollout.start_timeout_s=200"])
    assert syncs_adapter(config)
    assert engine_rank(config) == 8
    settings = dict(model_path=model_path, seed=0, threads=1, device="cpu", lora_rank=engine_rank(config))
    seen: dict = {}
    with make_policy(config) as policy:
        if placement == "in_process":
            engine = EngineInProcess(settings, config.rollout, transport)
        else:
            engine = FleetOfOne(settings, config.rollout, transport, on_ray=placement == "ray")
        seen["fresh"] = error(engine, policy)
        for version in (1, 2):
            randomise(policy, seed=version)
            seen[f"stale {version}"] = error(engine, policy)
            proof = push(engine, policy.adapter_source, version)
            seen[f"version {version}"] = error(engine, policy)
            seen[f"served {version}"] = engine.version()
        seen["bytes"] = proof.size_bytes
        seen["base"] = error(engine, policy, adapted=False)
        try:
            push(engine, Foreign(), 3)
        except (WeightSyncError, RolloutError) as refusal:
            seen["refusal"] = str(refusal)
        seen["after refusal"] = error(engine, policy)
        seen["served after refusal"] = engine.version()
        if placement == "ray":
            engine.replace()
            push(engine, policy.adapter_source, 2)
            seen["replaced"] = error(engine, policy)
            seen["served by the replacement"] = engine.version()
        engine.close()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
