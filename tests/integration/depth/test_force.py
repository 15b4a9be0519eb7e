"""`force_depth`: all-run is the base, a cache changes nothing, sequences stay by themselves."""

import copy
import itertools
from typing import Any

import pytest
import torch
from integration.depth.depth_models import (
    FAMILIES,
    LAYERS,
    close,
    feed,
    grown,
    new_cache,
    ragged,
    tiny,
    whole,
)

import moeroute

pytestmark = pytest.mark.hf
PATTERNS = list(itertools.product((0, 1, 2), repeat=LAYERS))
MIXED = [[0, 1, 2], [1, 1, 0], [2, 0, 1]]
TELLING = [(0, 1, 1), (1, 1, 0), (0, 0, 0), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 0, 3), MIXED]


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def models():
    made: dict[Any, Any] = {}

    def get(family: str = "llama", attention: str = "sdpa") -> Any:
        key = family, attention
        made.setdefault(key, tiny(*key) if key not in made else None)
        return made[key]

    return get


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_run_is_the_base_bit_for_bit(models, family: str, attention: str) -> None:
    model = models(family, attention)
    ids, mask = ragged("left")
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected, text = whole(model, ids, mask), model.generate(ids, **options)
    with moeroute.force_depth(model, [1] * LAYERS):
        assert torch.equal(whole(model, ids, mask), expected)
        found = model.generate(ids, **options)
    assert torch.equal(found.sequences, text.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(text.logits))


@pytest.mark.parametrize("cache", ["dynamic", "plain", "static"])
@pytest.mark.parametrize("actions", PATTERNS, ids=str)
def test_cached_equals_uncached_for_every_pattern(models, actions: Any, cache: str) -> None:
    model = models()
    ids, mask = grown(*ragged("left"), 5)
    with moeroute.force_depth(model, actions):
        found = feed(model, ids, mask, (9, 10, 12, 13), new_cache(model, cache))
        close(found, whole(model, ids, mask), mask)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_uncached_in_every_family(models, family: str, cache: str, side: str) -> None:
    model = models(family)
    ids, mask = grown(*ragged(side), 5)
    for actions in TELLING:
        with moeroute.force_depth(model, actions):
            chunked = feed(model, ids, mask, (4, 9, 10, 12, 13), new_cache(model, cache))
            close(chunked, whole(model, ids, mask), mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_agrees_with_itself(models, family: str) -> None:
    model = models(family, "eager")
    ids, mask = grown(*ragged("left"), 3)
    for actions in TELLING:
        with moeroute.force_depth(model, actions):
            found = feed(model, ids, mask, (9, 10, 11), new_cache(model, "dynamic"))
            close(found, whole(model, ids, mask), mask)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_batch_is_its_sequences_one_by_one(models, family: str, side: str) -> None:
    model = models(family)
    ids, mask = ragged(side)
    if side == "left":  # padding inside a text would count for a sliding window, in the base too
        ids, mask = grown(ids, mask, 4)
    with moeroute.force_depth(model, MIXED):
        together = feed(model, ids, mask, (4, 8), new_cache(model, "dynamic"))
    for row, actions in enumerate(MIXED):
        real = mask[row].bool()
        alone, ones = ids[row : row + 1, real], mask[row : row + 1, real]
        with moeroute.force_depth(model, actions):
            expected = whole(model, alone, ones)
        close(together[row : row + 1, real], expected, ones)


def test_actions_mean_skip_run_and_repeat(models) -> None:
    model = models()
    layers, calls = model.model.layers, []
    hooks = [
        layer.self_attn.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, layer in enumerate(layers)
    ]
    ids, mask = ragged("left", (6,))
    with moeroute.force_depth(model, [2, 0, 1]):
        out = model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert calls == [0, 0, 2]
    assert len(out.hidden_states) == LAYERS + 1
    assert torch.equal(out.hidden_states[1], out.hidden_states[2])


def test_skipped_sequences_are_not_computed(models) -> None:
    model = models()
    rows: list[int] = []
    hook = model.model.layers[1].mlp.register_forward_pre_hook(
        lambda _, args: rows.append(args[0].shape[0])
    )
    ids, mask = ragged("left")
    with moeroute.force_depth(model, [[1, 0, 1], [1, 2, 1], [1, 1, 1]]):
        whole(model, ids, mask)
    hook.remove()
    assert rows == [2, 1]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("actions", [(0, 2, 1), (0, 0, 0), MIXED], ids=str)
def test_beam_search_equals_the_same_without_a_cache(models, family: str, actions: Any) -> None:
    model = models(family)
    ids, mask = ragged("left")
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "num_beams": 3}
    with moeroute.force_depth(model, actions):
        found = model.generate(ids, use_cache=True, **options)
        expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reordered_rows_take_their_decisions_along(models, family: str, kind: str) -> None:
    model = models(family)
    ids, mask = grown(*ragged("left"), 4)
    order = torch.tensor([2, 0, 0])
    with moeroute.force_depth(model, MIXED):
        cache = new_cache(model, kind)
        feed(model, ids[:, :9], mask[:, :9], (), cache)
    cache.reorder_cache(order)
    ids, mask = ids[order], mask[order]
    with moeroute.force_depth(model, [MIXED[row] for row in order]):
        out = model(
            input_ids=ids[:, 9:],
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1)[:, 9:],
            past_key_values=cache,
        )
        close(out.logits, whole(model, ids, mask)[:, 9:], mask[:, 9:])


def test_rows_can_be_selected_and_repeated(models) -> None:
    model = models()
    ids, mask = grown(*ragged("left"), 2)
    with moeroute.force_depth(model, MIXED):
        cache = new_cache(model, "dynamic")
        feed(model, ids[:, :9], mask[:, :9], (), cache)
        copied = copy.deepcopy(cache)
    cache.batch_select_indices(torch.tensor([0, 2]))
    copied.batch_repeat_interleave(2)
    for kept, rows in ((cache, [0, 2]), (copied, [0, 0, 1, 1, 2, 2])):
        with moeroute.force_depth(model, [MIXED[row] for row in rows]):
            found = feed_on(model, ids[rows], mask[rows], kept)
            close(found, whole(model, ids[rows], mask[rows])[:, 9:], mask[rows][:, 9:])


@pytest.mark.parametrize("actions", [(0, 2, 1), (0, 0, 0), MIXED], ids=str)
def test_a_cropped_cache_goes_on(models, actions: Any) -> None:
    model = models()
    ids, mask = grown(*ragged("left"), 4)
    with moeroute.force_depth(model, actions):
        cache = new_cache(model, "dynamic")
        feed(model, ids, mask, (9,), cache)
        cache.crop(-4)
        close(feed_on(model, ids, mask, cache), whole(model, ids, mask)[:, 9:], mask[:, 9:])


def test_a_reset_cache_is_as_new(models) -> None:
    model = models()
    ids, mask = ragged("left")
    for kind in ("dynamic", "static"):
        cache = new_cache(model, kind)
        for actions in (MIXED, (0, 1, 0), (1, 2, 1)):
            with moeroute.force_depth(model, actions):
                close(feed(model, ids, mask, (5,), cache), whole(model, ids, mask), mask)
            cache.reset()


def test_static_generation_runs_twice_and_equals_dynamic(models) -> None:
    model = tiny()
    ids, mask = ragged("left")
    for actions in (MIXED, (2, 0, 1), (1, 1, 1)):
        with moeroute.force_depth(model, actions):
            options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
            dynamic = model.generate(ids, **options)
            static = model.generate(ids, cache_implementation="static", **options)
        assert torch.equal(dynamic, static)


def test_assisted_generation_is_right_where_actions_are_fixed(models) -> None:
    model = models()
    ids, mask = ragged("left", (7,))
    with moeroute.force_depth(model, [0, 2, 1]):
        plain = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        drafted = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            prompt_lookup_num_tokens=2,
        )
    assert torch.equal(plain, drafted)


def feed_on(model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits of what follows the first nine tokens, which are in the cache."""
    return model(
        input_ids=ids[:, 9:],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1)[:, 9:],
        past_key_values=cache,
    ).logits
