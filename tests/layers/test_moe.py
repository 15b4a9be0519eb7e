import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moeroute
from moeroute.layers import MLPExperts, ModuleExperts, MoELayer, SwiGLUExperts, SwiGLUFeedForward
from moeroute.losses import BalanceLoss, ZLoss
from moeroute.routers import ComposedRouter, LinearScore, TopK, deepseek_v3_router, mixtral_router
from moeroute.types import RouterInput, RouterOutput

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 8, 12, 4, 2
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_experts": EXPERTS,
    "top_k": TOP_K,
}


def build(**changes):
    torch.manual_seed(0)
    return MoELayer.build(**(SIZES | changes))


@pytest.mark.parametrize("shape", [(2, 5), (7,), (0,), (2, 0), (0, 3), (1, 1)])
def test_output_has_the_shape_of_the_input(shape):
    layer = build(shared_intermediate_size=6, losses=(BalanceLoss(), ZLoss()))
    hidden_states = torch.randn(*shape, HIDDEN, requires_grad=True)
    out = layer(hidden_states)
    assert out.shape == hidden_states.shape
    (out.sum() + moeroute.aux_losses(layer).total).backward()
    assert hidden_states.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_by_hand():
    layer = MoELayer(
        router=mixtral_router(2, 2, 1),
        experts=ModuleExperts([nn.Linear(2, 2), nn.Linear(2, 2)]),
        shared_expert=nn.Linear(2, 2),
        shared_expert_gate=nn.Linear(2, 1),
    )
    with torch.no_grad():
        layer.router.score.weight.copy_(torch.eye(2))
    tokens = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    first, second = layer.experts.experts
    routed = torch.stack([first(tokens[0]), second(tokens[1])])
    shared = layer.shared_expert_gate(tokens).sigmoid() * layer.shared_expert(tokens)
    torch.testing.assert_close(layer(tokens), routed + shared)


def test_sequences_and_flat_tokens_agree():
    layer = build()
    hidden_states = torch.randn(3, 5, HIDDEN)
    torch.testing.assert_close(
        layer(hidden_states).reshape(15, -1), layer(hidden_states.flatten(0, 1))
    )


def test_strides_do_not_matter():
    layer = build(shared_intermediate_size=6)
    hidden_states = torch.randn(3, 5, HIDDEN)
    spread = torch.randn(3, 5, 2 * HIDDEN)
    spread[..., ::2] = hidden_states
    for view in (hidden_states.transpose(0, 1).contiguous().transpose(0, 1), spread[..., ::2]):
        assert not view.is_contiguous()
        torch.testing.assert_close(layer(view), layer(hidden_states))
    repeated = hidden_states[:1, :1].expand(3, 5, HIDDEN)
    torch.testing.assert_close(layer(repeated), layer(repeated.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    layer = build(shared_intermediate_size=6).to(dtype)
    hidden_states = torch.randn(2, 5, HIDDEN).to(dtype).requires_grad_()
    out = layer(hidden_states)
    assert out.dtype == dtype
    out.sum().backward()
    assert hidden_states.grad.dtype == dtype
    exact = copy.deepcopy(layer).double()(hidden_states.detach().double())
    torch.testing.assert_close(out.double(), exact, rtol=5e-2, atol=5e-2)


def test_autocast_routes_in_float32_and_answers_in_its_dtype():
    layer = build(shared_intermediate_size=6)
    hidden_states = torch.randn(2, 5, HIDDEN)
    expected = layer(hidden_states)
    logits = layer.routing_pass.read()[0].routing.router_logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(hidden_states)
    assert out.dtype == torch.bfloat16
    assert torch.equal(layer.routing_pass.read()[0].routing.router_logits, logits)
    torch.testing.assert_close(out.float(), expected, rtol=5e-2, atol=5e-2)
    out.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def test_gradcheck():
    layer = build(shared_intermediate_size=3).double()
    tokens = torch.randn(5, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (tokens,))


@pytest.mark.parametrize("length", [5, 9])
def test_compiles_as_one_graph_with_its_losses(length):
    layer = build(shared_intermediate_size=6)
    hidden_states = torch.randn(2, length, HIDDEN)

    def step(x):
        out = layer(x)
        return out, moeroute.aux_losses(layer).total

    expected = step(hidden_states)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = compiled(hidden_states)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    (got[0].sum() + got[1]).backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant):
    layer = build(losses=())
    hidden_states = torch.randn(2, 5, HIDDEN, requires_grad=True)
    gradients = []
    for recompute in (False, True):
        if recompute:
            out = checkpoint(layer, hidden_states, use_reentrant=use_reentrant)
        else:
            out = layer(hidden_states)
        out.square().sum().backward()
        gradients.append([hidden_states.grad, *(value.grad for value in layer.parameters())])
        hidden_states.grad = None
        layer.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_losses_under_checkpointing_count_once():
    layer = build()
    hidden_states = torch.randn(2, 5, HIDDEN, requires_grad=True)
    gradients = []
    for recompute in (False, True):
        if recompute:
            out = checkpoint(layer, hidden_states, use_reentrant=False)
        else:
            out = layer(hidden_states)
        assert len(layer.routing_pass.records) == 1
        (out.sum() + moeroute.aux_losses(layer).total).backward()
        gradients.append(layer.router.score.weight.grad.clone())
        layer.zero_grad()
    torch.testing.assert_close(*gradients)


def test_copies_and_state_dicts_answer_alike():
    layer = build(shared_intermediate_size=6)
    hidden_states = torch.randn(2, 5, HIDDEN)
    expected = layer(hidden_states)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    torch.manual_seed(7)
    loaded = MoELayer.build(**SIZES, shared_intermediate_size=6)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (copy.deepcopy(layer), loaded):
        assert twin.routing_pass is not layer.routing_pass
        assert torch.equal(twin(hidden_states), expected)


def test_records_are_kept_in_training_only_and_only_if_asked():
    hidden_states = torch.randn(2, 5, HIDDEN)
    layer = build()
    layer(hidden_states)
    (record,) = layer.routing_pass.read()
    assert record.router is layer.router
    assert record.experts is layer.experts
    assert record.routing.selected_experts.shape == (10, TOP_K)
    silent, quiet = build(losses=()), build().eval()
    for other in (silent, quiet):
        other(hidden_states)
        assert other.routing_pass.read() == ()


def test_the_default_loss_balances_and_trains_the_router():
    layer = build()
    layer(torch.randn(2, 5, HIDDEN))
    report = moeroute.aux_losses(layer)
    assert list(report.parts) == ["BalanceLoss"]
    report.total.backward()
    assert layer.router.score.weight.grad.abs().sum() > 0
    assert layer.experts.down_proj.grad is None


class EveryOther(nn.Module):
    """A router of somebody else's: token t goes to expert t mod E, every third token to nobody."""

    def __init__(self, num_experts):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, router_input: RouterInput) -> RouterOutput:
        position = torch.arange(router_input.hidden_states.shape[0])
        ids = torch.where(position % 3 == 0, self.num_experts, position % self.num_experts)
        return RouterOutput(
            router_logits=torch.zeros(position.shape[0], self.num_experts),
            routing_weights=(ids < self.num_experts).float()[:, None],
            selected_experts=ids[:, None],
        )


def test_any_router_will_do():
    layer = MoELayer(router=EveryOther(EXPERTS), experts=MLPExperts(EXPERTS, HIDDEN, 6))
    tokens = torch.randn(9, HIDDEN)
    tokens[::3] = float("nan")
    out = layer(tokens)
    assert torch.count_nonzero(out[::3]) == 0
    assert out.isfinite().all()


def test_nan_tokens_stay_alone():
    layer = build()
    hidden_states = torch.randn(6, HIDDEN)
    expected = layer(hidden_states)
    hidden_states[2] = float("nan")
    out = layer(hidden_states)
    assert out[2].isnan().all()
    others = torch.arange(6) != 2
    torch.testing.assert_close(out[others], expected[others])


def test_repr_shows_the_parts():
    text = repr(build(losses=(ZLoss(weight=0.5),)))
    assert "losses=(ZLoss(weight=0.5),)" in text
    assert "top_k=2" in text
    assert "intermediate_size=12" in text
    assert "0x" not in text


def parts(router=None, experts=None, **others):
    router = router or mixtral_router(HIDDEN, EXPERTS, TOP_K)
    experts = experts or SwiGLUExperts(EXPERTS, HIDDEN, INTERMEDIATE)
    return {"router": router, "experts": experts, **others}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: parts(mixtral_router(HIDDEN, 5, 2)), "num_experts=5 .* num_experts=4"),
        (lambda: parts(deepseek_v3_router(9, EXPERTS, 2)), "in_features=9 .* hidden_size=8"),
        (lambda: parts(nn.Linear(HIDDEN, EXPERTS)), "router is a Linear"),
        (lambda: parts(experts=nn.Linear(HIDDEN, HIDDEN)), "experts is a Linear"),
        (lambda: parts(shared_expert_gate=nn.Linear(HIDDEN, 1)), "there is none; pass one"),
    ],
)
def test_parts_that_do_not_fit(make, told):
    arguments = make()
    with pytest.raises(ValueError, match=told):
        MoELayer(**arguments)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"top_k": 5}, "top_k=5 exceeds the 4 experts"),
        ({"top_k": 0}, "top_k=0"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"intermediate_size": 0}, "intermediate_size=0"),
        ({"shared_intermediate_size": 0}, "intermediate_size=0"),
    ],
)
def test_impossible_sizes(sizes, told):
    with pytest.raises(ValueError, match=told):
        build(**sizes)


def test_tokens_of_another_width():
    with pytest.raises(ValueError, match="tokens are 9 wide"):
        build()(torch.randn(2, 3, 9))


def test_frozen_experts_still_train_the_router():
    layer = build(losses=())
    layer.experts.requires_grad_(requires_grad=False)
    layer(torch.randn(2, 5, HIDDEN)).square().sum().backward()
    assert layer.router.score.weight.grad.abs().sum() > 0
    assert layer.experts.down_proj.grad is None


def test_shared_expert_is_a_llama_block():
    block = SwiGLUFeedForward(HIDDEN, 5)
    x = torch.randn(2, 3, HIDDEN)
    gate = nn.functional.silu(x @ block.gate_proj.weight.T)
    torch.testing.assert_close(
        block(x), (gate * (x @ block.up_proj.weight.T)) @ block.down_proj.weight.T
    )


def test_a_router_without_width_fits_any_experts():
    router = ComposedRouter(LinearScore(HIDDEN, EXPERTS), TopK(1, normalize=False))
    assert router.in_features == HIDDEN
    layer = MoELayer(router=router, experts=ModuleExperts([nn.Identity() for _ in range(EXPERTS)]))
    tokens = torch.randn(5, HIDDEN)
    weight = layer.router(RouterInput(hidden_states=tokens, sequence_shape=(1, 5))).routing_weights
    torch.testing.assert_close(layer(tokens), weight * tokens)
