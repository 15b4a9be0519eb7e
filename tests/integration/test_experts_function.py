"""The experts function alone, on experts modules of every layout."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation

from moeroute.integration.expert_gates import fused_gate

pytestmark = pytest.mark.hf

E, H, I, T, K = 3, 6, 5, 11, 2  # noqa: E741


def swish_glu(self, gate_up):
    """A gate nobody knows, on interleaved columns if the layout says so."""
    halves = gate_up.chunk(2, dim=-1)
    gate, up = halves if self.is_concatenated else (gate_up[..., ::2], gate_up[..., 1::2])
    return self.act_fn(gate) * (up + 0.5)


def make_experts(*, act="silu", own_gate=False, **flags):
    """A decorated module with random weights in the layout that the flags ask for."""
    body = {"forward": reference_forward}
    if own_gate:
        body["_apply_gate"] = swish_glu
    decorated = use_experts_implementation(type("Experts", (Plain,), body), **flags)
    config = SimpleNamespace(_experts_implementation="moeroute", act=act, **flags)
    return decorated(config).double()


class Plain(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts = E
        gated = getattr(config, "has_gate", True)
        first, second = (E, 2 * I if gated else I, H), (E, H, I)
        if getattr(config, "is_transposed", False):
            first, second = (E, first[2], first[1]), (E, I, H)
        name = "gate_up_proj" if gated else "up_proj"
        setattr(self, name, nn.Parameter(torch.randn(first)))
        self.down_proj = nn.Parameter(torch.randn(second))
        if getattr(config, "has_bias", False):
            setattr(self, f"{name}_bias", nn.Parameter(torch.randn(E, 2 * I if gated else I)))
            self.down_proj_bias = nn.Parameter(torch.randn(E, H))
        if getattr(config, "has_post_expert_norm", False):
            self.post_expert_norm = nn.RMSNorm(H, eps=1e-6)
        self.act_fn = {"silu": nn.SiLU(), "tanh": nn.Tanh(), "function": F.silu}[config.act]


def reference_forward(self, hidden_states, top_k_index, top_k_weights):
    """Slot by slot, in the words of the flags."""
    name = "gate_up_proj" if self.has_gate else "up_proj"
    first, second = getattr(self, name), self.down_proj
    if self.is_transposed:
        first, second = first.transpose(1, 2), second.transpose(1, 2)
    rows = []
    for token in range(top_k_index.shape[0]):
        total = torch.zeros_like(hidden_states[token])
        for slot in range(top_k_index.shape[1]):
            expert = int(top_k_index[token, slot])
            if not 0 <= expert < self.num_experts:
                continue
            biases = None, None
            if self.has_bias:
                biases = getattr(self, f"{name}_bias")[expert], self.down_proj_bias[expert]
            row = F.linear(hidden_states[token], first[expert], biases[0])
            row = self._apply_gate(row) if self.has_gate else self.act_fn(row)
            row = F.linear(row, second[expert], biases[1])
            if self.has_post_expert_norm:
                row = self.post_expert_norm(row)
            total = total + row * top_k_weights[token, slot]
        rows.append(total)
    return torch.stack(rows) if rows else hidden_states * 1.0


def make_inputs(*, num_experts=E, dtype=torch.float64):
    hidden_states = torch.randn(T, H, dtype=dtype, requires_grad=True)
    ids = torch.randint(0, num_experts, (T, K))
    weights = torch.rand(T, K, dtype=dtype, requires_grad=True)
    return hidden_states, ids, weights


def compare(experts, hidden_states, ids, weights):
    """Outputs and all gradients of "moeroute" and of the module's own forward, in float64."""
    leaves = [hidden_states, weights, *experts.parameters()]
    found = experts(hidden_states, ids, weights)
    probe = torch.randn_like(found)
    found_gradients = torch.autograd.grad((found * probe).sum(), leaves)
    experts.config._experts_implementation = "eager"
    expected = experts(hidden_states, ids, weights)
    gradients = torch.autograd.grad((expected * probe).sum(), leaves, materialize_grads=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for one, other in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


FLAGS = [
    dict(zip(("has_bias", "is_transposed", "has_post_expert_norm"), values, strict=True))
    for values in itertools.product((False, True), repeat=3)
]


@pytest.mark.parametrize(
    "flags", FLAGS, ids=lambda flags: "+".join(k for k, v in flags.items() if v)
)
@pytest.mark.parametrize("act", ["silu", "tanh", "function"])
@pytest.mark.parametrize("has_gate", [True, False])
def test_every_layout_equals_the_slot_by_slot_loop(flags, act, has_gate):
    experts = make_experts(act=act, has_gate=has_gate, **flags)
    assert (fused_gate(experts) is None) == (act == "tanh")
    compare(experts, *make_inputs())


@pytest.mark.parametrize("is_concatenated", [True, False])
def test_own_gate_is_called(is_concatenated):
    experts = make_experts(own_gate=True, is_concatenated=is_concatenated)
    assert fused_gate(experts) is None
    compare(experts, *make_inputs())


def test_default_gate_is_what_transformers_calls_even_on_an_interleaved_layout():
    # transformers' own functions call `_apply_gate`, and its default splits in halves
    compare(make_experts(is_concatenated=False), *make_inputs())


def test_ids_outside_the_experts_are_skipped_and_never_read():
    experts = make_experts(has_bias=True)
    hidden_states, ids, weights = make_inputs()
    ids[0], ids[1, 0], ids[2, 1], ids[3, 0] = E, E + 7, -1, 2**40
    compare(experts, hidden_states, ids, weights)
    with torch.no_grad():
        hidden_states[0] = float("nan")
    for own_gate in (False, True):
        module = make_experts(own_gate=own_gate)
        out = module(hidden_states, ids, weights)
        assert (out[0] == 0).all()
        assert out.isfinite().all()
        gradient = torch.autograd.grad(out.sum(), hidden_states)[0]
        assert (gradient[0] == 0).all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("own_gate", [False, True])
class TestInputs:
    def test_int32_ids(self, own_gate):
        experts = make_experts(own_gate=own_gate)
        hidden_states, ids, weights = make_inputs()
        expected = experts(hidden_states, ids, weights)
        assert torch.equal(experts(hidden_states, ids.int(), weights), expected)

    def test_no_tokens(self, own_gate):
        experts = make_experts(own_gate=own_gate)
        empty = torch.zeros(0, H, dtype=torch.float64, requires_grad=True)
        out = experts(empty, torch.zeros(0, K, dtype=torch.int64), torch.zeros(0, K))
        assert out.shape == (0, H)
        out.sum().backward()
        assert (experts.down_proj.grad == 0).all()

    def test_strides(self, own_gate):
        experts = make_experts(own_gate=own_gate)
        wide = torch.randn(H, 2 * T, dtype=torch.float64)
        strided = wide[:, ::2].t().requires_grad_()
        ids = torch.randint(0, E, (K, T)).t()
        one_weight = torch.rand(T, 1, dtype=torch.float64, requires_grad=True)
        compare(experts, strided, ids, one_weight.expand(T, K))

    def test_input_dtype_comes_back(self, own_gate):
        experts = make_experts(own_gate=own_gate)
        hidden_states, ids, weights = make_inputs()
        expected = experts(hidden_states, ids, weights).float()
        experts.to(torch.bfloat16)
        out = experts(hidden_states.bfloat16(), ids, weights.bfloat16())
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.3)
        # as under transformers' own functions, tokens are computed in the dtype of the weights
        mixed = experts(hidden_states.float(), ids, weights.float())
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed, expected, rtol=0.1, atol=0.3)

    def test_autocast(self, own_gate):
        experts = make_experts(own_gate=own_gate).float()
        hidden_states, ids, weights = make_inputs(dtype=torch.float32)
        expected = experts(hidden_states, ids, weights)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = experts(hidden_states, ids, weights)
        assert out.dtype == torch.float32
        assert not torch.equal(out, expected)
        torch.testing.assert_close(out, expected, rtol=0.1, atol=0.3)

    def test_frozen_experts(self, own_gate):
        experts = make_experts(own_gate=own_gate).requires_grad_(False)
        hidden_states, ids, weights = make_inputs()
        experts(hidden_states, ids, weights).sum().backward()
        assert hidden_states.grad.isfinite().all()
        assert weights.grad.isfinite().all()


def test_sum_over_slots_is_in_float32():
    experts = make_experts().bfloat16()
    hidden_states, _, _ = make_inputs()
    ids = torch.zeros(T, 16, dtype=torch.int64)
    share = torch.full((T, 16), 1 / 16, dtype=torch.bfloat16)
    one = experts(hidden_states.bfloat16(), ids[:, :1], torch.ones(T, 1, dtype=torch.bfloat16))
    assert torch.equal(experts(hidden_states.bfloat16(), ids, share), one)


def test_one_compiled_graph_serves_all_layers():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    hidden_states, ids, weights = make_inputs()
    first = make_experts()
    layers = [type(first)(first.config).double() for _ in range(12)]
    for layer in layers:
        expected = layer(hidden_states, ids, weights)
        layer.compile(fullgraph=True, backend=counter)
        torch.testing.assert_close(layer(hidden_states, ids, weights), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("own_gate", [False, True])
def test_fullgraph_compile_keeps_outputs_and_gradients(own_gate):
    experts = make_experts(own_gate=own_gate, has_bias=True)
    hidden_states, ids, weights = make_inputs()
    leaves = [hidden_states, weights, *experts.parameters()]
    expected = experts(hidden_states, ids, weights)
    expected_gradients = torch.autograd.grad(expected.square().sum(), leaves)
    experts.compile(fullgraph=True, backend="aot_eager")
    found = experts(hidden_states, ids, weights)
    torch.testing.assert_close(found, expected)
    found_gradients = torch.autograd.grad(found.square().sum(), leaves)
    torch.testing.assert_close(found_gradients, expected_gradients)


def test_quantised_weights_are_refused():
    experts = make_experts()
    experts.gate_up_proj = nn.Parameter(
        experts.gate_up_proj.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(TypeError, match="float8_e4m3fn.*Dequantise"):
        experts(*make_inputs())


def test_fp8_experts_say_what_to_do():
    class Mine(FP8Experts):
        """transformers decorates FP8Experts itself as it quantises; a subclass leaves it alone."""

    decorated = use_experts_implementation(Mine, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    experts = decorated.__new__(decorated)
    nn.Module.__init__(experts)
    experts.config = SimpleNamespace(_experts_implementation="moeroute")
    with pytest.raises(NotImplementedError, match="FP8 experts.*dequantize=True"):
        experts(*make_inputs())
