"""MoELayer against transformers' own blocks: their weights by name, equal outputs and gradients."""

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moeroute import routers
from moeroute.layers import ExpertActivation, MoELayer, SwiGLUExperts, SwiGLUFeedForward

pytestmark = pytest.mark.hf
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 16, 24, 6, 2
COMMON = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K, "experts_implementation": "eager"}
RENAMED = (
    ("gate.e_score_correction_bias", "router.select.selection_bias.e_score_correction_bias"),
    ("gate.", "router.score."),
    ("router.", "router.score."),
    ("shared_experts.", "shared_expert."),
)


def mixtral():
    config = MixtralConfig(num_local_experts=EXPERTS, intermediate_size=INTERMEDIATE, **COMMON)
    router = routers.mixtral_router(HIDDEN, EXPERTS, TOP_K)
    return MixtralSparseMoeBlock(config), MoELayer(
        router=router, experts=SwiGLUExperts(EXPERTS, HIDDEN, INTERMEDIATE)
    )


def qwen2(*, norm):
    config = Qwen2MoeConfig(
        num_experts=EXPERTS,
        moe_intermediate_size=INTERMEDIATE,
        shared_expert_intermediate_size=9,
        norm_topk_prob=norm,
        **COMMON,
    )
    ours = MoELayer(
        router=routers.qwen_moe_router(HIDDEN, EXPERTS, TOP_K, norm_topk_prob=norm),
        experts=SwiGLUExperts(EXPERTS, HIDDEN, INTERMEDIATE),
        shared_expert=SwiGLUFeedForward(HIDDEN, 9),
        shared_expert_gate=nn.Linear(HIDDEN, 1, bias=False),
    )
    return Qwen2MoeSparseMoeBlock(config), ours


def qwen3(*, norm):
    config = Qwen3MoeConfig(
        num_experts=EXPERTS, moe_intermediate_size=INTERMEDIATE, norm_topk_prob=norm, **COMMON
    )
    router = routers.qwen_moe_router(HIDDEN, EXPERTS, TOP_K, norm_topk_prob=norm)
    return Qwen3MoeSparseMoeBlock(config), MoELayer(
        router=router, experts=SwiGLUExperts(EXPERTS, HIDDEN, INTERMEDIATE)
    )


def olmoe():
    config = OlmoeConfig(num_experts=EXPERTS, intermediate_size=INTERMEDIATE, **COMMON)
    router = routers.olmoe_router(HIDDEN, EXPERTS, TOP_K)
    return OlmoeSparseMoeBlock(config), MoELayer(
        router=router, experts=SwiGLUExperts(EXPERTS, HIDDEN, INTERMEDIATE)
    )


def deepseek_v3():
    config = DeepseekV3Config(
        n_routed_experts=EXPERTS,
        moe_intermediate_size=INTERMEDIATE,
        n_shared_experts=2,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=2.5,
        **COMMON,
    )
    ours = MoELayer(
        router=routers.deepseek_v3_router(HIDDEN, EXPERTS, TOP_K, num_groups=3, top_k_groups=2),
        experts=SwiGLUExperts(EXPERTS, HIDDEN, INTERMEDIATE),
        shared_expert=SwiGLUFeedForward(HIDDEN, 2 * INTERMEDIATE),
    )
    return DeepseekV3MoE(config), ours


def gpt_oss():
    config = GptOssConfig(num_local_experts=EXPERTS, intermediate_size=INTERMEDIATE, **COMMON)
    experts = SwiGLUExperts(
        EXPERTS,
        HIDDEN,
        INTERMEDIATE,
        bias=True,
        transposed=True,
        interleaved=True,
        activation=ExpertActivation(
            name="gpt_oss_glu", alpha=config.swiglu_alpha, limit=config.swiglu_limit
        ),
    )
    return GptOssMLP(config), MoELayer(
        router=routers.gpt_oss_router(HIDDEN, EXPERTS, TOP_K), experts=experts
    )


BLOCKS = {
    "mixtral": mixtral,
    "qwen2": lambda: qwen2(norm=False),
    "qwen2-norm": lambda: qwen2(norm=True),
    "qwen3": lambda: qwen3(norm=False),
    "qwen3-norm": lambda: qwen3(norm=True),
    "olmoe": olmoe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
}


def ours_for(name):
    for theirs, ours in RENAMED:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def loaded(family):
    theirs, ours = BLOCKS[family]()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            tensor.copy_(torch.randn(tensor.shape) * (2.0 if "gpt" in family else 0.5))
            assert ours.state_dict()[ours_for(name)].shape == tensor.shape
    ours.load_state_dict({ours_for(name): value for name, value in theirs.state_dict().items()})
    return theirs, ours


def their_answer(block, hidden_states):
    answer = block(hidden_states)
    return answer[0] if isinstance(answer, tuple) else answer


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (3, 40)])
def test_equal_outputs_and_gradients(family, shape):
    theirs, ours = loaded(family)
    mine = torch.randn(*shape, HIDDEN).requires_grad_()
    other = mine.detach().clone().requires_grad_()
    got, expected = ours(mine), their_answer(theirs, other)
    scale = expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * max(scale, 1.0))

    upstream = torch.randn_like(got)
    got.backward(upstream)
    expected.backward(upstream)
    gradients = {ours_for(name): value.grad for name, value in theirs.named_parameters()}
    compared = [("hidden_states", mine.grad, other.grad)]
    compared += [(name, value.grad, gradients.pop(name)) for name, value in ours.named_parameters()]
    assert gradients == {}
    for name, one, wanted in compared:
        tolerance = 1e-5 * max(wanted.abs().max().item(), 1.0)
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=tolerance, msg=f"{name}: {{}}")


def test_clamps_of_gpt_oss_were_reached():
    theirs, _ = loaded("gpt_oss")
    tokens = torch.randn(40, HIDDEN)
    experts = theirs.experts
    gate_up = torch.einsum("th,eho->teo", tokens, experts.gate_up_proj) + experts.gate_up_proj_bias
    assert (gate_up.abs() > experts.limit).float().mean() > 0.05
