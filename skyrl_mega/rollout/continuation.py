"""A turn that is put together from several completions, because engines ended it early (ABORT) with the tokens it had.

The next piece continues prompt + tokens so far, with the tokens that are left and a seed derived from the turn's (the engine's
random stream can't be carried on). The joined completion holds every sampled token once, with its own logprob and version.

Stop strings need care: an engine sees only the text of its own piece, and can't find a stop string that began in the piece
before. While the text so far ends with the beginning of a stop string, the turn goes on one token at a time and the joined
text is searched.
"""

from __future__ import annotations

from dataclasses import replace

from skyrl_mega.data.hashing import stable_hash
from skyrl_mega.data.routing import RoutedTokens
from skyrl_mega.types import Completion, GenerationRequest, StopReason


class PartialTurn:
    """What has been sampled of one request. `max_model_len`: most tokens of prompt and turn together."""

    def __init__(self, request: GenerationRequest, max_model_len: int) -> None:
        self.request = request
        self._most_tokens = min(request.sampling.max_new_tokens, max_model_len - len(request.prompt_token_ids))
        self.num_pieces = 0
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._text = ""
        self._routed = RoutedTokens()

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    def next_request(self) -> GenerationRequest:
        """The request for what is missing; the first is the request itself."""
        if not self._token_ids:
            return self.request
        sampling = self.request.sampling
        left = 1 if self._stop_string_may_have_begun() else self._most_tokens - len(self._token_ids)
        seed = None if sampling.seed is None else stable_hash(sampling.seed, "continued", len(self._token_ids), bits=32)
        return replace(
            self.request,
            prompt_token_ids=[*self.request.prompt_token_ids, *self._token_ids],
            sampling=replace(sampling, max_new_tokens=left, seed=seed),
        )

    def add(self, piece: Completion) -> Completion | None:
        """The whole completion, if `piece` ends the turn; None if the turn must be continued."""
        before = len(self._text)
        self.num_pieces += 1
        self._token_ids += piece.token_ids
        self._logprobs += piece.logprobs
        self._versions += piece.policy_versions
        self._text += piece.text
        self._routed.add(piece.routed_experts)
        if self.num_pieces > 1 and (end := self._end_of_stop_string(before)):
            self._text = self._text[:end]
            return self._whole(StopReason.STOP)
        if piece.stop_reason is StopReason.STOP:
            return self._whole(StopReason.STOP)
        if len(self._token_ids) >= self._most_tokens:
            return self._whole(StopReason.LENGTH)
        return None  # ended early, or one token was asked for

    def _whole(self, reason: StopReason) -> Completion:
        routed = self._routed.rows()
        return Completion(self.request.request_id, self._token_ids, self._logprobs, self._text, reason, self._versions, routed)

    def _stop_string_may_have_begun(self) -> bool:
        return any(self._text.endswith(stop[:i]) for stop in self.request.sampling.stop for i in range(1, len(stop)))

    def _end_of_stop_string(self, boundary: int) -> int:
        """Where the first stop string ends that lies across `boundary` of the text; 0 if none does."""
        ends = []
        for stop in self.request.sampling.stop:
            start = self._text.find(stop, max(0, boundary - len(stop) + 1))
            if 0 <= start < boundary:
                ends.append(start + len(stop))
        return min(ends, default=0)
