"""The composition root: the only place that picks concrete parts from the configuration and hands them to the loop."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_mega.checkpoint import store
from skyrl_mega.checkpoint.resume import checkpoint_to_resume
from skyrl_mega.checkpoint.saver import Checkpointer
from skyrl_mega.config.load import load_saved, save_resolved
from skyrl_mega.config.schema import Config, as_dict
from skyrl_mega.orchestration.recorder import Recorder
from skyrl_mega.orchestration.summary import FILE_NAME as SUMMARY_FILE
from skyrl_mega.orchestration.summary import show_summary, write_summary
from skyrl_mega.types import Metrics, TrainState

if TYPE_CHECKING:
    from skyrl_mega.orchestration.loop import Parts
    from skyrl_mega.orchestration.producer import Producer
    from skyrl_mega.parallel.topology import Topology
    from skyrl_mega.protocols import PromptSource, RolloutEngine
    from skyrl_mega.rollout.vllm_engine import VLLMEngine
    from skyrl_mega.training.policy import Policy


def run_training(config: Config) -> dict[str, Any]:
    """Trains to `trainer.max_steps`, continuing the run directory's newest checkpoint if there is one. All ranks call.

    Returns the summary (rank 0; {} elsewhere) that is also written to run_dir/summary.json.
    """
    began = time.perf_counter()
    run_dir = Path(config.trainer.run_dir)
    with ExitStack() as stack:
        topology = join_ranks(config, stack)
        notes: list[str] = []
        checkpoint = checkpoint_to_resume(config.trainer.run_dir, config.checkpoint, topology, warn=notes.append)
        start_step = store.read_state(checkpoint)[0].step if checkpoint is not None else 0
        recorder = Recorder(
            config, rank=topology.rank, num_ranks=topology.world_size, start_step=start_step, on_phase=topology.enter
        )
        stack.callback(recorder.close)
        if topology.rank == 0:
            for line in [*notes, *_save_config(config, run_dir)]:
                recorder.note(line)
        # Without a summary the last run died between its last checkpoint and its end: what is missing is made up for below.
        if start_step >= config.trainer.max_steps and (run_dir / SUMMARY_FILE).is_file():
            recorder.note(f"{run_dir} has finished its {config.trainer.max_steps} steps; raise trainer.max_steps to go on.")
            return {}
        parts = _assemble(config, topology, recorder, checkpoint, stack)

        from skyrl_mega.orchestration.loop import train

        startup_s = time.perf_counter() - began
        state = train(parts)
        if config.checkpoint.export_hf:
            with recorder.status(f"writing the model to {run_dir / 'hf'}"):
                parts.policy.save_hf(str(run_dir / "hf"))
        if topology.rank != 0:
            return {}
        summary = write_summary(config, state, startup_s=startup_s, implementation=_implementation(parts))
        recorder.close()
        show_summary(config, summary)
        return summary


def run_evaluation(config: Config, *, checkpoint: str | None = None) -> Metrics:
    """Greedy accuracy on the held-out prompts, of the model at `model.path` or of a checkpoint of the run. One process.

    `checkpoint`: latest, best, a step, or a path. Prints and returns the numbers.
    """
    from skyrl_mega.weights.publish import publish

    config = replace(config, telemetry=replace(config.telemetry, trackers=(), trace=False))
    path = store.find_checkpoint(config.trainer.run_dir, checkpoint) if checkpoint is not None else None
    with ExitStack() as stack:
        topology = join_ranks(config, stack)
        from skyrl_mega.telemetry.progress import StepDisplay

        display = StepDisplay(1, "lines")
        source = _make_source(config)
        if path is not None:
            with display.status(f"loading {path}"):
                exporter = _checkpoint_exporter(config, topology, path)
        with display.status("starting vLLM"):
            engine = _start_engine(config, topology, stack)
        if path is not None:
            import torch

            sink = engine.weight_sink()
            version = store.read_state(path)[0].policy_version
            publish(
                exporter,
                sink,
                version,
                getattr(torch, config.rollout.dtype),
                bucket_bytes=config.rollout.weight_bucket_mib * 2**20,
            )
        with display.status(f"answering {config.evaluation.num_prompts} held-out prompts"):
            metrics = _make_producer(config, source, engine).evaluate(config.evaluation.num_prompts)
        for name, value in metrics.items():
            display.note(f"{name:<22} {value:.4g}")
        return metrics


def _assemble(config: Config, topology: Topology, recorder: Recorder, checkpoint: Path | None, stack: ExitStack) -> Parts:
    import torch

    from skyrl_mega.checkpoint import state as checkpoint_state
    from skyrl_mega.orchestration.loop import Parts, push_weights
    from skyrl_mega.training.policy import Policy
    from skyrl_mega.training.reference import ReferenceModel

    # Prompts first: whatever is wrong with them is found before any model is loaded.
    source = _make_source(config) if topology.rank == 0 else None
    with recorder.status(f"loading {config.model.path} into Megatron-Core"):
        policy = Policy.from_hf(config, topology)
        reference = ReferenceModel(config, topology) if config.algorithm.kl.coef > 0.0 else None
    parts = Parts(
        config=config,
        topology=topology,
        policy=policy,
        reference=reference,
        recorder=recorder,
        state=TrainState(0, 0, {}, num_trained_groups=0, num_optimizer_steps=0),
        engine_dtype=getattr(torch, config.rollout.dtype),
        share_prompts=shares_prompts(config, policy),
        checkpointer=_make_checkpointer(config, topology, recorder, stack),
    )
    if checkpoint is not None:
        with recorder.status(f"resuming from {checkpoint}"):
            parts.state = checkpoint_state.load(checkpoint, policy, topology)
    if source is not None:
        if checkpoint is not None:
            source.load_state_dict(parts.state.prompt_source)
        with recorder.status("starting vLLM"):
            engine = _start_engine(config, topology, stack)
        parts.engine, parts.sink = engine, engine.weight_sink()
        parts.producer = _make_producer(config, source, engine)
    topology.barrier("start-up")
    if parts.state.policy_version > 0:
        push_weights(parts, parts.state.policy_version)
    return parts


def _make_checkpointer(config: Config, topology: Topology, recorder: Recorder, stack: ExitStack) -> Checkpointer:
    """The run's checkpointer; however the run ends, a save in flight is completed first."""
    settings = config.checkpoint
    retention = store.Retention(settings.keep_last, settings.keep_best, settings.best_metric, settings.best_is)
    checkpointer = Checkpointer(
        config.trainer.run_dir,
        topology,
        retention,
        asynchronous=settings.asynchronous,
        timeout_s=settings.timeout_s,
        note=recorder.note,
    )
    stack.callback(checkpointer.close)
    return checkpointer


def shares_prompts(config: Config, policy: Policy) -> bool:
    """Whether prompts are packed once per group.

    `auto` leaves TransformerEngine alone: whether it has a kernel for queries and keys of unequal length depends on its version,
    cuDNN's and the card. What was asked for with `on` fails there with TransformerEngine's own message if it has none.
    """
    setting, attention = config.trainer.share_prompts, policy.implementation["attention"]
    return setting == "on" or (setting == "auto" and attention != "transformer_engine")


def join_ranks(config: Config, stack: ExitStack) -> Topology:
    """This rank's place in the layout of `config.parallel`, left when `stack` closes."""
    from skyrl_mega.parallel.device import resolve_device, set_threads
    from skyrl_mega.parallel.topology import init_topology

    set_threads(config.trainer.threads)
    topology = init_topology(config.parallel, resolve_device(config.trainer.device), seed=config.trainer.seed)
    stack.callback(topology.destroy)
    return topology


def _start_engine(config: Config, topology: Topology, stack: ExitStack) -> VLLMEngine:
    from skyrl_mega.rollout.vllm_engine import VLLMEngine

    placement = config.rollout.placement
    engine = VLLMEngine.start(
        config.rollout,
        model_path=config.model.path,
        seed=config.trainer.seed,
        threads=config.trainer.threads,
        in_process=topology.world_size == 1 if placement == "auto" else placement == "in_process",
        device=topology.device.type,
    )
    stack.callback(engine.close)
    return engine


def _make_source(config: Config) -> PromptSource:
    from skyrl_mega.data.prompts import make_prompt_source
    from skyrl_mega.envs.registry import get_env_class

    return make_prompt_source(config, get_env_class(config.env.name))


def _make_producer(config: Config, source: PromptSource, engine: RolloutEngine) -> Producer:
    from transformers import AutoTokenizer

    from skyrl_mega.agents.turn_loop import AgentRunner
    from skyrl_mega.envs.registry import make_env
    from skyrl_mega.orchestration.buffer import TrajectoryBuffer
    from skyrl_mega.orchestration.producer import Producer

    runner = AgentRunner(
        engine,
        AutoTokenizer.from_pretrained(config.model.path),
        lambda: make_env(config.env.name, config.env.options),
        rollout=config.rollout,
        env=config.env,
        seed=config.trainer.seed,
    )
    return Producer(source, runner, TrajectoryBuffer(config.trainer.max_staleness), config.trainer)


def _save_config(config: Config, run_dir: Path) -> list[str]:
    """Writes run_dir/config.yaml; returns a line for each setting that differs from the run's earlier part."""
    path = run_dir / "config.yaml"
    lines = []
    if path.is_file():
        earlier, now = _flat(as_dict(load_saved(path))), _flat(as_dict(config))
        lines = [
            f"changed since this run began: {key} was {earlier.get(key)!r}, is {now[key]!r}"
            for key in now
            if earlier.get(key) != now[key]
        ]
    save_resolved(config, path)
    return lines


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _checkpoint_exporter(config: Config, topology: Topology, path: Path) -> Any:
    from skyrl_mega.checkpoint.state import load_model
    from skyrl_mega.models.build import build_model
    from skyrl_mega.models.hf_io import HFExporter

    chunks = build_model(config, topology)
    load_model(path, chunks)
    return HFExporter(chunks, config.model.path, topology)


def _implementation(parts: Parts) -> dict[str, str]:
    return {
        "device": parts.topology.device.type,
        "world_size": str(parts.topology.world_size),
        "model_dtype": parts.config.model.dtype,
        "rollout_dtype": parts.config.rollout.dtype,
        "share_prompts": "yes" if parts.share_prompts else "no",
        **parts.policy.implementation,
    }
