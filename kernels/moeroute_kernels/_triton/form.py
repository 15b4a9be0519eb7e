"""What kind of MLP the experts are, as the kernels want to know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeroute_kernels.activations import ACTIVATIONS
from moeroute_kernels.cpu_routed_mlp import Form

POINTWISE = {
    "silu_glu": "silu",
    "gelu_glu": "gelu",
    "gelu_tanh_glu": "gelu_tanh",
    "relu_glu": "relu",
    "sigmoid_glu": "sigmoid",
    "clamped_silu_glu": "silu",
    "gpt_oss_glu": "swish",
}
"""The pointwise function of each gated activation; an ungated one has its own name."""


@dataclass(frozen=True, slots=True)
class DeviceForm:
    """One row of `moeroute_kernels.activations.ACTIVATIONS` and its numbers.

    Attributes:
        pointwise: Name of the pointwise function in `glu.value_and_slope`.
        gated: Whether an up projection multiplies it.
        clamped: Whether gate and up are held within limit.
        shift: Added to up.
        interleaved: Columns alternate gate, up.
        alpha: Slope inside the sigmoid of "swish".
        limit: Clamp.
    """

    pointwise: str
    gated: bool
    clamped: bool
    shift: float
    interleaved: bool
    alpha: float
    limit: float

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of a kernel."""
        return {
            "NAME": self.pointwise,
            "GATED": self.gated,
            "CLAMPED": self.clamped,
            "SHIFT": self.shift,
        }


def device_form(form: Form) -> DeviceForm:
    """Look the activation up."""
    row = ACTIVATIONS[form.activation]
    return DeviceForm(
        POINTWISE.get(form.activation, form.activation),
        row.gated,
        row.clamped,
        row.shift,
        form.interleaved and row.gated,
        form.alpha,
        form.limit,
    )
