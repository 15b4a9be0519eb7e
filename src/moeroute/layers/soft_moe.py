"""Experts over slots that are mixtures of tokens: nothing is chosen, nothing is dropped.

Axes: B samples, S tokens of a sample, T = B * S, H hidden, E experts, P slots an expert.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeroute.layers.experts import MLPExperts, SwiGLUExperts
from moeroute.routing_pass import RoutingPass
from moeroute.types import AuxLoss, RouterInput, RouterOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotWeights:
    """How tokens and slots mix.

    Attributes:
        dispatch: (B, S, E, P) float32, sums to 1 over a sample's real tokens; 0 for padding.
        combine: (B, S, E, P) float32, sums to 1 over slots; 0 for padding.
    """

    dispatch: Tensor
    combine: Tensor


class SlotRouter(nn.Module):
    """The two softmaxes of Soft MoE over one table of similarities.

        l = scale * norm(x) . norm(phi);  D = softmax over tokens,  C = softmax over slots

    Args:
        in_features: H.
        num_experts: E.
        slots_per_expert: P.

    Shapes:
        phi: (H, E, P), normal of variance 1 / H at first; scale: (1,), 1 at first.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(self, in_features: int, num_experts: int, slots_per_expert: int = 1) -> None:
        super().__init__()
        if min(in_features, num_experts, slots_per_expert) < 1:
            raise ValueError(
                f"in_features={in_features}, num_experts={num_experts}, "
                f"slots_per_expert={slots_per_expert}: all are at least 1"
            )
        self.num_experts = num_experts
        self.phi = nn.Parameter(torch.empty(in_features, num_experts, slots_per_expert))
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.normal_(self.phi, std=in_features**-0.5)

    def forward(self, router_input: RouterInput) -> SlotWeights:
        """Weigh (T, H) tokens and the slots of their samples."""
        shape = router_input.sequence_shape
        tokens = router_input.hidden_states
        wide = torch.promote_types(tokens.dtype, torch.float32)
        real = real_tokens(router_input)
        x = tokens.to(wide).masked_fill(~real.flatten().unsqueeze(1), 0.0).unflatten(0, shape)
        with torch.autocast(tokens.device.type, enabled=False):
            near = torch.einsum(
                "bsh,hep->bsep",
                functional.normalize(x, dim=-1),
                functional.normalize(self.phi.to(wide), dim=0),
            )
        logits = self.scale.to(wide) * near
        keep = real[:, :, None, None]
        # a finite bound, so that a sample of padding alone gives zeros and not NaN
        shut = logits.masked_fill(~keep, torch.finfo(wide).min)
        return SlotWeights(
            dispatch=torch.softmax(shut, dim=1) * keep,
            combine=torch.softmax(logits.flatten(2), dim=2).reshape(logits.shape) * keep,
        )

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        width, experts, slots = self.phi.shape
        return f"in_features={width}, num_experts={experts}, slots_per_expert={slots}"


class SoftMoELayer(nn.Module):
    """Each slot is a weighted mean of a sample's tokens; each token one of all slots' outputs.

        slots = D^T x,  expert e on its P slots,  y = C (experts' outputs)

    All tokens of a sample meet in every slot, later ones too: it is no layer for a causal language
    model, and it warns where a key-value cache shows that it stands in one. Padding is in no slot,
    and its output is 0. Nothing is chosen, so that there is no record, and no loss.

    Source: From Sparse to Soft Mixtures of Experts, Puigcerver et al., 2023, arXiv 2308.00951,
    section 2; the scale and the normalisation as in the official code.

    Args:
        router: Of the tokens' width.
        experts: As many, of that width.
        site: Name of the layer.
        layer_index: Position in depth, -1 if it has none.

    Shapes:
        hidden_states: (B, S, H), or (S, H) for one sample; the output has its shape.

    Raises:
        ValueError: Router and experts do not fit each other.

    Example:
        >>> layer = SoftMoELayer(router=SlotRouter(64, 8, 2), experts=SwiGLUExperts(8, 64, 128))
        >>> y = layer(torch.randn(2, 16, 64))
    """

    losses: tuple[AuxLoss, ...] = ()

    def __init__(
        self,
        *,
        router: SlotRouter,
        experts: SwiGLUExperts | MLPExperts,
        site: str = "",
        layer_index: int = -1,
    ) -> None:
        super().__init__()
        if (experts.hidden_size, experts.num_experts) != tuple(router.phi.shape[:2]):
            raise ValueError(
                f"the router is for (H, E) = {tuple(router.phi.shape[:2])} but the experts have "
                f"{(experts.hidden_size, experts.num_experts)}; give both the same"
            )
        self.router = router
        self.experts = experts
        self.site = site
        self.layer_index = layer_index
        self.routing_pass = RoutingPass()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the layer to (B, S, H) or (S, H)."""
        router_input = self.routing_pass.router_input(hidden_states, self.site)
        if router_input.memory is not None and not torch.compiler.is_compiling():
            _warn_of_causal_model(self.site)
        weights: SlotWeights = self.router(router_input)
        real = real_tokens(router_input)
        tokens = router_input.hidden_states.reshape(*real.shape, hidden_states.shape[-1])
        tokens = tokens.masked_fill(~real.unsqueeze(2), 0.0)  # 0 times NaN is NaN
        wide = weights.dispatch.dtype
        slots = torch.einsum("bsep,bsh->ebph", weights.dispatch, tokens.to(wide))
        answers = self._run(slots.to(hidden_states.dtype)).to(wide)
        y = torch.einsum("bsep,ebph->bsh", weights.combine, answers)
        return y.to(hidden_states.dtype).reshape(hidden_states.shape)

    def _run(self, slots: Tensor) -> Tensor:
        """(E, B, P, H) slots through their experts: rows that are in expert order already."""
        rows = slots.flatten(0, 2)
        each = slots.shape[1] * slots.shape[2]
        ids = torch.arange(slots.shape[0], device=slots.device).repeat_interleave(each)
        wide = torch.promote_types(slots.dtype, torch.float32)
        ones = torch.ones(rows.shape[0], 1, device=slots.device, dtype=wide)
        routing = RouterOutput(
            router_logits=ones.new_zeros(rows.shape[0], slots.shape[0]),
            routing_weights=ones,
            selected_experts=ids.unsqueeze(1),
        )
        return self.experts(rows, routing).reshape(slots.shape)


def real_tokens(router_input: RouterInput) -> Tensor:
    """(B, S) bool, False marks padding."""
    mask = router_input.token_mask
    if mask is None:
        device = router_input.hidden_states.device
        return torch.ones(router_input.sequence_shape, dtype=torch.bool, device=device)
    return mask.to(torch.bool).reshape(router_input.sequence_shape)


def _warn_of_causal_model(site: str) -> None:
    warnings.warn(
        f"{site or 'SoftMoELayer'} mixes all tokens of a sample, later ones too, but the model "
        "keeps a key-value cache, as causal language models do: a token's output depends on what "
        "comes after it, and differs while text is generated. Use it in encoders",
        stacklevel=3,
    )
