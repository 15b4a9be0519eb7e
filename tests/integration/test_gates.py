"""Every gate of transformers that is known, against its own class: outputs and gradients."""

import importlib
import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from integration import tiny_models
from torch import nn

import moeroute
from moeroute import routers
from moeroute.integration.gate_families import GATES, OTHER_CONVENTIONS
from moeroute.integration.gates import equal_router, gate_family, unknown_gates
from moeroute.types import RouterInput

pytestmark = pytest.mark.hf
HIDDEN, EXPERTS, TOP_K, TOKENS = 12, 8, 3, 29
ROUTER_CLASS = re.compile(r"^class (\w*(?:Router|MoEV1Gate|TopKGating))\(", re.MULTILINE)
NO_ROUTERS = {"GraniteDoclingDensityRouter": "it chooses how many image tiles to look at"}
FIELDS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk"), TOP_K),
    "moe_num_experts": EXPERTS,
    "hidden_size": HIDDEN,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "router_scaling_factor": 1.7,
    "route_scale": 1.3,
    "output_multiplier": 0.7,
    "moe_norm_min": 1e-12,
    "moe_router_logit_softcapping": 0.0,
    "scoring_func": "sqrtsoftplus",
    "expert_selection_fn": "softmax",
    "use_expert_bias": True,
    "rms_norm_eps": 1e-6,
    "zero_expert_num": 0,
}
"""What the classes read of a config."""
SETTINGS = {
    "Cohere2MoeTopKRouter": [
        {"expert_selection_fn": "softmax"},
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": True},
        {"expert_selection_fn": "sigmoid", "norm_topk_prob": False},
    ],
    "DeepseekV2TopkRouter": [
        {"topk_method": "greedy", "routed_scaling_factor": 1.5},
        {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
    ],
    "DeepseekV3TopkRouter": [{}, {"norm_topk_prob": False}, {"n_group": 1, "topk_group": 1}],
    "DeepseekV4TopKRouter": [{"scoring_func": "sqrtsoftplus"}, {"scoring_func": "sigmoid"}],
    "FlintTopKRouter": [{"norm_topk_prob": True}, {"norm_topk_prob": False}],
    "Kolibri1TopKRouter": [{"norm_topk_prob": True}, {"norm_topk_prob": False}],
    "LagunaTopKRouter": [
        {"moe_router_logit_softcapping": 0.0},
        {"moe_router_logit_softcapping": 2.0},
    ],
    "Lfm2MoeTopKRouter": [
        {"use_expert_bias": True, "norm_topk_prob": True},
        {"use_expert_bias": False, "norm_topk_prob": False},
    ],
    "Mistral4TopkRouter": [{}, {"norm_topk_prob": False}],
    "OlmoeTopKRouter": [{"norm_topk_prob": False}, {"norm_topk_prob": True}],
    "Qwen2MoeTopKRouter": [{"norm_topk_prob": False}, {"norm_topk_prob": True}],
    "Qwen3MoeTopKRouter": [{"norm_topk_prob": False}, {"norm_topk_prob": True}],
}
"""Config fields under which a class is compared; once with the defaults where it is not named."""


def router_classes():
    """Class name -> family, of every router that a modelling file of transformers defines."""
    return {
        name: family
        for family in tiny_models._modelling_files()
        for name in ROUTER_CLASS.findall(tiny_models.modelling_text(family))
    }


def make_gate(name, settings):
    """A gate of this class with random weights and biases, from the fields that it reads."""
    family = router_classes()[name]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    gate = getattr(module, name)(SimpleNamespace(**{**FIELDS, **settings}))
    with torch.no_grad():
        for tensor in gate.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape))
    return gate


class Block(nn.Module):
    """Holds the bias of gates that are handed it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("e_score_correction_bias", torch.randn(EXPERTS))


def by_expert(weights, ids):
    """(T, E): each token's weight for each expert, whatever the order of its slots."""
    return torch.zeros(weights.shape[0], EXPERTS, dtype=weights.dtype).scatter(1, ids, weights)


PAIRS = [(name, settings) for name in GATES for settings in SETTINGS.get(name, [{}])]


@pytest.mark.parametrize(
    ("name", "settings"), PAIRS, ids=[f"{name}-{settings}" for name, settings in PAIRS]
)
def test_our_parts_route_as_the_class_does(name, settings):
    gate, block = make_gate(name, settings), Block()
    ours = equal_router(gate, block)
    tokens = torch.randn(TOKENS, HIDDEN)
    mine, other = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    takes = list(inspect.signature(type(gate).forward).parameters)[2:]
    extra = [block.e_score_correction_bias] if takes else []
    theirs = gate(other[None] if name == "AfmoeTokenChoiceRouter" else other, *extra)
    routing = ours(RouterInput(hidden_states=mine, sequence_shape=(1, TOKENS)))
    first = routing.router_logits
    if GATES[name].answers_probs:
        first = first.softmax(-1)
    torch.testing.assert_close(first, theirs[0].float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(routing.selected_experts.sort(1).values, theirs[2].sort(1).values)
    got = by_expert(routing.routing_weights, routing.selected_experts)
    expected = by_expert(theirs[1], theirs[2])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)

    upstream = torch.randn(TOKENS, EXPERTS)
    got.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)
    shapes = {}
    for parameter in gate.parameters():
        if parameter.grad is not None:
            shapes.setdefault(parameter.shape, []).append(parameter.grad)
    for parameter in ours.parameters():
        assert any(
            torch.allclose(parameter.grad, grad, rtol=1e-5, atol=1e-5)
            for grad in shapes[parameter.shape]
        )


def test_llama4_weighs_as_ours():
    gate = make_gate("Llama4Router", {})
    ours = routers.llama4_router(HIDDEN, EXPERTS, TOP_K)
    ours.load_state_dict({"score.weight": gate.weight.detach()})
    tokens = torch.randn(TOKENS, HIDDEN)
    scores, logits = gate(tokens)
    routing = ours(RouterInput(hidden_states=tokens, sequence_shape=(1, TOKENS)))
    torch.testing.assert_close(routing.router_logits, logits)
    got = by_expert(routing.routing_weights, routing.selected_experts)
    torch.testing.assert_close(got, scores)


@pytest.mark.parametrize("normalize", [True, False])
def test_dbrx_weighs_as_ours(normalize):
    from transformers import DbrxConfig
    from transformers.models.dbrx.modeling_dbrx import DbrxFFN

    with tiny_models.quiet_transformers():
        config = DbrxConfig(
            d_model=HIDDEN,
            ffn_config={
                "hidden_size": HIDDEN,
                "ffn_hidden_size": 8,
                "moe_num_experts": EXPERTS,
                "moe_top_k": TOP_K,
                "moe_normalize_expert_weights": 1.0 if normalize else None,
            },
        )
        block = DbrxFFN(config)
    ours = routers.qwen_moe_router(HIDDEN, EXPERTS, TOP_K, norm_topk_prob=normalize)
    with torch.no_grad():
        block.router.layer.weight.normal_()
    ours.load_state_dict({"score.weight": block.router.layer.weight.detach()})
    tokens = torch.randn(TOKENS, HIDDEN)
    logits = block.router(tokens)
    weights, ids = block.route_tokens_to_experts(logits)
    routing = ours(RouterInput(hidden_states=tokens, sequence_shape=(1, TOKENS)))
    torch.testing.assert_close(routing.router_logits, logits)
    assert torch.equal(routing.selected_experts, ids)
    torch.testing.assert_close(routing.routing_weights, weights)


def test_jetmoe_weighs_as_ours():
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeTopKGating

    gate = JetMoeTopKGating(HIDDEN, EXPERTS, TOP_K)
    ours = routers.granite_moe_router(HIDDEN, EXPERTS, TOP_K)
    ours.load_state_dict({"score.weight": gate.layer.weight.detach()})
    tokens = torch.randn(TOKENS, HIDDEN)
    order, _, weights, sizes, logits = gate(tokens)
    routing = ours(RouterInput(hidden_states=tokens, sequence_shape=(1, TOKENS)))
    torch.testing.assert_close(routing.router_logits, logits)
    torch.testing.assert_close(routing.routing_weights.flatten()[order], weights)
    assert routing.selected_experts.flatten().bincount(minlength=EXPERTS).tolist() == sizes


def test_every_router_of_transformers_has_a_row_or_a_reason():
    found = router_classes().keys() - NO_ROUTERS.keys()
    assert found == GATES.keys() | OTHER_CONVENTIONS.keys()


def test_a_family_whose_gate_is_not_known_is_an_error_that_says_so():
    model = tiny_models.build("zaya")
    assert unknown_gates(model)
    with pytest.raises(ValueError, match=r"ZayaRouter: it hands a state.*Known gates: .*Mixtral"):
        moeroute.wrap_model(model, "switch")
    with pytest.raises(ValueError, match="no method can stand at .*gate, a ZayaRouter"):
        moeroute.wrap_model(model, "switch", target_modules=["gate"])


def test_a_dense_model_has_no_gate():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1
    )
    with pytest.raises(ValueError, match="no gate site"):
        moeroute.wrap_model(LlamaForCausalLM(config), "switch")


def test_only_a_gate_is_asked_for_an_equal_router():
    assert gate_family(nn.Linear(2, 2)) is None
    with pytest.raises(ValueError, match="Linear is no gate"):
        equal_router(nn.Linear(2, 2))
