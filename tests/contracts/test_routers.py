"""What every router must do."""

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moeroute import routers
from moeroute.routers import All, ComposedRouter, LinearScore, TopK
from moeroute.types import Router, RouterInput

HIDDEN, EXPERTS, TOP_K, TOKENS = 6, 8, 3, 17
STATE = 4
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
ROUTERS = {
    **{name: partial(getattr(routers, f"{name}_router"), *SIZES) for name in PRESETS},
    "cosine": lambda: ComposedRouter(
        routers.CosineScore(HIDDEN, EXPERTS, space_size=4), TopK(TOP_K)
    ),
    "jitter": lambda: ComposedRouter(
        routers.JitteredScore(LinearScore(HIDDEN, EXPERTS), noise=0.1), TopK(TOP_K)
    ),
    "laguna-capped": lambda: routers.laguna_router(*SIZES, softcap=2.0),
    "recurrent": lambda: routers.RecurrentRouter(
        HIDDEN, EXPERTS, TopK(TOP_K), cell=torch.nn.GRUCell(STATE, STATE)
    ),
    "mixtral": lambda: routers.mixtral_router(*SIZES),
    "qwen_moe": lambda: routers.qwen_moe_router(*SIZES, norm_topk_prob=False),
    "qwen_moe-norm": lambda: routers.qwen_moe_router(*SIZES, norm_topk_prob=True),
    "olmoe": lambda: routers.olmoe_router(*SIZES),
    "deepseek_v3": lambda: routers.deepseek_v3_router(*SIZES, num_groups=4, top_k_groups=2),
    "gpt_oss": lambda: routers.gpt_oss_router(*SIZES),
    "noisy_top_k": lambda: routers.noisy_top_k_router(*SIZES),
    "soft": lambda: ComposedRouter(LinearScore(HIDDEN, EXPERTS), All()),
    "switch": lambda: ComposedRouter(LinearScore(HIDDEN, EXPERTS), TopK(1, normalize=False)),
}
WEIGHTS_SUM_TO = {
    "cosine": 1.0,
    "ernie": 1.0,
    "granite_moe": 1.0,
    "minimax_m2": 1.0,
    "recurrent": 1.0,
    "mixtral": 1.0,
    "qwen_moe-norm": 1.0,
    "deepseek_v3": 2.5,
    "gpt_oss": 1.0,
    "noisy_top_k": 1.0,
    "soft": 1.0,
}
every_router = pytest.mark.parametrize("name", ROUTERS)


def build(name):
    torch.manual_seed(0)
    router = ROUTERS[name]()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


def given(tokens):
    return RouterInput(
        hidden_states=tokens,
        sequence_shape=(1, tokens.shape[0]),
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
    assert ((ids >= 0) & (ids < EXPERTS)).all()
    assert (weights >= 0).all() or name == "gemma4"  # whose scales may have any sign
    assert all(len(set(row)) == len(row) for row in ids.tolist())


@pytest.mark.parametrize("name", WEIGHTS_SUM_TO)
def test_weights_sum_to_what_the_family_says(name):
    weights = build(name)(given(torch.randn(TOKENS, HIDDEN))).routing_weights
    torch.testing.assert_close(weights.sum(1), torch.full((TOKENS,), WEIGHTS_SUM_TO[name]))


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
    straight, shuffled = router(given(tokens)), router(given(tokens[order]))
    for one, other in zip(parts(straight), parts(shuffled), strict=True):
        torch.testing.assert_close(one[order], other)


@every_router
def test_no_token_sees_another(name):
    router = build(name).eval()
    tokens = torch.randn(TOKENS, HIDDEN)
    alone = router(given(tokens[3:4]))
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
        logits, weights, ids = parts(router(given(view)))
        wanted = parts(router(given(expected)))
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
    assert ((ids >= 0) & (ids < EXPERTS)).all()
    assert routing.routing_weights[4].isnan().all()
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
def test_traces_as_one_graph(name):
    router = build(name).eval()
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
    loaded = ROUTERS[name]().eval()
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
