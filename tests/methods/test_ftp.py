"""FTP's own properties: the rule, the routers, and what both owe to caches and neighbours."""

import pytest
import torch
from integration.depth.depth_models import (
    LAYERS,
    VOCAB,
    close,
    feed,
    grown,
    new_cache,
    ragged,
    tiny,
    whole,
)
from methods.ftp_models import (
    FAMILIES_WATCHED,
    SPARSITY,
    densely_pruned,
    differs,
    executed,
    learned,
    pruned,
    records,
    routers,
    static,
)
from peft import PeftModel

import moeroute
from moeroute.methods import FTP, get_method

pytestmark = pytest.mark.hf


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES_WATCHED)
def test_a_fresh_method_is_the_base_bit_for_bit(family):
    ids, mask = ragged("left")
    model, base = pruned(tiny(family), get_method("ftp")()), tiny(family)
    assert torch.equal(whole(model, ids, mask), whole(base, ids, mask))
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), base.generate(ids, **options))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("router", ["static", "learned"])
def test_sparsity_zero_is_the_base_bit_for_bit_whatever_the_routers_say(router, attention):
    ids, mask = ragged("right")
    model = pruned(tiny("llama", attention), FTP(sparsity=0.0, router=router))
    for each in routers(model):
        each.up.bias.copy_(torch.tensor([5.0, -5.0]))
    assert torch.equal(whole(model, ids, mask), whole(tiny("llama", attention), ids, mask))


def test_fewer_than_150_parameters_a_layer():
    model = moeroute.wrap_model(tiny(), FTP())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == LAYERS * (4 * 16 + 16 + 2 * 16 + 2) == LAYERS * 114


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.75, 1.0])
def test_the_rule_keeps_exact_counts_and_both_ends(side, sparsity):
    lengths = (9, 4, 1, 2, 7)
    ids, mask = ragged(side, lengths)
    kept = executed(static(sparsity=(0.0, sparsity, 0.0)), ids, mask)[1]
    for row, length in enumerate(lengths):
        real = mask[row].nonzero().flatten()
        expected = max(round((1 - sparsity) * length), min(2, length))
        assert int(kept[row, real].sum()) == expected
        assert kept[row, real[0]]
        assert kept[row, real[-1]]


@pytest.mark.parametrize("family", FAMILIES_WATCHED)
def test_the_rule_is_what_the_attention_maps_say(family):
    ids, mask = grown(*ragged("left", (9, 5, 7)), 4)
    lengths = (9, 5, 7)
    model, base = static(family), tiny(family, "eager")
    with moeroute.routing_inputs(model, prompt_lengths=torch.tensor(lengths)):
        kept = executed(model, ids, mask)
        found = whole(model, ids, mask)
    with densely_pruned(base, SPARSITY, mask, lengths) as expected:
        logits = whole(base, ids, mask)
    assert torch.equal(kept & mask.bool(), torch.stack(expected))
    close(found, logits, mask)
    assert not kept[1:, :, -4:][:, mask[:, -4:].bool()].all()  # later tokens are pruned too
    assert differs(kept[1:], mask)


def test_fewer_queries_are_the_last_that_ran():
    ids, mask = ragged("right", (12, 9))
    model = pruned(tiny(), FTP(sparsity=SPARSITY, router="static", num_queries=2))
    base = tiny("llama", "eager")
    with densely_pruned(base, SPARSITY, mask, (12, 9), 2) as expected:
        whole(base, ids, mask)
    assert torch.equal(executed(model, ids, mask) & mask.bool(), torch.stack(expected))


@pytest.mark.parametrize("make", [static, learned])
@pytest.mark.parametrize("side", ["left", "right"])
def test_skipped_tokens_pass_bit_for_bit_and_are_not_computed(make, side):
    model = make()
    ids, mask = ragged(side, (9,))
    rows = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
        for layer in model.base_model.model.model.layers
    ]
    with moeroute.track_routing(model) as stats:
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    kept = torch.stack([record.depth.num_executions.bool() for record in records(model)])
    assert differs(kept, mask)
    assert rows == kept.sum((1, 2)).tolist()
    assert [layer.executions for layer in stats.layers] == [
        pytest.approx(each.float().mean().item()) for each in kept
    ]
    for layer in range(LAYERS - 1):  # the last one is normed
        before, after = out.hidden_states[layer : layer + 2]
        assert torch.equal(before[~kept[layer]], after[~kept[layer]])


@pytest.mark.parametrize("make", [static, learned])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_equals_whole_where_the_prompt_is_told(make, family, cache, side):
    model = make(family)
    ids, mask = grown(*ragged(side), 5)
    lengths = torch.tensor([7, 4, 9])
    with moeroute.routing_inputs(model, prompt_lengths=lengths):
        expected = whole(model, ids, mask)
        kept = executed(model, ids, mask)
    assert differs(kept, mask)
    for cuts in ((9, 10, 11, 12, 13), (9, 12)):
        close(feed(model, ids, mask, cuts, new_cache(model, cache)), expected, mask)


def test_a_prompt_in_chunks_is_decided_from_the_first():
    model = static()
    ids, mask = ragged("right", (12, 12))
    with moeroute.routing_inputs(model, prompt_lengths=torch.tensor([6, 6])):
        expected = whole(model, ids, mask)
    close(feed(model, ids, mask, (6, 8), new_cache(model, "dynamic")), expected, mask)


@pytest.mark.parametrize("make", [static, learned])
def test_behind_the_prompt_no_token_sees_a_later_one(make):
    model = make()
    ids, mask = grown(*ragged("left"), 5)
    changed = ids.clone()
    changed[:, -1] = 3 + (changed[:, -1] + 1) % (VOCAB - 3)
    with moeroute.routing_inputs(model, prompt_lengths=torch.tensor([7, 4, 9])):
        one, other = whole(model, ids, mask), whole(model, changed, mask)
    close(one[:, :-1], other[:, :-1], mask[:, :-1])


def test_within_a_prompt_the_choice_looks_at_later_tokens():
    model = static()
    ids, mask = ragged("right", (12,))
    changed = ids.clone()
    changed[:, -3:] = 3 + (changed[:, -3:] + 7) % (VOCAB - 3)
    assert not torch.equal(executed(model, ids, mask), executed(model, changed, mask))


@pytest.mark.parametrize("make", [static, learned])
def test_a_batch_is_its_sequences_one_by_one(make):
    model = make()
    ids, mask = ragged("left", (7, 4, 9, 1))
    together, kept = whole(model, ids, mask), executed(model, ids, mask)
    for row in range(4):
        real = mask[row].bool()
        one, known = ids[row : row + 1, real], mask[row : row + 1, real]
        close(together[row : row + 1, real], whole(model, one, known), known)
        assert torch.equal(executed(model, one, known)[:, 0], kept[:, row, real])


@pytest.mark.parametrize("make", [static, learned])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_generation_without(make, beams):
    model = make()
    ids, mask = ragged("left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    with_cache = model.generate(ids, use_cache=True, **options)
    with moeroute.routing_inputs(model, prompt_lengths=mask.sum(1)):
        assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))


def test_what_is_known_of_the_prompt_follows_the_cache():
    model = static()
    ids, mask = grown(*ragged("left"), 1)
    cache = new_cache(model, "dynamic")
    model(input_ids=ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
    rows = torch.tensor([2, 0, 0])
    cache.reorder_cache(rows)
    found = model(input_ids=ids[rows, 9:], attention_mask=mask[rows], past_key_values=cache).logits
    other = new_cache(model, "dynamic")
    model(input_ids=ids[rows, :9], attention_mask=mask[rows, :9], past_key_values=other)
    again = model(input_ids=ids[rows, 9:], attention_mask=mask[rows], past_key_values=other).logits
    close(found, again, torch.ones(3, 1))


def test_evaluation_is_the_same_every_time():
    model = learned()
    ids, mask = ragged("left")
    assert torch.equal(whole(model, ids, mask), whole(model, ids, mask))


def test_one_number_spares_the_first_and_the_last_layer():
    ids, mask = ragged("right", (10, 10))
    kept = executed(static(sparsity=0.5), ids, mask)
    assert kept.sum(2).tolist() == [[10, 10], [5, 5], [10, 10]]


@pytest.mark.parametrize("make", [static, learned])
def test_saved_and_loaded_it_is_the_same_and_unwrapped_the_base(make, tmp_path):
    model = make()
    ids, mask = ragged("left")
    expected = whole(model, ids, mask)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert torch.equal(whole(again, ids, mask), expected)
    base = moeroute.unwrap_model(model)
    assert torch.equal(whole(base, ids, mask), whole(tiny(), ids, mask))


def test_a_bfloat16_model_generates():
    model = learned().to(torch.bfloat16)
    ids, mask = ragged("left")
    assert model.generate(ids, attention_mask=mask, max_new_tokens=4).shape == (3, 13)


def test_assisted_generation_is_refused():
    model = static()
    ids, _ = ragged("left", (9,))
    with pytest.raises(ValueError, match="removed from a cache right after"):
        model.generate(ids, max_new_tokens=8, prompt_lookup_num_tokens=2, do_sample=False)


def test_a_cache_that_was_begun_otherwise():
    model = static()
    ids, mask = ragged("right", (6,))
    cache = new_cache(model, "dynamic")
    with moeroute.force_depth(model, [1] * LAYERS):
        model(input_ids=ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache)
    with pytest.raises(ValueError, match="Begin with a fresh cache"):
        model(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.5}, "sparsity=1.5 is outside"),
        ({"sparsity": (0.0, -0.1, 0.0)}, "sparsity=-0.1 is outside"),
        ({"router": "dynamic"}, "neither 'learned' nor 'static'"),
        ({"num_queries": 0}, "num_queries=0 is below 1"),
        ({"width": 0}, "width=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"guide_steps": -1}, "steps=-1"),
        ({"sparsity_loss_coef": -1.0}, "sparsity_loss_coef=-1.0 is below 0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=f"FTP: .*{message}"):
        FTP(**fields)


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ((0.0, 0.5), "has 2 numbers for a model of 3"),
        ((0.5, 0.5, 0.0), "leave out 0.5 of its tokens"),
    ],
)
def test_sparsities_of_another_model(sparsity, message):
    base = tiny()
    with pytest.raises(ValueError, match=message):
        moeroute.wrap_model(base, FTP(sparsity=sparsity))
    assert not any("depth_host" in name for name, _ in base.named_modules())


def test_lists_from_json_are_tuples():
    assert FTP(sparsity=[0.0, 0.5, 0.0]) == FTP(sparsity=(0.0, 0.5, 0.0))


@pytest.mark.parametrize("family", ["gptj", "gpt2"])
def test_an_attention_that_cannot_be_watched_is_refused(family):
    base = tiny(family)
    with pytest.raises(ValueError, match=r"transformer.h.0 .*cannot be watched"):
        moeroute.wrap_model(base, FTP())
    assert not any("depth_host" in name for name, _ in base.named_modules())
