"""track_routing counts what the model routes: checked against what its experts are asked."""

import pytest
import torch
from integration import tiny_models
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    NllbMoeConfig,
    NllbMoeModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import moeroute
from moeroute.methods import MixLoRA

pytestmark = pytest.mark.hf

FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"]
LEFT_PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
EXPERTS = tiny_models.NUM_EXPERTS


def tiny_llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )


def wrapped(method=None, **fields):
    method = method or MixLoRA(r=2, num_experts=4, top_k=2)
    return moeroute.wrap_model(tiny_llama(), method, **fields)


def moe_layer():
    return moeroute.MoELayer.build(hidden_size=8, intermediate_size=8, num_experts=4, top_k=2)


def tokens_of(stats):
    return [layer.tokens for layer in stats.layers]


def hooks_of(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_equal_what_the_experts_are_asked(family):
    model, ids = tiny_models.build(family), tiny_models.token_ids()
    asked = {}
    for name, module in model.named_modules():
        if tiny_models.is_experts(module):
            module.register_forward_pre_hook(
                lambda _, args, name=name: asked.setdefault(name, args[1:3]) and None
            )
    with moeroute.track_routing(model) as stats:
        model(input_ids=ids)
    assert [layer.name for layer in stats.layers] == list(asked)
    assert [layer.layer_index for layer in stats.layers] == [0, 1]
    for layer in stats.layers:
        chosen, weights = asked[layer.name]
        one_hot = nn.functional.one_hot(chosen, EXPERTS)  # (T, K, E)
        counts = one_hot.sum((0, 1))
        assert torch.equal(layer.counts, counts)
        assert layer.tokens == ids.numel()
        assert layer.slots_per_token == 2
        torch.testing.assert_close(layer.load, counts / counts.sum())
        pairs = one_hot.sum(1)
        assert torch.equal(layer.coactivation, pairs.T @ pairs)
        expected = (one_hot * weights.detach()[..., None]).sum((0, 1)) / counts.clamp(min=1)
        torch.testing.assert_close(layer.mean_weight, expected.float())


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_left_out_and_generation_followed(family):
    model, ids = tiny_models.build(family), tiny_models.token_ids()
    with moeroute.track_routing(model) as stats:
        model(ids, LEFT_PADDED)
        model(input_ids=ids, attention_mask=LEFT_PADDED)
    assert tokens_of(stats) == [22, 22]
    with moeroute.track_routing(model) as stats:
        model.generate(
            input_ids=ids,
            attention_mask=LEFT_PADDED,
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    assert tokens_of(stats) == [11 + 2 * 2] * 2


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [lambda: tiny_models.build("mixtral"), wrapped])
def test_recomputation_is_not_counted_again(make, use_reentrant):
    model = make().train()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    ids = tiny_models.token_ids()
    with moeroute.track_routing(model) as stats:
        logits = model(input_ids=ids).logits if not use_reentrant else None
        if logits is None:
            with moeroute_losses_off(model):
                logits = model(input_ids=ids).logits
        logits.sum().backward()
    assert tokens_of(stats) == [14, 14]


class moeroute_losses_off:  # noqa: N801
    """Take a wrapped model's losses away, so that reentrant checkpointing is allowed."""

    def __init__(self, model):
        self.layers = [m for m in model.modules() if "losses" in vars(m)]

    def __enter__(self):
        for layer in self.layers:
            layer.losses = ()

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_of_a_lone_layer_is_not_counted_again(use_reentrant):
    layer, tokens = moe_layer(), torch.randn(2, 5, 8, requires_grad=True)
    with moeroute.track_routing(layer) as stats:
        checkpoint(layer, tokens, use_reentrant=use_reentrant).sum().backward()
    assert tokens_of(stats) == [10]
    assert [found.name for found in stats.layers] == ["MoELayer"]


def test_a_wrapped_model_in_eval_with_padding_and_generation():
    model, ids = wrapped().eval(), tiny_models.token_ids()
    with moeroute.track_routing(model) as stats:
        model(input_ids=ids, attention_mask=LEFT_PADDED)
        model.generate(input_ids=ids, attention_mask=LEFT_PADDED, max_new_tokens=2, pad_token_id=0)
    assert [layer.name for layer in stats.layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert [layer.layer_index for layer in stats.layers] == [0, 1]
    assert tokens_of(stats) == [11 + 11 + 2] * 2
    assert stats.model_name == "LlamaForCausalLM"


def test_layers_of_a_model_of_ones_own():
    model = nn.Sequential(moe_layer(), moe_layer())
    with torch.no_grad():
        for layer in model:
            layer.router.score.weight.copy_(torch.eye(4, 8))
    hidden_states = torch.eye(4, 8)[[0, 0, 0, 1]] + 0.5 * torch.eye(4, 8)[2]
    with moeroute.track_routing(model) as stats:
        model[0](hidden_states)
    (layer,) = stats.layers
    assert layer.name == "0"
    assert layer.counts.tolist() == [3, 1, 4, 0]
    assert layer.load.tolist() == [0.375, 0.125, 0.5, 0.0]
    assert layer.dead_experts == (3,)
    assert layer.max_violation == pytest.approx(1.0)
    assert layer.mean_weight[0].item() == pytest.approx(torch.tensor(0.5).sigmoid().item())
    assert "1 more routed layers saw no token" in str(stats)


def test_a_soft_mixture_is_measured_by_weight():
    model = wrapped("molora", num_experts=4, target_modules=["q_proj"]).eval()
    routers = moeroute.routers(model)
    with torch.no_grad():
        for router in routers.values():
            router.score.weight.zero_()
        first = next(iter(routers.values()))
        first.score.bias = nn.Parameter(torch.tensor([1.0, 3.0]).log()[[1, 0, 0, 0]])
    with moeroute.track_routing(model) as stats:
        model(input_ids=tiny_models.token_ids())
    skewed, even = stats.layers
    assert skewed.soft
    assert skewed.dead_experts == ()
    torch.testing.assert_close(skewed.load, torch.tensor([3.0, 1.0, 1.0, 1.0]) / 6)
    assert skewed.max_violation == pytest.approx(1.0)
    assert even.entropy == pytest.approx(1.0)
    assert "slots all" in str(stats)


def test_lora_on_experts_and_its_masks():
    base = tiny_models.build("mixtral")
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    model = get_peft_model(base, config).eval()
    with moeroute.track_routing(model) as stats:
        model(input_ids=tiny_models.token_ids(), attention_mask=LEFT_PADDED)
    assert tokens_of(stats) == [11, 11]
    assert stats.layers[0].name == "model.layers.0.mlp.experts"


@pytest.mark.parametrize("family", ["mixtral", "wrapped"])
@torch.no_grad()
def test_compiled_before_and_inside_the_block(family):
    model = wrapped().eval() if family == "wrapped" else tiny_models.build(family)
    ids = tiny_models.token_ids()
    compiled = torch.compile(model, backend="eager")
    compiled(input_ids=ids)
    with moeroute.track_routing(compiled) as stats:
        compiled(input_ids=ids)
    assert tokens_of(stats) == [14, 14]
    torch._dynamo.reset()
    with moeroute.track_routing(model) as stats:
        compiled = torch.compile(model, backend="eager")
        compiled(input_ids=ids)
        compiled(input_ids=ids)
    assert tokens_of(stats) == [28, 28]
    compiled(input_ids=ids)
    assert tokens_of(stats) == [28, 28]
    torch._dynamo.reset()


def test_inference_mode_may_come_and_go():
    model, ids = tiny_models.build("mixtral"), tiny_models.token_ids()
    with moeroute.track_routing(model) as stats:
        with torch.inference_mode():
            model(input_ids=ids)
        model(input_ids=ids)
    assert tokens_of(stats) == [28, 28]


@pytest.mark.parametrize("make", [lambda: tiny_models.build("mixtral"), wrapped, moe_layer])
def test_nothing_stays_behind_even_after_an_error(make):
    model = make()
    before = hooks_of(model)

    def fail_inside():
        with moeroute.track_routing(model):
            assert hooks_of(model) > before
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail_inside()
    assert hooks_of(model) == before
    assert not any(m.routing_pass._listeners for m in model.modules() if "routing_pass" in vars(m))


def test_an_error_in_a_forward_leaves_no_mask_behind():
    model, ids = tiny_models.build("mixtral"), tiny_models.token_ids()
    with moeroute.track_routing(model) as stats:
        with pytest.raises(IndexError):
            model(input_ids=ids + 1000, attention_mask=LEFT_PADDED)
        model.model.layers[0].mlp(torch.randn(2, 7, 32))
    assert tokens_of(stats) == [14]


def test_without_coactivation():
    model = tiny_models.build("mixtral")
    with moeroute.track_routing(model, coactivation=False) as stats:
        model(input_ids=tiny_models.token_ids())
    assert stats.layers[0].coactivation is None


@pytest.mark.parametrize("family", ["jetmoe", "llama4"])
def test_families_outside_the_registry(family):
    model = tiny_models.build(family)
    with moeroute.track_routing(model) as stats:
        model(input_ids=tiny_models.token_ids(), attention_mask=LEFT_PADDED)
    assert set(tokens_of(stats)) == {11}
    assert {layer.slots_per_token for layer in stats.layers} == {2.0}
    assert {layer.num_experts for layer in stats.layers} == {EXPERTS}


def test_dbrx_calls_its_experts_uniformly():
    config = DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        vocab_size=64,
        max_seq_len=32,
        attn_config={"kv_n_heads": 4, "rope_theta": 10000.0, "clip_qkv": 8},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    )
    with tiny_models.quiet_transformers():
        model = DbrxForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    with moeroute.track_routing(model) as stats:
        model(input_ids=tiny_models.token_ids())
    assert tokens_of(stats) == [14, 14]
    assert int(stats.layers[0].counts.sum()) == 28


def test_switch_routers_with_capacity_in_encoder_and_decoder():
    config = SwitchTransformersConfig(
        vocab_size=64,
        d_model=16,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_heads=2,
        num_experts=2,
        expert_capacity=2,
        decoder_start_token_id=0,
    )
    model = SwitchTransformersForConditionalGeneration(config).eval()
    ids = tiny_models.token_ids()
    with moeroute.track_routing(model) as stats:
        model(input_ids=ids, attention_mask=LEFT_PADDED, decoder_input_ids=ids[:, :3])
    encoder = [layer for layer in stats.layers if layer.name.startswith("encoder")]
    decoder = [layer for layer in stats.layers if layer.name.startswith("decoder")]
    assert {layer.tokens for layer in encoder} == {11}
    assert {layer.tokens for layer in decoder} == {6}
    assert all(int(layer.counts.max()) <= 2 * 2 for layer in stats.layers)


class OldStyleBlock(nn.Module):
    """As model code that comes with a checkpoint writes it: a list of experts and a linear gate."""

    def __init__(self):
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, hidden_states):
        weights, chosen = self.gate(hidden_states).softmax(-1).topk(self.top_k, dim=-1)
        every = torch.stack([expert(hidden_states) for expert in self.experts], 1)
        picked = every.gather(1, chosen[..., None].expand(-1, -1, 8))
        return (weights[..., None] * picked).sum(1)


def test_a_linear_gate_beside_a_list_of_experts():
    model = nn.ModuleDict({"mlp": OldStyleBlock()})
    hidden_states = torch.randn(6, 8)
    with moeroute.track_routing(model) as stats:
        model["mlp"](hidden_states)
    (layer,) = stats.layers
    chosen = model["mlp"].gate(hidden_states).topk(2, dim=-1).indices
    assert layer.name == "mlp"
    assert torch.equal(layer.counts, torch.bincount(chosen.flatten(), minlength=3))


def nllb():
    return NllbMoeModel(
        NllbMoeConfig(
            vocab_size=64,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            num_experts=4,
            encoder_sparse_step=1,
            decoder_sparse_step=1,
        )
    )


def test_experts_that_nobody_can_read_are_named():
    with pytest.raises(ValueError, match="NllbMoeExperts"), moeroute.track_routing(nllb()):
        pass
    beside = nn.ModuleDict({"nllb": nllb(), "own": moe_layer()})
    with (
        pytest.warns(UserWarning, match=r"NllbMoeExperts; first: nllb\.encoder"),
        moeroute.track_routing(beside) as stats,
    ):
        beside["own"](torch.randn(3, 8))
    assert tokens_of(stats) == [3]


def test_a_dense_model_is_refused_with_what_was_looked_for():
    with pytest.raises(ValueError, match="no routed layer") as error:
        moeroute.track_routing(tiny_llama()).__enter__()
    message = str(error.value)
    assert all(w in message for w in ("LlamaForCausalLM", "top_k_index", "MoELayer", "wrap_model"))
