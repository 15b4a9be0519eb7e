"""Union of Experts' own properties, of blocks and of attention; all else is in the suite."""

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import moeroute
from moeroute.layers import MoELayer, SwiGLUFeedForward
from moeroute.layers.union import slice_block
from moeroute.layers.union_attention import UnionAttention
from moeroute.methods import UnionOfExperts
from moeroute.routers import All, ComposedRouter, LinearScore, SequenceCapacity, TopK
from moeroute.types import RouterInput

HIDDEN, WIDTH, EXPERTS = 8, 12, 4


class Ones:
    """Every expert at weight 1."""

    def __call__(self, logits):
        return torch.ones_like(logits)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def test_all_slices_at_weight_one_are_the_block():
    torch.manual_seed(0)
    block, x = SwiGLUFeedForward(HIDDEN, WIDTH), torch.randn(2, 5, HIDDEN)
    experts = slice_block(block, EXPERTS)
    router = ComposedRouter(LinearScore(HIDDEN, EXPERTS), All(probs=Ones()))
    torch.testing.assert_close(MoELayer(router=router, experts=experts)(x), block(x))
    assert sum(p.numel() for p in experts.parameters()) == sum(
        p.numel() for p in block.parameters()
    )


def test_in_a_checkpoint_chosen_slices_are_the_routed_experts_of_the_block():
    method = UnionOfExperts(num_experts=EXPERTS, top_k=2)
    base = llama()
    block = base.model.layers[0].mlp
    plain = SwiGLUFeedForward(16, 24)
    plain.load_state_dict({k: v for k, v in block.state_dict().items()})
    model = moeroute.wrap_model(base, method).eval()
    host, router = model.model.model.layers[0].mlp, next(iter(moeroute.routers(model).values()))
    layer = MoELayer(router=router, experts=slice_block(plain, EXPERTS)).eval()
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(host(x), layer(x))
    assert not torch.allclose(host(x), plain(x))  # as the method says


def test_the_router_has_a_gradient_and_the_block_none():
    model = moeroute.wrap_model(llama(), UnionOfExperts(num_experts=EXPERTS, top_k=2)).train()
    ids = torch.arange(10).reshape(2, 5)
    model(input_ids=ids, labels=ids).loss.backward()
    for key, parameter in model.named_parameters():
        if "moeroute_site" in key:
            assert parameter.grad.abs().sum() > 0, key
        else:
            assert parameter.grad is None


def test_a_slice_keeps_its_heaviest_tokens_of_each_sample():
    torch.manual_seed(0)
    inner = ComposedRouter(LinearScore(HIDDEN, EXPERTS, init_std=1.0), TopK(2))
    router = SequenceCapacity(inner, share=0.3)
    x = torch.randn(2 * 10, HIDDEN)
    mask = torch.ones(20, dtype=torch.bool)
    mask[15:] = False
    given = RouterInput(hidden_states=x, sequence_shape=(2, 10), token_mask=mask)
    free, limited = inner(given), router(given)
    for sample, real, capacity in ((0, 10, 3), (1, 5, 2)):
        rows = slice(10 * sample, 10 * sample + real)
        for expert in range(EXPERTS):
            wanted = free.routing_weights[rows][free.selected_experts[rows] == expert]
            kept = limited.routing_weights[rows][limited.selected_experts[rows] == expert]
            best = wanted.sort(descending=True).values[:capacity]
            torch.testing.assert_close(kept.sort(descending=True).values, best)
    assert (limited.selected_experts[15:] == EXPERTS).all()
    assert torch.equal(router.eval()(given).selected_experts, free.selected_experts)


def test_by_sequence_all_tokens_have_the_same_slices():
    router = UnionOfExperts(by_sequence=True).router(HIDDEN, EXPERTS)
    ids = router(
        RouterInput(hidden_states=torch.randn(10, HIDDEN), sequence_shape=(2, 5))
    ).selected_experts.reshape(2, 5, 2)
    assert torch.equal(ids, ids[:, :1].expand_as(ids))


def attention(select, heads=4):
    torch.manual_seed(0)
    router = ComposedRouter(LinearScore(HIDDEN, 2, init_std=1.0), select)
    return UnionAttention(HIDDEN, heads, router=router)


def dense(layer, x, seen=None, heads=4):
    q, k, v = (
        p(x).unflatten(2, (heads, -1)).transpose(1, 2)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    if seen is None:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def test_all_groups_of_heads_at_weight_one_are_dense_attention():
    layer, x = attention(All(probs=Ones())), torch.randn(2, 6, HIDDEN)
    expected = layer.o_proj(dense(layer, x).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)


def test_a_head_sees_the_tokens_that_chose_it():
    layer, x, kept = attention(TopK(1, normalize=False)), torch.randn(1, 6, HIDDEN), []
    with layer.routing_pass.listening(kept.append):
        y = layer(x)
    routing = kept[0].routing
    ids, weights = routing.selected_experts[:, 0], routing.routing_weights[:, 0]
    expected = torch.zeros(6, 4, 2)
    for expert in range(2):
        mine = (ids == expert).nonzero().flatten()  # attention among these alone, in their order
        if not len(mine):
            continue
        heads = dense(layer, x[:, mine])[0, 2 * expert : 2 * expert + 2].transpose(0, 1)
        expected[mine, 2 * expert : 2 * expert + 2] = heads * weights[mine, None, None]
    torch.testing.assert_close(y[0], layer.o_proj(expected.flatten(1)))
    y.sum().backward()
    assert layer.router.score.weight.grad.abs().sum() > 0


def test_padding_is_not_attended_to():
    layer, x = attention(TopK(1, normalize=False)), torch.randn(1, 6, HIDDEN)
    expected = layer(x)
    layer.routing_pass.begin(token_mask=(torch.arange(9) < 6)[None])
    padded = torch.cat([x, torch.full((1, 3, HIDDEN), float("nan"))], 1)
    y = layer(padded)
    torch.testing.assert_close(y[:, :6], expected)
    assert (y[:, 6:] == 0).all()


def test_what_cannot_be():
    with pytest.raises(ValueError, match="num_experts=5 does not divide the 24 hidden units of"):
        moeroute.wrap_model(llama(), UnionOfExperts(num_experts=5))
    with pytest.raises(ValueError, match="capacity=0"):
        UnionOfExperts(capacity=0.0)
    with pytest.raises(ValueError, match="top_k=5"):
        UnionOfExperts(top_k=5)
    with pytest.raises(ValueError, match="experts the heads"):
        attention(TopK(1), heads=1)
