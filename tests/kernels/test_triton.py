"""The Triton kernels equal the definition: in Triton's interpreter, or on a GPU where there is one.

In the interpreter the ops' own kernels on a CPU are replaced, so that dispatch, autograd and the
comparison are those of the other tests of the ops.
"""

import importlib
from collections.abc import Callable

import pytest
import routed_cases
import torch
from routed_cases import CASES, Case
from torch import Tensor
from triton_cases import (
    DEVICE,
    DTYPES,
    check,
    check_inference,
    compare,
    counting_launches,
    exactly,
    leaves,
)

from moeroute_kernels import (
    combine,
    cuda,
    expert_sort,
    grouped_lora,
    grouped_mm,
    reference,
    reference_lora,
    routed_mlp,
)
from moeroute_kernels.activations import ACTIVATIONS

lora_module = importlib.import_module("moeroute_kernels.gated_lora")
pytest.importorskip("triton", reason="the kernels are written in Triton")
source_module = importlib.import_module("moeroute_kernels._triton.source")
weights_module = importlib.import_module("moeroute_kernels._triton.weights")
pytestmark = pytest.mark.usefixtures("triton_ops")
REPEATS = 20
BASE = Case(29, 2, 5, 40, 24)
TINY = Case(1, 4, 6, 40, 24)
"""So few slots that inference does not sort them."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_routed_mlp(name: str, dtype: torch.dtype):
    check(CASES[name].but(dtype=dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str):
    check(BASE.but(activation=activation, limit=1.0))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rows", ["few", "some", "many"])
def test_every_layout(bias: bool, transposed: bool, interleaved: bool, rows: str):
    tokens = {"few": 12, "some": 60, "many": 150}[rows]
    check(
        Case(
            tokens,
            2,
            2,
            72,
            40,
            routed_cases.with_empty_slots,
            "gpt_oss_glu",
            bias=bias,
            transposed=transposed,
            interleaved=interleaved,
        )
    )


def test_float64_runs_as_plain_torch():
    check(BASE.but(dtype=torch.float64))


@pytest.mark.parametrize("routing", [routed_cases.with_empty_slots, routed_cases.crowded])
@pytest.mark.parametrize(
    ("tokens", "slots", "experts"),
    [(50, 3, 7), (1, 1, 1), (0, 2, 4), (3, 2, 300), (520, 2, 9)],
)
def test_expert_sort(routing: routed_cases.Routing, tokens: int, slots: int, experts: int):
    ids = routing(tokens, slots, experts)
    for layout in (ids, ids.int(), ids.t().contiguous().t()):
        expected = reference.expert_sort(layout, experts)
        for a, b in zip(expert_sort(layout.to(DEVICE), experts), expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("sizes", "tail", "width", "out"),
    [
        ([3, 5, 1, 7, 2, 9, 4], 6, 97, 47),
        ([0, 4, 0, 0, 30, 0], 3, 32, 24),
        ([0, 0, 0], 5, 16, 8),
        ([0, 0], 0, 16, 8),
        ([130, 70], 1, 64, 136),
    ],
)
def test_grouped_mm(
    sizes: list[int], tail: int, width: int, out: int, transposed: bool, dtype: torch.dtype
):
    weight = torch.randn(len(sizes), out, width) * width**-0.5
    stored = weight.transpose(1, 2).contiguous() if transposed else weight
    given = [torch.randn(sum(sizes) + tail, width), stored, torch.randn(len(sizes), out)]
    new = leaves([tensor.to(dtype) for tensor in given])
    old = exactly(new)
    ends = torch.tensor(sizes).cumsum(0).int()

    def call(op: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
        x, stack, bias = tensors
        given_ends = ends.to(x.device)
        return op(x, stack.transpose(1, 2) if transposed else stack, given_ends, bias)

    seen = call(grouped_mm, new)
    compare("grouped_mm", seen, call(reference.grouped_mm, old), new, old)
    assert not seen[sum(sizes) :].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(20, 3, 6, 32), (7, 2, 5, 47), (1, 4, 4, 300), (0, 2, 3, 8)], ids=str
)
def test_combine(shape: tuple[int, int, int, int], dtype: torch.dtype):
    tokens, slots, experts, width = shape
    ids = routed_cases.with_empty_slots(tokens, slots, experts)
    plan = reference.expert_sort(ids, experts)
    new = [torch.randn(tokens * slots, width).to(dtype), torch.rand(tokens, slots)]
    new = leaves(new)
    old = exactly(new)
    place = (plan.inverse, plan.expert_offsets)
    seen = combine(*new, *(tensor.to(DEVICE) for tensor in place))
    expected = reference.combine(*old, *place)
    compare("combine", seen, expected, new, old)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(37, 29, 19, 5, 3, 2), (9, 31, 17, 3, 5, 3), (0, 6, 7, 3, 4, 2), (1, 6, 7, 3, 4, 2)]
)
def test_gated_lora(
    shape: tuple[int, ...], dtype: torch.dtype, dense: bool, monkeypatch: pytest.MonkeyPatch
):
    for module in (lora_module, cuda):
        monkeypatch.setattr(module, "runs_dense", lambda lora_a, selected_experts: dense)
    tokens, width, out, experts, rank, slots = shape
    lora_a = torch.randn(experts, rank, width) * width**-0.5
    lora_b = torch.randn(out, experts, rank) * rank**-0.5
    new = [torch.randn(tokens, out), torch.randn(tokens, width), lora_a, lora_b]
    new = [*(tensor.to(dtype) for tensor in new), torch.rand(tokens, slots)]
    new = leaves(new)
    old = exactly(new)
    ids = routed_cases.with_empty_slots(tokens, slots, experts)

    def call(op: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
        *others, weights = tensors
        return op(*others, ids.to(weights.device), weights, 1.5)

    seen, expected = call(lora_module.gated_lora, new), call(reference_lora.gated_lora, old)
    compare("gated_lora", seen, expected, new, old)


def test_grouped_lora():
    sizes, rank, width, out = [3, 0, 21, 7], 4, 48, 40
    rows = sum(sizes) + 2
    new = [torch.randn(rows, out), torch.randn(rows, width)]
    new += [torch.randn(len(sizes), rank, width) * width**-0.5, torch.randn(len(sizes), out, rank)]
    new = leaves(new)
    old = exactly(new)
    ends = torch.tensor(sizes).cumsum(0).int()

    def by_reference(base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        middle = reference.grouped_mm(x, lora_a, ends)
        return base + 1.5 * reference.grouped_mm(middle, lora_b, ends)

    seen = grouped_lora(*new, ends.to(DEVICE), 1.5)
    compare("gated_lora", seen, by_reference(*old), new, old)


def test_repeats_are_equal_to_the_bit():
    case = Case(9, 3, 4, 24, 16, routed_cases.with_empty_slots, bias=True)
    inputs = routed_cases.make(case).on(DEVICE)
    tensors = list(inputs.differentiable.values())
    gradient = torch.randn(case.tokens, case.hidden).to(DEVICE)
    first: list[Tensor] | None = None
    for _ in range(REPEATS):
        out = inputs.call(routed_mlp)
        seen = [out.detach(), *torch.autograd.grad(out, tensors, gradient)]
        first = first or seen
        assert all(torch.equal(a, b) for a, b in zip(first, seen, strict=True))


class TestUnsorted:
    """Inference over so few slots that the ids themselves are the map of the tiles."""

    @pytest.mark.parametrize("tokens", [0, 1, 3])
    def test_takes_three_launches(self, tokens: int):
        """Two products and the sum; of no token, nothing."""
        inputs = routed_cases.make(TINY.but(tokens=tokens, experts=48)).on(DEVICE)
        with torch.no_grad(), counting_launches() as launched:
            inputs.call(routed_mlp)
        assert launched == ["mlp_up_kernel", "mm_rows_kernel", "combine_kernel"] * (tokens > 0)

    def test_more_slots_are_sorted(self):
        inputs = routed_cases.make(TINY.but(tokens=4, experts=48)).on(DEVICE)
        with torch.no_grad(), counting_launches() as launched:
            inputs.call(routed_mlp)
        assert launched[0] == "sort_one_kernel"
        assert len(launched) == 4

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_every_activation(self, activation: str):
        check_inference(TINY.but(activation=activation, bias=True))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("interleaved", [False, True])
    def test_every_layout(
        self, bias: bool, transposed: bool, interleaved: bool, dtype: torch.dtype
    ):
        case = TINY.but(bias=bias, transposed=transposed, interleaved=interleaved, dtype=dtype)
        check_inference(case.but(activation="gpt_oss_glu"))

    @pytest.mark.parametrize("number", [torch.uint8, torch.int32, torch.int64])
    def test_empty_slots_and_repeated_experts(self, number: torch.dtype):
        """What lies outside contributes nothing, whatever the integers; rows are never NaN."""
        ids = torch.tensor([[3, 200, 0, 3, 6, 5, 255, 3]])
        if number != torch.uint8:
            least, most = torch.iinfo(number).min, torch.iinfo(number).max
            ids = torch.tensor([[3, -1, 0, 3, 6, most, least, 3]])

        def routing(tokens: int, slots: int, experts: int) -> Tensor:
            return ids.to(number)

        check_inference(TINY.but(slots=8, routing=routing, bias=True))

    def test_several_tokens(self):
        check_inference(Case(3, 2, 40, 24, 16, routed_cases.with_empty_slots, bias=True))

    def test_all_slots_may_be_empty(self):
        inputs = routed_cases.make(CASES["one token nowhere"]).on(DEVICE)
        with torch.no_grad():
            assert not inputs.call(routed_mlp).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_inference(name: str, dtype: torch.dtype):
    check_inference(CASES[name].but(dtype=dtype))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inference_in_wide_tiles(dtype: torch.dtype, transposed: bool, interleaved: bool):
    """Many rows per expert, and weights that come in whole steps."""
    case = Case(220, 2, 3, 128, 192, transposed=transposed, interleaved=interleaved, dtype=dtype)
    check_inference(case)


def test_only_whole_steps_by_tma_take_wide_tiles():
    stack = torch.zeros(2, 192, 128, dtype=torch.bfloat16, device=DEVICE)
    has_tma = DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0)
    assert source_module.comes_whole(stack) == has_tma
    assert source_module.comes_whole(stack.transpose(1, 2)) == has_tma
    assert not source_module.comes_whole(stack[:, :, :96])
    assert not source_module.comes_whole(stack.float())
    assert not source_module.comes_whole(stack[:, :, ::2])


class TestLongestFirst:
    """Experts with many rows start before the others; what is computed does not change."""

    @staticmethod
    def ends(sizes: list[int]) -> Tensor:
        return torch.tensor(sizes, device=DEVICE).cumsum(0).int()

    @pytest.mark.parametrize(
        "sizes", [[3, 0, 9, 3, 1], [7], [0, 0, 0], [5] * 40, [i * 37 % 101 for i in range(300)]]
    )
    def test_order(self, sizes: list[int]):
        turns = weights_module.longest_first(self.ends(sizes))
        expected = sorted(range(len(sizes)), key=lambda expert: -sizes[expert])
        assert turns.tolist() == expected

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_bits_do_not_change(self, dtype: torch.dtype):
        sizes = [2, 0, 70, 5]
        ends = self.ends(sizes)
        left = torch.randn(sum(sizes), 24).to(DEVICE, dtype)
        right = torch.randn(sum(sizes), 40).to(DEVICE, dtype)
        seen = []
        for turns in (torch.arange(4).int().to(DEVICE), weights_module.longest_first(ends)):
            out = torch.full((4, 24, 40), float("nan"), dtype=dtype, device=DEVICE)
            seen.append(weights_module.mm_weights(left, right, ends, turns, out))
        assert torch.equal(*seen)
        assert not seen[0][1].any()
