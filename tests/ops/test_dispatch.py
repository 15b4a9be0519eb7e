import torch

from moeroute import ops
from moeroute.types import RouterOutput

TOKENS, HIDDEN, EXPERTS = 7, 5, 4


def make_routing(ids, dtype=torch.float64):
    logits = torch.zeros(ids.shape[0], EXPERTS, dtype=dtype)
    weights = torch.rand(ids.shape, dtype=dtype)
    return RouterOutput(router_logits=logits, routing_weights=weights, selected_experts=ids)


def random_ids():
    ids = torch.randint(0, EXPERTS, (TOKENS, 3))
    ids[2] = EXPERTS
    ids[4, 1] = -5
    return ids


def loop(tokens, matrices, routing):
    out = torch.zeros_like(tokens)
    for t, row in enumerate(routing.selected_experts.tolist()):
        for k, expert in enumerate(row):
            if 0 <= expert < EXPERTS:
                out[t] = out[t] + routing.routing_weights[t, k] * (matrices[expert] @ tokens[t])
    return out


def planned(tokens, matrices, routing):
    plan = ops.plan_dispatch(routing)
    rows = ops.grouped_mm(ops.dispatch(tokens, plan), matrices, plan.expert_offsets)
    return ops.combine(rows, routing.routing_weights, plan)


def test_there_and_back_equals_a_loop_with_gradients():
    routing = make_routing(random_ids())
    tokens = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    matrices = torch.randn(EXPERTS, HIDDEN, HIDDEN, dtype=torch.float64, requires_grad=True)
    ours, theirs = planned(tokens, matrices, routing), loop(tokens, matrices, routing)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, (tokens, matrices), upstream),
        torch.autograd.grad(theirs, (tokens, matrices), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_plan_orders_rows_by_expert_with_empty_slots_last():
    ids = torch.tensor([[1, 9], [0, 1], [3, 0]])
    plan = ops.plan_slots(ids, EXPERTS)
    assert plan.expert_offsets.tolist() == [2, 4, 4, 5]
    assert plan.token_index.tolist() == [1, 2, 0, 1, 2, 0]
    assert plan.slot_index[plan.row_index].tolist() == list(range(6))


def test_gradient_at_rows_of_empty_slots_is_never_read():
    routing = make_routing(random_ids())
    plan = ops.plan_dispatch(routing)
    tokens = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    rows = ops.dispatch(tokens, plan)
    upstream = torch.ones_like(rows)
    upstream[plan.expert_offsets[-1] :] = float("nan")
    (gradient,) = torch.autograd.grad(rows, tokens, upstream)
    filled = ((routing.selected_experts >= 0) & (routing.selected_experts < EXPERTS)).sum(1)
    torch.testing.assert_close(gradient, filled[:, None].double().expand(-1, HIDDEN))


def test_no_tokens():
    routing = make_routing(torch.empty(0, 2, dtype=torch.int64))
    tokens = torch.empty(0, HIDDEN, dtype=torch.float64, requires_grad=True)
    out = planned(tokens, torch.randn(EXPERTS, HIDDEN, HIDDEN, dtype=torch.float64), routing)
    out.sum().backward()
    assert out.shape == (0, HIDDEN)
    assert tokens.grad is not None


def test_dispatch_traces_and_frozen_tokens_cost_nothing():
    routing = make_routing(random_ids())
    tokens = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    matrices = torch.randn(EXPERTS, HIDDEN, HIDDEN, dtype=torch.float64, requires_grad=True)
    expected = planned(tokens, matrices, routing)
    compiled = torch.compile(planned, fullgraph=True, backend="aot_eager")
    out = compiled(tokens, matrices, routing)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert matrices.grad is not None


def test_gradcheck_of_dispatch():
    plan = ops.plan_slots(random_ids(), EXPERTS)
    tokens = torch.randn(TOKENS, 2, dtype=torch.float64, requires_grad=True)
    filled = int(plan.expert_offsets[-1])
    assert torch.autograd.gradcheck(lambda x: ops.dispatch(x, plan)[:filled], (tokens,))


def test_opcheck_of_dispatch():
    plan = ops.plan_slots(random_ids(), EXPERTS)
    tokens = torch.randn(TOKENS, 2, requires_grad=True)
    arguments = (tokens, plan.token_index, plan.row_index, plan.expert_offsets)
    torch.library.opcheck(torch.ops.moeroute.dispatch.default, arguments)
