"""What every router must do."""

import copy

import pytest
import torch
from contracts.router_cases import EXPERTS, HIDDEN, ROUTERS, STATE, TOKENS, build, every_router
from torch.utils.checkpoint import checkpoint

from moeroute import routers
from moeroute.types import Router, RouterInput


@pytest.fixture(autouse=True)
def _only_what_applies(request):
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    reason = ROUTERS[name].exceptions.get(request.node.originalname) if name in ROUTERS else None
    if reason:
        pytest.skip(f"{name}: {reason}")


def given(tokens, token_ids=None, token_mask=None):
    ids = torch.arange(tokens.shape[0]) * 7 if token_ids is None else token_ids
    return RouterInput(
        hidden_states=tokens,
        sequence_shape=(1, tokens.shape[0]),
        token_ids=ids,
        token_mask=token_mask,
        state=torch.ones(tokens.shape[0], STATE),
    )


def parts(routing):
    return routing.router_logits, routing.routing_weights, routing.selected_experts


@every_router
@pytest.mark.parametrize("tokens", [0, 1, TOKENS])
def test_shapes_dtypes_and_range(name, tokens):
    router = build(name)
    logits, weights, ids = parts(router(given(torch.randn(tokens, HIDDEN))))
    assert isinstance(router, Router)
    assert router.num_experts == EXPERTS
    assert logits.shape == (tokens, EXPERTS)
    assert weights.shape == ids.shape
    assert ids.shape[0] == tokens
    assert logits.dtype == weights.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert ((ids >= 0) & (ids < EXPERTS + ROUTERS[name].empties)).all()
    assert (weights[ids == EXPERTS] == 0).all()
    assert (weights >= 0).all() or name in (
        "gemma4",
        "positive-rms",
        "chunk-steered",
    )  # scales of any sign
    for row in ids.tolist():
        filled = [expert for expert in row if expert < EXPERTS]
        assert len(set(filled)) == len(filled)


@pytest.mark.parametrize(
    "name", [name for name, case in ROUTERS.items() if case.weights_sum_to is not None]
)
def test_weights_sum_to_what_the_case_says(name):
    weights = build(name)(given(torch.randn(TOKENS, HIDDEN))).routing_weights
    total = torch.full((TOKENS,), ROUTERS[name].weights_sum_to)
    torch.testing.assert_close(weights.sum(1), total)


@every_router
def test_gradient_reaches_every_parameter_and_the_tokens(name):
    router = build(name)
    tokens = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    weights = router(given(tokens)).routing_weights
    (weights * torch.randn_like(weights)).sum().backward()
    assert tokens.grad.abs().sum() > 0
    for key, parameter in router.named_parameters():
        assert parameter.grad.abs().sum() > 0, key


@every_router
def test_gradcheck_in_float64(name):
    router = build(name).double().eval()
    tokens = torch.randn(5, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: parts(router(given(x)))[:2], (tokens,))
    assert router(given(tokens)).routing_weights.dtype == torch.float64


@every_router
def test_permuting_tokens_permutes_the_answer(name):
    router = build(name).eval()
    tokens, order = torch.randn(TOKENS, HIDDEN), torch.randperm(TOKENS)
    straight, shuffled = router(given(tokens)), router(given(tokens[order], order * 7))
    for one, other in zip(parts(straight), parts(shuffled), strict=True):
        torch.testing.assert_close(one[order], other)


@every_router
def test_no_token_sees_another(name):
    router = build(name).eval()
    tokens = torch.randn(TOKENS, HIDDEN)
    alone = router(given(tokens[3:4], torch.tensor([21])))
    for one, other in zip(parts(router(given(tokens))), parts(alone), strict=True):
        torch.testing.assert_close(one[3:4], other)


@every_router
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_are_routed_in_float32(name, dtype):
    router = build(name).eval()
    tokens = torch.randn(TOKENS, HIDDEN).to(dtype)
    half, full = router(given(tokens)), router(given(tokens.float()))
    for one, other in zip(parts(half), parts(full), strict=True):
        assert torch.equal(one, other)
    cast = router.to(dtype)(given(tokens))
    assert cast.router_logits.dtype == cast.routing_weights.dtype == torch.float32


@every_router
def test_strides_do_not_matter(name):
    router = build(name).eval()
    tokens = torch.randn(TOKENS, HIDDEN)
    strided = tokens.t().contiguous().t()
    spread = torch.randn(TOKENS, 2 * HIDDEN)
    spread[:, ::2] = tokens
    repeated = tokens[:1].expand(TOKENS, HIDDEN)
    for view, expected in ((strided, tokens), (spread[:, ::2], tokens), (repeated, tokens[:1])):
        same = torch.arange(TOKENS) * 7 * (expected.shape[0] > 1)
        logits, weights, ids = parts(router(given(view, same)))
        wanted = parts(router(given(expected, same[: expected.shape[0]])))
        torch.testing.assert_close(logits, wanted[0].expand(logits.shape))
        torch.testing.assert_close(weights, wanted[1].expand(weights.shape))
        assert torch.equal(ids, wanted[2].expand(ids.shape))


@every_router
def test_nan_logits_keep_ids_in_range_and_other_tokens_right(name):
    router = build(name).eval()
    tokens = torch.randn(TOKENS, HIDDEN)
    expected = router(given(tokens))
    tokens[4] = float("nan")
    routing = router(given(tokens))
    ids = routing.selected_experts
    assert ((ids >= 0) & (ids < EXPERTS + ROUTERS[name].empties)).all()
    assert routing.routing_weights[4].isnan().any()
    assert (ids[4][routing.routing_weights[4].isnan()] < EXPERTS).any()  # it shows
    others = torch.arange(TOKENS) != 4
    for one, other in zip(parts(routing), parts(expected), strict=True):
        assert torch.equal(one[others], other[others])


@every_router
def test_nan_logits_are_an_error_in_debug(name, monkeypatch):
    router = build(name).eval()
    tokens = torch.randn(TOKENS, HIDDEN)
    monkeypatch.setenv("MOEROUTE_DEBUG", "1")
    router(given(tokens))
    tokens[4] = float("nan")
    with pytest.raises(ValueError, match="1 of 17 tokens have NaN router logits.* token 4;"):
        router(given(tokens))


@every_router
@pytest.mark.parametrize("training", [False, True])
def test_padding_moves_no_real_token(name, training):
    router = build(name).train(training and not ROUTERS[name].draws)
    tokens = torch.randn(TOKENS, HIDDEN)
    real = torch.arange(2 * TOKENS) % 2 == 0
    padded = torch.full((2 * TOKENS, HIDDEN), 1e3)
    padded[1::4] = float("nan")
    padded[real] = tokens
    plain, ids = given(tokens), torch.zeros(2 * TOKENS, dtype=torch.int64)
    ids[real] = plain.token_ids
    expected, routing = router(plain), router(given(padded, ids, real))
    for one, other in zip(parts(routing), parts(expected), strict=True):
        torch.testing.assert_close(one[real], other)


@every_router
@pytest.mark.parametrize("training", [False, True])
def test_traces_as_one_graph(name, training):
    router = build(name).train(training and not ROUTERS[name].draws)
    tokens = torch.randn(TOKENS, HIDDEN)
    compiled = torch.compile(lambda x: parts(router(given(x))), fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(tokens), parts(router(given(tokens))), strict=True):
        torch.testing.assert_close(one, other)


@every_router
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(name, use_reentrant):
    router = build(name)
    tokens = torch.randn(TOKENS, HIDDEN, requires_grad=True)

    def weigh(x):
        return router(given(x)).routing_weights

    gradients = []
    for recompute in (False, True):
        torch.manual_seed(5)  # the noise of a noisy router
        weights = (
            checkpoint(weigh, tokens, use_reentrant=use_reentrant) if recompute else weigh(tokens)
        )
        weights.square().sum().backward()
        gradients.append([tokens.grad, *(parameter.grad for parameter in router.parameters())])
        tokens.grad = None
        router.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@every_router
def test_eval_is_deterministic_and_changes_no_state(name):
    router = build(name).eval()
    before = copy.deepcopy(router.state_dict())
    tokens = torch.randn(TOKENS, HIDDEN)
    first, second = router(given(tokens)), router(given(tokens))
    assert all(torch.equal(*pair) for pair in zip(parts(first), parts(second), strict=True))
    router.train()(given(tokens))
    assert all(torch.equal(before[key], value) for key, value in router.state_dict().items())


@every_router
def test_copies_and_state_dicts_route_alike(name):
    router = build(name).eval()
    loaded = ROUTERS[name].make().eval()
    loaded.load_state_dict(router.state_dict())
    tokens = torch.randn(TOKENS, HIDDEN)
    expected = parts(router(given(tokens)))
    for twin in (copy.deepcopy(router), loaded):
        assert all(
            torch.equal(*pair) for pair in zip(parts(twin(given(tokens))), expected, strict=True)
        )


@every_router
def test_repr_names_the_parts(name):
    text = repr(build(name))
    assert "num_experts=8" in text
    assert "0x" not in text


@pytest.mark.parametrize(
    "make",
    [
        routers.mixtral_router,
        lambda *sizes: routers.qwen_moe_router(*sizes, norm_topk_prob=True),
        routers.olmoe_router,
        routers.deepseek_v3_router,
        routers.gpt_oss_router,
        routers.noisy_top_k_router,
    ],
)
@pytest.mark.parametrize(
    ("sizes", "told"),
    [((6, 4, 5), "top_k=5"), ((6, 4, 0), "top_k=0"), ((6, 0, 1), "num_experts=0")],
)
def test_impossible_sizes(make, sizes, told):
    with pytest.raises(ValueError, match=told):
        make(*sizes)


@pytest.mark.parametrize(
    "make",
    [
        routers.mixtral_router,
        routers.olmoe_router,
        routers.deepseek_v3_router,
        routers.gpt_oss_router,
        routers.noisy_top_k_router,
    ],
)
def test_one_expert(make):
    routing = make(HIDDEN, 1, 1)(given(torch.randn(3, HIDDEN)))
    assert routing.selected_experts.tolist() == [[0]] * 3
    assert routing.routing_weights.isfinite().all()
