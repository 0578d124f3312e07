"""Whether one model can judge, token by token, what another one wrote: read from their files alone, no torch, no transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skyrl_mega.config.model_files import ModelFiles, inspect_model


def teacher_problems(path: Path, policy: ModelFiles, *, max_model_len: int) -> list[str]:
    """Why the model in directory `path` can't teach `policy`; [] if it can.

    A teacher says how likely each of the policy's token ids is: both must mean the same token by it. Tokenizers are compared
    where both have a tokenizer.json; models of one tokenizer may differ in how many rows pad their vocabulary, and the teacher
    must have every row of the policy's.
    """
    teacher, problems = inspect_model(path)
    if teacher is None or problems:
        return [problem.replace("`model.path`", "`teacher.path`") for problem in problems]
    tokens, known = _tokens(policy.path), _tokens(path)
    if tokens is not None and known is not None:
        difference = next((i for i in sorted(tokens.keys() | known.keys()) if tokens.get(i) != known.get(i)), None)
        if difference is not None:
            return [
                f"Teacher and policy must have one vocabulary; token {difference} is {known.get(difference)!r} in `{path}` and "
                f"{tokens.get(difference)!r} in `{policy.path}`. Choose a teacher of the policy's family."
            ]
        if teacher.vocab_size < policy.vocab_size:
            problems.append(_sizes_differ("as many", teacher, policy))
    elif teacher.vocab_size != policy.vocab_size:
        problems.append(_sizes_differ("equally many", teacher, policy))
    if teacher.max_position_embeddings < max_model_len:
        problems.append(
            f"A teacher must know the positions of whole trajectories; `{path}` knows {teacher.max_position_embeddings}, and "
            f"`rollout.max_model_len` is {max_model_len}. Lower it, or choose another teacher."
        )
    return problems


def _sizes_differ(rule: str, teacher: ModelFiles, policy: ModelFiles) -> str:
    return (
        f"A teacher must have {rule} tokens as the policy; `{teacher.path}` has {teacher.vocab_size} and `{policy.path}` "
        f"{policy.vocab_size}. Choose a teacher of the policy's family."
    )


def _tokens(path: Path) -> dict[int, str] | None:
    """Token by id, of a tokenizer.json; None where there is none, or none of that kind."""
    try:
        tokenizer: dict[str, Any] = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        added = {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or []}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if isinstance(vocabulary, dict):
        return {index: token for token, index in vocabulary.items()} | added
    return {index: token for index, (token, _) in enumerate(vocabulary)} | added
