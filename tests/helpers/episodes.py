"""Episodes as a few numbers, and what an advantage estimator is given of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st

from skyrl_mega.algorithms.advantages.inputs import AdvantageInputs
from skyrl_mega.types import TrainSample

#: Rewards of few values, so that ties and groups of equal rewards occur.
few_rewards = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 4, width=32)


@dataclass
class Episode:
    """One sample: a token of the prompt, then turns of (sampled tokens, reward), one token of the environment between two."""

    group: int
    turns: list[tuple[int, float]]
    truncated: bool = False
    greedy: float = 0.0
    components: dict[str, float] = field(default_factory=dict)

    @property
    def reward(self) -> float:
        return sum(reward for _, reward in self.turns)

    @property
    def trained(self) -> int:
        return sum(tokens for tokens, _ in self.turns)

    def turn_index(self) -> list[int]:
        """The turn of each token, -1 for those of prompt and environment."""
        index = []
        for number, (tokens, _) in enumerate(self.turns):
            index += [-1] + [number] * tokens
        return index

    def states(self) -> list[int]:
        """The observation that each token's turn answers, -1 for other tokens: as `sample` numbers tokens, its own number."""
        states, place = [], 0
        for tokens, _ in self.turns:
            states += [-1] + [place] * tokens
            place += tokens + 1
        return states

    def token_rewards(self) -> list[float]:
        return list(itertools.chain.from_iterable([0.0] * tokens + [reward] for tokens, reward in self.turns))

    def sample(self, number: int) -> TrainSample:
        index = self.turn_index()
        spans = [(index.index(n), len(index) - index[::-1].index(n)) for n in range(len(self.turns))]
        mask = torch.tensor(index) >= 0
        return TrainSample(
            number,
            self.group,
            f"g{self.group}",
            torch.arange(len(index)),
            mask,
            torch.where(mask, -1.0, 0.0),
            self.reward,
            turns=tuple((start, end, reward) for (start, end), (_, reward) in zip(spans, self.turns, strict=True)),
            truncated=self.truncated,
            reward_components=self.components,
            baseline_reward=self.greedy,
        )


def outcomes(*groups: list[float], tokens: int = 1) -> list[Episode]:
    """Episodes of one turn, by group."""
    return [Episode(number, [(tokens, reward)]) for number, rewards in enumerate(groups) for reward in rewards]


def inputs_of(episodes: list[Episode], *, values: list[list[float]] | None = None) -> AdvantageInputs:
    """values: of each episode one more than it has tokens, the last being that of its end."""
    lengths = [len(episode.turn_index()) for episode in episodes]
    turn_index_T = torch.tensor([i for e in episodes for i in e.turn_index()])
    return AdvantageInputs(
        group_index_N=torch.tensor([e.group for e in episodes]),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)]),
        loss_mask=turn_index_T >= 0,
        token_rewards_T=torch.tensor([r for e in episodes for r in e.token_rewards()], dtype=torch.float64),
        turn_index_T=turn_index_T,
        truncated_N=torch.tensor([e.truncated for e in episodes]),
        rollout_logprobs_T=torch.zeros(sum(lengths), dtype=torch.float64),
        values_T=None if values is None else torch.tensor([v for row in values for v in row[:-1]], dtype=torch.float64),
        last_values_N=None if values is None else torch.tensor([row[-1] for row in values], dtype=torch.float64),
        baseline_rewards_N=torch.tensor([e.greedy for e in episodes], dtype=torch.float64),
        state_T=torch.tensor([state for e in episodes for state in e.states()]),
        reward_components={
            name: torch.tensor([e.components[name] for e in episodes], dtype=torch.float64) for name in episodes[0].components
        },
    )


def per_sample(advantages_T: torch.Tensor, episodes: list[Episode]) -> list[float]:
    """The one advantage that all of an episode's trained tokens share; the others must be 0."""
    shared = []
    for row, episode in zip(by_token(advantages_T, episodes), episodes, strict=True):
        assert len(set(row)) == 1, (row, episode)
        shared.append(row[0])
    return shared


def by_token(advantages_T: torch.Tensor, episodes: list[Episode]) -> list[list[float]]:
    """Each episode's advantages at its trained tokens; those of other tokens must be 0."""
    rows = []
    for values, episode in zip(advantages_T.split([len(e.turn_index()) for e in episodes]), episodes, strict=True):
        index = torch.tensor(episode.turn_index())
        assert (values[index < 0] == 0).all()
        rows.append(values[index >= 0].tolist())
    return rows


@st.composite
def batches(draw, *, max_turns=1, max_tokens=3, max_samples=6, rewards=few_rewards):
    """Groups of 1 to `max_samples` episodes, in any order."""
    turn = st.tuples(st.integers(1, max_tokens), rewards)
    groups = draw(st.lists(st.integers(1, max_samples), min_size=1, max_size=3))
    episodes = [
        Episode(7 - 3 * number, draw(st.lists(turn, min_size=1, max_size=max_turns)), greedy=draw(rewards))
        for number, size in enumerate(groups)
        for _ in range(size)
    ]
    return draw(st.permutations(episodes))
