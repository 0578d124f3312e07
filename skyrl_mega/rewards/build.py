"""The reward pipeline that a configuration describes."""

from __future__ import annotations

from typing import Any

from skyrl_mega.config.schema import AnyRewardTerm, Config, FunctionTerm, JudgeTerm, ModelTerm
from skyrl_mega.rewards.pipeline import RewardPipeline
from skyrl_mega.rewards.scorer import Scorer


def make_pipeline(config: Config, policy_tokenizer: Any, *, sequential: bool = False) -> RewardPipeline | None:
    """The pipeline of `config.reward`; None where the environment's reward is all there is, unweighted.

    Loads models. `sequential`: functions and models stop the event loop while they score, so that a run repeats exactly. Raises
    ConfigError, ModelLoadError, BackendUnavailableError.
    """
    reward = config.reward
    if not reward.terms and reward.env_weight == 1.0:
        return None
    terms = [(term, make_scorer(term, config, policy_tokenizer, sequential=sequential)) for term in reward.terms]
    return RewardPipeline(terms, env_weight=reward.env_weight)


def make_scorer(term: AnyRewardTerm, config: Config, policy_tokenizer: Any, *, sequential: bool) -> Scorer:
    if isinstance(term, FunctionTerm):
        from skyrl_mega.rewards.function import FunctionReward

        return FunctionReward(term, sequential=sequential)
    if isinstance(term, JudgeTerm):
        from skyrl_mega.rewards.judge import Judge

        return Judge(term)
    return _model_reward(term, config, policy_tokenizer, sequential=sequential)


def _model_reward(term: ModelTerm, config: Config, policy_tokenizer: Any, *, sequential: bool) -> Scorer:
    from transformers import AutoConfig, AutoTokenizer

    from skyrl_mega.rewards.encoding import SequenceEncoder
    from skyrl_mega.rewards.model import Classifier, LoadedClassifier, ModelReward, ServedClassifier

    encode = SequenceEncoder(AutoTokenizer.from_pretrained(term.path), policy_tokenizer, chat=config.env.chat_template)
    classifier: Classifier = ServedClassifier(term) if term.url else LoadedClassifier(term, sequential=sequential)
    return ModelReward(term, classifier, encode, AutoConfig.from_pretrained(term.path))
