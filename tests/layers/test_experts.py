import pytest
import torch
from torch import nn
from torch.nn import functional

from moeroute.layers import ExpertActivation, MLPExperts, ModuleExperts, SwiGLUExperts
from moeroute.types import Experts, RouterOutput

HIDDEN, INTERMEDIATE, EXPERTS, TOKENS, TOP_K = 6, 10, 5, 13, 3


def make_routing(tokens=TOKENS, dtype=torch.float32):
    logits = torch.zeros(tokens, EXPERTS, dtype=dtype)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(tokens)] or [logits[0:0, :3]])
    ids = ids.reshape(tokens, TOP_K).to(torch.int64)
    if tokens > 4:
        ids[2] = EXPERTS
        ids[4, 1] = EXPERTS
    weights = torch.rand(tokens, TOP_K, dtype=dtype).masked_fill(ids == EXPERTS, 0)
    return RouterOutput(router_logits=logits, routing_weights=weights, selected_experts=ids)


def loop(tokens, routing, expert):
    out = torch.zeros_like(tokens)
    for t, row in enumerate(routing.selected_experts.tolist()):
        for k, chosen in enumerate(row):
            if chosen < EXPERTS:
                out[t] = out[t] + routing.routing_weights[t, k] * expert(tokens[t], chosen)
    return out


def swiglu_reference(experts, act):
    def expert(x, e):
        gate_up, down = experts.gate_up_proj[e], experts.down_proj[e]
        if experts.transposed:
            gate_up, down = gate_up.T, down.T
        hidden = gate_up @ x
        if experts.gate_up_proj_bias is not None:
            hidden = hidden + experts.gate_up_proj_bias[e]
        if experts.interleaved:
            gate, up = hidden[0::2], hidden[1::2]
        else:
            gate, up = hidden.chunk(2)
        out = down @ act(gate, up)
        return out if experts.down_proj_bias is None else out + experts.down_proj_bias[e]

    return expert


def silu_glu(gate, up):
    return functional.silu(gate) * up


def gpt_oss_glu(gate, up):
    gate, up = gate.clamp(max=0.5), up.clamp(-0.5, 0.5)
    return (up + 1) * gate * torch.sigmoid(1.5 * gate)


def randomise(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def assert_same(experts, expert):
    routing = make_routing(dtype=torch.float64)
    tokens = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    ours, theirs = experts(tokens, routing), loop(tokens, routing, expert)
    torch.testing.assert_close(ours, theirs)
    inputs = (tokens, *experts.parameters())
    upstream = torch.randn_like(ours)
    mine = torch.autograd.grad(ours, inputs, upstream)
    for one, other in zip(mine, torch.autograd.grad(theirs, inputs, upstream), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("activation", "act"),
    [
        ("silu_glu", silu_glu),
        (ExpertActivation(name="gpt_oss_glu", alpha=1.5, limit=0.5), gpt_oss_glu),
    ],
)
def test_every_layout_equals_a_loop(bias, transposed, interleaved, activation, act):
    experts = SwiGLUExperts(
        EXPERTS,
        HIDDEN,
        INTERMEDIATE,
        bias=bias,
        transposed=transposed,
        interleaved=interleaved,
        activation=activation,
    )
    experts = randomise(experts).double()
    assert_same(experts, swiglu_reference(experts, act))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("activation", "act"), [("gelu", functional.gelu), ("relu2", lambda x: x.relu().square())]
)
def test_plain_experts_equal_a_loop(bias, transposed, activation, act):
    experts = MLPExperts(
        EXPERTS, HIDDEN, INTERMEDIATE, bias=bias, transposed=transposed, activation=activation
    )
    experts = randomise(experts).double()

    def expert(x, e):
        up, down = experts.up_proj[e], experts.down_proj[e]
        up, down = (up.T, down.T) if transposed else (up, down)
        hidden = up @ x + (experts.up_proj_bias[e] if bias else 0)
        return down @ act(hidden) + (experts.down_proj_bias[e] if bias else 0)

    assert_same(experts, expert)


def test_modules_as_experts_equal_a_loop():
    modules = [nn.Linear(HIDDEN, HIDDEN), nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh())]
    modules += [nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(EXPERTS - 2)]
    experts = ModuleExperts(modules).double()
    assert_same(experts, lambda x, e: experts.experts[e](x))


def test_modules_equal_stacked_experts():
    stacked = randomise(MLPExperts(EXPERTS, HIDDEN, INTERMEDIATE, activation="relu"))
    modules = []
    for e in range(EXPERTS):
        up = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        down = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)
        up.weight.data, down.weight.data = stacked.up_proj[e].data, stacked.down_proj[e].data
        modules.append(nn.Sequential(up, nn.ReLU(), down))
    routing, tokens = make_routing(), torch.randn(TOKENS, HIDDEN)
    torch.testing.assert_close(ModuleExperts(modules)(tokens, routing), stacked(tokens, routing))


def test_modules_may_change_the_width_and_the_idle_get_zero_gradients():
    experts = ModuleExperts([nn.Linear(HIDDEN, 3) for _ in range(EXPERTS)])
    routing = make_routing(4)
    routing.selected_experts.fill_(0)
    out = experts(torch.randn(4, HIDDEN), routing)
    assert out.shape == (4, 3)
    out.sum().backward()
    assert torch.count_nonzero(experts.experts[0].weight.grad) > 0
    assert torch.count_nonzero(experts.experts[1].weight.grad) == 0


MAKERS = {
    "swiglu": lambda: SwiGLUExperts(EXPERTS, HIDDEN, INTERMEDIATE),
    "swiglu-all-layouts": lambda: SwiGLUExperts(
        EXPERTS, HIDDEN, INTERMEDIATE, bias=True, transposed=True, interleaved=True
    ),
    "mlp": lambda: MLPExperts(EXPERTS, HIDDEN, INTERMEDIATE, bias=True),
    "modules": lambda: ModuleExperts([nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS)]),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_no_tokens(make, dtype):
    experts = make().to(dtype)
    assert isinstance(experts, Experts)
    for tokens in (0, TOKENS):
        inputs = torch.randn(tokens, HIDDEN).to(dtype).requires_grad_()
        routing = make_routing(tokens)
        out = experts(inputs, routing)
        assert out.shape == (tokens, HIDDEN)
        assert out.dtype == dtype
        out.sum().backward()
        assert inputs.grad.isfinite().all()
        assert torch.count_nonzero(out[routing.routing_weights.sum(1) == 0]) == 0
    exact = experts.float()(inputs.detach().float(), routing)
    torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)


def test_initial_weights():
    experts = SwiGLUExperts(4, 100, 50, bias=True)
    assert experts.gate_up_proj.abs().max().item() == pytest.approx(0.1, rel=1e-2)
    assert experts.down_proj.abs().max().item() == pytest.approx(50**-0.5, rel=1e-2)
    assert torch.count_nonzero(experts.gate_up_proj_bias) == 0
    assert torch.count_nonzero(experts.down_proj_bias) == 0


def test_names_and_shapes_are_hugging_faces():
    plain = SwiGLUExperts(EXPERTS, HIDDEN, INTERMEDIATE, bias=True, transposed=True)
    assert {name: tuple(value.shape) for name, value in plain.state_dict().items()} == {
        "gate_up_proj": (EXPERTS, HIDDEN, 2 * INTERMEDIATE),
        "gate_up_proj_bias": (EXPERTS, 2 * INTERMEDIATE),
        "down_proj": (EXPERTS, INTERMEDIATE, HIDDEN),
        "down_proj_bias": (EXPERTS, HIDDEN),
    }
    assert sorted(MLPExperts(EXPERTS, HIDDEN, INTERMEDIATE).state_dict()) == [
        "down_proj",
        "up_proj",
    ]
    assert repr(plain) == (
        "SwiGLUExperts(num_experts=5, hidden_size=6, intermediate_size=10, activation=silu_glu, "
        "bias=True, transposed)"
    )


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: SwiGLUExperts(0, 4, 4), "num_experts=0"),
        (lambda: MLPExperts(2, 4, 0), "intermediate_size=0"),
        (lambda: SwiGLUExperts(2, 4, 4, activation="gelu"), "'gelu' is no gated .*silu_glu"),
        (lambda: MLPExperts(2, 4, 4, activation="silu_glu"), "'silu_glu' is no ungated .*relu2"),
        (lambda: ModuleExperts([]), "experts is empty"),
    ],
)
def test_bad_settings(make, told):
    with pytest.raises(ValueError, match=told):
        make()
