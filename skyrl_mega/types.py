"""The nouns that travel between rooms. Imports nothing of ours and no torch at run time.

Shape letters: N samples (trajectories), S sequences in one micro-batch, L tokens of one sequence, T packed tokens of a
micro-batch.

Two alignments, and only two:

- **token-aligned** (`Trajectory`, `TrainSample`): index t speaks of token t itself. `rollout_logprobs[t]` is the
  log-probability with which the engine sampled `token_ids[t]`; `loss_mask[t]` says whether token t was sampled by the
  policy (and so is trained).
- **label-aligned** (`MicroBatch`): index t speaks of `labels[t]`, which is the next token of the same sequence. The last
  position of each sequence has no label: its `loss_mask` is False and its `labels` is 0.

`data.packing` is the one place that turns the first into the second.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class StopReason(str, enum.Enum):
    """Why the engine stopped sampling one turn."""

    STOP = "stop"  #: an end-of-sequence token or a stop string was reached
    LENGTH = "length"  #: `max_new_tokens` or the context length was reached
    ABORT = "abort"  #: the request was cancelled; its tokens are valid but the turn is unfinished


@dataclass(frozen=True)
class Prompt:
    """One task to try: a stable id, and whatever the environment needs to pose and grade it.

    `prompt_id` is stable across runs and resumes (row number, generator index ...): the ledger of trained prompts uses it.
    `payload` is given to the environment's `reset(options={"payload": ...})`; it must be JSON-serialisable.
    """

    prompt_id: str
    payload: Mapping[str, Any]


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and how many independent trajectories to sample for it. `group_id` is unique within a run."""

    group_id: str
    prompt: Prompt
    num_samples: int


@dataclass(frozen=True)
class SamplingParams:
    """How the engine samples one turn. `temperature` 0 is greedy.

    `top_p` 1.0 and `top_k` 0 mean no truncation. `stop` strings end the turn; the tokens that spell them stay part of the
    turn. `seed` fixes the request's random stream (None: the engine's own stream).
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """Token ids in. `request_id` is unique among the requests in flight."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams


@dataclass(frozen=True)
class Completion:
    """Token ids out, with the log-probability of each as the engine sampled it.

    `logprobs[t]` is that of the distribution token t was drawn from: log softmax(logits / temperature)[token_ids[t]], after
    top-p and top-k where they are on (greedy: temperature 1). `policy_version` is the weight version that sampled every token
    of it. `text` is the decoded turn, for environments; it is never tokenised again. len(token_ids) == len(logprobs) >= 1.
    """

    request_id: str
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    text: str
    stop_reason: StopReason
    policy_version: int


@dataclass(frozen=True)
class Turn:
    """One exchange inside a trajectory: tokens [start, end) were sampled, then the environment answered with `reward`."""

    start: int
    end: int
    stop_reason: StopReason
    reward: float


@dataclass(frozen=True)
class Trajectory:
    """One finished episode, token-aligned; all four lists have the same length L.

    `rollout_logprobs` is 0.0 and `policy_versions` is -1 where `loss_mask` is 0. `reward` is the sum of the turns' rewards.
    `terminated`: the environment ended the episode; `truncated`: a limit (turns, tokens) did. `metrics` are numbers the
    environment reports at the end (`accuracy` ...), averaged by telemetry.
    """

    token_ids: Sequence[int]
    loss_mask: Sequence[int]
    rollout_logprobs: Sequence[float]
    policy_versions: Sequence[int]
    turns: tuple[Turn, ...]
    reward: float
    terminated: bool
    truncated: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True)
class TrajectoryGroup:
    """All trajectories of one prompt: the unit that is buffered, trained and counted exactly once."""

    group_id: str
    prompt_id: str
    trajectories: tuple[Trajectory, ...]

    @property
    def min_policy_version(self) -> int:
        """The oldest weight version that sampled any token of the group."""
        return min(v for t in self.trajectories for v in t.policy_versions if v >= 0)


@dataclass
class TrainSample:
    """One trajectory as tensors, token-aligned, on CPU. Filled in stages: `advantages` by the algorithm.

    token_ids int64 [L]; loss_mask bool [L]; rollout_logprobs float32 [L]; advantages float32 [L] (None until computed).
    `sample_index` numbers the samples of one step 0..N-1; `group_index` numbers their groups.
    """

    sample_index: int
    group_index: int
    group_id: str
    token_ids: torch.Tensor
    loss_mask: torch.Tensor
    rollout_logprobs: torch.Tensor
    reward: float
    advantages: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.numel())

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class ContextPart:
    """How a context-parallel rank's part of a micro-batch lies in the whole one. Every tensor is int64 [S], on CPU.

    Attention speaks of key rows: the `num_tokens` rows of the whole micro-batch in its own order, then this rank's padding.
    `key_places` (int64, one entry a key row) says where each lies among the rows of all ranks end to end: row i of rank r is
    r * T + i, and T is the same on every rank.

    The part's sequences are chunks of whole ones. Each chunk's queries see, of key rows: a trunk (`trunk_starts`,
    `trunk_lengths`; 0 where there is none), the `before` tokens of their sequence ahead of the chunk, and causally the chunk
    itself, which begins at `starts`.
    """

    num_tokens: int
    key_places: torch.Tensor
    starts: torch.Tensor
    before: torch.Tensor
    trunk_starts: torch.Tensor
    trunk_lengths: torch.Tensor


@dataclass
class MicroBatch:
    """Packed sequences for one forward/backward, label-aligned. Every tensor is 1-D.

    input_ids, position_ids, labels int64 [T]; cu_seqlens int32 [S+1], cu_seqlens[0] == 0, cu_seqlens[-1] == T;
    loss_mask bool [T]; rollout_logprobs, advantages float32 [T]; sample_index int64 [S] (-1 marks a padding sequence, which
    has no loss token); loss_tokens_per_sequence float32 [S]: loss tokens of the *whole* sequence, for sequence means.
    `prefix_segments` int64 [S], where prompts are shared: the index of the sequence whose tokens this one attends to before
    its own (a trunk), or -1. A trunk holds a prompt once, without its last token, and has sample_index -1; each branch holds
    that last token and one response without its last token, so every position of a branch has a label.
    `old_logprobs` and `ref_logprobs` float32 [T] are filled by the passes that compute them; entries where loss_mask is
    False are 0.
    `context` is set where this is a context-parallel rank's part of a micro-batch: its sequences are then chunks (the last
    may be padding), with the sample_index and the loss_tokens_per_sequence of the whole sequence, and no prefix_segments.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    loss_mask: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor
    sample_index: torch.Tensor
    loss_tokens_per_sequence: torch.Tensor
    prefix_segments: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    context: ContextPart | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.numel())


@dataclass
class TrainBatch:
    """What one optimizer update sees on one data-parallel rank, with the normalisers of the *global* batch.

    `num_loss_tokens` and `num_sequences` count the whole batch over all data-parallel ranks and micro-batches, and include
    samples that were left out of compute because all their advantages are zero. Every rank has the same number of
    micro-batches. `padding_fraction`: share of this rank's tokens that carry no sample; `imbalance`: 1 - mean/max over
    ranks of the estimated cost.
    """

    micro_batches: list[MicroBatch]
    num_loss_tokens: int
    num_sequences: int
    num_skipped: int = 0
    padding_fraction: float = 0.0
    imbalance: float = 0.0


#: A step's numbers, by slash-separated name: `reward/mean`, `loss/policy`, `time/train_s`, `throughput/train_tokens_per_s`.
Metrics = dict[str, float]


@dataclass(frozen=True)
class WeightVersion:
    """Proof that an engine serves `version`: how many tensors and bytes went, their joint checksum, seconds by phase."""

    version: int
    num_tensors: int
    size_bytes: int
    checksum: str
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainState:
    """Everything besides tensors that a resumed run needs.

    `step`: optimizer steps' outer loop count already finished; `policy_version`: version the engine must serve;
    `prompt_source`: the prompt source's own state; `trained_groups`: group ids trained so far, counted (for the ledger).
    """

    step: int
    policy_version: int
    prompt_source: Mapping[str, Any]
    num_trained_groups: int
    num_optimizer_steps: int
    elapsed_train_s: float = 0.0
