"""Early exit: where it leaves, what it learns, and that it is the base until then."""

import copy
import math
from typing import Any

import pytest
import torch
from integration.depth.depth_models import (
    SIZES,
    close,
    feed,
    grown,
    new_cache,
    ragged,
    tiny,
    whole,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, CohereConfig

import moeroute
from moeroute.depth import exit_at
from moeroute.layers.early_exit import EarlyExitLayer, ExitTransform
from moeroute.layers.exit_schedule import ExitSchedule
from moeroute.losses.early_exit import ExitLoss, exit_scales, exit_weights
from moeroute.methods import EarlyExit

pytestmark = pytest.mark.hf
L, H = 5, SIZES["hidden_size"]
KINDS = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
EVERY: dict[str, Any] = {"every": 1}


def base(family: str = "llama", **changes: Any) -> Any:
    """Five layers, so that three exits learn."""
    if "gemma" in family:
        changes["layer_types"] = KINDS
    return tiny(family, num_hidden_layers=L, **changes)


def sites(model: Any) -> list[EarlyExitLayer]:
    return [module for module in model.modules() if isinstance(module, EarlyExitLayer)]


def wrapped(family: str = "llama", **fields: Any) -> Any:
    """A model whose exits have learned something."""
    model = moeroute.wrap_model(base(family), EarlyExit(**fields)).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ExitTransform):
                module.up.normal_(std=0.1)
    return model


def read_out(model: Any, states: torch.Tensor) -> torch.Tensor:
    return model.lm_head(model.model.norm(states))


def middle(values: torch.Tensor) -> float:
    return values.flatten().median().item()


def confidence(model: Any, ids: torch.Tensor, mask: torch.Tensor, layers: int) -> torch.Tensor:
    """(B, S) highest probability after so many layers of a plain model."""
    with moeroute.force_depth(model, [1] * layers + [0] * (L - layers)), torch.no_grad():
        return whole(model, ids, mask).softmax(-1).amax(-1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize("fields", [{}, {"exit_layer": L}, {"threshold": 1.5}], ids=str)
def test_without_an_exit_it_is_the_base_bit_for_bit(family, fields, tmp_path):
    plain, (ids, mask) = base(family), ragged("left")
    model = wrapped(family, **fields)
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    expected, text = whole(plain, ids, mask), plain.generate(ids, **options)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(family), tmp_path).eval()
    for found in (model, copy.deepcopy(model), again):
        assert torch.equal(whole(found, ids, mask), expected)
        assert torch.equal(found.generate(ids, **options), text)
    names = list(dict(plain.named_modules()))
    bare = moeroute.unwrap_model(model)
    assert torch.equal(whole(bare, ids, mask), expected)
    assert list(dict(bare.named_modules())) == names
    assert not bare._forward_pre_hooks


@pytest.mark.parametrize("exit_layer", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox", "gpt2"])
def test_an_exit_is_the_head_on_the_states_of_the_layer(family, exit_layer):
    if family in ("gpt_neox", "gpt2"):
        plain = tiny(family, **{"num_hidden_layers" if family != "gpt2" else "n_layer": L})
    else:
        plain = base(family)
    ids, mask = ragged("left")
    with moeroute.force_depth(plain, [1] * exit_layer + [0] * (L - exit_layer)), torch.no_grad():
        expected = whole(plain, ids, mask)
    model = moeroute.wrap_model(plain, EarlyExit(exit_layer=exit_layer)).eval()
    with torch.no_grad():
        assert torch.equal(whole(model, ids, mask), expected)


def test_states_leave_through_their_transform():
    plain, (ids, mask) = base(), ragged("left")
    model = wrapped(exit_layer=3)
    with torch.no_grad():
        states = plain.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
        ).hidden_states[3]
        lens = sites(model)[3].transform
        expected = states + states @ lens.down.T @ lens.up.T
        close(whole(model, ids, mask), read_out(plain, expected), mask)
        assert not torch.equal(expected, states)


@pytest.mark.parametrize("fields", [{"exit_layer": 3}, {"exit_layer": 1}, {"threshold": 0.0}])
def test_layers_after_an_exit_are_not_computed_and_keep_nothing(fields):
    model, (ids, mask) = wrapped(**fields), ragged("left")
    runs = fields.get("exit_layer", 1)
    calls, layers = [], model.get_base_model().model.layers
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, layer in enumerate(layers)
    ]
    cache = new_cache(model, "dynamic")
    with torch.no_grad(), moeroute.track_routing(model) as stats:
        feed(model, ids, mask, (5,), cache)
    for hook in hooks:
        hook.remove()
    assert calls == [*range(runs)] * 2
    assert [layer.executions for layer in stats.layers] == [1.0] * runs + [0.0] * (L - runs)
    lengths = [slot.get_seq_length() for slot in cache.layers]
    assert lengths == [ids.shape[1]] * L
    if "exit_layer" in fields:  # one zero a token stands for its length
        assert {slot.keys.numel() for slot in cache.layers[runs:]} == {ids.shape[1]}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_equals_whole(family, cache, side):
    ids, mask = grown(*ragged(side), 5)
    bar = middle(confidence(base(family), ids, mask, 2))
    for fields in ({"exit_layer": 2}, {"threshold": bar}, {"threshold": bar, "exit_layer": 4}):
        model = wrapped(family, **fields)
        with torch.no_grad():
            found = feed(model, ids, mask, (5, 9, 10, 12), new_cache(model, cache))
            close(found, whole(model, ids, mask), mask)


def dense(model: Any, ids: torch.Tensor, threshold: float, first: int) -> torch.Tensor:
    """Confidence exits on one unpadded sequence, every layer run on everything."""
    plain, tokens = base(), ids.shape[1]
    states = plain.model.embed_tokens(ids)
    positions = torch.arange(tokens)[None]
    angles = plain.model.rotary_emb(states, position_ids=positions)
    mask = torch.full((tokens, tokens), -torch.inf).triu(1)[None, None]
    stopped = torch.zeros(1, tokens, dtype=torch.bool)
    for place, (layer, site) in enumerate(zip(plain.model.layers, sites(model), strict=True)):
        left = states if site.transform is None else site.transform(states)
        if place >= first:
            sure = read_out(plain, left).softmax(-1).amax(-1) >= threshold
            states = torch.where((sure & ~stopped)[..., None], left, states)
            stopped |= sure
        ran = layer(states, attention_mask=mask, position_embeddings=angles)
        states = torch.where(stopped[..., None], states, ran)
    return read_out(plain, states)


@pytest.mark.parametrize("first", [1, 3])
def test_tokens_stop_when_they_are_sure_as_a_dense_reference_says(first):
    ids, mask = ragged("left", (9,))
    surest = torch.stack([confidence(base(), ids, mask, layers) for layers in range(first, L)])
    bar = middle(surest.amax(0))
    model = wrapped(threshold=bar, first_exit=first)
    rows: list[int] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
        for layer in model.get_base_model().model.layers
    ]
    with torch.no_grad(), moeroute.track_routing(model) as stats:
        close(whole(model, ids, mask), dense(model, ids, bar, first), mask)
    for hook in hooks:
        hook.remove()
    runs = [layer.executions for layer in stats.layers]
    assert runs[:first] == [1.0] * first
    assert runs == sorted(runs, reverse=True)
    assert 0 < runs[-1] < 1
    assert rows == [round(9 * run) for run in runs]


def test_less_confidence_never_runs_more():
    model, (ids, mask) = wrapped(), ragged("left")
    spent = []
    for bar in (0.0, 0.2, 0.5, 0.9, 1.5):
        with exit_at(model, threshold=bar), moeroute.track_routing(model) as stats:
            whole(model, ids, mask)
        spent.append(stats.layers_executed)
    assert spent == sorted(spent)
    assert (spent[0], spent[-1]) == (1.0, float(L))


@pytest.mark.parametrize("fields", [{"exit_layer": 3}, {"threshold": 0.5}])
def test_a_batch_is_its_sequences_and_a_token_sees_no_later_one(fields):
    model, (ids, mask) = wrapped(**fields), ragged("left")
    with torch.no_grad():
        together = whole(model, ids, mask)
        assert torch.equal(whole(model, ids, mask), together)
        for row in range(3):
            real = mask[row].bool()
            one = whole(model, ids[row : row + 1, real], mask[row : row + 1, real])
            close(together[row : row + 1, real], one, mask[row : row + 1, real])
        changed = ids.clone()
        changed[:, -1] = 3 + (changed[:, -1] + 1) % 50
        close(whole(model, changed, mask)[:, :-1], together[:, :-1], mask[:, :-1])
        close(whole(model, ids[:, -1:], mask[:, -1:]), dense_one(model, ids), mask[:, -1:])


def dense_one(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """T = 1 without a neighbour."""
    ones = torch.ones_like(ids[:1, -1:])
    return torch.cat([whole(model, ids[row : row + 1, -1:], ones) for row in range(3)])


@pytest.mark.parametrize("fields", [{"exit_layer": 3}, {"threshold": 0.5}])
def test_generation_and_beams_with_a_cache_are_those_without(fields):
    model, (ids, mask) = wrapped(**fields), ragged("left")
    for beams in (1, 3):
        options = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": beams}
        found = model.generate(ids, use_cache=True, do_sample=False, **options)
        expected = model.generate(ids, use_cache=False, do_sample=False, **options)
        assert torch.equal(found, expected)


def test_an_exit_can_be_chosen_for_a_block_of_calls():
    model, (ids, mask) = wrapped(), ragged("left")
    with torch.no_grad():
        before = whole(model, ids, mask)
        for exit_layer in range(1, L + 1):
            with exit_at(model, exit_layer):
                assert torch.equal(
                    whole(model, ids, mask), whole(wrapped(exit_layer=exit_layer), ids, mask)
                )
        assert torch.equal(whole(model, ids, mask), before)
        cache = new_cache(model, "dynamic")
        with exit_at(model, 3):
            feed(model, ids, mask, (), cache)
        with pytest.raises(ValueError, match="filled with executions"):
            feed(model, *grown(ids, mask, 1), (), cache)
    for wrong, message in ((0, r"outside 1\.\.5"), (6, r"outside 1\.\.5")):
        with pytest.raises(ValueError, match=message), exit_at(model, wrong):
            pass
    with pytest.raises(ValueError, match="has no exits"), exit_at(base(), 2):
        pass


def test_weights_and_rates_by_hand():
    assert exit_scales(4, 1.0) == [0.0, 1.0, 3.0, 3.0 + 3.0]
    assert exit_scales(4, 0.5) == [0.0, 0.5, 1.5, 3.0 + 1.5]
    weights = exit_weights(4, 1.0, [2, 3])
    assert weights == {2: 0.1, 3: 0.3}  # the model's own loss keeps 0.6
    assert exit_weights(4, 1.0, []) == {}
    rates = [ExitSchedule(num_layers=5, layer_dropout=0.2).dropout(n, 0) for n in range(5)]
    expected = [0.2 * (math.exp(n * math.log(2) / 4) - 1) for n in range(5)]
    assert rates == pytest.approx(expected)
    assert (rates[0], rates[-1]) == (0.0, pytest.approx(0.2))
    rising = ExitSchedule(num_layers=5, layer_dropout=0.2, dropout_steps=11)
    found = [rising.dropout(4, step) for step in (0, 5, 10, 99)]
    assert found == pytest.approx([0.0, 0.2 * (math.sqrt(2) - 1), 0.2, 0.2])


def test_exits_take_turns_and_join_one_by_one():
    turns = ExitSchedule(num_layers=8, every=3)
    assert [turns.exits(step) for step in range(4)] == [[2, 5], [3, 6], [4, 7], [2, 5]]
    alone = ExitSchedule(num_layers=4, every=8)
    assert [alone.exits(step) for step in range(3)] == [[2], [3], [2]]
    joining = ExitSchedule(num_layers=5, gradual_steps=20)
    assert [joining.exits(step) for step in (0, 1, 2, 4, 20)] == [
        [4],
        [4],
        [3, 4],
        [2, 3, 4],
        [2, 3, 4],
    ]
    assert ExitSchedule(num_layers=2).exits(0) == []
    assert ExitSchedule(num_layers=5, loss_scale=0.0).exits(0) == []


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("items", [None, 7])
def test_the_loss_is_the_papers_sum_and_padding_is_no_part_of_it(family, items):
    plain, model = base(family), wrapped(family, **EVERY).train()
    ids, mask = ragged("right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :3] = -100
    extra = {} if items is None else {"num_items_in_batch": items}
    out = model(input_ids=ids, attention_mask=mask, labels=labels, **extra)
    parts = moeroute.aux_losses(model).parts
    cap = getattr(plain.config, "final_logit_softcapping", None)

    def loss_of(logits: torch.Tensor) -> torch.Tensor:
        if items is None:
            return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (
            cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            / items
        )

    with torch.no_grad():
        states = plain.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        losses = {}
        for e in (2, 3, 4):
            logits = read_out(plain, sites(model)[e].transform(states.hidden_states[e]))
            losses[e] = loss_of(logits if cap is None else cap * (logits / cap).tanh())
        final = loss_of(plain(input_ids=ids, attention_mask=mask).logits)
    weights = exit_weights(L, 0.2, [2, 3, 4])
    own = 1 - sum(weights.values())
    assert own == pytest.approx((4 + 0.2 * 6) / (4 + 0.2 * 16))
    expected = own * final + sum(weights[e] * losses[e] for e in losses)
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-5)
    if items is None:
        found = [value.item() for value in parts.values()]
        assert found == pytest.approx([loss.item() for loss in losses.values()], rel=1e-5)
    poisoned = ids.masked_fill(mask == 0, 5)
    again = model(input_ids=poisoned, attention_mask=mask, labels=labels, **extra)
    torch.testing.assert_close(again.loss, out.loss)


def test_padding_with_labels_teaches_no_exit():
    model, (ids, mask) = wrapped(**EVERY).train(), ragged("left")
    model(input_ids=ids, attention_mask=mask, labels=ids)
    named = moeroute.aux_losses(model).parts
    model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    assert named == moeroute.aux_losses(model).parts


def test_exits_learn_and_nothing_else():
    model, (ids, mask) = wrapped(**EVERY).train(), ragged("left")
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("depth_host" in name)
        assert (parameter.grad is not None) == ("depth_host" in name)
        if parameter.grad is not None:
            assert parameter.grad.abs().sum() > 0
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * 2 * 8 * H


def test_in_turn_every_exit_learns_and_only_its_logits_are_made():
    model, (ids, mask) = wrapped().train(), ragged("left")
    heads = []
    hook = model.get_base_model().lm_head.register_forward_hook(lambda *_: heads.append(1))
    for step in range(4):
        model(input_ids=ids, attention_mask=mask, labels=ids)
        losses = [loss for layer in sites(model) for loss in records_of(layer)]
        assert [loss.exit_layer for loss in losses] == [2 + step % 3]
    hook.remove()
    assert len(heads) == 4 * 2
    assert sites(model)[0].clock.steps.item() == 4


def records_of(layer: EarlyExitLayer) -> tuple[Any, ...]:
    record = layer.routing_pass.records.get(layer.site)
    return () if record is None else record.losses


def test_the_step_is_saved_once(tmp_path):
    model, (ids, mask) = wrapped().train(), ragged("left")
    for _ in range(2):
        model(input_ids=ids, attention_mask=mask, labels=ids)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).train()
    assert sum("steps" in name for name in again.state_dict()) == 1
    again(input_ids=ids, attention_mask=mask, labels=ids)
    assert sites(again)[0].clock.now == 2
    assert records_of(sites(again)[4])
    twin = copy.deepcopy(again)
    twin(input_ids=ids, attention_mask=mask, labels=ids)
    assert (sites(again)[1]._clock[0].now, sites(twin)[1]._clock[0].now) == (2, 3)


def test_the_loss_at_early_exits_falls():
    model = moeroute.wrap_model(base(), EarlyExit(**EVERY)).train()
    torch.manual_seed(0)
    ids = torch.randint(3, 61, (8, 12))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        history.append([part.item() for part in moeroute.aux_losses(model).parts.values()])
        optimizer.step()
    for before, after in zip(history[0], history[-1], strict=True):
        assert after < 0.6 * before


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointed in (False, True):
        model = wrapped(layer_dropout=0.5, **EVERY).train()
        if checkpointed:
            inner = model.get_base_model()
            newer = getattr(inner, "activation_checkpointing_enable", None)  # transformers 5.23
            (newer or inner.gradient_checkpointing_enable)({"use_reentrant": False})
        model.get_base_model().requires_grad_(True)
        torch.manual_seed(8)
        ids, mask = ragged("left")
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_layers_are_dropped_by_sequence_in_training_alone():
    model = wrapped(layer_dropout=0.4, loss_scale=0.0, exit_rank=0).train()
    ids = torch.randint(3, 61, (200, 3))
    with torch.no_grad(), moeroute.track_routing(model) as stats:
        model(input_ids=ids)
    kept = [layer.executions for layer in stats.layers]
    rates = [0.4 * (2 ** (layer / 4) - 1) for layer in range(L)]
    assert kept[0] == 1.0
    assert kept == pytest.approx([1 - rate for rate in rates], abs=0.1)
    shares = [set(record.routing.selected_experts.flatten().tolist()) for record in last(model)]
    assert shares[-1] == {0, 1}
    by_sequence = last(model)[-1].routing.selected_experts.reshape(200, 3)
    assert bool((by_sequence == by_sequence[:, :1]).all())
    with torch.no_grad(), moeroute.track_routing(model.eval()) as stats:
        model(input_ids=ids[:4])
    assert [layer.executions for layer in stats.layers] == [1.0] * L


def last(model: Any) -> list[Any]:
    return list(sites(model)[0].routing_pass.records.values())


def test_the_papers_recipe_gives_an_ordinary_checkpoint(tmp_path):
    method = EarlyExit(layer_dropout=0.2, exit_rank=0, loss_scale=1.0, **EVERY)
    model = moeroute.wrap_model(base(), method).train()
    assert not [name for name, p in model.named_parameters() if "depth_host" in name]
    model.get_base_model().requires_grad_(True)
    torch.manual_seed(0)
    ids = torch.randint(3, 61, (8, 12))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        history.append([part.item() for part in moeroute.aux_losses(model).parts.values()])
        optimizer.step()
    assert all(after < 0.5 * before for before, after in zip(history[0], history[-1], strict=True))
    tuned = moeroute.unwrap_model(model.eval())
    tuned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(base())
    assert list(again.state_dict()) == list(base().state_dict())
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, tuned(input_ids=ids).logits)
        assert not torch.equal(again(input_ids=ids).logits, base()(input_ids=ids).logits)
    prompt = ids[:1, :5]
    options = {"max_new_tokens": 12, "do_sample": False}
    plain = again.generate(prompt, **options)
    assert torch.equal(again.generate(prompt, assistant_early_exit=3, **options), plain)


def test_bfloat16_and_a_frozen_float32_transform():
    model = moeroute.wrap_model(base().to(torch.bfloat16), EarlyExit(**EVERY))
    ids, mask = ragged("left")
    assert sites(model)[2].transform.down.dtype == torch.float32
    loss = model.train()(input_ids=ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    assert sites(model)[2].transform.up.grad.isfinite().all()
    model.eval()
    for choice in ({"exit_layer": 3}, {"threshold": 0.5}):
        with torch.no_grad(), exit_at(model, **choice):
            assert whole(model, ids, mask).dtype == torch.bfloat16


def test_training_without_labels_is_not_forgotten_without_a_word():
    model, (ids, mask) = wrapped().train(), ragged("left")
    with pytest.warns(UserWarning, match="early exits learn from labels"):
        model(input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exit_layer": 0}, "exit_layer=0 is below 1"),
        ({"threshold": -0.1}, "threshold=-0.1 is below 0"),
        ({"first_exit": 0}, "first_exit=0 is below 1"),
        ({"every": 0}, "every=0 is below 1"),
        ({"exit_rank": -1}, "exit_rank=-1 is below 0"),
        ({"layer_dropout": 1.5}, r"layer_dropout=1.5 is outside \[0, 1\]"),
        ({"loss_scale": -1.0}, r"loss_scale=-1.0 is outside \[0, 1\]"),
    ],
)
def test_bad_numbers(fields, message):
    with pytest.raises(ValueError, match=message):
        EarlyExit(**fields)


def test_models_that_cannot_be_left():
    plain = base()
    with pytest.raises(ValueError, match=r"exit_layer=6 is outside 1\.\.5"):
        moeroute.wrap_model(plain, EarlyExit(exit_layer=6))
    with pytest.raises(ValueError, match=r"the targets are layers \[1, 2\] of 5"):
        moeroute.wrap_model(plain, EarlyExit(), target_modules=["layers.1", "layers.2"])
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        moeroute.wrap_model(plain.model, EarlyExit())
    with pytest.raises(ValueError, match="CohereForCausalLM multiplies its logits by logit_scale"):
        moeroute.wrap_model(AutoModelForCausalLM.from_config(CohereConfig(**SIZES)), EarlyExit())
    assert not [name for name, _ in plain.named_modules() if "depth_host" in name]
    record = moeroute.layers.MoELayer.build(
        hidden_size=4, intermediate_size=4, num_experts=2, top_k=1, losses=(ExitLoss(exit_layer=2),)
    ).train()
    record(torch.randn(3, 4))
    with pytest.raises(ValueError, match="needs the states of an exit"):
        moeroute.aux_losses(record)


def test_a_lora_trains_beside_the_exits():
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    plain = get_peft_model(base(), lora).get_base_model()
    with pytest.raises(ValueError, match="carries an adapter already"):
        moeroute.wrap_model(plain, EarlyExit())
