"""`routed_mlp` as an op: registration, compilation, memory, autocast, and what it refuses."""

import pytest
import routed_cases
import torch
from routed_cases import CASES, Case
from tolerances import assert_close
from torch.library import opcheck

from moeroute_kernels import cpu_routed_mlp_backward, reference, routed_mlp
from moeroute_kernels.routed_mlp import routed_mlp_backward_op, routed_mlp_op

BASE = Case(13, 2, 5, 24, 16)


def op_arguments(case: Case, *, keep: bool, grad: bool = True) -> tuple[object, ...]:
    inputs = routed_cases.make(case)
    given = {k: v.detach().requires_grad_(grad) for k, v in inputs.differentiable.items()}
    biases = (given.get("gate_up_bias"), given.get("down_bias"))
    tensors = (given["x"], given["gate_up"], given["down"], inputs.ids, given["weights"], *biases)
    return *tensors, case.activation, case.interleaved, 1.7, float("inf"), keep


@pytest.mark.parametrize(
    "case", [BASE, BASE.but(bias=True), CASES["no token"]], ids=["plain", "bias", "no token"]
)
def test_opcheck(case: Case):
    opcheck(routed_mlp_op, op_arguments(case, keep=True))
    opcheck(routed_mlp_op, op_arguments(case, keep=False, grad=False))


@pytest.mark.parametrize("needs", [[True] * 6, [True, False, False, True, False, False]])
def test_opcheck_of_backward(needs: list[bool]):
    case = BASE.but(bias=True, transposed=True)
    *inputs, name, interleaved, alpha, limit, keep = op_arguments(case, keep=True, grad=False)
    inputs[1], inputs[2] = inputs[1].transpose(1, 2), inputs[2].transpose(1, 2)
    out, *saved = routed_mlp_op(*inputs, name, interleaved, alpha, limit, keep)
    x, gate_up, down, _, weights, *biases = inputs
    tensors = (torch.randn_like(out), x, gate_up, down, weights, *biases, *saved)
    opcheck(routed_mlp_backward_op, (*tensors, name, interleaved, alpha, limit, needs))


def test_a_call_that_needs_gradients_must_keep():
    with pytest.raises(ValueError, match="keep=True"):
        routed_mlp_op(*op_arguments(BASE, keep=False))


# importing inductor for the first time
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_as_one_graph(backend: str, dtype: torch.dtype):
    case = BASE.but(dtype=dtype, bias=True, activation="gpt_oss_glu")
    inputs = routed_cases.make(case)
    names, tensors = list(inputs.differentiable), list(inputs.differentiable.values())

    def call(*given: torch.Tensor) -> torch.Tensor:
        return inputs.call(routed_mlp, dict(zip(names, given, strict=True))) * 2

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    seen, expected = compiled(*tensors), call(*tensors)
    assert torch.equal(seen, expected)
    gradient = torch.randn_like(seen)
    new = torch.autograd.grad(seen, tensors, gradient)
    old = torch.autograd.grad(expected, tensors, gradient)
    assert all(torch.equal(a, b) for a, b in zip(new, old, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(*tensors), expected)


def test_the_number_of_tokens_does_not_recompile():
    inputs = routed_cases.make(BASE)
    given = {k: v.detach() for k, v in inputs.differentiable.items()}
    graphs = torch._dynamo.testing.CompileCounter()

    def call(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return routed_mlp(x, given["gate_up"], given["down"], ids, weights)

    compiled = torch.compile(call, fullgraph=True, backend=graphs, dynamic=True)
    for tokens in (13, 7, 30, 64):
        x, weights = torch.randn(tokens, BASE.hidden), torch.rand(tokens, BASE.slots)
        ids = torch.randint(0, BASE.experts, (tokens, BASE.slots))
        assert torch.equal(compiled(x, ids, weights), call(x, ids, weights))
    assert graphs.frame_count == 1


class TestMemory:
    @staticmethod
    def saved_bytes(call: object, parameters: list[torch.Tensor]) -> int:
        known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            alive = call()  # keeps the storages apart while they are counted
        assert alive.requires_grad
        return sum(storages.values())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_saves_tokens_and_pre_activation_and_indices_alone(self, dtype: torch.dtype):
        case = Case(32, 8, 16, 256, 96, dtype=dtype)
        inputs = routed_cases.make(case)
        given = inputs.differentiable
        rows = case.tokens * case.slots
        elements = case.tokens * case.hidden + rows * 2 * case.width
        indices = rows * 8 + case.experts * 4 + rows * 4  # order, ends, routing weights
        saved = self.saved_bytes(lambda: inputs.call(routed_mlp), [given["gate_up"], given["down"]])
        assert saved == elements * dtype.itemsize + indices

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_saves_less_than_a_third_of_what_grouped_products_under_autograd_save(
        self, dtype: torch.dtype
    ):
        # the proportions of hidden_size 2048, intermediate_size 768, top_k 8, one eighth each way
        case = Case(32, 8, 16, 256, 96, dtype=dtype)
        inputs = routed_cases.make(case)
        given = inputs.differentiable
        parameters = [given["gate_up"], given["down"]]

        def grouped() -> torch.Tensor:
            order = inputs.ids.flatten().argsort()
            ends = inputs.ids.flatten().bincount(minlength=case.experts).cumsum(0).int()
            mm = torch.nn.functional.grouped_mm
            rows = given["x"][order // case.slots]
            gate, up = mm(rows, given["gate_up"].transpose(1, 2), offs=ends).chunk(2, dim=-1)
            activated = torch.nn.functional.silu(gate) * up
            out = mm(activated, given["down"].transpose(1, 2), offs=ends)
            out = (out * given["weights"].flatten()[order, None])[order.argsort()]
            return out.view(case.tokens, case.slots, -1).sum(1)

        ours = self.saved_bytes(lambda: inputs.call(routed_mlp), parameters)
        assert ours <= 0.30 * self.saved_bytes(grouped, parameters)

    def test_nothing_is_saved_without_gradients(self):
        inputs = routed_cases.make(BASE)
        given = {k: v.detach() for k, v in inputs.differentiable.items()}
        out = inputs.call(routed_mlp, given)
        assert not out.requires_grad
        *_, pre, order, ends = routed_mlp_op(*op_arguments(BASE, keep=False, grad=False))
        assert pre.numel() == order.numel() == ends.numel() == 0


class TestFrozen:
    @pytest.mark.parametrize("trained", ["x", "gate_up", "down", "weights", "down_bias"])
    def test_only_what_is_trained_gets_a_gradient(self, trained: str):
        inputs = routed_cases.make(BASE.but(bias=True))
        full = dict(inputs.differentiable)
        inputs.call(routed_mlp).sum().backward()
        expected = full[trained].grad
        frozen = {k: v.detach().requires_grad_(k == trained) for k, v in full.items()}
        inputs.call(routed_mlp, frozen).sum().backward()
        assert [name for name, tensor in frozen.items() if tensor.grad is not None] == [trained]
        assert torch.equal(frozen[trained].grad, expected)

    def test_frozen_weights_cost_no_product(self, monkeypatch: pytest.MonkeyPatch):
        calls: list[torch.Size] = []
        monkeypatch.setattr(
            cpu_routed_mlp_backward, "mm_weights", lambda *args: calls.append(args[-1].shape)
        )
        inputs = routed_cases.make(BASE)
        frozen = {k: v.detach() for k, v in inputs.differentiable.items()}
        frozen["x"].requires_grad_()
        frozen["weights"].requires_grad_()
        inputs.call(routed_mlp, frozen).sum().backward()
        assert calls == []

    def test_a_trained_down_projection_costs_no_gradient_of_the_first_half(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.delattr(cpu_routed_mlp_backward, "mm_rows")
        monkeypatch.delattr(cpu_routed_mlp_backward, "activate_backward")
        inputs = routed_cases.make(BASE)
        frozen = {k: v.detach() for k, v in inputs.differentiable.items()}
        frozen["down"].requires_grad_()
        inputs.call(routed_mlp, frozen).sum().backward()
        assert frozen["down"].grad is not None


class TestAutocast:
    @pytest.mark.parametrize("tokens", [1, 13])
    def test_casts_tokens_and_weights_but_not_routing_weights(self, tokens: int):
        inputs = routed_cases.make(BASE.but(bias=True, tokens=tokens))
        given = inputs.differentiable
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen = inputs.call(routed_mlp)
        seen.float().square().sum().backward()
        assert seen.dtype == torch.bfloat16
        assert all(tensor.grad.dtype == torch.float32 for tensor in given.values())
        rounded = {k: v.detach().bfloat16() for k, v in given.items() if k != "weights"}
        rounded["weights"] = given["weights"].detach()
        assert torch.equal(seen, inputs.call(routed_mlp, rounded)) or tokens == 1
        exact = {k: v.double() for k, v in rounded.items()}
        assert_close("routed_mlp", seen, inputs.call(reference.routed_mlp, exact))

    def test_leaves_float64_alone(self):
        inputs = routed_cases.make(BASE.but(dtype=torch.float64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen = inputs.call(routed_mlp)
            seen.sum().backward()
        assert torch.equal(seen, inputs.call(routed_mlp))

    def test_compiles_as_one_graph(self):
        inputs = routed_cases.make(BASE)

        def call() -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return inputs.call(routed_mlp)

        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(), call())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_routing_weights_of_another_dtype(dtype: torch.dtype):
    inputs = routed_cases.make(BASE)
    given = inputs.differentiable
    expected = inputs.call(routed_mlp, given | {"weights": given["weights"].to(dtype).float()})
    other = given["weights"].detach().to(dtype).requires_grad_()
    seen = inputs.call(routed_mlp, given | {"weights": other})
    assert torch.equal(seen, expected)
    seen.sum().backward()
    assert other.grad is not None
    assert other.grad.dtype == dtype


def test_non_reentrant_checkpoint_gives_the_same_gradients():
    inputs = routed_cases.make(BASE)
    names, tensors = list(inputs.differentiable), list(inputs.differentiable.values())

    def call(*given: torch.Tensor) -> torch.Tensor:
        return inputs.call(routed_mlp, dict(zip(names, given, strict=True)))

    plain = torch.autograd.grad(call(*tensors).square().sum(), tensors)
    out = torch.utils.checkpoint.checkpoint(call, *tensors, use_reentrant=False)
    again = torch.autograd.grad(out.square().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


class TestRefusals:
    BAD = {
        "unknown activation 'swoosh'": {"activation": "swoosh"},
        "2 \\* I rows per expert": {"gate_up": torch.randn(5, 17, 24)},
        "1 \\* I rows per expert": {"activation": "relu"},
        "gate_up .* and down .* do not fit": {"down": torch.randn(4, 24, 16)},
        "x .* does not fit": {"x": torch.randn(13, 25)},
        "selected_experts .* must be": {"selected_experts": torch.zeros(12, 2, dtype=torch.int64)},
        "they must be integers": {"selected_experts": torch.zeros(13, 2)},
        "routing_weights .* differ": {"routing_weights": torch.rand(13, 3)},
        "gate_up_bias .* must be": {"gate_up_bias": torch.randn(5, 31)},
        "down_bias .* must be": {"down_bias": torch.randn(24)},
        "dtypes differ .*bfloat16": {"down": torch.randn(5, 24, 16).bfloat16()},
    }

    @pytest.mark.parametrize("message", BAD)
    def test_says_what_and_what_is_allowed(self, message: str):
        inputs = routed_cases.make(BASE)
        given = {k: v.detach() for k, v in inputs.differentiable.items()}
        given |= {"selected_experts": inputs.ids, "routing_weights": given.pop("weights")}
        with pytest.raises(ValueError, match=f"routed_mlp: .*{message}"):
            routed_mlp(**(given | self.BAD[message]))
