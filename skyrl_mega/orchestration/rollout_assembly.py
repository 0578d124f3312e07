"""Composes the rollout side of a run: prompts, agents, engines, ledger, and the host in which the coordinator lives.

`RolloutPlan` is plain and travels to the process of the coordinator, which may be on another machine of a Ray cluster.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_mega.config.lora_rules import engine_rank
from skyrl_mega.config.placement import Placement, resolve_placement
from skyrl_mega.config.reward_rules import api_key_variables
from skyrl_mega.config.schema import Config, EnvConfig, SamplingConfig
from skyrl_mega.errors import DataError, EnvError

if TYPE_CHECKING:
    from skyrl_mega.orchestration.coordinator import RolloutCoordinator
    from skyrl_mega.orchestration.rollout_host import RolloutHost
    from skyrl_mega.parallel.topology import Topology
    from skyrl_mega.protocols import PromptSource
    from skyrl_mega.rewards.pipeline import RewardPipeline
    from skyrl_mega.rollout.fleet import EngineFactory


@dataclass(frozen=True)
class RolloutPlan:
    """What the rollout side is made from. `policy_version`: what the trainer's policy is at; `directory`: of the trainer.

    `api_keys`: the environment variables that judges of the reward name; a Ray actor may lack them. `greedy_baseline`: each
    prompt is answered greedily too.
    """

    config: Config
    placement: Placement
    device: str
    policy_version: int
    ledger_path: str
    directory: str
    import_path: tuple[str, ...]
    visible_devices: tuple[str, ...]
    node_id: str | None = None
    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    greedy_baseline: bool = False


def start_rollout(config: Config, topology: Topology, *, policy_version: int, ledger_path: Path, stack: ExitStack) -> RolloutHost:
    """The coordinator, with its engines up; rank 0 only. Closed by `stack`.

    Raises BackendUnavailableError, MissingDependencyError, RolloutError, DeadlineError, LedgerError, DataError, EnvError.
    """
    from skyrl_mega.algorithms.advantages import needs
    from skyrl_mega.orchestration.rollout_host import InlineHost, ThreadHost

    plan = RolloutPlan(
        config=config,
        placement=resolve_placement(config, topology.world_size),
        device=topology.device.type,
        policy_version=policy_version,
        ledger_path=str(ledger_path.resolve()),
        directory=str(Path.cwd()),
        import_path=tuple(entry or str(Path.cwd()) for entry in sys.path),
        visible_devices=tuple(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))),
        api_keys={name: os.environ[name] for name in api_key_variables(config) if name in os.environ},
        greedy_baseline="greedy" in needs(config.algorithm),
    )
    # Engines are started again after a failed start, so the coordinator gets the time of two starts.
    start_timeout_s = 2 * config.rollout.start_timeout_s
    host: RolloutHost
    if plan.placement == "in_process":
        host = InlineHost(functools.partial(make_coordinator, plan))
    elif plan.placement == "child_process":
        host = ThreadHost(functools.partial(make_coordinator, plan), start_timeout_s=start_timeout_s)
    else:
        host = _start_on_ray(plan, start_timeout_s, stack)
    stack.callback(host.close)
    return host


def _start_on_ray(plan: RolloutPlan, start_timeout_s: float, stack: ExitStack) -> RolloutHost:
    from skyrl_mega.orchestration.rollout_host import RayHost
    from skyrl_mega.rollout import ray_cluster

    cluster = ray_cluster.connect(plan.config.rollout.ray_address, timeout_s=plan.config.rollout.start_timeout_s)
    stack.callback(cluster.close)
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node_id = ray.get_runtime_context().get_node_id()
    environment = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    options: dict[str, Any] = {
        "num_cpus": 0,
        "max_restarts": 0,
        "max_concurrency": 64,
        "runtime_env": {"env_vars": ray_cluster.actor_environment(environment)},
        # Beside the trainer's rank 0: the ledger and the prompts are files of its machine.
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
    }
    factory = functools.partial(make_coordinator, replace(plan, node_id=node_id))
    return RayHost(factory, cluster, actor_options=options, start_timeout_s=start_timeout_s)


async def make_coordinator(plan: RolloutPlan) -> RolloutCoordinator:
    """The coordinator of `plan`, in the event loop that calls this; its engines are up. Everything is closed if a part fails."""
    from transformers import AutoTokenizer

    from skyrl_mega.agents.turn_loop import AgentRunner
    from skyrl_mega.data.ledger import Ledger
    from skyrl_mega.envs.registry import make_env
    from skyrl_mega.orchestration.coordinator import RolloutCoordinator
    from skyrl_mega.orchestration.evaluation import EvalSuite
    from skyrl_mega.rewards.build import make_pipeline
    from skyrl_mega.rollout.fleet import Fleet
    from skyrl_mega.rollout.traced_engine import traced
    from skyrl_mega.telemetry.rollout_trace import RolloutTrace

    if plan.placement == "ray":
        os.chdir(plan.directory)
        sys.path.extend(entry for entry in plan.import_path if entry not in sys.path)
        os.environ.update(plan.api_keys)
    config = plan.config
    source, task_sources = make_source(config), make_task_sources(config)
    async with AsyncExitStack() as on_failure:
        ledger = Ledger.open(
            plan.ledger_path,
            identity={"seed": config.trainer.seed, "model": config.model.path, "env": config.env.name},
            prompts_per_step=config.trainer.prompts_per_step,
            max_staleness=config.trainer.max_staleness,
            replay_max_age=config.sampling.replay.max_age if config.sampling.replay.share > 0 else 0,
        )
        on_failure.callback(ledger.close)
        trace, factories = None, engine_factories(plan)
        if config.telemetry.trace:
            trace = RolloutTrace(config.trainer.run_dir)
            factories = {name: traced(factory, trace) for name, factory in factories.items()}
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        rewards = make_pipeline(config, tokenizer, sequential=plan.placement == "in_process")
        # Engines come up with the weights of model.path, or, where they are to be 8-bit, with none.
        begins_stale = config.warmup.steps > 0 or bool(config.lora.path) or config.rollout.quantization != "none"
        fleet = Fleet(config.rollout, factories, policy_version=plan.policy_version, begins_stale=begins_stale)
        on_failure.push_async_callback(fleet.close)
        runner = AgentRunner(
            fleet,
            tokenizer,
            lambda: make_env(config.env.name, config.env.options),
            rollout=config.rollout,
            env=config.env,
            seed=config.trainer.seed,
            sequential_envs=plan.placement == "in_process",
            rewards=rewards,
        )
        on_failure.push_async_callback(runner.close)
        evaluation = config.evaluation
        sampler = replace(
            config.rollout,
            temperature=evaluation.temperature or config.rollout.temperature,  # 0: asked for as greedy, group by group
            top_p=evaluation.top_p,
            top_k=evaluation.top_k,
        )

        def eval_runner(env: EnvConfig, rewards: RewardPipeline | None) -> AgentRunner:
            return AgentRunner(
                fleet,
                tokenizer,
                lambda: make_env(env.name, env.options),
                rollout=sampler,
                env=env,
                seed=config.trainer.seed,
                sequential_envs=plan.placement == "in_process",
                rewards=rewards,
            )

        tasks = [
            EvalSuite(
                task.name,
                task_source,
                eval_runner(task.env, None),
                task.num_prompts or evaluation.num_prompts,
                task.samples_per_prompt or evaluation.samples_per_prompt,
            )
            for task, task_source in zip(evaluation.tasks, task_sources, strict=True)
        ]
        await fleet.start()
        on_failure.pop_all()
        return RolloutCoordinator(
            config,
            source,
            runner,
            fleet,
            ledger,
            trace,
            greedy_baseline=plan.greedy_baseline,
            eval_runner=eval_runner(config.env, rewards),
            eval_tasks=tasks,
        )


def make_source(config: Config) -> PromptSource:
    """The prompts of `config`. Raises DataError or EnvError for whatever is wrong with them."""
    from skyrl_mega.data.prompts import make_prompt_source
    from skyrl_mega.envs.registry import get_env_class

    return make_prompt_source(config, get_env_class(config.env.name))


def make_task_sources(config: Config) -> list[PromptSource]:
    """The prompts of each of `evaluation.tasks`; they are asked for once here, so that a lack of them shows at once.

    Raises DataError or EnvError that names the task.
    """
    sources = []
    for task in config.evaluation.tasks:
        try:
            source = make_source(replace(config, env=task.env, data=task.data, sampling=SamplingConfig()))
            source.eval_prompts(task.num_prompts or config.evaluation.num_prompts)
        except (DataError, EnvError) as error:
            raise type(error)(f"evaluation.tasks, {task.name}: {error}") from error
        sources.append(source)
    return sources


def engine_factories(plan: RolloutPlan) -> dict[str, EngineFactory]:
    """How each engine of the fleet is started, by name."""
    config, rollout = plan.config, plan.config.rollout
    common: dict[str, Any] = dict(
        model_path=config.model.path,
        seed=config.trainer.seed,
        threads=config.trainer.threads,
        device=plan.device,
        routed_experts=config.model.router_replay == "rollout",
        lora_rank=engine_rank(config),
    )
    factories: dict[str, EngineFactory] = {}
    if plan.placement == "in_process":
        from skyrl_mega.rollout.local_engines import InProcessEngineFactory

        factories["0"] = InProcessEngineFactory(rollout, **common)
    elif plan.placement == "child_process":
        from skyrl_mega.rollout.local_engines import ChildProcessEngineFactory

        factories["0"] = ChildProcessEngineFactory(rollout, **common)
    else:
        from skyrl_mega.rollout.ray_engine import RayEngineFactory

        on_ray = RayEngineFactory(rollout, **common, visible_devices=plan.visible_devices, node_id=plan.node_id)
        factories |= {str(number): on_ray for number in range(rollout.num_engines)}
    if rollout.external_urls:
        from transformers import AutoConfig

        from skyrl_mega.rollout.openai_engine import ExternalEngineFactory

        vocab_size = AutoConfig.from_pretrained(config.model.path).vocab_size
        factories |= {url: ExternalEngineFactory(rollout, url, vocab_size) for url in rollout.external_urls}
    return factories
