"""Every router of the suite: the known ones, every score with a top-k, every selection."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from moeroute import routers
from moeroute.routers import All, ComposedRouter, LinearScore, TopK, TopKSoftmax

HIDDEN, EXPERTS, TOP_K, TOKENS = 6, 8, 3, 17
STATE = 8
SIZES = (HIDDEN, EXPERTS, TOP_K)
PRESETS = (
    "deepseek_v2",
    "deepseek_v4",
    "ernie",
    "flint",
    "gemma4",
    "granite_moe",
    "kolibri",
    "laguna",
    "lfm2_moe",
    "llama4",
    "longcat",
    "minimax_m2",
    "mistral4",
    "muse_spark",
)

NO_GRADIENT = {
    "test_gradient_reaches_every_parameter_and_the_tokens": "no token moves its logits",
    "test_gradcheck_in_float64": "no token moves its logits",
    "test_activation_checkpointing_gives_the_same_gradients": "it has no gradient",
    "test_nan_logits_keep_ids_in_range_and_other_tokens_right": "its logits are never NaN",
    "test_nan_logits_are_an_error_in_debug": "its logits are never NaN",
}
TOKENS_COMPETE = {
    "test_permuting_tokens_permutes_the_answer": "who comes first has the place",
    "test_no_token_sees_another": "tokens compete for places",
    "test_nan_logits_keep_ids_in_range_and_other_tokens_right": "tokens compete for places",
    "test_strides_do_not_matter": "a token alone has a place that it has not among its likes",
}
BATCH_DECIDES = {
    "test_no_token_sees_another": "tokens compete for places",
    "test_nan_logits_keep_ids_in_range_and_other_tokens_right": "tokens compete for places",
    "test_strides_do_not_matter": "a token alone has a place that it has not among its likes",
}


@dataclass(frozen=True, kw_only=True)
class RouterCase:
    """One router in the suite.

    Attributes:
        make: Builds it over HIDDEN features and EXPERTS experts.
        weights_sum_to: What a token's weights sum to, None if to nothing in particular.
        empties: Whether tokens may have empty slots.
        draws: Whether it draws in training.
        exceptions: Name of a test of the suite -> why it cannot hold for this router.
    """

    make: Callable[[], nn.Module]
    weights_sum_to: float | None = None
    empties: bool = False
    draws: bool = False
    exceptions: Mapping[str, str] = field(default_factory=dict)


def preset(name: str, weights_sum_to: float | None = None, **settings: Any) -> RouterCase:
    """A router of a known model."""
    make = partial(getattr(routers, f"{name}_router"), *SIZES, **settings)
    return RouterCase(make=make, weights_sum_to=weights_sum_to)


def scored(make: Callable[[], Any], **traits: Any) -> RouterCase:
    """A score, with a top-k whose weights sum to 1."""
    return RouterCase(
        make=lambda: ComposedRouter(make(), TopK(TOP_K)), weights_sum_to=1.0, **traits
    )


def selected(make: Callable[[], Any], **traits: Any) -> RouterCase:
    """A selection over linear logits."""
    return RouterCase(make=lambda: ComposedRouter(LinearScore(HIDDEN, EXPERTS), make()), **traits)


def linear() -> LinearScore:
    """The score inside other scores."""
    return LinearScore(HIDDEN, EXPERTS)


ROUTERS: Mapping[str, RouterCase] = {
    **{name: preset(name) for name in PRESETS},
    "ernie": preset("ernie", 1.0),
    "granite_moe": preset("granite_moe", 1.0),
    "minimax_m2": preset("minimax_m2", 1.0),
    "laguna-capped": preset("laguna", softcap=2.0),
    "mixtral": preset("mixtral", 1.0),
    "qwen_moe": preset("qwen_moe", norm_topk_prob=False),
    "qwen_moe-norm": preset("qwen_moe", 1.0, norm_topk_prob=True),
    "olmoe": preset("olmoe"),
    "deepseek_v3": preset("deepseek_v3", 2.5, num_groups=4, top_k_groups=2),
    "gpt_oss": preset("gpt_oss", 1.0),
    "noisy_top_k": RouterCase(
        make=lambda: routers.noisy_top_k_router(*SIZES), weights_sum_to=1.0, draws=True
    ),
    "recurrent": RouterCase(
        make=lambda: routers.RecurrentRouter(
            HIDDEN, EXPERTS, TopK(TOP_K), cell=nn.GRUCell(STATE, STATE)
        ),
        weights_sum_to=1.0,
    ),
    "cosine": scored(lambda: routers.CosineScore(HIDDEN, EXPERTS, space_size=4)),
    "jitter": scored(lambda: routers.JitteredScore(linear(), noise=0.1), draws=True),
    "soft-capped": scored(lambda: routers.SoftCappedScore(linear(), cap=2.0)),
    "scaled": scored(lambda: routers.ScaledScore(linear(), factor=0.5)),
    "normed": scored(lambda: routers.NormedScore(linear())),
    "mlp": scored(lambda: routers.MLPScore(HIDDEN, EXPERTS)),
    "noisy": scored(lambda: routers.NoisyScore(linear()), draws=True),
    "momentum": RouterCase(
        make=lambda: routers.MomentumRouter(routers.MLPScore(HIDDEN, EXPERTS), TopK(TOP_K)),
        weights_sum_to=1.0,
        exceptions={
            "test_gradient_reaches_every_parameter_and_the_tokens": "its W learns from pairs alone",
            "test_activation_checkpointing_gives_the_same_gradients": "the same",
        },
    ),
    "pathway": RouterCase(
        make=lambda: routers.PathwayRouter(linear(), TopK(TOP_K)), weights_sum_to=1.0
    ),
    "fixed": scored(lambda: routers.fixed(linear())),
    "fixed-cosine": scored(
        lambda: routers.fixed(routers.CosineScore(HIDDEN, EXPERTS, space_size=4))
    ),
    "hash": RouterCase(
        make=lambda: ComposedRouter(
            routers.HashScore(EXPERTS, TOP_K, table_size=50), TopKSoftmax(TOP_K)
        ),
        weights_sum_to=1.0,
        exceptions=NO_GRADIENT,
    ),
    "hash-weighed": RouterCase(
        make=lambda: ComposedRouter(
            routers.HashScore(EXPERTS, TOP_K, table_size=50, score=linear()), TopKSoftmax(TOP_K)
        ),
        weights_sum_to=1.0,
        exceptions={
            "test_gradcheck_in_float64": "a finite difference of minus infinity is none",
            "test_nan_logits_keep_ids_in_range_and_other_tokens_right": "only the K are NaN",
        },
    ),
    "soft": selected(All, weights_sum_to=1.0),
    "switch": selected(lambda: TopK(1, normalize=False)),
    "sigmoid": selected(lambda: TopK(TOP_K, probs=routers.sigmoid_probs)),
    "sqrt-softplus": selected(lambda: TopK(TOP_K, probs=routers.sqrt_softplus_probs)),
    "biased": selected(lambda: TopK(TOP_K, selection_bias=routers.SelectionBias(EXPERTS))),
    "positive": selected(routers.Positive, empties=True),
    "positive-rms": selected(lambda: routers.PositiveRMS(EXPERTS), empties=True),
    "chunk-steered": selected(
        lambda: routers.ChunkControl(routers.PositiveRMS(EXPERTS)), empties=True
    ),
    "density-steered": selected(
        lambda: routers.DensityControl(routers.Positive(), TOP_K), empties=True
    ),
    "counted": selected(lambda: routers.RunningLoad(TopK(TOP_K)), weights_sum_to=1.0),
    "top_p": selected(lambda: routers.TopP(0.7), empties=True),
    "top_p-capped": selected(
        lambda: routers.TopP(0.9, max_slots=2, normalize=True), empties=True, weights_sum_to=1.0
    ),
    "threshold": selected(lambda: routers.Threshold(0.6), empties=True),
    "threshold-none": selected(
        lambda: routers.Threshold(0.2, least=0, probs=routers.softmax_probs, normalize=True),
        empties=True,
    ),
    "expert_choice": selected(lambda: routers.ExpertChoice(EXPERTS), empties=True),
    "expert_choice-batch": selected(
        lambda: routers.ExpertChoice(EXPERTS, causal=False), empties=True, exceptions=BATCH_DECIDES
    ),
    "capacity": selected(
        lambda: routers.Capacity(TopK(TOP_K), capacity_factor=0.7),
        empties=True,
        exceptions=TOKENS_COMPETE,
    ),
    "capacity-by_weight": selected(
        lambda: routers.Capacity(TopK(TOP_K), capacity_factor=0.7, priority="weight"),
        empties=True,
        exceptions=BATCH_DECIDES,
    ),
    "capacity-reroute": selected(
        lambda: routers.Capacity(TopK(TOP_K), capacity_factor=1.0, overflow="reroute"),
        empties=True,
        exceptions=TOKENS_COMPETE,
    ),
    "capacity-by_sequence": RouterCase(
        make=lambda: routers.SequenceCapacity(ComposedRouter(linear(), TopK(TOP_K)), share=0.4),
        empties=True,
    ),
    "sinkhorn": selected(lambda: routers.SinkhornTopK(TOP_K)),
    "sinkhorn-one": selected(lambda: routers.SinkhornTopK(1)),
    "base": RouterCase(
        make=lambda: routers.base_router(HIDDEN, EXPERTS), empties=True, exceptions=TOKENS_COMPETE
    ),
}
every_router = pytest.mark.parametrize("name", ROUTERS)


def build(name: str) -> nn.Module:
    """A router whose parameters all have a value."""
    torch.manual_seed(0)
    router = ROUTERS[name].make()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router
