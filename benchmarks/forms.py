"""How the gated MLP of a layer lies in its checkpoint, and its activation in plain torch.

Axes: E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["GPT_OSS", "SWIGLU", "Form"]


@dataclass(frozen=True, slots=True)
class Form:
    """What a layer has beside its sizes.

    Attributes:
        activation: Key of `moeroute_kernels.activations.ACTIVATIONS`; this file computes two.
        interleaved: Gate and up take turns; otherwise all gates come first.
        transposed: The matrices lie as (E, in, out); otherwise as (E, out, in).
        biased: Both products have a bias.
        alpha: Slope inside the sigmoid of "gpt_oss_glu".
        limit: Its clamp.
    """

    activation: str = "silu_glu"
    interleaved: bool = False
    transposed: bool = False
    biased: bool = False
    alpha: float = 1.702
    limit: float = math.inf

    def glu(self, pre: Tensor) -> Tensor:
        """Turn gate and up (..., 2I) into what the second product takes, (..., I)."""
        if self.interleaved:
            gate, up = pre[..., ::2], pre[..., 1::2]
        else:
            gate, up = pre.chunk(2, -1)
        if self.activation == "silu_glu":
            return F.silu(gate) * up
        gate = gate.clamp(max=self.limit)
        up = up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)

    def matrices(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """View the layer's matrices as gate_up (E, 2I, H) and down (E, H, I), however they lie."""
        gate_up, down = weights["gate_up"], weights["down"]
        if self.transposed:
            return gate_up.transpose(1, 2), down.transpose(1, 2)
        return gate_up, down


SWIGLU = Form()
GPT_OSS = Form("gpt_oss_glu", interleaved=True, transposed=True, biased=True, limit=7.0)
