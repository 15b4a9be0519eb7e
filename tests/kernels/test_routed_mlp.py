"""`routed_mlp` equals its definition: output and every gradient, for every form it comes in."""

import pytest
import routed_cases
import torch
from routed_cases import CASES, Case
from tolerances import assert_close

from moeroute_kernels import reference, routed_mlp
from moeroute_kernels.activations import ACTIVATIONS

BASE = Case(29, 2, 5, 40, 24)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def check(case: Case) -> None:
    for name, (seen, expected) in routed_cases.both_sides(case).items():
        op = "routing weights" if name == "weights" else "routed_mlp"
        assert_close(op, seen, expected, name, case.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_every_case(name: str, dtype: torch.dtype):
    check(CASES[name].but(dtype=dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_activation(activation: str, dtype: torch.dtype):
    # rounding moves a value across a bound, where the derivative jumps: none lie there in bfloat16
    limit = 1.0 if dtype == torch.float64 else 8.0
    check(BASE.but(activation=activation, dtype=dtype, limit=limit))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_layout(bias: bool, transposed: bool, interleaved: bool, dtype: torch.dtype):
    routing = routed_cases.with_empty_slots
    case = BASE.but(bias=bias, transposed=transposed, interleaved=interleaved, dtype=dtype)
    check(case.but(routing=routing))
    check(case.but(routing=routing, activation="gpt_oss_glu", tokens=1, limit=8.0))


@pytest.mark.parametrize("name", ["one token", "one token with empty slots", "one crowded token"])
@pytest.mark.parametrize("bias", [False, True])
def test_one_token_without_gradients(name: str, bias: bool):
    for dtype in DTYPES:
        inputs = routed_cases.make(CASES[name].but(bias=bias, dtype=dtype))
        exact = {k: v.detach().double() for k, v in inputs.differentiable.items()}
        with torch.no_grad():
            seen = inputs.call(routed_mlp)
        assert_close("routed_mlp", seen, inputs.call(reference.routed_mlp, exact))


@pytest.mark.parametrize("tokens", [0, 1, 2, 30])
def test_gradients_do_not_change_the_output(tokens: int):
    inputs = routed_cases.make(BASE.but(tokens=tokens))
    with torch.no_grad():
        quiet = inputs.call(routed_mlp)
    assert_close("routed_mlp", quiet, inputs.call(routed_mlp))


def test_one_expert_is_the_dense_mlp():
    case = CASES["one expert"]
    given = {k: v.detach() for k, v in routed_cases.make(case).differentiable.items()}
    gate, up = (given["x"] @ given["gate_up"][0].t()).chunk(2, dim=-1)
    dense = (torch.nn.functional.silu(gate) * up) @ given["down"][0].t()
    ids, ones = torch.zeros(case.tokens, 1, dtype=torch.int64), torch.ones(case.tokens, 1)
    seen = routed_mlp(given["x"], given["gate_up"], given["down"], ids, ones)
    assert_close("routed_mlp", seen, dense)


@pytest.mark.parametrize("activation", ["silu_glu", "gpt_oss_glu", "relu2"])
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_gradcheck(activation: str, tokens: int):
    case = Case(tokens, 2, 3, 5, 3, routed_cases.with_empty_slots, activation, bias=True)
    inputs = routed_cases.make(case.but(dtype=torch.float64))
    inputs.ids = torch.randint(-1, 4, (tokens, 2))
    names = list(inputs.differentiable)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return inputs.call(routed_mlp, dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(inputs.differentiable.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rows of many sizes", "empty slots", "crowded"])
def test_twenty_repeats_are_bitwise_equal(name: str, dtype: torch.dtype):
    inputs = routed_cases.make(CASES[name].but(dtype=dtype))
    tensors = list(inputs.differentiable.values())

    def run() -> list[torch.Tensor]:
        out = inputs.call(routed_mlp)
        return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]

    first = run()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


class TestEmptySlots:
    def test_tokens_and_weights_that_nobody_chose_are_never_read(self):
        inputs = routed_cases.make(BASE.but(tokens=6, slots=2, experts=4))
        inputs.ids = torch.tensor([[0, 1], [4, -1], [1, 9], [0, 0], [-7, 1], [4, 4]])
        given = inputs.differentiable
        clean = inputs.call(routed_mlp)
        with torch.no_grad():
            given["x"][[1, 5]] = float("nan")
            given["weights"][(inputs.ids < 0) | (inputs.ids > 3)] = float("nan")
            given["gate_up"][2:] = float("nan")
            given["down"][2:] = float("nan")
        seen = inputs.call(routed_mlp)
        gradients = torch.autograd.grad(seen, list(given.values()), torch.ones_like(seen))
        assert torch.equal(seen, clean)
        assert not seen[[1, 5]].any()
        assert all(torch.isfinite(gradient).all() for gradient in gradients)

    def test_gradients_of_an_output_that_nobody_made_are_not_used(self):
        inputs = routed_cases.make(BASE.but(tokens=3, slots=1))
        inputs.ids = torch.tensor([[0], [-1], [2]])
        gradient = torch.ones(3, BASE.hidden)
        gradient[1] = float("nan")
        given = list(inputs.differentiable.values())
        gradients = torch.autograd.grad(inputs.call(routed_mlp), given, gradient)
        assert all(torch.isfinite(found).all() for found in gradients)

    def test_an_idle_expert_gets_a_gradient_of_exactly_zero(self):
        inputs = routed_cases.make(BASE.but(bias=True))
        inputs.ids = torch.zeros_like(inputs.ids)
        inputs.call(routed_mlp).sum().backward()
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            gradient = inputs.differentiable[name].grad
            assert gradient is not None
            assert gradient[0].any()
            assert not gradient[1:].any()

    def test_an_empty_slot_has_no_weight_gradient(self):
        inputs = routed_cases.make(BASE.but(routing=routed_cases.with_empty_slots))
        inputs.call(routed_mlp).sum().backward()
        empty = (inputs.ids < 0) | (inputs.ids >= BASE.experts)
        gradient = inputs.differentiable["weights"].grad
        assert gradient is not None
        assert not gradient[empty].any()
        assert gradient[~empty].all()


class TestStrides:
    def test_inputs_of_any_strides(self):
        inputs = routed_cases.make(BASE.but(dtype=torch.float64))
        expected = inputs.call(routed_mlp)
        spread = {
            name: torch.stack([tensor, tensor], dim=-1).detach()[..., 0].requires_grad_()
            for name, tensor in inputs.differentiable.items()
        }
        assert not any(tensor.is_contiguous() for tensor in spread.values())
        inputs.ids = inputs.ids.t().contiguous().t()
        seen = inputs.call(routed_mlp, spread)
        assert_close("routed_mlp", seen, expected)
        old = torch.autograd.grad(expected.sum(), list(inputs.differentiable.values()))
        new = torch.autograd.grad(seen.sum(), list(spread.values()))
        for a, b in zip(new, old, strict=True):
            assert_close("routed_mlp", a, b)

    @pytest.mark.parametrize("tokens", [1, 6])
    def test_expanded_inputs(self, tokens: int):
        inputs = routed_cases.make(BASE.but(tokens=tokens))
        given = {k: v.detach() for k, v in inputs.differentiable.items()}
        given["x"] = given["x"][:1].expand(tokens, -1)
        given["gate_up"] = given["gate_up"][:1].expand(BASE.experts, -1, -1)
        given["weights"] = given["weights"][:1, :1].expand(tokens, BASE.slots)
        inputs.ids = inputs.ids[:1, :1].expand(tokens, BASE.slots)
        expected = inputs.call(reference.routed_mlp, {k: v.double() for k, v in given.items()})
        assert_close("routed_mlp", inputs.call(routed_mlp, given), expected)

    def test_gradients_of_a_transposed_weight_lie_as_the_weight_does(self):
        inputs = routed_cases.make(BASE.but(transposed=True))
        inputs.call(routed_mlp).sum().backward()
        for name in ("gate_up", "down"):
            weight = inputs.differentiable[name]
            assert weight.grad is not None
            assert weight.grad.stride() == weight.stride()
