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
    import numpy as np
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
    top-p and top-k where they are on (greedy: temperature 1). `policy_versions[t]` is the weight version that sampled token t:
    a request in flight while weights are updated has more than one. `text` is the decoded turn, for environments; it is never
    tokenised again. len(token_ids) == len(logprobs) == len(policy_versions) >= 1; an aborted turn may hold no token.

    `routed_experts` int16 [n, layers, K]: the experts that computed token t of prompt and turn, in every layer of the model (one
    without experts holds any number). n is one less than their tokens: the last one was not computed. None where the engine
    was not asked for them, and in a turn without tokens.
    """

    request_id: str
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    text: str
    stop_reason: StopReason
    policy_versions: Sequence[int]
    routed_experts: np.ndarray | None = field(default=None, compare=False)


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
    `reward_components`: where the reward is a mixture (`reward.terms`), each score by the name of its term, unweighted, and
    the environment's own reward as `env`; the turns then hold env_weight x the environment's rewards, the last one the rest too.
    `answer`: what the environment took for the answer, in a form in which equal answers are equal; None: none, or it says none.
    `routed_experts` int16 [L, layers, K], where the engine was asked for them: the experts that computed token t when it first
    was (for a sampled token: in the turn that sampled it), -1 where none are known, as of the very last token.
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
    reward_components: Mapping[str, float] = field(default_factory=dict)
    answer: str | None = None
    routed_experts: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class TrajectoryGroup:
    """All trajectories of one prompt: the unit that is buffered, trained and counted exactly once.

    `num_masked`: samples left out because their environment (`env.on_error: mask`) or a reward term (its `on_error`) failed;
    `num_retries`: episodes begun again; `reward_errors`: by term, samples that it could not score, masked or not.
    `is_replayed`: an earlier step trained it already (`sampling.replay`); what is counted once leaves it out.
    `baseline_reward`: of one greedy answer to the same prompt, where the advantages need it.
    """

    group_id: str
    prompt_id: str
    trajectories: tuple[Trajectory, ...]
    num_masked: int = 0
    num_retries: int = 0
    reward_errors: Mapping[str, int] = field(default_factory=dict)
    is_replayed: bool = False
    baseline_reward: float | None = None

    @property
    def min_policy_version(self) -> int:
        """The oldest weight version that sampled any token of the group."""
        return min(v for t in self.trajectories for v in t.policy_versions if v >= 0)

    @property
    def max_policy_version(self) -> int:
        """The newest weight version that sampled any token of the group."""
        return max(v for t in self.trajectories for v in t.policy_versions)


@dataclass
class TrainSample:
    """One trajectory as tensors, token-aligned, on CPU. Filled in stages: `advantages` by the algorithm.

    token_ids int64 [L]; loss_mask bool [L]; rollout_logprobs float32 [L]; advantages float32 [L] (None until computed).
    `sample_index` numbers the samples of one step 0..N-1; `group_index` numbers their groups. `turns`: (start, end, reward) of
    each policy turn, tokens [start, end). `reward_components`: as in `Trajectory`. `baseline_reward`: of the greedy answer to the
    same prompt, where one was asked for. `is_replayed`: as in TrajectoryGroup. `staleness` float32 [L]: the trained policy's
    version less the one that sampled the token, 0 where loss_mask is False; None where versions are not known. `routed_experts`
    int16 [L, layers, K]: as in `Trajectory`.

    Filled by passes over models, where the algorithm needs them before advantages: old_logprobs, ref_logprobs, teacher_logprobs
    float32 [L], 0 where loss_mask is False; values float32 [L + 1]: values[t] is that of the state before token t, values[L]
    that of the state after the last. `returns` float32 [L]: what the critic is trained on. `marked` float32 [L]: 1 at the tokens
    that a policy loss picked from the whole update.
    """

    sample_index: int
    group_index: int
    group_id: str
    token_ids: torch.Tensor
    loss_mask: torch.Tensor
    rollout_logprobs: torch.Tensor
    reward: float
    advantages: torch.Tensor | None = None
    turns: tuple[tuple[int, int, float], ...] = ()
    truncated: bool = False
    is_replayed: bool = False
    reward_components: Mapping[str, float] = field(default_factory=dict)
    baseline_reward: float | None = None
    staleness: torch.Tensor | None = None
    routed_experts: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    teacher_logprobs: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    marked: torch.Tensor | None = None

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
    itself, which begins at `starts`. `sequence` is the number of the whole sequence in the whole micro-batch, which has
    `num_sequences`; -1 for padding. `sample_index` is that of every whole sequence of it, also of those of which this rank has no
    token.
    """

    num_tokens: int
    key_places: torch.Tensor
    starts: torch.Tensor
    before: torch.Tensor
    trunk_starts: torch.Tensor
    trunk_lengths: torch.Tensor
    sequence: torch.Tensor
    num_sequences: int
    sample_index: torch.Tensor


@dataclass
class MicroBatch:
    """Packed sequences for one forward/backward, label-aligned. Every tensor is 1-D.

    input_ids, position_ids, labels int64 [T]; cu_seqlens int32 [S+1], cu_seqlens[0] == 0, cu_seqlens[-1] == T;
    loss_mask bool [T]; rollout_logprobs, advantages float32 [T]; sample_index int64 [S] (-1 marks a padding sequence, which
    has no loss token); loss_tokens_per_sequence float32 [S]: loss tokens of the *whole* sequence, for sequence means;
    loss_tokens_per_group float32 [S]: those of all samples of its prompt in the update, for prompt means.
    `prefix_segments` int64 [S], where prompts are shared: the index of the sequence whose tokens this one attends to before
    its own (a trunk), or -1. A trunk holds a prompt once, without its last token, and has sample_index -1; each branch holds
    that last token and one response without its last token, so every position of a branch has a label.
    `old_logprobs`, `ref_logprobs`, `values`, `returns` and `marked` float32 [T] come with the samples or are filled by the
    passes that compute them; entries where loss_mask is False are 0. `values[t]`: of the state in which `labels[t]` was sampled.
    `staleness` float32 [T]: that of each label (see TrainSample).
    `routed_experts` int16 [T, layers, K]: the experts that each *input* token goes to (as input_ids, not as labels), -1: the
    router's own; from the samples, or from the pass that computed old_logprobs.
    `teacher_topk_ids` int64 and `teacher_topk_logprobs` float32 [T, K]: the teacher's K likeliest tokens, where a loss wants
    them. `context` is set where this is a context-parallel rank's part of a micro-batch: its sequences are then chunks (the last
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
    loss_tokens_per_group: torch.Tensor | None = None
    prefix_segments: torch.Tensor | None = None
    staleness: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    marked: torch.Tensor | None = None
    teacher_topk_ids: torch.Tensor | None = None
    teacher_topk_logprobs: torch.Tensor | None = None
    routed_experts: torch.Tensor | None = None
    context: ContextPart | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.numel())


@dataclass
class TrainBatch:
    """What one optimizer update sees on one data-parallel rank, with the normalisers of the *global* batch.

    `num_loss_tokens`, `num_sequences` and `num_groups` (prompts) count the whole batch over all data-parallel ranks and
    micro-batches, and include samples that were left out of compute because all their advantages are zero. Every rank has the
    same number of micro-batches. `padding_fraction`: share of this rank's tokens that carry no sample; `imbalance`: 1 -
    mean/max over ranks of the estimated cost.
    """

    micro_batches: list[MicroBatch]
    num_loss_tokens: int
    num_sequences: int
    num_groups: int = 0
    num_skipped: int = 0
    padding_fraction: float = 0.0
    imbalance: float = 0.0


@dataclass
class RowBatch(TrainBatch):
    """A TrainBatch of rows of fixed data, with what the rows say besides their tokens; float32 [N], by sample_index.

    `targets`: score, label or margin. `ref_logprobs`: the reference model's, summed over each answer's tokens, 0 for samples of
    other data-parallel ranks; None where the loss needs none. `kl_baseline`: the distance that kto measures rewards against.
    """

    targets: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    kl_baseline: float = 0.0


#: A step's numbers, by slash-separated name: `reward/mean`, `loss/policy`, `time/train_s`, `throughput/train_tokens_per_s`.
Metrics = dict[str, float]


@dataclass(frozen=True)
class WeightVersion:
    """Proof that engines serve `version`: how many tensors and bytes went, their joint checksum, seconds by phase.

    `failed` names the engines that do not serve it, with the reason; each must be rebuilt or given a later version.
    """

    version: int
    num_tensors: int
    size_bytes: int
    checksum: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainState:
    """Everything besides tensors that a resumed run needs.

    `num_critic_updates`: optimizer updates of the critic; None: the run has none. `kl_coef`: where an adaptive KL coefficient
    stands (None: where it begins). `warmup_steps`: supervised updates made before the first step. `num_nonfinite_skipped`:
    updates left out because loss or gradient was not finite.
    `step`: optimizer steps' outer loop count already finished; `policy_version`: version the engine must serve;
    `prompt_source`: the prompt source's own state; `trained_groups`: group ids trained so far, counted (for the ledger).
    """

    step: int
    policy_version: int
    prompt_source: Mapping[str, Any]
    num_trained_groups: int
    num_optimizer_steps: int
    elapsed_train_s: float = 0.0
    kl_coef: float | None = None
    num_critic_updates: int | None = None
    warmup_steps: int = 0
    num_nonfinite_skipped: int = 0
