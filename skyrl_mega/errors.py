"""Every exception this library raises on purpose, in one tree.

A message states the rule that was broken, the values that broke it, and the remedy. Callers catch the narrowest class
they can handle; `SkyRLMegaError` is what a command line catches to print a message instead of a traceback.
"""


class SkyRLMegaError(Exception):
    """Root of all errors raised on purpose by skyrl_mega."""


class ConfigError(SkyRLMegaError, ValueError):
    """A setting, or a combination of settings, that can't work. Raised before any expensive work."""


class MissingDependencyError(SkyRLMegaError, ImportError):
    """An optional package is needed for what was asked; the message names the package and the command that installs it."""


class BackendUnavailableError(SkyRLMegaError, RuntimeError):
    """A kernel, transport, device or engine was asked for by name and can't run here. Nothing falls back silently."""


class DataError(SkyRLMegaError, ValueError):
    """A prompt file or a trajectory breaks its format; the message names the file and row."""


class EnvError(SkyRLMegaError, RuntimeError):
    """An environment broke its contract (reset/step), or does not exist in the registry."""


class RewardError(SkyRLMegaError, RuntimeError):
    """A reward function, reward model or judge failed, ran out of time, or gave something that is no score."""


class ModelLoadError(SkyRLMegaError, ValueError):
    """Weights and model do not fit: a tensor is missing, left over, or of the wrong shape; or the family is not supported."""


class WeightSyncError(SkyRLMegaError, RuntimeError):
    """A weight version could not be published whole. The engine still serves the version it served before, or must be rebuilt."""


class RolloutError(SkyRLMegaError, RuntimeError):
    """The engine failed, or answered something that breaks its protocol (lengths, logprobs, versions)."""


class EngineDiedError(RolloutError):
    """A rollout engine is gone or does not answer. Its requests may be given to another engine."""


class EngineStaleError(RolloutError):
    """A rollout engine lives, but serves nothing until a whole weight version reaches it. Others may answer its requests."""


class CheckpointError(SkyRLMegaError, RuntimeError):
    """A checkpoint is absent, incomplete, or does not belong to this run."""


class LedgerError(SkyRLMegaError, RuntimeError):
    """The ledger refuses a transition that would lose or double a group, or its file can't be used or is damaged."""


class DeadlineError(SkyRLMegaError, TimeoutError):
    """A wait ran past its deadline; the message names who was missing, the phase and the step."""


class NumericsError(SkyRLMegaError, ArithmeticError):
    """A loss, gradient or logprob is NaN or infinite, or a probe found engine and policy apart."""


class NonFiniteUpdateError(NumericsError):
    """The loss or the gradient norm of an update is not finite, on every rank: weights and optimizer are as they were before it.

    The next update may be made: it begins with fresh gradients.
    """
