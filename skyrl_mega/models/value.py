"""A value function: the policy's model with one number per token in the place of the LM head.

The head is replicated over tensor ranks. It reads the gathered hidden states, which are the same on all of them, and so its
gradient, and the gradient that it sends back, are complete on every one: nothing is added up (see `build`).

Shape letters: T packed tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from skyrl_mega.models.build import PolicyModel

#: The head's parameter. Megatron's checkpoint code wants the last stage to hold one of this name.
VALUE_HEAD = "output_layer.weight"


class ValueHead(torch.nn.Module):
    """A row of H weights, zero at first and kept in the model's dtype; computes in float32."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))

    def forward(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """float32 [T]."""
        return F.linear(hidden_TH.float(), self.weight.float()).squeeze(1)


class ValueModel(PolicyModel):
    """PolicyModel whose last stage gives the value of the state after each token: float32 [T], the same on every tensor rank."""

    has_lm_head = False

    def __init__(self, config: TransformerConfig, *args: Any) -> None:
        super().__init__(config, *args)
        if self.post_process:
            self.output_layer = ValueHead(config)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Values, or what the next pipeline stage takes; arguments as in PolicyModel."""
        output = super().forward(*args, **kwargs)
        return self.output_layer(output) if self.post_process else output
