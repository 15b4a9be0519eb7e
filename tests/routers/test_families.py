"""Every preset against transformers' own router, bit for bit: outputs and gradients."""

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moeroute import routers
from moeroute.types import RouterInput

pytestmark = pytest.mark.hf
HIDDEN, EXPERTS, TOP_K, TOKENS = 12, 8, 3, 29
COMMON = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}


def mixtral():
    theirs = MixtralTopKRouter(MixtralConfig(num_local_experts=EXPERTS, **COMMON))
    return theirs, routers.mixtral_router(HIDDEN, EXPERTS, TOP_K)


def qwen2(*, norm):
    config = Qwen2MoeConfig(num_experts=EXPERTS, norm_topk_prob=norm, **COMMON)
    ours = routers.qwen_moe_router(HIDDEN, EXPERTS, TOP_K, norm_topk_prob=norm)
    return Qwen2MoeTopKRouter(config), ours


def qwen3(*, norm):
    config = Qwen3MoeConfig(num_experts=EXPERTS, norm_topk_prob=norm, **COMMON)
    ours = routers.qwen_moe_router(HIDDEN, EXPERTS, TOP_K, norm_topk_prob=norm)
    return Qwen3MoeTopKRouter(config), ours


def olmoe():
    theirs = OlmoeTopKRouter(OlmoeConfig(num_experts=EXPERTS, **COMMON))
    return theirs, routers.olmoe_router(HIDDEN, EXPERTS, TOP_K)


def deepseek_v3(*, groups, kept, norm=True):
    config = DeepseekV3Config(
        n_routed_experts=EXPERTS,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
        **COMMON,
    )
    ours = routers.deepseek_v3_router(
        HIDDEN,
        EXPERTS,
        TOP_K,
        num_groups=groups,
        top_k_groups=kept,
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
    )
    return DeepseekV3TopkRouter(config), ours


def gpt_oss():
    theirs = GptOssTopKRouter(GptOssConfig(num_local_experts=EXPERTS, **COMMON))
    return theirs, routers.gpt_oss_router(HIDDEN, EXPERTS, TOP_K)


PAIRS = {
    "mixtral": mixtral,
    "qwen2": lambda: qwen2(norm=False),
    "qwen2-norm": lambda: qwen2(norm=True),
    "qwen3": lambda: qwen3(norm=False),
    "qwen3-norm": lambda: qwen3(norm=True),
    "olmoe": olmoe,
    "deepseek_v3": lambda: deepseek_v3(groups=4, kept=2),
    "deepseek_v3-ungrouped": lambda: deepseek_v3(groups=1, kept=1),
    "deepseek_v3-no-norm": lambda: deepseek_v3(groups=2, kept=1, norm=False),
    "gpt_oss": gpt_oss,
}


def same_weights(theirs, ours):
    """Draw their parameters and buffers, and load them into ours by name."""
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape))
    names = {
        "weight": "score.weight",
        "bias": "score.bias",
        "e_score_correction_bias": "select.selection_bias.e_score_correction_bias",
    }
    ours.load_state_dict({names[key]: value for key, value in theirs.state_dict().items()})


def route(router, tokens):
    routing = router(RouterInput(hidden_states=tokens, sequence_shape=(1, tokens.shape[0])))
    return routing.router_logits, routing.routing_weights, routing.selected_experts


@pytest.mark.parametrize("pair", PAIRS)
def test_equals_transformers_router_bit_for_bit(pair):
    theirs, ours = PAIRS[pair]()
    same_weights(theirs, ours)
    tokens = torch.randn(TOKENS, HIDDEN)
    mine, other = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    got, expected = route(ours, mine), theirs(other)
    for ours_part, their_part in zip(got, expected, strict=True):
        assert torch.equal(ours_part, their_part)

    upstream = torch.randn(TOKENS, TOP_K)
    got[1].backward(upstream)
    expected[1].backward(upstream)
    assert torch.equal(mine.grad, other.grad)
    for (name, mine_parameter), (_, parameter) in zip(
        sorted(ours.named_parameters()), sorted(theirs.named_parameters()), strict=True
    ):
        assert torch.equal(mine_parameter.grad, parameter.grad), name


@pytest.mark.parametrize("pair", ["mixtral", "qwen3-norm", "olmoe", "gpt_oss"])
def test_compute_dtype_follows_a_gate_in_the_models_dtype(pair):
    theirs, ours = PAIRS[pair]()
    same_weights(theirs, ours)
    theirs = theirs.to(torch.bfloat16)
    ours = ours.to(torch.bfloat16)
    ours.score.compute_dtype = torch.bfloat16
    tokens = torch.randn(TOKENS, HIDDEN).to(torch.bfloat16)
    logits, weights, ids = route(ours, tokens)
    their_logits, their_weights, _ = theirs(tokens)
    assert torch.equal(logits, their_logits.float())
    assert logits.dtype == weights.dtype == torch.float32
    chosen = logits.gather(1, ids).sort(1).values
    assert torch.equal(chosen, logits.topk(TOP_K).values.sort(1).values)
    torch.testing.assert_close(weights, their_weights.float(), rtol=2**-8, atol=0)


def test_float32_is_the_default_for_bfloat16_tokens():
    _, ours = mixtral()
    tokens = torch.randn(TOKENS, HIDDEN).to(torch.bfloat16)
    logits = route(ours, tokens)[0]
    assert torch.equal(logits, tokens.float() @ ours.score.weight.T)


def test_selection_bias_changes_who_but_not_how_much():
    _, ours = deepseek_v3(groups=1, kept=1, norm=False)
    tokens = torch.randn(TOKENS, HIDDEN)
    bias = ours.select.selection_bias.e_score_correction_bias
    with torch.no_grad():
        ours.score.weight.normal_()
        bias[5] = 10.0
    logits, weights, ids = route(ours, tokens)
    assert (ids == 5).any(1).all()
    torch.testing.assert_close(weights, 2.5 * logits.sigmoid().gather(1, ids))


def test_negative_bias_never_opens_a_shut_group():
    _, ours = deepseek_v3(groups=4, kept=2)
    with torch.no_grad():
        ours.score.weight.normal_()
        ours.select.selection_bias.e_score_correction_bias.fill_(-0.9)
    ids = route(ours, torch.randn(200, HIDDEN))[2]
    assert max(len(set(row)) for row in (ids // 2).tolist()) <= 2
