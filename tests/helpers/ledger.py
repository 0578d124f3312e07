"""Groups for a ledger: prompts to issue, and what an engine would have made of them."""

import random

from skyrl_mega.data.ledger import Ledger
from skyrl_mega.types import Prompt, PromptGroup, StopReason, Trajectory, TrajectoryGroup, Turn, WeightVersion

IDENTITY = {"seed": 7}
SAMPLES = 2


def open_ledger(run_dir, *, prompts_per_step=2, max_staleness=2, identity=IDENTITY, replay_max_age=0) -> Ledger:
    return Ledger.open(
        run_dir / "ledger.sqlite",
        identity=identity,
        prompts_per_step=prompts_per_step,
        max_staleness=max_staleness,
        replay_max_age=replay_max_age,
    )


def prompts(first: int, count: int) -> list[PromptGroup]:
    """Groups g<first> ..., named by their seq."""
    return [
        PromptGroup(f"g{n}", Prompt(f"p{n}", {"question": f"{n} + {n}?", "n": n}), SAMPLES) for n in range(first, first + count)
    ]


def issue(ledger: Ledger, count: int, *, version: int = 0) -> list[str]:
    """Issues the next `count` groups, with the prompt source's state after them; their ids."""
    first = ledger.next_seq
    groups = prompts(first, count)
    assert ledger.issue(groups, policy_version=version, source_state={"index": first + count}) == first
    return [group.group_id for group in groups]


def finished(group_id: str, *, version: int = 0, length: int = 3, samples: int = SAMPLES) -> TrajectoryGroup:
    """What `group_id` becomes when `version` samples `length` tokens per sample."""
    number = int(group_id[1:])
    rng = random.Random(number)
    trajectories = tuple(
        Trajectory(
            token_ids=[number % 50_000, 5, *(rng.randrange(50_000) for _ in range(length))],
            loss_mask=[0, 0] + [1] * length,
            rollout_logprobs=[0.0, 0.0] + [-rng.random() for _ in range(length)],
            policy_versions=[-1, -1] + [version] * length,
            turns=(Turn(2, 2 + length, StopReason.STOP, float(sample)),),
            reward=float(sample),
            terminated=True,
            truncated=False,
            metrics={"accuracy": float(sample)},
            text=f"answer {sample}",
        )
        for sample in range(samples)
    )
    return TrajectoryGroup(group_id, f"p{number}", trajectories)


def finish_all(ledger: Ledger, group_ids, *, version: int = 0, length: int = 3) -> None:
    for group_id in group_ids:
        ledger.finish(finished(group_id, version=version, length=length))


def train_step(ledger: Ledger, step: int, group_ids, *, publish: bool = True, replayed=()) -> None:
    """Step `step` on the version before it, published as version `step`."""
    ledger.take(step, group_ids, step - 1, replayed=replayed)
    ledger.trained(step, WeightVersion(step, 3, 3000, f"sum{step}", {"transfer": 0.5}) if publish else None)
