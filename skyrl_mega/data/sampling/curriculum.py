"""A curriculum by past success: prompts that are half solved come most often.

The spread of a group's rewards, and with it what a group teaches, is largest where the policy succeeds half of the time: a
success rate p has the variance p (1 - p). So a prompt whose success rate was last estimated as p has the weight

    w(p) = max(4 p (1 - p), FLOOR)

(learnability, arXiv:2502.12272; Kimi k1.5, arXiv:2501.12599, weighs prompts by 1 - p). One that was never tried has the weight
1. The estimate follows the policy: every group of a prompt moves it by RATE towards that group's mean.

Weights are chances of acceptance. The rows come in the order of an epoch's permutation, and each is accepted with the chance w,
or passed over until the next epoch. So over many epochs a prompt is drawn in proportion to its weight; no prompt comes twice in
one epoch; the first epoch has them all; FLOOR sees to it that none starves. The fate of the n-th row depends on the seed, n and
its estimate alone, however the draws are grouped into calls.

The state holds one byte a prompt (0: never tried; 1 to 255: the estimate in steps of 1/254, so that 128 is one half), packed for
JSON. It is written with every draw and every finished group: meant for up to about a million prompts.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from skyrl_mega.data.hashing import stable_hash
from skyrl_mega.errors import DataError
from skyrl_mega.types import Metrics, Prompt, TrajectoryGroup

if TYPE_CHECKING:
    from skyrl_mega.data.prompts import RowPromptSource

#: Least weight: a prompt that is always solved, or never, is drawn in one epoch of ten.
FLOOR = 0.1
#: How far one group moves a prompt's estimate towards its own mean.
RATE = 0.5
_LEVELS = 254
_KEY = "success"


def weight(success: float | None) -> float:
    """The chance to be drawn in an epoch, of a prompt with this estimated success rate (None: never tried)."""
    return 1.0 if success is None else max(4.0 * success * (1.0 - success), FLOOR)


def success_rate(group: TrajectoryGroup) -> float:
    """Mean over the group of the environment's `accuracy`, or of the reward where it reports none; each taken within [0, 1]."""
    scores = [trajectory.metrics.get("accuracy", trajectory.reward) for trajectory in group.trajectories]
    return sum(min(max(score, 0.0), 1.0) for score in scores) / len(scores)


class CurriculumPromptSource:
    """The prompts of `rows`, those of middling success more often; a `protocols.CurriculumSource`. See the module's text.

    Raises DataError for a saved state that is not one of these prompts; a state without a curriculum begins with none tried.
    """

    def __init__(self, rows: RowPromptSource, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self._place = {prompt_id: place for place, prompt_id in enumerate(rows.train_ids())}
        self._levels = np.zeros(len(self._place), dtype=np.uint8)
        self._passed_over = 0

    def next(self, count: int) -> list[Prompt]:
        prompts: list[Prompt] = []
        while len(prompts) < count:
            number = self._rows.num_drawn
            [prompt] = self._rows.next(1)
            if stable_hash("curriculum", self._seed, number) < weight(self.success(prompt.prompt_id)) * 2**64:
                prompts.append(prompt)
            else:
                self._passed_over += 1
        return prompts

    def success(self, prompt_id: str) -> float | None:
        """The estimated success rate of a training prompt, None if it was never tried."""
        level = int(self._levels[self._place[prompt_id]])
        return None if level == 0 else (level - 1) / _LEVELS

    def observe(self, group: TrajectoryGroup) -> None:
        """Moves the estimate of the group's prompt."""
        measured, before = success_rate(group), self.success(group.prompt_id)
        estimate = measured if before is None else before + RATE * (measured - before)
        self._levels[self._place[group.prompt_id]] = 1 + round(estimate * _LEVELS)

    def metrics(self) -> Metrics:
        """`sampling/curriculum_tried`: share of prompts; `_success`: mean estimate of those; `_passed_over`: rows since last."""
        tried = self._levels[self._levels > 0].astype(np.float64)
        passed_over, self._passed_over = self._passed_over, 0
        return {
            "sampling/curriculum_tried": len(tried) / len(self._levels),
            "sampling/curriculum_success": float((tried - 1).mean() / _LEVELS) if len(tried) else 0.0,
            "sampling/curriculum_passed_over": float(passed_over),
        }

    def eval_prompts(self, count: int) -> list[Prompt]:
        return self._rows.eval_prompts(count)

    def state_dict(self) -> dict[str, Any]:
        return {**self._rows.state_dict(), _KEY: base64.b85encode(zlib.compress(self._levels.tobytes(), 1)).decode("ascii")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rows.load_state_dict(state)
        self._levels = np.zeros(len(self._place), dtype=np.uint8)
        if _KEY in state:
            self._levels = _unpack(state[_KEY], len(self._place))


def _unpack(packed: Any, count: int) -> np.ndarray:
    try:
        levels = np.frombuffer(zlib.decompress(base64.b85decode(packed)), dtype=np.uint8).copy()
    except (ValueError, TypeError, zlib.error) as error:
        raise DataError(
            f"the saved success rates of the curriculum are damaged: {error}. Resume from another checkpoint."
        ) from error
    if len(levels) != count:
        raise DataError(
            f"the saved curriculum has success rates of {len(levels)} prompts, and there are {count}. Resume with the data of "
            "the saved run, or start a new run_dir."
        )
    return levels
