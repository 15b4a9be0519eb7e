"""gated_lora against its float64 definition: values, gradients, edges, tracing."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from moeroute_kernels import reference_lora
from moeroute_kernels.gated_lora import gated_lora

module = importlib.import_module("moeroute_kernels.gated_lora")
NAMES = ("base", "x", "lora_a", "lora_b", "routing_weights")
# (T, I, O, E, R, K): odd sizes, experts without tokens, K = E, one expert, no and one token.
SHAPES = [
    (37, 29, 19, 5, 3, 2),
    (16, 8, 24, 4, 8, 1),
    (9, 31, 17, 3, 5, 3),
    (7, 13, 11, 16, 2, 2),
    (5, 6, 7, 1, 4, 1),
    (0, 6, 7, 3, 4, 2),
    (1, 6, 7, 3, 4, 2),
    (4, 6, 7, 3, 4, 0),
]


@pytest.fixture(params=["autograd", "dense", "sorted"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every form of the op, whatever the switch would choose; "autograd" is dense in torch's."""
    dense = request.param != "sorted"
    monkeypatch.setattr(module, "runs_dense", lambda lora_a, selected_experts: dense)
    monkeypatch.setattr(
        module, "dense_is_faster", lambda lora_a, *sizes: request.param == "autograd"
    )
    return request.param


def make(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, ...]:
    """Inputs of order one: base, x, lora_a, lora_b, selected_experts, routing_weights."""
    tokens, width, out, experts, rank, slots = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    lora_a = (normal(experts * rank, width) / width**0.5).to(dtype).view(experts, rank, width)
    lora_b = (normal(out, experts * rank) / rank**0.5).to(dtype).view(out, experts, rank)
    ids = torch.randint(0, experts, (tokens, slots), generator=generator)
    weights = torch.rand((tokens, slots), generator=generator)
    if dtype == torch.float64:
        weights = weights.double()
    base, x = normal(tokens, out).to(dtype), normal(tokens, width).to(dtype)
    return base, x, lora_a, lora_b, ids, weights


def leaves(inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Fresh leaves of the inputs; the floating ones require a gradient."""
    fresh = []
    for tensor in inputs:
        if tensor.is_floating_point():
            fresh.append(tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_())
        else:
            fresh.append(tensor)
    return fresh


def run(function, inputs, scaling: float = 1.5, dtype: torch.dtype | None = None):
    """Output and the five gradients under a fixed cotangent."""
    fresh = leaves(inputs, dtype)
    out = function(*fresh, scaling)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).cos().view(out.shape)
    floating = [tensor for tensor in fresh if tensor.is_floating_point()]
    grads = torch.autograd.grad(
        out, floating, cotangent.to(out.dtype), allow_unused=True, materialize_grads=True
    )
    return out.detach(), grads


def close(seen: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Relative Frobenius error."""
    assert seen.shape == wanted.shape, what
    error = (seen.double() - wanted.double()).norm()
    assert error <= tolerance * wanted.double().norm() + 1e-12, f"{what}: {error}"


def compare(inputs, tolerance: float) -> None:
    """Against the definition in float64, which sees the same rounded inputs."""
    out, grads = run(gated_lora, inputs)
    wanted, wanted_grads = run(reference_lora.gated_lora, inputs, dtype=torch.float64)
    assert out.dtype == inputs[0].dtype
    close(out, wanted, tolerance, "out")
    floating = [tensor for tensor in inputs if tensor.is_floating_point()]
    for name, tensor, seen, expected in zip(NAMES, floating, grads, wanted_grads, strict=True):
        assert seen.dtype == tensor.dtype, name
        close(seen, expected, tolerance, name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.bfloat16, 1.5e-2),
        (torch.float16, 2e-3),
    ],
)
def test_matches_the_definition(form, shape, dtype, tolerance):
    compare(make(shape, dtype), tolerance)


def test_float32_adapters_on_a_bfloat16_base(form):
    base, x, lora_a, lora_b, ids, weights = make((37, 29, 19, 5, 3, 2))
    compare((base.bfloat16(), x.bfloat16(), lora_a, lora_b, ids, weights), 4e-3)


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float64])
def test_routing_weights_of_another_dtype(form, weights_dtype):
    *rest, weights = make((9, 31, 17, 3, 5, 3))
    compare((*rest, weights.to(weights_dtype)), 1e-2 if weights_dtype == torch.bfloat16 else 1e-5)


def test_hand_computed():
    base = torch.tensor([[10.0], [20.0]])
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    lora_a = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    lora_b = torch.tensor([[[2.0], [3.0]]])
    ids = torch.tensor([[0, 1], [1, 2]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 7.0]])
    out = gated_lora(base, x, lora_a, lora_b, ids, weights, 2.0)
    # 10 + 2 (0.5 * 2 * 1 + 0.25 * 3 * 2) = 15 ; 20 + 2 (1 * 3 * 4) = 44
    assert out.tolist() == [[15.0], [44.0]]


def test_empty_slots_are_never_read(form):
    base, x, lora_a, lora_b, ids, weights = make((20, 12, 10, 4, 3, 2))
    ids[::3, 0], ids[1::4, 1], ids[5] = -1, 4, 99
    x[5] = weights[5] = float("nan")
    weights[::3, 0] = weights[1::4, 1] = float("nan")
    fresh = leaves((base, x, lora_a, lora_b, ids, weights))
    out = gated_lora(*fresh, 1.0)
    cotangent = torch.ones_like(out)
    cotangent[5] = float("nan")
    grads = torch.autograd.grad(out, [fresh[i] for i in (1, 2, 3, 5)], cotangent)
    assert torch.equal(out[5], base[5])
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    empty = (ids < 0) | (ids >= 4)
    assert (grads[3][empty] == 0).all()
    assert (grads[0][5] == 0).all()
    clean = torch.where(empty, 0.0, weights)
    wanted = reference_lora.gated_lora(base, x.nan_to_num(0.0), lora_a, lora_b, ids, clean, 1.0)
    close(out, wanted, 1e-5, "out")


def test_duplicate_ids_add_up(form):
    base, x, lora_a, lora_b, _, weights = make((11, 12, 10, 4, 3, 3))
    ids = torch.tensor([[2, 2, 2]]).repeat(11, 1)
    ids[::2, 1] = 0
    compare((base, x, lora_a, lora_b, ids, weights), 1e-5)


def test_experts_without_tokens_get_zero_gradients(form):
    base, x, lora_a, lora_b, ids, weights = make((20, 12, 10, 6, 3, 2))
    ids = ids % 2 + 3
    _, (_, _, grad_a, grad_b, _) = run(gated_lora, (base, x, lora_a, lora_b, ids, weights))
    for expert in (0, 1, 2, 5):
        assert (grad_a[expert] == 0).all()
        assert (grad_b[:, expert] == 0).all()


def test_strided_and_expanded_inputs(form):
    base, x, lora_a, lora_b, ids, weights = make((18, 12, 10, 4, 3, 2))
    wanted = run(gated_lora, (base, x, lora_a, lora_b, ids, weights))
    wide = torch.stack([x, x], 2).flatten(1)
    odd = (
        base.t().contiguous().t(),
        wide[:, ::2],
        lora_a.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        lora_b.permute(1, 0, 2).contiguous().permute(1, 0, 2),
        ids.t().contiguous().t(),
        weights.t().contiguous().t(),
    )
    fresh = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in odd]
    out = gated_lora(*fresh, 1.5)
    close(out, wanted[0], 1e-6, "out")
    # A gradient of stride 0 comes from sum().
    grads = torch.autograd.grad(out.sum(), [fresh[i] for i in (0, 1, 2, 3, 5)])
    reference = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in odd]
    total = reference_lora.gated_lora(*reference, 1.5).sum()
    expected = torch.autograd.grad(total, [reference[i] for i in (0, 1, 2, 3, 5)])
    for name, seen, want in zip(NAMES, grads, expected, strict=True):
        close(seen, want, 1e-5, name)


@pytest.mark.parametrize("shared", [True, False])
def test_soft_mixture(form, shared):
    base, x, lora_a, lora_b, _, weights = make((18, 12, 10, 4, 3, 4))
    ids = torch.arange(4).expand(18, 4)
    compare((base, x, lora_a, lora_b, ids if shared else ids.contiguous(), weights), 1e-5)


def test_one_expert_of_weight_one_is_plain_lora(form):
    base, x, lora_a, lora_b, ids, weights = make((18, 12, 10, 1, 3, 1))
    out = gated_lora(base, x, lora_a, lora_b, ids, torch.ones_like(weights), 0.5)
    plain = base + 0.5 * (x @ lora_a[0].t()) @ lora_b[:, 0].t()
    close(out, plain, 1e-6, "out")


def test_permuting_the_experts_changes_nothing(form):
    base, x, lora_a, lora_b, ids, weights = make((18, 12, 10, 5, 3, 2))
    order = torch.tensor([3, 0, 4, 2, 1])
    out = gated_lora(base, x, lora_a, lora_b, ids, weights, 1.0)
    place = order.argsort()
    moved = gated_lora(base, x, lora_a[order], lora_b[:, order], place[ids], weights, 1.0)
    close(moved, out, 1e-6, "out")


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("host", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_lora_b_leaves_the_base_bit_for_bit(form, host, adapter):
    base, x, lora_a, lora_b, ids, weights = make((33, 40, 24, 5, 8, 2))
    base, x = base.to(host) * 7, x.to(host)
    lora_a, lora_b = lora_a.to(adapter), torch.zeros_like(lora_b, dtype=adapter)
    assert torch.equal(gated_lora(base, x, lora_a, lora_b, ids, weights, 2.0), base)


def test_the_output_does_not_alias_base(form):
    base, *rest = make((4, 6, 7, 3, 4, 0))
    out = gated_lora(base, *rest, 1.0)
    assert out.data_ptr() != base.data_ptr()
    assert torch.equal(out, base)


def test_repeats_are_bitwise_equal(form):
    inputs = make((200, 48, 40, 6, 4, 3))
    first = run(gated_lora, inputs)
    for _ in range(5):
        again = run(gated_lora, inputs)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


def test_gradcheck(form):
    base, x, lora_a, lora_b, ids, weights = make((5, 4, 3, 3, 2, 2), torch.float64)
    ids[1, 0], ids[2] = 3, torch.tensor([1, 1])
    fresh = leaves((base, x, lora_a, lora_b, ids, weights))
    assert torch.autograd.gradcheck(lambda *args: gated_lora(*args, 0.7), fresh)


@pytest.mark.parametrize("trained", range(5))
def test_only_what_is_trained_gets_a_gradient(form, trained):
    inputs = make((12, 10, 8, 4, 3, 2))
    _, wanted = run(gated_lora, inputs)
    fresh = [tensor.clone() for tensor in inputs]
    leaf = fresh[(0, 1, 2, 3, 5)[trained]].requires_grad_()
    out = gated_lora(*fresh, 1.5)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).cos().view(out.shape)
    (grad,) = torch.autograd.grad(out, leaf, cotangent.to(out.dtype))
    close(grad, wanted[trained], 1e-6, NAMES[trained])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(form, dtype):
    inputs = leaves(make((6, 5, 4, 3, 2, 2), dtype))
    torch.library.opcheck(torch.ops.moeroute.gated_lora.default, (*inputs, 0.5))


def test_opcheck_backward(form):
    base, x, lora_a, lora_b, ids, weights = make((6, 5, 4, 3, 2, 2))
    saved = torch.ops.moeroute.gated_lora(base, x, lora_a, lora_b, ids, weights, 0.5)[1:]
    arguments = (base, x, *saved, lora_a, lora_b, ids, weights, 0.5, [True, False, True, True])
    torch.library.opcheck(torch.ops.moeroute.gated_lora_backward.default, arguments)


def test_compiles_whole_and_once_for_all_token_counts(form):
    compiled = torch.compile(gated_lora, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.compiler.set_stance("default"):
        for tokens in (6, 9, 12):
            inputs = make((tokens, 10, 8, 4, 3, 2))
            with torch._dynamo.config.patch(error_on_recompile=tokens > 6):
                seen = run(compiled, inputs)
            wanted = run(gated_lora, inputs)
            assert torch.equal(seen[0], wanted[0])
            assert all(torch.equal(a, b) for a, b in zip(seen[1], wanted[1], strict=True))


def test_autocast_computes_in_its_dtype_and_keeps_the_bases(form):
    base, x, lora_a, lora_b, ids, weights = make((37, 29, 19, 5, 3, 2))
    fresh = leaves((base, x, lora_a, lora_b, ids, weights))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gated_lora(*fresh, 1.5)
        out.sum().backward()
    half = (base, x.bfloat16(), lora_a.bfloat16(), lora_b.bfloat16(), ids, weights)
    wanted = gated_lora(*half, 1.5)
    assert out.dtype == torch.float32
    assert torch.equal(out, wanted)
    assert all(t.grad.dtype == t.dtype for t in fresh if t.requires_grad)


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [
        (0, (5, 8), "base"),
        (1, (6, 11), "x"),
        (2, (12, 10), "lora_a"),
        (3, (8, 3, 3), "lora_b"),
        (4, (6, 3), "selected_experts"),
        (5, (7, 2), "routing_weights"),
    ],
)
def test_sizes_that_do_not_belong_together(place, shape, message):
    inputs = list(make((6, 10, 8, 4, 3, 2)))
    inputs[place] = torch.zeros(shape, dtype=inputs[place].dtype)
    with pytest.raises(ValueError, match=message):
        gated_lora(*inputs, 1.0)


def test_ids_must_be_integers():
    base, x, lora_a, lora_b, ids, weights = make((6, 10, 8, 4, 3, 2))
    with pytest.raises(ValueError, match="integers"):
        gated_lora(base, x, lora_a, lora_b, ids.float(), weights, 1.0)
