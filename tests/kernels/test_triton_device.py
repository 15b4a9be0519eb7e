"""What only a CUDA device can show: graphs, compilation, launches, syncs, and larger sizes."""

from typing import Any

import pytest
import routed_cases
import torch
from routed_cases import Case, Inputs
from torch import Tensor
from triton_cases import check, check_inference, close, counting_launches

from moeroute_kernels import grouped_mm, reference, routed_mlp

pytest.importorskip("triton", reason="the kernels are written in Triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

REPEATS = 20
LAYER = Case(64, 4, 16, 256, 128, dtype=torch.bfloat16)
SIZES = [(2880, 160), (320, 2880), (97, 47)]
"""Hidden and intermediate size, no multiples of a tile."""
ROWS = {"few": 24, "some": 150, "many": 700}
"""Tokens, by class of rows per expert."""


def on_device(case: Case) -> Inputs:
    return routed_cases.make(case).on("cuda")


def slack(case: Case) -> float:
    """float32 adds thousands of products one after the other: twice the error of a small shape."""
    return 2.0 if case.dtype == torch.float32 else 1.0


# a limit that few reach: half precision moves what lies beside it to its other side
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("hidden", "width"), SIZES)
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"activation": "gpt_oss_glu", "interleaved": True, "bias": True, "limit": 7.0},
        {"activation": "gpt_oss_glu", "transposed": True, "bias": True, "limit": 7.0},
        {"activation": "relu2"},
    ],
    ids=["plain", "interleaved", "transposed", "ungated"],
)
def test_every_shipped_layout(
    form: dict[str, Any], hidden: int, width: int, rows: str, dtype: torch.dtype
):
    case = Case(ROWS[rows], 2, 8, hidden, width, dtype=dtype).but(**form)
    check(case, slack=slack(case))
    check_inference(case, slack=slack(case))


def test_a_graph_replays_with_other_inputs():
    """Other tokens, other experts, other routing weights: only the sizes are fixed."""
    inputs = on_device(LAYER)
    with torch.no_grad():
        given = {name: tensor.detach() for name, tensor in inputs.differentiable.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            inputs.call(routed_mlp, given)  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = inputs.call(routed_mlp, given)
        for routing in (routed_cases.distinct, routed_cases.crowded, routed_cases.with_empty_slots):
            ids = routing(LAYER.tokens, LAYER.slots, LAYER.experts)
            inputs.ids.copy_(ids)
            given["x"].copy_(torch.randn(given["x"].shape))
            given["weights"].copy_(torch.rand(given["weights"].shape))
            graph.replay()
            assert torch.equal(replayed, inputs.call(routed_mlp, given))


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("activation", ["silu_glu", "gpt_oss_glu"])
def test_compiles_as_one_graph(activation: str, backend: str):
    inputs = on_device(LAYER.but(activation=activation, bias=True))
    names, tensors = list(inputs.differentiable), list(inputs.differentiable.values())

    def call(*given: Tensor) -> Tensor:
        return inputs.call(routed_mlp, dict(zip(names, given, strict=True)))

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    seen, expected = compiled(*tensors), call(*tensors)
    assert torch.equal(seen, expected)
    gradient = torch.randn_like(seen)
    new = torch.autograd.grad(seen, tensors, gradient)
    old = torch.autograd.grad(expected, tensors, gradient)
    assert all(torch.equal(a, b) for a, b in zip(new, old, strict=True))


def run_both_ways(inputs: Inputs, gradient: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    out = inputs.call(routed_mlp)
    tensors = list(inputs.differentiable.values())
    return [out.detach(), *torch.autograd.grad(out, tensors, gradient)]


def test_another_number_of_tokens_compiles_nothing(monkeypatch: pytest.MonkeyPatch):
    """Within each class of rows per expert, T decides nothing that is compiled."""
    from triton.runtime.jit import JITFunction

    compiled: list[str] = []
    inner = JITFunction._do_compile

    def count(self: Any, *args: Any, **options: Any) -> Any:
        compiled.append(self.__name__)
        return inner(self, *args, **options)

    def run(tokens: int) -> None:
        # an odd number of slots, so that no row of partial sums stays aligned
        inputs = on_device(LAYER.but(tokens=tokens, slots=3, bias=True))
        run_both_ways(inputs, torch.randn(tokens, LAYER.hidden).to("cuda", LAYER.dtype))
        with torch.no_grad():
            inputs.call(routed_mlp)

    monkeypatch.setattr(JITFunction, "_do_compile", count)
    for base in (33, 129, 513):
        run(base)
        compiled.clear()
        for tokens in range(base + 1, base + 21):
            run(tokens)
        assert compiled == []


def test_one_token_takes_three_launches():
    inputs = on_device(LAYER.but(tokens=1, experts=128, slots=8))
    with torch.no_grad(), counting_launches() as launched:
        inputs.call(routed_mlp)
    assert launched == ["mlp_up_kernel", "mm_rows_kernel", "combine_kernel"]


@pytest.mark.parametrize("tokens", [1, 64, 700])
def test_nothing_waits_for_the_device(tokens: int):
    inputs = on_device(LAYER.but(tokens=tokens, bias=True))
    gradient = torch.randn(tokens, LAYER.hidden).to("cuda", LAYER.dtype)
    run_both_ways(inputs, gradient)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_both_ways(inputs, gradient)
        with torch.no_grad():
            inputs.call(routed_mlp)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("tokens", [1, 64, 700])
def test_repeats_are_equal_to_the_bit(tokens: int):
    case = LAYER.but(tokens=tokens, bias=True, routing=routed_cases.with_empty_slots)
    inputs = on_device(case)
    gradient = torch.randn(tokens, case.hidden).to("cuda", case.dtype)
    first = run_both_ways(inputs, gradient)
    for _ in range(REPEATS):
        seen = run_both_ways(inputs, gradient)
        assert all(torch.equal(a, b) for a, b in zip(first, seen, strict=True))


def test_more_than_31_bits_of_rows():
    """Output and its gradient have more than 2**31 elements; their last rows are right."""
    rows, out, width, last = 70_000, 32_768, 32, 8
    if torch.cuda.mem_get_info()[0] < 5 * rows * out * 2:
        pytest.skip("needs 23 GB of the device's memory")
    x = torch.randn(rows, width).to("cuda", torch.bfloat16).requires_grad_()
    weight = (torch.randn(2, out, width) * width**-0.5).to("cuda", torch.bfloat16)
    ends = torch.tensor([5, rows], dtype=torch.int32, device="cuda")
    seen = grouped_mm(x, weight, ends)
    exact_x = x.detach()[-last:].cpu().double().requires_grad_()
    exact_ends = torch.tensor([0, last])
    expected = reference.grouped_mm(exact_x, weight.cpu().double(), exact_ends)
    close("grouped_mm", seen[-last:], expected, "output", x.dtype)
    gradient = torch.zeros_like(seen)
    gradient[-last:] = torch.randn(last, out).to(seen)
    (found,) = torch.autograd.grad(seen, x, gradient)
    (exact,) = torch.autograd.grad(expected, exact_x, gradient[-last:].cpu().double())
    close("grouped_mm", found[-last:], exact, "gradient", x.dtype)
    assert not found[:-last].any()
