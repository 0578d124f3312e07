"""Whether the terms of the reward can work, found out before anything is loaded: functions are imported, servers are asked.

What the configuration alone can say is in `config/reward_rules.py`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx

from skyrl_mega.config.build import numbered
from skyrl_mega.config.schema import AnyRewardTerm, Config, FunctionTerm, JudgeTerm, ModelTerm
from skyrl_mega.errors import ConfigError, RewardError

#: A server that is up answers one short request within this.
PROBE_TIMEOUT_S = 30.0


def check_rewards(config: Config) -> None:
    """Raises ConfigError with all that is wrong with `config.reward`. Not to be called inside an event loop."""
    if problems := [problem for term in config.reward.terms if (problem := find_problem(term))]:
        raise ConfigError(numbered(problems))


def find_problem(term: AnyRewardTerm, *, transport: httpx.AsyncBaseTransport | None = None) -> str:
    """Why the term can't work, with the remedy; "" if nothing speaks against it. `transport`: another way to reach servers."""
    try:
        if isinstance(term, FunctionTerm):
            from skyrl_mega.rewards.function import function_of

            function_of(term)
        elif isinstance(term, ModelTerm):
            _check_model(term, transport)
        else:
            asyncio.run(_ask_judge(term, transport))
    except ConfigError as error:
        return str(error)
    except RewardError as error:
        return f"The server of reward `{term.name}` must answer; {error}. Start it, or mend `url`, the model's name or the key."
    return ""


def _check_model(term: ModelTerm, transport: httpx.AsyncBaseTransport | None) -> None:
    from transformers import AutoConfig

    from skyrl_mega.rewards.model import output_index

    try:
        config = AutoConfig.from_pretrained(term.path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The `path` of reward `{term.name}` must be a model's directory; {error}. Correct it.") from error
    output_index(term, config)
    if term.url:
        asyncio.run(_ask_server(term, config.num_labels, transport))


async def _ask_server(term: ModelTerm, num_outputs: int, transport: httpx.AsyncBaseTransport | None) -> None:
    from skyrl_mega.rewards.model import ServedClassifier

    server = ServedClassifier(replace(term, retries=0, timeout_s=PROBE_TIMEOUT_S), transport=transport)
    try:
        [row] = await server.outputs([[0, 0]])
    finally:
        await server.close()
    if len(row) != num_outputs:
        raise RewardError(f"{term.url} serves a model with {len(row)} outputs, that in {term.path} has {num_outputs}")


async def _ask_judge(term: JudgeTerm, transport: httpx.AsyncBaseTransport | None) -> None:
    from skyrl_mega.rewards.judge import Judge

    judge = Judge(replace(term, retries=0, timeout_s=PROBE_TIMEOUT_S), transport=transport)
    try:
        await judge.ask("Say yes.", max_tokens=1)
    finally:
        await judge.close()
