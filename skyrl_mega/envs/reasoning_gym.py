"""The procedural tasks of the `reasoning-gym` package (arXiv:2505.24760) as environments: one question, one graded answer.

A payload holds coordinates, not the entry: `create_dataset(task, seed=dataset_seed, size=CHUNK)[item]` makes the same entry
anywhere, while most entries do not survive JSON (tuples, integer keys), and their scorers need them whole.

Training and evaluation are apart twice over: their items come from disjoint seeds, and an item belongs to evaluation exactly
if a hash of its question says so; an item on the wrong side is passed over.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, Literal

from skyrl_mega.envs.base import Observation, Reply, Split, TextEnvBase, nearest, stable_hash
from skyrl_mega.envs.registry import register_env
from skyrl_mega.errors import EnvError, MissingDependencyError

#: Items are made in datasets of this size. Some tasks do work for every item when their dataset is made, so it is small.
CHUNK = 64
_SEEDS = 1 << 30  # training seeds are below, evaluation seeds above
_HELD_OUT = 8  # one question in eight
_MOST_TRIES = 400  # per wanted item, before the task is called exhausted

INSTRUCTION = "Give the final answer between <answer> and </answer>."

# Scorers parse what the model wrote, and some let the parser's errors out (prime_factorization, boxnet).
_UNPARSABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError)


def _package() -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "env.name=reasoning_gym needs the package reasoning-gym; install it with: pip install 'skyrl-mega[envs]'"
        ) from error
    return reasoning_gym


@functools.lru_cache(maxsize=256)
def _dataset(task: str, options_json: str, dataset_seed: int) -> Any:
    return _package().create_dataset(task, seed=dataset_seed, size=CHUNK, **json.loads(options_json))


def _check_task(task: str, task_options: Mapping[str, Any]) -> str:
    """The options as canonical JSON. Raises EnvError if the package has no such task, option, or refuses a value."""
    datasets = _package().factory.DATASETS
    if task not in datasets:
        raise EnvError(f"reasoning_gym has no task {task!r}{nearest(str(task), datasets)}")
    known = {field.name for field in dataclasses.fields(datasets[task][1])} - {"seed", "size"}
    for option in task_options:
        if option not in known:
            raise EnvError(f"reasoning_gym task {task!r} has no option {option!r}{nearest(option, known)}")
    options_json = json.dumps(dict(task_options), sort_keys=True)
    try:
        _dataset(task, options_json, 0)
    except (AssertionError, TypeError, ValueError) as error:
        raise EnvError(f"reasoning_gym task {task!r} refuses the task_options {options_json}: {error}") from error
    return options_json


def _coordinates(split: Split, seed: int, position: int) -> tuple[int, int]:
    """(dataset seed, item) of the position-th candidate of a split. Chunks never overlap: item i is drawn from seed + i."""
    base = 0 if split == "eval" else stable_hash("reasoning_gym", seed) % (_SEEDS // CHUNK)
    chunk = (base + position // CHUNK) % (_SEEDS // CHUNK)
    return (_SEEDS if split == "eval" else 0) + chunk * CHUNK, position % CHUNK


def _is_held_out(question: str) -> bool:
    return stable_hash("held out", question) % _HELD_OUT == 0


@functools.cache
def _eval_stream(task: str, options_json: str) -> _EvalStream:
    return _EvalStream(task, options_json)


class _EvalStream:
    """The held-out items of a task, each question once, found in order and remembered. The same for every seed."""

    def __init__(self, task: str, options_json: str) -> None:
        self._task, self._options_json = task, options_json
        self._found: list[tuple[int, int]] = []
        self._questions: set[str] = set()
        self._position = 0

    def item(self, index: int) -> tuple[int, int]:
        limit = self._position + _MOST_TRIES * max(1, index + 1 - len(self._found))
        while len(self._found) <= index:
            if self._position >= limit:
                raise EnvError(
                    f"reasoning_gym task {self._task!r} gave {len(self._found)} different held-out questions in "
                    f"{self._position} tries, but {index + 1} are wanted. Lower evaluation.num_prompts, or make the task "
                    "larger with env.options.task_options."
                )
            coordinates = _coordinates("eval", 0, self._position)
            question = _dataset(self._task, self._options_json, coordinates[0])[coordinates[1]]["question"]
            if _is_held_out(question) and question not in self._questions:
                self._questions.add(question)
                self._found.append(coordinates)
            self._position += 1
        return self._found[index]


def _train_item(task: str, options_json: str, index: int, seed: int) -> tuple[int, int]:
    for attempt in range(_MOST_TRIES):  # later attempts use positions beyond any run's indexes
        coordinates = _coordinates("train", seed, index + attempt * (_SEEDS // 2 // _MOST_TRIES))
        if not _is_held_out(_dataset(task, options_json, coordinates[0])[coordinates[1]]["question"]):
            return coordinates
    raise EnvError(f"reasoning_gym task {task!r} gave no training question in {_MOST_TRIES} tries; make the task larger.")


@register_env("reasoning_gym")
class ReasoningGymEnv(TextEnvBase):
    """One question of `task`; the reward is the task's own score where it reaches `threshold`, else 0.

    Wrong answers score up to 0.4 in some tasks, so the default threshold of 1.0 rewards right answers alone. Style "chat" asks
    in one user message and grades what stands between the last <answer> tags; style "raw" appends "\\nAnswer:" and grades the
    stripped action. `task_options` go to the package's dataset configuration. Metrics: accuracy (score 1), score (before
    the threshold), format (an answer was found), grader_error (the scorer could not parse the answer; its score is 0).
    """

    def __init__(
        self,
        *,
        task: str = "chain_sum",
        threshold: float = 1.0,
        style: Literal["chat", "raw"] = "chat",
        instruction: str = INSTRUCTION,
        task_options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(threshold, (int, float)) or not 0.0 < threshold <= 1.0:
            raise EnvError(f"reasoning_gym option threshold must be above 0 and at most 1, but is {threshold!r}.")
        if style not in ("chat", "raw"):
            raise EnvError(f"reasoning_gym option style must be 'chat' or 'raw', but is {style!r}.")
        self._options_json = _check_task(task, task_options or {})
        super().__init__(chat=style == "chat", task=task, task_options=dict(task_options or {}))
        self.task, self.threshold, self.style, self.instruction = task, float(threshold), style, instruction
        self._graded: tuple[Any, dict[str, Any]] | None = None

    @classmethod
    def generate_payload(cls, index: int, seed: int, split: Split, **options: Any) -> dict[str, Any]:
        """{"task", "dataset_seed", "item"}. Evaluation questions are all different; a training question may come again."""
        task = options.get("task", "chain_sum")
        options_json = _check_task(task, options.get("task_options") or {})
        if split == "eval":
            dataset_seed, item = _eval_stream(task, options_json).item(index)
        else:
            dataset_seed, item = _train_item(task, options_json, index, seed)
        return {"task": task, "dataset_seed": dataset_seed, "item": item}

    @classmethod
    def check_payload(cls, payload: Mapping[str, Any]) -> None:
        seed, item = payload.get("dataset_seed"), payload.get("item")
        if not isinstance(payload.get("task"), str) or type(seed) is not int or type(item) is not int or not 0 <= item < CHUNK:
            raise EnvError(
                f"a reasoning_gym payload must be {{task: text, dataset_seed: integer, item: 0..{CHUNK - 1}}}, "
                f"but is {dict(payload)!r}."
            )

    @classmethod
    def payload_key(cls, payload: Mapping[str, Any]) -> str:
        return f"{payload['task']}/{payload['dataset_seed'] + payload['item']}"

    def pose(self, payload: Mapping[str, Any]) -> Observation:
        if payload["task"] != self.task:
            raise EnvError(f"this environment poses task {self.task!r}, but the payload is of {payload['task']!r}.")
        dataset = _dataset(self.task, self._options_json, payload["dataset_seed"])
        entry = dataset[payload["item"]]
        self._graded = (dataset, entry)
        if self.style == "raw":
            return f"{entry['question']}\nAnswer:"
        content = f"{entry['question']}\n\n{self.instruction}" if self.instruction else entry["question"]
        return [{"role": "user", "content": content}]

    def respond(self, action: str) -> Reply:
        assert self._graded is not None  # step runs only after pose
        dataset, entry = self._graded
        answer = action.strip() if self.style == "raw" else _package().utils.extract_answer(action)
        score, failed = 0.0, False
        if answer:
            try:
                score = min(1.0, max(0.0, float(dataset.score_answer(answer, entry))))
            except _UNPARSABLE:
                failed = True
        metrics = {
            "accuracy": float(score >= 1.0),
            "score": score,
            "format": float(bool(answer)),
            "grader_error": float(failed),
        }
        reward = score if score >= self.threshold else 0.0
        return Reply(reward=reward, metrics=metrics, answer=answer.strip() if answer else None)
