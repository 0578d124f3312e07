"""Held-out prompts answered by the engines, and the numbers that follow: the run's own task, and those of `evaluation.tasks`.

A suite is one task: its prompts, and agents that sample as `evaluation` says. The numbers of the run's own are `eval/...`, those
of a task `eval/<task>/...`. Prompts and sampling seeds are the same in every evaluation, so two of them compare prompt by prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from skyrl_mega.agents.stats import rollout_metrics
from skyrl_mega.config.reward_rules import ENV_SCORE
from skyrl_mega.config.schema import EvalConfig
from skyrl_mega.errors import DataError
from skyrl_mega.protocols import GroupRunner, PromptSource
from skyrl_mega.telemetry.eval_stats import Estimate, estimate, ks_up_to, majority_score, pass_at_k
from skyrl_mega.types import Metrics, PromptGroup, Trajectory, TrajectoryGroup


@dataclass(frozen=True)
class EvalSuite:
    """One task to evaluate. `name` is "" for the run's own."""

    name: str
    source: PromptSource
    runner: GroupRunner
    num_prompts: int
    samples_per_prompt: int

    def groups(self) -> list[PromptGroup]:
        """The prompt groups to play, their ids the same in every evaluation."""
        prefix = f"eval:{self.name}" if self.name else "eval"
        return [
            PromptGroup(f"{prefix}/{index}/{prompt.prompt_id}", prompt, self.samples_per_prompt)
            for index, prompt in enumerate(self.source.eval_prompts(self.num_prompts))
        ]


@dataclass(frozen=True)
class SuiteResult:
    """What came of a suite: the played groups in the order of its prompts, and its statistics by name (`accuracy`, `pass@4` ...).

    `omitted`: what could not be computed, and why.
    """

    name: str
    samples_per_prompt: int
    groups: list[TrajectoryGroup]
    estimates: dict[str, Estimate]
    metrics: Metrics  #: by full name, `eval/...`
    omitted: list[str] = field(default_factory=list)


class Evaluation:
    """All suites' groups in flight at once. One event loop."""

    def __init__(self, suites: Sequence[EvalSuite], settings: EvalConfig) -> None:
        """Begins; raises EnvError or DataError where a suite has too few prompts."""
        self._suites, self._settings = list(suites), settings
        greedy = settings.temperature == 0.0
        groups = [(suite, group) for suite in suites for group in suite.groups()]
        self.num_total = sum(group.num_samples for _, group in groups)
        self.num_finished = 0
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(suite.runner(group, greedy=greedy, on_sample=self._count)) for suite, group in groups]
        self._of_suite = [suite.name for suite, _ in groups]

    def _count(self) -> None:
        self.num_finished += 1

    async def wait(self, patience_s: float | None = None) -> list[SuiteResult] | None:
        """The results; None if they are not there after `patience_s`. Raises what an engine or an environment raised."""
        if not self._tasks:
            raise DataError("there is no prompt to evaluate; raise evaluation.num_prompts.")
        done, waiting = await asyncio.wait(self._tasks, timeout=patience_s, return_when=asyncio.FIRST_EXCEPTION)
        failures = [task.exception() for task in done if task.exception() is not None]
        if failures:
            await self.cancel()
            raise failures[0]  # type: ignore[misc]
        if waiting:
            return None
        played: dict[str, list[TrajectoryGroup]] = {suite.name: [] for suite in self._suites}
        for name, task in zip(self._of_suite, self._tasks, strict=True):
            played[name].append(task.result())
        return [suite_result(suite, played[suite.name], self._settings.pass_score) for suite in self._suites]

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def score_of(trajectory: Trajectory) -> float:
    """How good the environment found an episode: the `accuracy` it reports, else its own reward."""
    env_reward = trajectory.reward_components.get(ENV_SCORE, trajectory.reward)
    return float(trajectory.metrics.get("accuracy", env_reward))


def suite_result(suite: EvalSuite, groups: list[TrajectoryGroup], pass_score: float) -> SuiteResult:
    """The statistics of played groups. A sample passes if its score is at least `pass_score`.

    `accuracy` is the mean score (mean@n). With several samples there are `pass@k` for k in powers of two up to n, over prompts
    that have k samples; and `maj@n`, where the environment reports what each sample answered. Raises DataError where an
    environment that failed has left no sample.
    """
    prefix = f"eval/{suite.name}/" if suite.name else "eval/"
    answered = [group for group in groups if group.trajectories]
    means = rollout_metrics(answered)
    scores = [[score_of(trajectory) for trajectory in group.trajectories] for group in answered]
    estimates = {"accuracy": estimate([sum(row) / len(row) for row in scores])}
    omitted: list[str] = []
    if suite.samples_per_prompt > 1:
        passed = [(len(row), sum(score >= pass_score for score in row)) for row in scores]
        for k in ks_up_to(suite.samples_per_prompt):
            if values := [pass_at_k(n, c, k) for n, c in passed if n >= k]:
                estimates[f"pass@{k}"] = estimate(values)
        answers = [[trajectory.answer for trajectory in group.trajectories] for group in answered]
        if any(answer is not None for row in answers for answer in row):
            votes = [majority_score(row, values) for row, values in zip(answers, scores, strict=True)]
            estimates[f"maj@{suite.samples_per_prompt}"] = estimate(votes)
        else:
            omitted.append(f"maj@{suite.samples_per_prompt}: the environment does not report what was answered (Reply.answer)")
    first = answered[0].trajectories[0]
    metrics = {
        **{f"{prefix}{name}": number.value for name, number in estimates.items()},
        f"{prefix}accuracy_low": estimates["accuracy"].low,
        f"{prefix}accuracy_high": estimates["accuracy"].high,
        f"{prefix}reward": means["reward/mean"],
        f"{prefix}response_tokens": means["response/tokens_mean"],
        f"{prefix}prompts": float(len(groups)),
        **{f"{prefix}reward_{name}": means[f"reward/{name}_mean"] for name in sorted(first.reward_components)},
    }
    return SuiteResult(suite.name, suite.samples_per_prompt, groups, estimates, metrics, omitted)
