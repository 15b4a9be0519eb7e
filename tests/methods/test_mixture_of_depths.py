"""Mixture-of-Depths' own properties, and what token-wise depth owes to caches and neighbours."""

import pytest
import torch
from integration.depth.depth_models import (
    LAYERS,
    close,
    feed,
    grown,
    new_cache,
    ragged,
    tiny,
    whole,
)
from peft import PeftModel

import moeroute
from moeroute.layers.routed import routing_passes
from moeroute.losses.membership import MembershipLoss
from moeroute.methods import MixtureOfDepths
from moeroute.routers.token_capacity import TokenCapacityRouter, highest

pytestmark = pytest.mark.hf


def wrapped(family="llama", bias=0.0, **fields):
    """A model whose every layer is routed, with a predictor that says yes to some."""
    model = moeroute.wrap_model(tiny(family), MixtureOfDepths(**{"every": 1, **fields})).eval()
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, TokenCapacityRouter):
            with torch.no_grad():
                module.score.normal_()
                module.predictor.weight.normal_()
                module.predictor.bias.fill_(bias)
    return model


def records(model):
    return list(routing_passes(model)[0].records.values())


def run(model, ids, mask):
    with moeroute.track_routing(model) as stats:
        out = model(input_ids=ids, attention_mask=mask, use_cache=False)
    return out, stats


def test_a_fresh_method_is_the_base_and_routes_every_second_layer():
    base, (ids, mask) = tiny(), ragged("left")
    model = moeroute.wrap_model(tiny(), MixtureOfDepths()).eval()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {int(name.split("layers.")[1][0]) for name in trained} == {1}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 32 + 1
    with torch.no_grad():
        close(whole(model, ids, mask), whole(base, ids, mask), mask)


def test_capacity_one_is_the_base_in_training_too():
    base, (ids, mask) = tiny(), ragged("left")
    model = moeroute.wrap_model(tiny(), MixtureOfDepths(capacity=1.0, every=1)).train()
    with torch.no_grad():
        close(whole(model, ids, mask), whole(base, ids, mask), mask)


def test_exactly_the_share_runs_in_training_and_the_others_pass_bit_for_bit():
    model = wrapped(capacity=0.5).train()
    ids, mask = ragged("right", (8, 4, 7))
    with torch.no_grad(), moeroute.track_routing(model):
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    for layer, record in enumerate(records(model)):
        runs = record.depth.num_executions.bool()
        assert runs.sum(1).tolist() == [4, 2, 3]
        before, after = out.hidden_states[layer : layer + 2]
        if layer + 1 < LAYERS:  # the last one is normed
            assert torch.equal(before[~runs], after[~runs])
            assert not torch.equal(before[runs], after[runs])


def test_highest_takes_early_tokens_on_ties_and_no_padding():
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    real = torch.tensor([[True, True, True, True], [False, True, True, True]])
    assert highest(score, real, 0.5).tolist() == [
        [False, True, True, False],
        [False, True, False, False],
    ]
    assert highest(score, real, 1e-6).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_equals_whole_and_a_token_sees_no_later_one(family, cache):
    model = wrapped(family)
    ids, mask = grown(*ragged("left"), 5)
    with torch.no_grad():
        expected = whole(model, ids, mask)
        close(feed(model, ids, mask, (5, 9, 10, 12), new_cache(model, cache)), expected, mask)
        changed = ids.clone()
        changed[:, -1] = 3 + (changed[:, -1] + 1) % 50
        close(whole(model, changed, mask)[:, :-1], expected[:, :-1], mask[:, :-1])
        shares = [record.depth.num_executions.float().mean() for record in records_of(model, ids)]
    assert any(0.1 < share < 0.9 for share in shares)


def records_of(model, ids):
    run(model, ids, torch.ones_like(ids))
    return records(model)


def test_a_batch_is_its_sequences_one_by_one():
    model = wrapped()
    ids, mask = ragged("left")
    with torch.no_grad():
        together = whole(model, ids, mask)
        for row in range(3):
            real = mask[row].bool()
            alone = whole(model, ids[row : row + 1, real], mask[row : row + 1, real])
            close(together[row : row + 1, real], alone, mask[row : row + 1, real])


def test_a_cache_that_forced_depth_began_cannot_go_on_by_token():
    model, cache = wrapped(), new_cache(tiny(), "dynamic")
    ids, mask = ragged("left")
    with torch.no_grad(), moeroute.force_depth(model, [1, 0, 1]):
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    longer, mask = grown(ids, mask, 1)
    with pytest.raises(ValueError, match=r"filled with executions \[1, 1, 1\] of this layer"):
        model(input_ids=longer[:, -1:], attention_mask=mask, past_key_values=cache)


def test_skipped_tokens_are_not_computed():
    model = wrapped()
    ids, mask = ragged("left", (9,))
    rows: list[int] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
        for layer in model.base_model.model.model.layers
    ]
    with torch.no_grad():
        run(model, ids, mask)
    for hook in hooks:
        hook.remove()
    runs = [int(record.depth.num_executions.sum()) for record in records(model)]
    assert rows == [count for count in runs if count]
    assert sum(rows) < LAYERS * 9


def test_generation_with_a_cache_is_generation_without():
    model = wrapped(bias=0.5)
    ids, mask = ragged("left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    with_cache = model.generate(ids, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))


def test_routers_and_predictors_learn_and_nothing_else():
    model = wrapped(capacity=0.5, predictor_loss_coef=1.0).train()
    ids, mask = ragged("right", (9, 9, 9))
    loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
    parts = moeroute.aux_losses(model).parts
    each = []
    for record in records(model):
        runs, expects = record.depth.num_executions.float(), record.depth.router_logits[..., 1]
        each.append(
            torch.nn.functional.binary_cross_entropy_with_logits(expects, runs, reduction="mean")
        )
    torch.testing.assert_close(parts["MembershipLoss"], torch.stack(each).mean())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("depth_host" in name)
        if parameter.grad is not None:
            assert parameter.grad.abs().sum() > 0


def test_the_predictor_comes_to_foretell_the_choice():
    model = wrapped(capacity=0.5, predictor_loss_coef=1.0).train()
    ids, mask = ragged("right", (9, 9, 9))
    trained = [p for name, p in model.named_parameters() if "predictor" in name]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask)
        loss = moeroute.aux_losses(model).total
        loss.backward()
        optimizer.step()
    assert loss < 0.2


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = wrapped()
    ids, mask = ragged("left")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(whole(again, ids, mask), whole(model, ids, mask))


def test_what_cannot_be():
    with pytest.raises(ValueError, match="capacity=0"):
        MixtureOfDepths(capacity=0)
    with pytest.raises(ValueError, match="every=0"):
        MixtureOfDepths(every=0)
    record = moeroute.layers.MoELayer.build(
        hidden_size=4, intermediate_size=4, num_experts=2, top_k=1, losses=(MembershipLoss(),)
    ).train()
    record(torch.randn(3, 4))
    with pytest.raises(ValueError, match="decides token by token"):
        moeroute.aux_losses(record)
