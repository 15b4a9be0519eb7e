"""Duo-LLM in evaluation: what each token takes, what is computed for it, what a cache changes."""

import pytest
import torch
from integration.depth.depth_models import (
    LAYERS,
    SIZES,
    close,
    feed,
    grown,
    new_cache,
    ragged,
    tiny,
    whole,
)
from methods.duo_models import blocks, dense, duo, rows, widths_of
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode

import moeroute
from moeroute.depth import Width, force_widths
from moeroute.integration.depth.force_widths import width_layers
from moeroute.layers.width import WidthFeedForward, certain
from moeroute.methods import DuoLLM
from moeroute.routers.width_choice import hardest

pytestmark = pytest.mark.hf
FAMILIES = ["llama", "qwen3", "gemma2", "mistral"]
HIDDEN, BIG, SMALL = SIZES["hidden_size"], SIZES["intermediate_size"], 6


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_a_fresh_method_is_the_base_bit_for_bit(family):
    changes = {"resid_pdrop": 0.0} if family == "gpt2" else {}
    base, (ids, mask) = tiny(family, **changes), ragged("left")
    model = moeroute.wrap_model(tiny(family, **changes), DuoLLM(bypass=True)).eval()
    with torch.no_grad():
        assert torch.equal(whole(model, ids, mask), whole(base, ids, mask))
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), base.generate(ids, **options))
    again = moeroute.unwrap_model(model)
    with torch.no_grad():
        assert torch.equal(whole(again, ids, mask), whole(base, ids, mask))


def test_small_blocks_are_a_sixteenth_and_parameters_are_as_told():
    model = moeroute.wrap_model(tiny(intermediate_size=160), DuoLLM())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == LAYERS * HIDDEN * (2 + 3 * 160 // 16)
    narrow = moeroute.wrap_model(tiny(intermediate_size=8), DuoLLM())
    assert all(small.up_proj.out_features == 1 for _, small in blocks(narrow))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_big_is_the_base_whatever_was_learned(family):
    base, model = tiny(family), duo(family)
    ids, mask = ragged("left")
    with torch.no_grad():
        assert not torch.equal(whole(model, ids, mask), whole(base, ids, mask))
        with force_widths(model, [Width.BIG] * LAYERS):
            assert torch.equal(whole(model, ids, mask), whole(base, ids, mask))
            options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
            assert torch.equal(model.generate(ids, **options), base.generate(ids, **options))


def test_a_bypass_leaves_the_stream_unchanged():
    model, (ids, mask) = duo(), ragged("right")
    outputs: list[torch.Tensor] = []
    hosts = [layer.mlp for layer in model.get_base_model().model.layers]
    hooks = [h.register_forward_hook(lambda _, __, out: outputs.append(out)) for h in hosts]
    with torch.no_grad():
        chosen = widths_of(model, ids, mask)
    for hook in hooks:
        hook.remove()
    for widths, out in zip(chosen, outputs, strict=True):
        assert torch.count_nonzero(out[widths == Width.BYPASS]) == 0
    assert chosen.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_gathered_equals_dense_and_only_chosen_rows_are_computed(family):
    model, (ids, mask) = duo(family), ragged("left")
    with rows(model) as counts:
        chosen = widths_of(model, ids, mask)
    for count, widths in zip(counts, chosen, strict=True):
        assert count == [int((widths == w).sum()) for w in (Width.BIG, Width.SMALL)]
        assert sum(count) < ids.numel()
    with torch.no_grad():
        found = whole(model, ids, mask)
        hooks = dense(model, chosen)
        close(found, whole(model, ids, mask), mask)
    for hook in hooks:
        hook.remove()


def test_a_block_that_nobody_takes_is_not_called():
    model, (ids, mask) = duo(), ragged("left")
    route = [Width.SMALL, Width.BYPASS, Width.BIG]
    with rows(model) as counts, force_widths(model, route), torch.no_grad():
        whole(model, ids, mask)
    tokens = ids.numel()
    assert counts == [[0, tokens], [0, 0], [tokens, 0]]


def test_operations_are_those_of_the_formula():
    model, tokens = duo(), 24
    layer = width_layers(model)[0]
    big = blocks(model)[0][0]
    u = torch.randn(2, 12, HIDDEN)
    widths = torch.tensor([Width.BIG] * 9 + [Width.SMALL] * 11 + [Width.BYPASS] * 4)
    layer.forced = widths[torch.randperm(tokens)].reshape(2, 12)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(u, big)
    assert counter.get_total_flops() == 2 * 3 * HIDDEN * (9 * BIG + 11 * SMALL)
    layer.forced = None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer.router.score.weight.zero_()
        layer(u, big)
    assert counter.get_total_flops() == 2 * tokens * HIDDEN * (3 * BIG + 3)


def test_of_equal_logits_big_wins_then_small():
    logits = torch.tensor([[1.0, 1, 1], [2, 1, 2], [0, 1, 2], [2, 3, 3], [1, 0, -1], [0, 2, 1]])
    assert hardest(logits).tolist() == [1, 0, 2, 1, 0, 1]
    assert hardest(torch.zeros(2, 2)).tolist() == [1, 1]
    assert set(hardest(torch.full((2, 3), torch.nan)).tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_equals_whole_and_a_token_sees_no_later_one(family, cache, side):
    model = duo(family)
    ids, mask = ragged("left", (7, 4, 9)) if side == "left" else ragged("right", (9, 9, 9))
    ids, mask = grown(ids, mask, 5)
    with torch.no_grad():
        expected = whole(model, ids, mask)
        close(feed(model, ids, mask, (5, 9, 10, 12), new_cache(model, cache)), expected, mask)
        changed = ids.clone()
        changed[:, -1] = 3 + (changed[:, -1] + 1) % 50
        close(whole(model, changed, mask)[:, :-1], expected[:, :-1], mask[:, :-1])


def test_a_batch_is_its_sequences_one_by_one():
    model = duo()
    ids, mask = ragged("left", (7, 1, 9))
    with torch.no_grad():
        together = whole(model, ids, mask)
        chosen = widths_of(model, ids, mask)
        for row in range(3):
            real = mask[row].bool()
            own, ones = ids[row : row + 1, real], mask[row : row + 1, real]
            close(together[row : row + 1, real], whole(model, own, ones), ones)
            assert torch.equal(widths_of(model, own, ones)[:, 0], chosen[:, row, real])


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_a_cache_is_generation_without_and_again(beams):
    model, (ids, mask) = duo(), ragged("left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    found = model.generate(ids, use_cache=True, **options)
    assert torch.equal(found, model.generate(ids, use_cache=False, **options))
    assert torch.equal(found, model.generate(ids, use_cache=True, **options))
    routes = [[Width.BIG, Width.SMALL, Width.BIG], [Width.SMALL] * 3, [Width.BYPASS, 1, 0]]
    with force_widths(model, routes):
        forced = model.generate(ids, use_cache=True, **options)
        assert torch.equal(forced, model.generate(ids, use_cache=False, **options))
    for row, route in enumerate(routes):
        with force_widths(model, route):
            assert torch.equal(forced[row], model.generate(ids, **options)[row])


def test_saved_and_loaded_it_is_the_same_bit_for_bit(tmp_path):
    model, (ids, mask) = duo(), ragged("left")
    for layer in width_layers(model):
        layer.router.select.sharpness.steps_taken.fill_(7)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(whole(again, ids, mask), whole(model, ids, mask))
    steps = [int(layer.router.select.sharpness.steps_taken) for layer in width_layers(again)]
    assert steps == [7] * LAYERS


def test_bfloat16_models_keep_their_dtype_and_their_choices():
    ids, mask = ragged("left")
    model = moeroute.wrap_model(tiny().to(torch.bfloat16), DuoLLM(bypass=True)).eval()
    with torch.no_grad():
        expected = whole(tiny().to(torch.bfloat16), ids, mask)
        assert torch.equal(whole(model, ids, mask), expected)
        for layer in width_layers(model):
            layer.router.score.weight.normal_()
        found = whole(model, ids, mask)
    assert found.dtype == torch.bfloat16
    assert bool(found[mask.bool()].isfinite().all())
    assert len(widths_of(model, ids, mask).unique()) == 3


def test_what_was_executed_is_tracked_without_padding():
    model, (ids, mask) = duo(), ragged("left")
    chosen = widths_of(model, ids, mask)
    with moeroute.track_routing(model) as stats, torch.no_grad():
        whole(model, ids, mask)
    real = mask.bool()
    for layer, widths in zip(stats.layers, chosen, strict=True):
        expected = [int((widths[real] == width).sum()) for width in Width]
        assert layer.counts.tolist() == expected
        assert layer.tokens == int(real.sum())
        assert layer.expert_names == ("small", "big", "bypass")
    assert stats.to_dict()["layers"][0]["expert_names"] == ["small", "big", "bypass"]
    lines = [line.split() for line in str(stats.summary()).splitlines()]
    assert ["layer", "small", "big", "bypass"] in lines
    shares = [[f"{share:.0%}" for share in layer.load.tolist()] for layer in stats.layers]
    assert [line[1:] for line in lines if line[:1] in (["0"], ["1"], ["2"])] == shares
    mean = torch.stack([layer.load for layer in stats.layers]).mean(0)
    assert next(line[1:] for line in lines if line[:1] == ["all"]) == [f"{x:.0%}" for x in mean]
    route = [Width.BIG, Width.SMALL, Width.BYPASS]
    with moeroute.track_routing(model) as stats, torch.no_grad(), force_widths(model, route):
        whole(model, ids, mask)
    assert [layer.load.argmax().item() for layer in stats.layers] == [1, 0, 2]


def test_it_runs_compiled_with_breaks_between_blocks():
    model, (ids, mask) = duo(), ragged("left")
    with torch.no_grad():
        expected = whole(model, ids, mask)
        close(whole(torch.compile(model, backend="eager"), ids, mask), expected, mask)


def test_no_tokens_and_one():
    layer = WidthFeedForward(router=DuoLLM().router(4), small=torch.nn.Linear(4, 4)).eval()
    big = torch.nn.Linear(4, 4)
    assert layer(torch.zeros(2, 0, 4), big).shape == (2, 0, 4)
    one = torch.randn(1, 1, 4)
    assert torch.equal(layer(one, big), big(one))
    layer.forced = torch.tensor(Width.SMALL)
    torch.testing.assert_close(layer(one, big), layer.small(one))
    assert certain(torch.tensor([0, 1]), 2).router_logits.softmax(-1).tolist() == [[1, 0], [0, 1]]


def test_what_cannot_be():
    for name, value in (
        ("budget", 1.5),
        ("random_share", -0.1),
        ("small_intermediate_size", 0),
        ("distil_loss_coef", -1),
        ("sharpness_steps", -1),
        ("sharpness_start", 0.0),
    ):
        with pytest.raises(ValueError, match=f"DuoLLM: {name}={value}"):
            DuoLLM(**{name: value})
    with pytest.raises(ValueError, match="sharpness_end=0.5"):
        DuoLLM(sharpness_start=1.0, sharpness_end=0.5)
    with pytest.raises(ValueError, match="has no mlp site"):
        moeroute.wrap_model(torch.nn.Linear(3, 3), DuoLLM())
