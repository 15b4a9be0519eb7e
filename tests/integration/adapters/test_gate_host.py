"""The hook on a gate: what it answers, what it keeps, what becomes of the model's own loss."""

import pickle

import pytest
import torch
from integration import tiny_models
from torch import nn

import moeroute
from moeroute.integration.adapters.gate_host import hosted_gates
from moeroute.methods import RMoE, Switch
from moeroute.types import RouterOutput

pytestmark = pytest.mark.hf
EXPERTS = tiny_models.NUM_EXPERTS


class HalfEmpty(nn.Module):
    """Gives every token its first expert, and every other token a second one."""

    num_experts = EXPERTS

    def forward(self, router_input):
        tokens = router_input.hidden_states.shape[0]
        first = torch.arange(tokens) % EXPERTS
        second = torch.where(torch.arange(tokens) % 2 == 0, (first + 1) % EXPERTS, EXPERTS)
        weights = torch.stack([torch.full((tokens,), 0.75), 0.25 * (second < EXPERTS)], dim=1)
        return RouterOutput(
            router_logits=torch.zeros(tokens, EXPERTS),
            routing_weights=weights,
            selected_experts=torch.stack([first, second], dim=1),
        )


def with_router(model, make):
    wrapped = moeroute.wrap_model(model, Switch(router_jitter_noise=0.0)).eval()
    for _, gate in hosted_gates(wrapped):
        gate.route_host.moeroute_site["default"].router = make()
    return wrapped


def calls_of(wrapped):
    """(ids, weights) of every call of experts."""
    seen = []

    def note(module, args):
        seen.append((args[1], args[2]))

    for _, gate in hosted_gates(wrapped):
        gate.route_host.gate_experts.register_forward_pre_hook(note)
    return seen


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "moeroute"])
def test_empty_slots_reach_no_expert(implementation):
    ids = tiny_models.token_ids()
    expected = with_router(tiny_models.build("mixtral"), HalfEmpty)(ids).logits
    model = with_router(tiny_models.build("mixtral", implementation=implementation), HalfEmpty)
    seen = calls_of(model)
    with moeroute.track_routing(model) as stats:
        logits = model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    chosen, weights = seen[0]
    empty = torch.arange(len(chosen)) % 2 == 1
    assert (chosen[empty, 1] == (EXPERTS if implementation == "moeroute" else 0)).all()
    assert (weights[empty, 1] == 0).all()
    filled = len(chosen) + int((~empty).sum())
    assert all(int(layer.counts.sum()) == filled for layer in stats.layers)


def test_the_answer_has_the_dtypes_of_the_gates_own():
    model = tiny_models.build("qwen3_moe").to(torch.bfloat16)
    gate = model.model.layers[0].mlp.gate
    tokens = torch.randn(5, 32, dtype=torch.bfloat16)
    own = gate(tokens)
    moeroute.wrap_model(model, Switch())
    assert [part.dtype for part in gate(tokens)] == [part.dtype for part in own]


def test_a_gate_that_answers_probabilities_still_does():
    model = moeroute.wrap_model(tiny_models.build("gemma4"), Switch()).eval()
    first = next(gate for _, gate in hosted_gates(model))(torch.randn(5, 32))[0]
    torch.testing.assert_close(first.sum(-1), torch.ones(5))


def test_our_balance_loss_stands_in_for_the_models_own():
    ids = tiny_models.token_ids()
    batch = {"input_ids": ids, "labels": ids}
    base = tiny_models.build("mixtral")
    base.router_aux_loss_coef = 0.5
    model = moeroute.wrap_model(base, Switch(router_jitter_noise=0.0)).train()
    plain, both = model(**batch), model(**batch, output_router_logits=True)
    torch.testing.assert_close(both.loss, plain.loss)
    assert both.aux_loss > 0
    parts = moeroute.aux_losses(model).parts
    evaluated = model.eval()(**batch).loss
    torch.testing.assert_close(plain.loss - evaluated, 0.01 * parts["BalanceLoss"])
    with_theirs = model(**batch, output_router_logits=True)
    torch.testing.assert_close(with_theirs.loss, evaluated + 0.5 * with_theirs.aux_loss)
    as_tuple = model.train()(**batch, output_router_logits=True, return_dict=False)
    torch.testing.assert_close(as_tuple[0], plain.loss)


def test_the_models_own_balance_loss_stays_where_a_method_has_none():
    ids = tiny_models.token_ids()
    batch = {"input_ids": ids, "labels": ids, "output_router_logits": True}
    base = tiny_models.build("mixtral")
    base.router_aux_loss_coef = 0.5
    method = Switch(router_jitter_noise=0.0, router_aux_loss_coef=0.0)
    model = moeroute.wrap_model(base, method).train()
    output = model(**batch)
    without = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(output.loss, without + 0.5 * output.aux_loss)


def test_gates_that_count_twice_are_warned_of():
    ids = tiny_models.token_ids()
    model = moeroute.wrap_model(tiny_models.build("mixtral"), Switch(), layers_to_transform=[0])
    with pytest.warns(UserWarning, match="1 of 2 gates .* count twice"):
        model.train()(input_ids=ids, labels=ids, output_router_logits=True)


def test_embeddings_tell_the_shape_of_the_batch():
    shapes = []

    class Spy(HalfEmpty):
        def forward(self, router_input):
            shapes.append(router_input.sequence_shape)
            return super().forward(router_input)

    model = with_router(tiny_models.build("mixtral"), Spy)
    model(inputs_embeds=torch.randn(3, 4, 32))
    assert shapes == [(3, 4), (3, 4)]


def test_the_state_goes_from_layer_to_layer_and_no_further():
    ids = tiny_models.token_ids()
    model = moeroute.wrap_model(tiny_models.build("mixtral"), RMoE(state_size=6)).eval()
    seen = []
    for _, gate in hosted_gates(model):
        router = gate.route_host.moeroute_site["default"].router
        router.register_forward_pre_hook(lambda _, args: seen.append(args[0].state))
    model(ids)
    first = model(ids).logits
    assert [state is None for state in seen] == [True, False] * 2
    assert torch.equal(model(ids).logits, first)
    with pytest.raises(RuntimeError, match="outside the forward of the model"):
        model.get_base_model().model(ids)
    cells = [key for key in model.state_dict() if "cell" in key]
    assert len(cells) == 4
    assert all("layers.0." in key for key in cells)


def test_the_state_carries_a_gradient_to_the_layer_before():
    ids = tiny_models.token_ids()
    model = moeroute.wrap_model(tiny_models.build("mixtral"), RMoE(state_size=6)).train()
    model(ids, labels=ids)
    records = list(next(iter(hosted_gates(model)))[1].route_host.routing_pass.records.values())
    first = records[0].router.down.weight
    (gradient,) = torch.autograd.grad(records[1].routing.state.sum(), first)
    assert gradient.abs().sum() > 0


def test_a_wrapped_model_can_be_pickled():
    ids = tiny_models.token_ids()
    model = moeroute.wrap_model(tiny_models.build("mixtral"), RMoE(state_size=6)).eval()
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(ids).logits, model(ids).logits)


def test_records_name_the_experts_of_the_checkpoint():
    ids = tiny_models.token_ids()
    model = moeroute.wrap_model(tiny_models.build("mixtral"), Switch()).train()
    model(ids, labels=ids)
    host = next(iter(hosted_gates(model)))[1].route_host
    record = host.routing_pass.records["model.layers.0.mlp.gate"]
    assert record.experts is model.get_base_model().model.layers[0].mlp.experts


def test_more_slots_than_experts_names_the_gate():
    with pytest.raises(ValueError, match=r"top_k=9 exceeds num_experts=4 at .*mlp\.gate"):
        moeroute.wrap_model(tiny_models.build("mixtral"), Switch(top_k=9))


def test_a_router_does_not_merge():
    model = moeroute.wrap_model(tiny_models.build("mixtral"), Switch())
    with pytest.raises(ValueError, match="not defined for switch: its routers stand at gates"):
        moeroute.merge(model)
    with pytest.raises(ValueError, match="unwrap_model"):
        model.merge_and_unload()
