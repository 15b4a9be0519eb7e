"""The two stages of informed routing: what learns, from what, and what moves the temperature."""

import pytest
import torch
from integration.depth.depth_models import LAYERS, ragged, tiny, whole
from methods.unit_models import bias, children, executed, records, units, watching, wrapped
from peft import PeftModel
from torch.nn.functional import cosine_similarity, smooth_l1_loss

import moeroute
from moeroute.depth import first_guess, train_only
from moeroute.methods import InformedRouting, MixtureOfDepths
from moeroute.ops.gumbel import hard_gumbel_softmax
from moeroute.routers.step_schedule import StepSchedule
from moeroute.types import RouterInput

pytestmark = pytest.mark.hf


def staged(part, family="llama", **fields):
    """A model in training, at one stage."""
    model = wrapped(family, **fields).train()
    train_only(model, part)
    return model


def inputs(*, labels=False):
    """A batch, with labels on its real tokens if they are wanted."""
    ids, mask = ragged("right")
    given = {"input_ids": ids, "attention_mask": mask}
    return {**given, "labels": ids.masked_fill(mask == 0, -100)} if labels else given


def checkpoint(model, *, use_reentrant):
    """Switch activation checkpointing on."""
    base = model.get_base_model()
    newer = getattr(base, "activation_checkpointing_enable", None)  # since transformers 5.23
    (newer or base.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})


def gradients(model):
    """Name -> gradient of every parameter that has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def learnt(model, part):
    """Names of the parameters of "forecaster" or "router"."""
    return {name for name, _ in model.named_parameters() if f".{part}." in name}


def temperature(model):
    """The schedule that all routers share."""
    found = [m for m in model.modules() if isinstance(m, StepSchedule)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("labels", [False, True])
def test_forecasters_learn_what_units_answer_in_the_unmodified_model(family, labels):
    model, base = staged("forecasters", family), tiny(family)
    given = inputs(labels=labels)
    out = model(**given)
    with watching(children(model, base)) as seen, torch.no_grad():
        plain = base(**given)
    assert torch.equal(out.logits, plain.logits)
    real, expected = given["attention_mask"].bool(), []
    for unit, child in zip(units(model), children(model, base), strict=True):
        tokens, answer = seen[child]
        expected.append(smooth_l1_loss(unit.forecaster(tokens)[real], answer[real]))
    mean = torch.stack(expected).mean()
    torch.testing.assert_close(out.loss, mean + plain.loss if labels else mean)
    out.loss.backward()
    found = gradients(model)
    assert set(found) == learnt(model, "forecaster")
    assert all(grad.abs().sum() > 0 for grad in found.values())
    own = torch.autograd.grad(mean, units(model)[0].forecaster.up.weight)[0]
    torch.testing.assert_close(units(model)[0].forecaster.up.weight.grad, own)


def test_forecasters_come_to_foretell():
    model = moeroute.wrap_model(tiny(), InformedRouting()).train()
    train_only(model, "forecasters")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(**inputs()).loss
        loss.backward()
        optimizer.step()
        moeroute.post_step(model)
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert temperature(model).steps_taken == 0  # no router was trained


def test_routers_learn_from_the_models_loss_their_share_and_the_change():
    model = staged("routers", sparsity=0.4, change_loss_coef=0.5)
    given = inputs(labels=True)
    with watching(children(model)) as seen:
        out = model(**given)
    real = given["attention_mask"].bool()
    gates = [record.depth.routing_weights for record in records(model)]
    assert all(set(gate.unique().tolist()) <= {0.0, 1.0} for gate in gates)
    share = torch.stack([gate[real].mean() for gate in gates]).mean()
    changes = []
    for record, gate, child in zip(records(model), gates, children(model), strict=True):
        tokens = seen[child][0]
        torch.testing.assert_close(record.unit.tokens, tokens)
        away = real & (gate == 0)
        change = 1 - cosine_similarity(tokens, tokens + record.unit.executed, dim=-1)
        changes.append(change[away].mean() if bool(away.any()) else torch.zeros(()))
    parts = moeroute.aux_losses(model).parts
    torch.testing.assert_close(parts["SparsityTargetLoss"], (0.6 - share).abs())
    torch.testing.assert_close(parts["ForetoldChangeLoss"], torch.stack(changes).mean())
    labels = given["labels"]
    told = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    charged = 8 * (0.6 - share).abs() + 0.5 * torch.stack(changes).mean()
    torch.testing.assert_close(out.loss, told + charged)
    out.loss.backward()
    found = gradients(model)
    assert set(found) == learnt(model, "router")
    assert all(grad.abs().sum() > 0 for grad in found.values())


def test_the_models_own_loss_alone_reaches_every_router():
    model = staged("routers", sparsity_loss_coef=0.0, change_loss_coef=0.0)
    model(**inputs(labels=True)).loss.backward()
    found = gradients(model)
    assert set(found) == learnt(model, "router")
    assert all(grad.abs().sum() > 0 for grad in found.values())


def test_a_training_forward_mixes_what_it_computed_of_both():
    model = staged("routers")
    with watching(children(model)) as seen, torch.no_grad():
        model(**inputs())
    mixed = 0
    for record, unit, child in zip(records(model), units(model), children(model), strict=True):
        gate = record.depth.routing_weights[..., None]
        expected = torch.where(gate == 1, record.unit.executed, unit.forecaster(seen[child][0]))
        assert torch.equal(seen[child][1], expected)
        mixed += 0 < gate.mean() < 1
    assert mixed == len(units(model))


def test_everything_learns_after_wrapping_by_all_losses():
    model = wrapped().train()
    model(**inputs(labels=True)).loss.backward()
    assert set(gradients(model)) == learnt(model, "router") | learnt(model, "forecaster")
    names = {"ForecastLoss", "ForetoldChangeLoss", "SparsityTargetLoss"}
    assert set(moeroute.aux_losses(model).parts) == names
    train_only(model, "routers")
    model(**inputs(labels=True))
    assert set(moeroute.aux_losses(model).parts) == names - {"ForecastLoss"}
    train_only(model, "all")
    assert all(p.requires_grad for unit in units(model) for p in unit.parameters())


def test_routers_without_labels_are_not_trained_on_their_share_alone():
    model = staged("routers")
    assert model(**inputs()).get("loss") is None
    with pytest.warns(UserWarning, match="reached no loss"):
        model(**inputs(labels=True))
    moeroute.aux_losses(model)


def test_frozen_routers_decide_in_training_as_in_evaluation():
    model = staged("routers").eval()
    given = inputs()
    with torch.no_grad():
        expected = whole(model, given["input_ids"], given["attention_mask"])
        for unit in units(model):
            unit.requires_grad_(False)
        state = torch.get_rng_state()
        found = whole(model.train(), given["input_ids"], given["attention_mask"])
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_routers_learn_the_share_that_is_asked_for():
    model = bias(staged("routers", sparsity=0.5, temperature_steps=20, change_loss_coef=0.0), 2.0)
    given = inputs(labels=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(**given)
        moeroute.aux_losses(model).total.backward()
        optimizer.step()
        moeroute.post_step(model)
    assert temperature(model)().item() == 1.0
    real = given["attention_mask"].bool()
    runs = executed(model.eval(), given["input_ids"], given["attention_mask"])
    assert runs[:, real].double().mean().item() == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("part", ["forecasters", "routers", "all"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_activation_checkpointing_gives_the_same_gradients(part, family):
    found = []
    for checkpointing in (False, True):
        model = staged(part, family)
        if checkpointing:
            checkpoint(model, use_reentrant=False)
        torch.manual_seed(7)
        out = model(**inputs(labels=True), use_cache=False)
        kept = len(records(model))
        out.loss.backward()
        assert kept == len(records(model)) == 2 * LAYERS
        moeroute.post_step(model)
        assert temperature(model).steps_taken == (part != "forecasters")
        found.append((out.loss.detach(), gradients(model)))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("part", ["forecasters", "routers"])
def test_reentrant_checkpointing_is_an_error(part):
    model = staged(part)
    checkpoint(model, use_reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="reentrant activation checkpointing runs the layers"):
        model(**inputs(labels=True), use_cache=False)


def test_checkpointed_frozen_routers_gather_again():
    found = []
    for checkpointing in (False, True):
        model = staged("routers")
        for unit in units(model):
            unit.requires_grad_(False)
        if checkpointing:
            checkpoint(model, use_reentrant=False)
        embedding = model.get_input_embeddings().weight.requires_grad_()
        model(**inputs(labels=True), use_cache=False).loss.backward()
        found.append(embedding.grad)
    torch.testing.assert_close(found[0], found[1])
    assert found[0].abs().sum() > 0


def test_one_temperature_falls_by_steps_that_trained_routers_and_is_saved(tmp_path):
    model = staged("routers", temperature_steps=4)
    assert temperature(model)().item() == 5.0
    for _ in range(3):  # accumulated batches are one step
        model(**inputs(labels=True)).loss.backward()
    moeroute.post_step(model)
    moeroute.post_step(model)  # nothing was trained since
    assert temperature(model).steps_taken == 1
    assert temperature(model)().item() == 4.0
    with torch.no_grad():
        model.eval()(**inputs())
    moeroute.post_step(model)
    assert temperature(model).steps_taken == 1
    assert all(unit.router._schedule[0] is temperature(model) for unit in units(model))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path, is_trainable=True)
    assert temperature(again).steps_taken == 1
    again.bfloat16()
    for _ in range(6):
        temperature(again).observe(None)
        moeroute.post_step(again)
    assert temperature(again).steps_taken == 7
    assert temperature(again)().item() == 1.0
    assert StepSchedule(start=3.0, end=2.0, steps=0)().item() == 2.0


def test_hard_draws_are_ones_and_zeros_with_the_soft_ones_gradient():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0]).repeat(20000, 1).requires_grad_()
    drawn = hard_gumbel_softmax(logits, 2.0)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn[:, 1].mean().item() == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.01)
    drawn[:, 1].sum().backward()
    torch.manual_seed(0)
    noise = -torch.empty_like(logits).exponential_().log()
    soft = ((logits.detach() + noise) / 2.0).softmax(-1)
    torch.testing.assert_close(logits.grad[:, 1], soft[:, 0] * soft[:, 1] / 2.0)


def test_the_base_stays_as_it_was():
    model = staged("all")
    before = {n: p.clone() for n, p in model.named_parameters() if "depth_host" not in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**inputs(labels=True)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert name not in before or torch.equal(parameter, before[name])


def test_a_first_guess_leaves_out_what_is_foretold_best():
    model = wrapped().eval()
    train_only(model, "routers")
    _, mask = ragged("left", (12, 4, 9))
    ids = mask * (3 + torch.randperm(36).reshape(3, 12))  # no token twice
    batch = {"input_ids": ids, "attention_mask": mask}
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    losses = first_guess(model, [batch] * 150, lr=3e-2)
    assert losses[-1] < 0.02 < losses[0]
    assert len(losses) == 150
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == (".router." not in name)
        assert weight.requires_grad == (".router." in name)
        assert weight.grad is None
    assert not any(module.training for module in model.modules())
    base = tiny()
    with watching(children(model, base)) as seen, torch.no_grad():
        base(**batch)
    for unit, child in zip(units(model), children(model, base), strict=True):
        tokens, answer = seen[child]
        runs_there = unit_runs(unit, tokens)
        error = smooth_l1_loss(unit.forecaster(tokens), answer, reduction="none").mean(-1)
        for row, count in enumerate((3, 1, 2)):
            real = mask[row].bool()
            best = error[row][real].argsort()[:count].sort().values
            left_out = (~runs_there[row][real]).nonzero().flatten()
            assert torch.equal(left_out, best)


def unit_runs(unit, tokens):
    """(B, S) what a router says of its unit's input in the unmodified model."""
    shape = (tokens.shape[0], tokens.shape[1])
    given = RouterInput(hidden_states=tokens.flatten(0, 1), sequence_shape=shape)
    return unit.router(given).num_executions.bool()


def test_a_first_guess_of_no_share():
    with pytest.raises(ValueError, match=r"share=1.0 is outside \(0, 1\)"):
        first_guess(wrapped(), [], share=1.0)


def test_stages_of_other_models():
    with pytest.raises(ValueError, match="part='head' is none of forecasters, routers and all"):
        train_only(wrapped(), "head")
    for model in (tiny(), moeroute.wrap_model(tiny(), MixtureOfDepths())):
        with pytest.raises(ValueError, match="no active adapter that learns in stages"):
            train_only(model, "routers")
