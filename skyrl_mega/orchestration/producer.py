"""Draws prompts, has them rolled out, and puts the finished groups into the buffer. Lives on rank 0."""

from __future__ import annotations

from skyrl_mega.agents.stats import rollout_metrics
from skyrl_mega.config.schema import TrainerConfig
from skyrl_mega.orchestration.buffer import TrajectoryBuffer
from skyrl_mega.protocols import GroupRunner, PromptSource
from skyrl_mega.types import Metrics, PromptGroup, TrajectoryGroup


class Producer:
    """The rollout side of the loop. Synchronous training calls `fill` itself, right before it takes."""

    def __init__(self, source: PromptSource, runner: GroupRunner, buffer: TrajectoryBuffer, trainer: TrainerConfig) -> None:
        self.source = source
        self.runner = runner
        self.buffer = buffer
        self.trainer = trainer

    def fill(self, step: int) -> None:
        """Rolls out one step's prompts. Group ids are unique in a run and the same when a step is repeated after a crash."""
        prompts = self.source.next(self.trainer.prompts_per_step)
        groups = [
            PromptGroup(f"{step}/{index}/{prompt.prompt_id}", prompt, self.trainer.samples_per_prompt)
            for index, prompt in enumerate(prompts)
        ]
        self.buffer.put(self.runner(groups))

    def take(self, policy_version: int) -> list[TrajectoryGroup]:
        return self.buffer.take(self.trainer.prompts_per_step, policy_version)

    def evaluate(self, num_prompts: int) -> Metrics:
        """Greedy results on the first `num_prompts` held-out prompts, one sample each: `eval/accuracy`, `eval/reward`, ..."""
        prompts = self.source.eval_prompts(num_prompts)
        groups = [PromptGroup(f"eval/{index}/{prompt.prompt_id}", prompt, 1) for index, prompt in enumerate(prompts)]
        results = self.runner(groups, greedy=True)
        trajectories = [trajectory for group in results for trajectory in group.trajectories]
        metrics = rollout_metrics(results)
        scores = [trajectory.metrics.get("accuracy", trajectory.reward) for trajectory in trajectories]
        return {
            "eval/accuracy": sum(scores) / len(scores),
            "eval/reward": metrics["reward/mean"],
            "eval/response_tokens": metrics["response/tokens_mean"],
            "eval/prompts": float(len(scores)),
        }
