"""Routers that read what a whole first pass of the model said of a token.

A head turns the states that the first pass ended in into logits for the experts of every place; the
routers of the second pass each take their own place's.

Axes: B samples, S tokens of a sample, T = B * S, H hidden, E experts, P = places * E.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeroute.routers.samples import sample_means, to_tokens
from moeroute.routers.scores import linear_logits
from moeroute.types import Router, RouterInput, RouterOutput

KEPT = "first_pass"


class MLP(nn.Module):
    """Linears with ReLU and dropout between them, in float32 or wider, autocast or not.

    Args:
        in_features: Width of what comes in.
        out_features: Width of what goes out.
        depth: Number of linears; with 1 neither width nor dropout matters.
        width: Between the linears.
        dropout: Probability of zeroing an element between the linears, in training.

    Raises:
        ValueError: A size below 1; in forward, inputs of another width.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        depth: int = 1,
        width: int = 2048,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(in_features, out_features, depth, width) < 1:
            raise ValueError(
                f"in_features={in_features}, out_features={out_features}, depth={depth}, "
                f"width={width}: all are at least 1"
            )
        sizes = [in_features, *[width] * (depth - 1)]
        self.inner = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(sizes[-1], out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) of any floating dtype to (..., out_features) float32, or float64."""
        for linear in self.inner:
            assert isinstance(linear, nn.Linear)
            x = self.dropout(functional.relu(linear_logits(x, linear.weight, linear.bias, None)))
        return linear_logits(x, self.out.weight, self.out.bias, None)


class FirstPassHead(nn.Module):
    """Logits of every place's experts from the states of a first pass.

        logits = mlp(h) / temperature

    Args:
        mlp: (..., H) to (..., P).
        num_experts: E.
        sites: Names of the linears that it speaks to; P is E * len(sites) where each has a
            place of its own, E where all share one.
        temperature: Divides the logits.
        per_sample: One row of logits for all tokens of a sample, from the mean of its real tokens.
            While text is generated the prompt's row holds for every later token.
        first_weight: What every expert weighs in the first pass; 0 lets the base answer.

    Shapes:
        hidden_states of the router_input: (T, H), the states.
        logits: (T, P) float32, or float64; place-major.

    Raises:
        ValueError: The mlp answers another number of logits; in forward, states of another width.
    """

    def __init__(
        self,
        mlp: MLP,
        num_experts: int,
        sites: Sequence[str],
        *,
        temperature: float = 1.0,
        per_sample: bool = False,
        first_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if mlp.out.out_features not in (num_experts, num_experts * len(sites)):
            raise ValueError(
                f"the mlp answers {mlp.out.out_features} numbers, neither {num_experts} for all "
                f"sites nor so many for each of the {len(sites)}"
            )
        self.mlp = mlp
        self.num_experts = num_experts
        self.sites = tuple(sites)
        self.layerwise = mlp.out.out_features != num_experts
        self.temperature = temperature
        self.per_sample = per_sample
        self.first_weight = first_weight

    def score(self, site: str) -> FirstPassScore:
        """The score of one linear; that of the first holds the head, to be saved with it."""
        place = self.sites.index(site)
        return FirstPassScore(
            self.num_experts,
            place if self.layerwise else 0,
            head=None if place else self,
        )

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, P) logits; of samples, they are kept in the input's memory if it has one."""
        if not self.per_sample:
            return self._logits(router_input.hidden_states)
        logits = self._logits(sample_means(router_input))  # (B, P)
        if router_input.memory is not None:
            router_input.memory[KEPT] = logits.detach()
        return to_tokens(logits, router_input.sequence_shape)

    def recall(
        self, memory: MutableMapping[str, Tensor], sequence_shape: tuple[int, int]
    ) -> Tensor | None:
        """What an earlier call with the same cache said of these samples.

        Args:
            memory: That of the earlier call.
            sequence_shape: (B, S) of this call.

        Returns:
            (T, P) logits, or None where every token is read by itself or nothing was said yet.

        Raises:
            ValueError: The earlier call had another number of samples.
        """
        if not self.per_sample or KEPT not in memory:
            return None
        kept = memory[KEPT]
        if kept.shape[0] != sequence_shape[0]:
            raise ValueError(
                f"the cache was filled with {kept.shape[0]} samples but this call has "
                f"{sequence_shape[0]}; start with a fresh cache"
            )
        return to_tokens(kept, sequence_shape)

    def _logits(self, states: Tensor) -> Tensor:
        return self.mlp(states) / self.temperature


class FirstPassScore(nn.Module):
    """The logits that a head gave the experts of one place.

    Args:
        num_experts: E.
        place: Which E of the P columns; 0 where all sites share theirs.
        head: At one of the sites that a head speaks to, the head itself, so that it is saved and
            trained with it; it is called by whoever runs the first pass. None at the others.

    Shapes:
        router_logits: (T, E) float32, or float64.

    Raises:
        ValueError: In forward, there was no first pass, or one over another number of tokens.
        RuntimeError: In forward, the layer runs under reentrant activation checkpointing.
    """

    def __init__(
        self, num_experts: int, place: int = 0, *, head: FirstPassHead | None = None
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.place = place
        self.head = head

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits."""
        said, tokens = router_input.first_pass, router_input.hidden_states
        if said is None:
            raise ValueError(
                "there was no first pass over these tokens: its head speaks when the whole wrapped "
                "model is called, so call that and no part of it"
            )
        if said.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"the first pass ended in {said.shape[0]} tokens but this linear is asked for "
                f"{tokens.shape[0]}; leave it out of the mixture"
            )
        if said.requires_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "reentrant activation checkpointing would go back through the head once a layer. "
                'Use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        start = self.place * self.num_experts
        return said[:, start : start + self.num_experts].to(tokens.device)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"num_experts={self.num_experts}, place={self.place}"


class EqualInFirstPass(nn.Module):
    """Another router, but for the first pass, in which every expert weighs the same.

    Args:
        router: Of the second pass.
        weight: Of every expert in the first.

    Shapes:
        As the router's; in the first pass routing_weights, selected_experts: (T, E).
    """

    router: Router

    def __init__(self, router: nn.Module, weight: float) -> None:
        super().__init__()
        self.router = router  # pyright: ignore[reportAttributeAccessIssue]
        self.num_experts = self.router.num_experts
        self.weight = weight

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens."""
        said, tokens = router_input.first_pass, router_input.hidden_states
        if said is None or said.shape[1]:
            return self.router(router_input)
        wide = torch.promote_types(tokens.dtype, torch.float32)
        logits = tokens.new_zeros(tokens.shape[0], self.num_experts, dtype=wide)
        everyone = torch.arange(self.num_experts, device=tokens.device)
        return RouterOutput(
            router_logits=logits,
            routing_weights=torch.full_like(logits, self.weight),
            selected_experts=everyone.expand(logits.shape),
        )
