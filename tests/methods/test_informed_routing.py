"""Informed routing: what its units do, with caches and neighbours; training is in its own file."""

import copy

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
from methods.unit_models import bias, children, dense, executed, units, watching, wrapped
from peft import PeftModel
from transformers import AutoModelForCausalLM, BloomConfig, OPTConfig

import moeroute
from moeroute.depth import flops_saved, train_only
from moeroute.integration.depth.units import UnitForward, unit_names
from moeroute.methods import InformedRouting

pytestmark = pytest.mark.hf
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "mixtral", "gpt_neox", "gpt2"]


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_executing_everything_is_the_base_bit_for_bit(family, side):
    base, model = tiny(family), bias(wrapped(family), 1e3)
    ids, mask = ragged(side)
    expected = whole(base, ids, mask)
    assert torch.equal(whole(model, ids, mask), expected)
    pieces = feed(model, ids, mask, (3, 5), new_cache(model, "dynamic"))
    assert torch.equal(pieces, feed(base, ids, mask, (3, 5), new_cache(base, "dynamic")))
    if side == "left":
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(ids, **options), base.generate(ids, **options))
    if family == "gpt2":  # drops out in training
        return
    model.train()
    assert torch.equal(whole(model, ids, mask), expected)  # as drawn: the bias outweighs the noise
    train_only(model, "forecasters")
    assert torch.equal(whole(bias(model, -1e3), ids, mask), expected)  # routers are not asked


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_gathered_is_dense(family, side):
    base, model = tiny(family), wrapped(family)
    ids, mask = ragged(side)
    with dense(base, model):
        close(whole(model, ids, mask), whole(base, ids, mask), mask)
    share = executed(model, ids, mask).double().mean()
    assert 0.1 < share < 0.9
    for execute in (1e3, -1e3):
        with dense(base, bias(model, execute)):
            close(whole(model, ids, mask), whole(base, ids, mask), mask)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mistral"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_equals_whole_and_a_token_sees_no_later_one(family, cache):
    model = wrapped(family)
    ids, mask = grown(*ragged("left"), 5)
    expected = whole(model, ids, mask)
    close(feed(model, ids, mask, (5, 9, 10, 12), new_cache(model, cache)), expected, mask)
    changed = ids.clone()
    changed[:, -1] = 3 + (changed[:, -1] + 1) % 50
    close(whole(model, changed, mask)[:, :-1], expected[:, :-1], mask[:, :-1])
    bias(model, -1e3)
    pieces = feed(model, ids, mask, (5, 9, 10, 12), new_cache(model, cache))
    close(pieces, whole(model, ids, mask), mask)


def test_right_padding_and_one_token_at_a_time():
    model = wrapped()
    ids, mask = ragged("right")
    pieces = feed(model, ids, mask, tuple(range(1, ids.shape[1])), new_cache(model, "dynamic"))
    close(pieces, whole(model, ids, mask), mask)
    one, alone = ids[:1, :1], mask[:1, :1]
    with dense(base := tiny(), model):
        close(whole(model, one, alone), whole(base, one, alone), alone)


def test_a_batch_is_its_sequences_one_by_one():
    model = wrapped()
    ids, mask = ragged("left")
    together, runs = whole(model, ids, mask), executed(model, ids, mask)
    for row in range(3):
        real = mask[row].bool()
        alone, own = ids[row : row + 1, real], mask[row : row + 1, real]
        close(together[row : row + 1, real], whole(model, alone, own), own)
        assert torch.equal(executed(model, alone, own)[:, 0], runs[:, row, real])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_generation_without(beams):
    model = wrapped()
    ids, mask = ragged("left")
    options = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "num_beams": beams,
    }
    with_cache = model.generate(ids, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))
    assert not torch.equal(with_cache, tiny().generate(ids, **options))


def test_evaluation_is_deterministic_and_draws_nothing():
    model = wrapped()
    ids, mask = ragged("left")
    state = torch.get_rng_state()
    assert torch.equal(whole(model, ids, mask), whole(model, ids, mask))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_foretold_and_silent_leaves_the_stream_alone():
    model = bias(wrapped(), -1e3)
    for unit in units(model):
        for parameter in unit.forecaster.parameters():
            parameter.zero_()
    ids, mask = ragged("left")
    states = model(
        input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    assert len(states) == LAYERS + 1
    for before, after in zip(states[:-2], states[1:-1], strict=True):  # the last one is normed
        assert torch.equal(before, after)


def test_a_foretold_unit_answers_with_the_forecast_and_is_not_run():
    model = bias(wrapped(), -1e3)
    ids, mask = ragged("left")
    inner = [
        module
        for layer in model.base_model.model.model.layers
        for module in (layer.self_attn.o_proj, layer.mlp.gate_proj)
    ]
    calls: list[int] = []
    hooks = [module.register_forward_hook(lambda *_: calls.append(1)) for module in inner]
    with watching(children(model)) as seen:
        whole(model, ids, mask)
    for unit, child in zip(units(model), children(model), strict=True):
        tokens, out = seen[child]
        torch.testing.assert_close(out, unit.forecaster(tokens), rtol=1e-6, atol=1e-6)
    feed(model, ids, mask, (5,), new_cache(model, "dynamic"))
    for hook in hooks:
        hook.remove()
    assert not calls


def test_only_executed_tokens_pass_the_unit():
    model = wrapped()
    ids, mask = ragged("left", (9,))
    rows = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
        for layer in model.base_model.model.model.layers
        for module in (layer.self_attn.o_proj, layer.mlp.gate_proj)
    ]
    whole(model, ids, mask)
    for hook in hooks:
        hook.remove()
    runs = executed(model, ids, mask).sum((1, 2)).tolist()
    assert rows == [count for count in runs if count]
    assert 0 < sum(rows) < 2 * LAYERS * 9


def test_fewer_units_are_fewer_operations():
    ids, mask = ragged("left", (9,))
    batch = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    model = wrapped(forecaster_width=4)
    some = flops_saved(model, [batch]).executed
    none = flops_saved(bias(model, -1e3), [batch]).executed
    everything = flops_saved(bias(model, 1e3), [batch])
    routers = 2 * LAYERS * 9 * 2 * (32 * 16 + 16 * 2)
    assert everything.executed == everything.base + routers
    head = 2 * 9 * 32 * 61
    assert none == head + routers + 2 * LAYERS * 9 * 2 * (2 * 32 * 4)  # forecasts alone
    assert none < some < everything.executed


def test_every_token_leaves_its_keys():
    model, base = bias(wrapped(), -1e3), tiny()
    ids, mask = ragged("left")
    cache, plain = new_cache(model, "dynamic"), new_cache(base, "dynamic")
    feed(model, ids, mask, (), cache)
    feed(base, ids, mask, (), plain)
    assert cache.get_seq_length() == ids.shape[1]
    assert all(slot.keys.shape == plain.layers[0].keys.shape for slot in cache.layers)
    torch.testing.assert_close(cache.layers[0].keys, plain.layers[0].keys)


def test_track_routing_counts_units_and_a_unit_is_half_a_layer(tmp_path):
    model = wrapped()
    ids, mask = ragged("left")
    runs = executed(model, ids, mask)
    with moeroute.track_routing(model) as stats:
        whole(model, ids, mask)
    real = mask.bool()
    shares = [unit[real].double().mean().item() for unit in runs]
    assert [layer.executions for layer in stats.layers] == pytest.approx(shares)
    names = [f"model.layers.{n}.{unit}" for n in range(LAYERS) for unit in ("self_attn", "mlp")]
    assert [layer.name for layer in stats.layers] == names
    assert [layer.tokens for layer in stats.layers] == [int(real.sum())] * 2 * LAYERS
    assert stats.layers_executed == pytest.approx(sum(shares) / 2)
    table = str(stats.summary())
    assert f"{sum(shares) / 2:.2f}" in table
    assert f"{LAYERS} without routing; a unit is" in table
    stats.plot(tmp_path / "units.png")
    with moeroute.track_routing(bias(model, 1e3)) as stats:
        whole(model, ids, mask)
    assert stats.layers_executed == LAYERS


def test_saved_loaded_copied_unwrapped(tmp_path):
    model = wrapped()
    ids, mask = ragged("left")
    expected = whole(model, ids, mask)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert torch.equal(whole(again, ids, mask), expected)
    other = copy.deepcopy(model)
    bias(model, 1e3)
    assert torch.equal(whole(other, ids, mask), expected)
    base = moeroute.unwrap_model(model)
    assert torch.equal(whole(base, ids, mask), whole(tiny(), ids, mask))
    assert not [m for m in base.modules() if isinstance(m.__dict__.get("forward"), UnitForward)]
    assert base.state_dict().keys() == tiny().state_dict().keys()


def test_no_adapter_another_adapter_and_forced_depth():
    model, base = wrapped(), tiny()
    ids, mask = ragged("left")
    expected, plain = whole(model, ids, mask), whole(base, ids, mask)
    with model.disable_adapter():
        assert torch.equal(whole(model, ids, mask), plain)
    with moeroute.force_depth(model, [1, 0, 2]), moeroute.force_depth(base, [1, 0, 2]):
        assert torch.equal(whole(model, ids, mask), whole(base, ids, mask))
    moeroute.wrap_model(model, InformedRouting(), adapter_name="second")
    model.set_adapter("second")
    second = whole(model, ids, mask)
    assert not torch.equal(second, expected)
    model.set_adapter("default")
    assert torch.equal(whole(model, ids, mask), expected)
    cache = new_cache(model, "dynamic")
    with moeroute.force_depth(model, [1, 0, 2]):
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    longer, mask = grown(ids, mask, 1)
    with pytest.raises(ValueError, match=r"executions \[1, 1, 1\] of this layer, which hold"):
        model(input_ids=longer[:, -1:], attention_mask=mask, past_key_values=cache)


def test_two_generations_do_not_meet():
    model = wrapped()
    ids, mask = grown(*ragged("left"), 4)
    expected = whole(model, ids, mask)
    ends = [(0, 9), (9, 10), (10, 13)]
    caches = [new_cache(model, "dynamic") for _ in range(2)]
    parts: list[list[torch.Tensor]] = [[], []]
    for begin, end in ends:
        for mine, cache in zip(parts, caches, strict=True):
            out = model(
                input_ids=ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache
            )
            mine.append(out.logits)
    for mine in parts:
        close(torch.cat(mine, 1), expected, mask)


def test_a_model_in_bfloat16():
    base = tiny().bfloat16()
    model = moeroute.wrap_model(tiny().bfloat16(), InformedRouting()).eval()
    ids, mask = ragged("left")
    out = whole(model, ids, mask)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    assert all(parameter.dtype == torch.float32 for parameter in units(model)[0].parameters())
    assert torch.equal(whole(bias(model, 1e3), ids, mask), whole(base, ids, mask))
    model.train()
    assert torch.equal(whole(model, ids, mask), whole(base, ids, mask))


def test_parameters_as_the_paper_counts_them():
    model = moeroute.wrap_model(tiny(), InformedRouting())
    unit, width = units(model)[0], 16  # 32 // 4 - 200 is below it
    forecaster = sum(p.numel() for p in unit.forecaster.parameters())
    assert forecaster == 2 * 32 * 100 + 100 + 32
    assert sum(p.numel() for p in unit.router.parameters()) == 32 * width + 3 * width + 2
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * LAYERS * ((width + 2 * 100 + 1) * 32 + 3 * width + 102)
    assert unit.forecaster.down.weight.std().item() == pytest.approx(1e-3, rel=0.1)
    bound = (6 / 32) ** 0.5
    assert unit.router.down.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
    assert not any(linear.bias.any() for linear in (unit.router.down, unit.router.up))


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(
            vocab_size=9, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2,
            word_embed_proj_dim=8,
        ),
        BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2),
    ],
    ids=["no module for its feed-forward", "residual inside its units"],
)  # fmt: skip
def test_a_layer_without_two_units_is_named_before_anything_is_touched(config):
    model = AutoModelForCausalLM.from_config(config)
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=r"InformedRouting: \S+\.0 \(\w+\) has no two units"):
        moeroute.wrap_model(model, InformedRouting())
    assert set(model.state_dict()) == before
    layer = next(m for m in model.modules() if type(m).__name__.endswith(("DecoderLayer", "Block")))
    assert not unit_names(layer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.5}, r"InformedRouting: sparsity=1.5 is outside \[0, 1\]"),
        ({"forecaster_width": 0}, "InformedRouting: forecaster_width=0 is below 1"),
        ({"router_width": 0}, "InformedRouting: router_width=0 is below 1"),
        ({"change_loss_coef": -1.0}, "InformedRouting: change_loss_coef=-1.0 is below 0"),
        ({"end_temperature": 0.0}, "InformedRouting: end_temperature=0.0 is below 1e-06"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        InformedRouting(**fields)
