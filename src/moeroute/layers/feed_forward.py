"""One gated feed-forward block, for a shared expert."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class SwiGLUFeedForward(nn.Module):
    """The feed-forward block of Llama and of shared experts, in Hugging Face's names.

        y = down_proj(silu(gate_proj(x)) * up_proj(x))

    Args:
        hidden_size: H.
        intermediate_size: I.

    Shapes:
        hidden_states: (..., H); the output has its shape.
        gate_proj.weight, up_proj.weight: (I, H); down_proj.weight: (H, I); no biases.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        if min(hidden_size, intermediate_size) < 1:
            raise ValueError(
                f"hidden_size={hidden_size}, intermediate_size={intermediate_size}: both must be "
                "at least 1"
            )
        self.hidden_size = hidden_size
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the block."""
        gate = functional.silu(self.gate_proj(hidden_states))
        return self.down_proj(gate * self.up_proj(hidden_states))
