"""Reinforcement learning for language models: Megatron-Core policies, vLLM rollouts, one code path from laptop to cluster.

Importing this package imports nothing heavy: no torch, vLLM, Ray or Megatron.
"""

__version__ = "0.1.0"
