"""The composition root: the only place that picks concrete parts from the configuration and hands them to the loop."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_mega.checkpoint import store
from skyrl_mega.checkpoint.resume import checkpoint_to_resume
from skyrl_mega.checkpoint.saver import Checkpointer
from skyrl_mega.config.load import load_saved, save_resolved
from skyrl_mega.config.lora_rules import syncs_adapter
from skyrl_mega.config.placement import resolve_placement
from skyrl_mega.config.schema import Config, WarmupConfig, as_dict
from skyrl_mega.data.ledger_file import FILE_NAME as LEDGER_FILE
from skyrl_mega.orchestration.recorder import Recorder
from skyrl_mega.orchestration.rollout_assembly import make_source, make_task_sources, start_rollout
from skyrl_mega.orchestration.summary import FILE_NAME as SUMMARY_FILE
from skyrl_mega.orchestration.summary import show_summary, write_summary
from skyrl_mega.rewards.check import check_rewards
from skyrl_mega.types import Metrics, TrainState

#: Seconds between two looks at how far an evaluation of its own is.
EVALUATION_PATIENCE_S = 0.5

#: Settings that say nothing of what is sampled, or trained on it.
_NOT_OF_TRAJECTORIES = (
    *("telemetry.", "checkpoint.", "evaluation.", "parallel."),
    *("trainer.max_steps", "trainer.run_dir", "trainer.record_steps", "trainer.threads", "trainer.device"),
)

if TYPE_CHECKING:
    from skyrl_mega.orchestration.loop import Parts
    from skyrl_mega.orchestration.rollout_host import RolloutHost
    from skyrl_mega.parallel.topology import Topology
    from skyrl_mega.protocols import WeightReceiver, WeightSource
    from skyrl_mega.training.policy import Policy
    from skyrl_mega.weights.fleet_sink import FleetSink


def run_training(config: Config) -> dict[str, Any]:
    """Trains to `trainer.max_steps`, continuing the run directory's newest checkpoint if there is one. All ranks call.

    Returns the summary (rank 0; {} elsewhere) that is also written to run_dir/summary.json.
    """
    from skyrl_mega.algorithms.check import check_algorithm
    from skyrl_mega.orchestration.teacher import check_teacher

    began = time.perf_counter()
    run_dir = Path(config.trainer.run_dir)
    check_algorithm(config.algorithm)
    check_teacher(config)
    with ExitStack() as stack:
        topology = join_ranks(config, stack)
        notes: list[str] = []
        checkpoint = checkpoint_to_resume(config.trainer.run_dir, config.checkpoint, topology, warn=notes.append)
        start_step = _start_step(config, checkpoint)
        recorder = Recorder(
            config, rank=topology.rank, num_ranks=topology.world_size, start_step=start_step, on_phase=topology.enter
        )
        stack.callback(recorder.close)
        if topology.rank == 0:
            changes = changed_settings(config, run_dir)
            if start_step == 0:
                notes += _set_aside_ledger(run_dir, changes)
            save_resolved(config, run_dir / "config.yaml")
            for line in [*notes, *(changes or {}).values()]:
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
                if config.lora.rank > 0:
                    parts.policy.save_adapter(str(run_dir / "lora"))
                if parts.critic is not None:
                    parts.critic.save_hf(str(run_dir / "hf_critic"))
        if topology.rank != 0:
            return {}
        summary = write_summary(config, state, startup_s=startup_s, implementation=_implementation(parts))
        recorder.close()
        show_summary(config, summary)
        return summary


def run_evaluation(config: Config, *, checkpoint: str | None = None, output: Path | None = None) -> Metrics:
    """Results on held-out prompts of all tasks, of the model at `model.path` or of a checkpoint of the run. One process.

    `checkpoint`: latest, best, a step, or a path. Prints the numbers, writes them with every sample to `output` (None:
    run_dir/evaluations/<the model's or checkpoint's name>), and returns them.
    """
    from transformers import AutoTokenizer

    from skyrl_mega.orchestration.evaluation_report import show_progress, show_results, write_results

    config = replace(
        config,
        telemetry=replace(config.telemetry, trackers=(), trace=False),
        warmup=WarmupConfig(),
        trainer=replace(config.trainer, max_staleness=0),
    )
    path = store.find_checkpoint(config.trainer.run_dir, checkpoint) if checkpoint is not None else None
    make_source(config)
    make_task_sources(config)
    check_rewards(config)
    with ExitStack() as stack:
        topology = join_ranks(config, stack)
        from skyrl_mega.telemetry.progress import StepDisplay

        display = StepDisplay(1, "lines")
        weights = None
        if path is not None or config.lora.path or config.rollout.quantization != "none":
            with display.status(f"loading {path or config.lora.path or config.model.path}"):
                weights = _weights_of(config, topology, path)
        # An evaluation trains nothing: its ledger stays empty, and apart from the run's.
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        with display.status("starting vLLM"):
            rollout = start_rollout(config, topology, policy_version=0, ledger_path=Path(scratch) / LEDGER_FILE, stack=stack)
        if weights is not None:
            version = 0 if path is None else store.read_state(path)[0].policy_version
            _push_once(config, topology, weights, rollout, version)
        rollout.call("begin_evaluation", config.evaluation.num_prompts, timeout_s=config.parallel.timeout_s)
        patience = partial(rollout.call, "evaluated", patience_s=EVALUATION_PATIENCE_S, timeout_s=config.parallel.timeout_s)
        results = show_progress(patience)
        show_results(config, results)
        evaluated = Path(config.model.path) if path is None else path
        directory = output or Path(config.trainer.run_dir) / "evaluations" / evaluated.name
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        metrics = write_results(config, results, directory, model=str(evaluated), tokenizer=tokenizer)
        display.note(f"every number and sample: {directory}")
        return metrics


def _assemble(config: Config, topology: Topology, recorder: Recorder, checkpoint: Path | None, stack: ExitStack) -> Parts:
    import torch

    from skyrl_mega.checkpoint import state as checkpoint_state
    from skyrl_mega.orchestration.loop import Parts
    from skyrl_mega.orchestration.served_teacher import ServedTeacher, check_served_teacher
    from skyrl_mega.orchestration.warmup import read_demonstrations
    from skyrl_mega.training.critic import Critic
    from skyrl_mega.training.policy import Policy
    from skyrl_mega.training.reference import ReferenceModel, make_reference

    # Prompts and rewards first: whatever is wrong with them is found before any model is loaded.
    if topology.rank == 0:
        make_source(config)
        make_task_sources(config)
        check_rewards(config)
    is_begun = checkpoint is not None and store.read_state(checkpoint)[0].step > 0
    demonstrations = [] if is_begun else read_demonstrations(config)
    with recorder.status(f"loading {config.model.path} into Megatron-Core"):
        policy = Policy.from_hf(config, topology)
        reference = make_reference(config, topology, policy)
        critic = Critic.from_hf(config, topology) if _has_critic(config) else None
    teacher: ReferenceModel | ServedTeacher | None = None
    if config.teacher.url:
        teacher = ServedTeacher(config, topology)
        if topology.rank == 0:
            with recorder.status(f"asking the teacher at {config.teacher.url}"):
                check_served_teacher(config, policy.vocab_size)
    elif config.teacher.path:
        with recorder.status(f"loading the teacher {config.teacher.path}"):
            teacher = ReferenceModel(config, topology, config.teacher.path)
    parts = Parts(
        config=config,
        topology=topology,
        policy=policy,
        reference=reference,
        teacher=teacher,
        demonstrations=demonstrations,
        recorder=recorder,
        state=TrainState(0, 0, {}, num_trained_groups=0, num_optimizer_steps=0),
        engine_dtype=getattr(torch, config.rollout.dtype),
        share_prompts=shares_prompts(config, policy),
        syncs_adapter=syncs_adapter(config),
        checkpointer=make_checkpointer(config, topology, recorder, stack),
        critic=critic,
    )
    if checkpoint is not None:
        with recorder.status(f"resuming from {checkpoint}"):
            parts.state = checkpoint_state.load(checkpoint, policy, topology, critic=critic)
    if topology.rank == 0:
        with recorder.status("starting vLLM"):
            parts.rollout = start_rollout(
                config,
                topology,
                policy_version=parts.state.policy_version,
                ledger_path=Path(config.trainer.run_dir) / LEDGER_FILE,
                stack=stack,
            )
        parts.sink = _make_sink(config, topology, parts.receivers, stack)
        found = parts.rollout.call(
            "resume", parts.state.step, parts.state.prompt_source, timeout_s=config.rollout.start_timeout_s
        )
        if found:
            recorder.note(found)
    topology.barrier("start-up")
    return parts


def _start_step(config: Config, checkpoint: Path | None) -> int:
    """The step that the checkpoint to go on from was saved after. Raises CheckpointError where the run can't go on from it."""
    if checkpoint is None:
        return 0
    from skyrl_mega.checkpoint.state import require_critic

    state, _ = store.read_state(checkpoint)
    require_critic(checkpoint, state, has_critic=_has_critic(config))
    return state.step


def _has_critic(config: Config) -> bool:
    from skyrl_mega.algorithms.advantages import needs

    return "values" in needs(config.algorithm)


def make_checkpointer(config: Config, topology: Topology, recorder: Recorder, stack: ExitStack) -> Checkpointer:
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
    from skyrl_mega.parallel.kernel_cache import keep_few_kernels
    from skyrl_mega.parallel.topology import init_topology

    set_threads(config.trainer.threads)
    device = resolve_device(config.trainer.device)
    if device.type == "cpu":
        keep_few_kernels()
    topology = init_topology(config.parallel, device, seed=config.trainer.seed)
    stack.callback(topology.destroy)
    return topology


def _make_sink(config: Config, topology: Topology, receivers: list[WeightReceiver], stack: ExitStack) -> FleetSink:
    """The way weights take to the engines that `receivers` holds at the time of a push."""
    from skyrl_mega.rollout.transport.choose import make_transport, resolve_transport
    from skyrl_mega.weights.fleet_sink import FleetSink

    rollout = config.rollout
    name = resolve_transport(
        rollout,
        device=topology.device.type,
        in_process=resolve_placement(config, topology.world_size) == "in_process",
        one_machine=rollout.colocated and not rollout.external_urls,
        trainer_ranks=topology.world_size,
    )
    transport = make_transport(name, delta=rollout.weight_delta, timeout_s=rollout.request_timeout_s, host=_own_address(config))
    sink = FleetSink(lambda: receivers, transport, timeout_s=rollout.request_timeout_s)
    stack.callback(sink.close)
    return sink


def _own_address(config: Config) -> str:
    """Where engines reach this machine: on itself, or over the network of the Ray cluster."""
    if config.rollout.colocated:
        return "127.0.0.1"
    import ray

    return ray.util.get_node_ip_address()


def _push_once(config: Config, topology: Topology, source: WeightSource, rollout: RolloutHost, version: int) -> None:
    """Publishes a checkpoint's weights to the engines."""
    import torch

    from skyrl_mega.weights.fp8 import as_engines_take
    from skyrl_mega.weights.publish import publish

    timeout_s = config.parallel.timeout_s
    with ExitStack() as stack:
        receivers = rollout.call("receivers", timeout_s=timeout_s)
        sink = _make_sink(config, topology, receivers, stack)
        dtype = getattr(torch, config.rollout.dtype)
        published = publish(
            as_engines_take(source, config.rollout), sink, version, dtype, bucket_bytes=config.rollout.weight_bucket_mib * 2**20
        )
        served = [receiver.name for receiver in receivers if receiver.name not in published.failed]
        rollout.call("serve", version, served, timeout_s=timeout_s)


def changed_settings(config: Any, run_dir: Path) -> dict[str, str] | None:
    """A line for each setting that differs from the run's earlier part, by its key; None if nothing says what those were."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return None
    earlier, now = _flat(as_dict(load_saved(path))), _flat(as_dict(config))
    return {
        key: f"changed since this run began: {key} was {earlier.get(key)!r}, is {now[key]!r}"
        for key in now
        if earlier.get(key) != now[key]
    }


def _set_aside_ledger(run_dir: Path, changes: dict[str, str] | None) -> list[str]:
    """Keeps the ledger of an earlier run that left no checkpoint under a dated name, where its trajectories are another run's.

    That is what they are if they were sampled under other settings; with equal ones this run goes on with them. Returns a line on
    what was done. Raises LedgerError if another process writes the ledger.
    """
    from skyrl_mega.data.ledger_file import set_aside

    path = run_dir / LEDGER_FILE
    if not path.is_file() or (changes is not None and all(key.startswith(_NOT_OF_TRAJECTORIES) for key in changes)):
        return []
    return [f"the ledger of an earlier run, sampled under other settings, is now {set_aside(path)}"]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _weights_of(config: Config, topology: Topology, checkpoint: Path | None) -> WeightSource:
    """What engines get to serve a checkpoint; None: the adapter of `lora.path`, or the model of `model.path`."""
    from skyrl_mega.checkpoint.state import load_model
    from skyrl_mega.models import lora_weights
    from skyrl_mega.models.hf_io import load_hf_weights

    chunks = lora_weights.build_to_load(config, topology)
    if checkpoint is not None:
        load_model(checkpoint, chunks)
    elif chunks[0].adapters is None:
        load_hf_weights(chunks, config.model.path, topology)
    else:
        lora_weights.load_adapter(chunks[0].adapters, chunks[0].adapters.active, config.lora.path)
    if syncs_adapter(config):
        adapters = chunks[0].adapters
        return lora_weights.AdapterSource(lora_weights.AdapterWeights(adapters, adapters.active))
    return lora_weights.make_exporter(chunks, topology)


def _implementation(parts: Parts) -> dict[str, str]:
    return {
        "device": parts.topology.device.type,
        "world_size": str(parts.topology.world_size),
        "model_dtype": parts.config.model.dtype,
        "rollout_dtype": parts.config.rollout.dtype,
        "share_prompts": "yes" if parts.share_prompts else "no",
        **parts.policy.implementation,
    }
