"""How routers of FTP learn: three losses, draws with a gradient, a guide that fades."""

from dataclasses import replace

import pytest
import torch
from integration.depth.depth_models import LAYERS, close, ragged, tiny, whole
from methods.ftp_models import SPARSITY, differs, executed, learned, pruned, records, routers
from torch.nn.functional import cross_entropy

import moeroute
from moeroute.depth import distillation_loss
from moeroute.losses import GuideLoss, SkipShareLoss
from moeroute.methods import FTP
from moeroute.types import RoutingRecord

pytestmark = pytest.mark.hf


def batch(side="right", lengths=(9, 5, 8)):
    ids, mask = ragged(side, lengths)
    return {"input_ids": ids, "attention_mask": mask}


def checkpoint(model, *, use_reentrant):
    """Switch activation checkpointing on."""
    base = model.get_base_model()
    newer = getattr(base, "activation_checkpointing_enable", None)  # since transformers 5.23
    (newer or base.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})


def all_losses(model, **inputs):
    """Distillation and what the routers are charged."""
    loss = distillation_loss(model, **inputs)
    return loss + moeroute.aux_losses(model).total


def gradients(model):
    """Name -> gradient of every parameter that has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_losses_are_those_of_the_formulas():
    model = learned().train()
    inputs = batch()
    model(**inputs, use_cache=False)
    kept = records(model)
    real = inputs["attention_mask"].bool()
    guide, share = [], []
    for layer, record in enumerate(kept):
        logits = record.depth.router_logits[real]
        guide.append(cross_entropy(logits, record.depth.guide[real]))
        share.append((logits.softmax(-1)[:, 0].mean() - SPARSITY[layer]) ** 2)
    report = moeroute.aux_losses(model)
    torch.testing.assert_close(report.parts["GuideLoss"], torch.stack(guide).mean())
    torch.testing.assert_close(report.parts["SkipShareLoss"], torch.stack(share).mean())
    expected = report.parts["GuideLoss"] + 10 * report.parts["SkipShareLoss"]
    torch.testing.assert_close(report.total, expected)


def test_the_guide_is_what_the_rule_does():
    model = learned().train()
    inputs = batch()
    model(**inputs, use_cache=False)
    first = records(model)[1]  # all tokens ran the layer before
    static = pruned(tiny(), FTP(sparsity=SPARSITY, router="static"))
    kept = executed(static, *inputs.values())[1]
    real = inputs["attention_mask"].bool()
    assert torch.equal(first.depth.guide[real].bool(), kept[real])


@pytest.mark.parametrize("loss", [GuideLoss(), SkipShareLoss()])
def test_padding_enters_no_loss(loss):
    model = learned().train()
    inputs = batch()
    model(**inputs, use_cache=False)
    moeroute.aux_losses(model)
    for record in records(model)[1:]:
        logits = record.depth.router_logits.detach().clone()
        logits[inputs["attention_mask"] == 0] = torch.nan
        spoilt = replace(record, depth=replace(record.depth, router_logits=logits))
        torch.testing.assert_close(loss(spoilt), loss(record))
        nobody = replace(spoilt, token_mask=torch.zeros_like(record.token_mask))
        assert loss(nobody) == 0


def test_all_that_is_declared_has_a_gradient_and_nothing_else():
    model = learned().train()
    torch.manual_seed(0)
    all_losses(model, **batch()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("depth_host" in name)
        assert (parameter.grad is not None) == ("depth_host" in name)


def test_the_distillation_alone_teaches_on_both_sides_of_the_choice():
    model = learned(guide_loss_coef=0.0, sparsity_loss_coef=0.0).train()
    torch.manual_seed(0)
    distillation_loss(model, **batch()).backward()
    assert [router.up.weight.grad is not None for router in routers(model)] == [False, True, True]
    assert all(router.up.weight.grad.abs().sum() > 0 for router in routers(model)[1:])


def test_training_runs_what_evaluation_would_and_no_more():
    """Skipped tokens pass, though all are computed; a kept one sees the same keys either way."""
    model = learned().train()
    inputs = batch("left")
    torch.manual_seed(0)
    with torch.no_grad(), moeroute.track_routing(model):
        out = model(**inputs, use_cache=False, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    kept = torch.stack([record.depth.num_executions.bool() for record in records(model)])
    weights = [record.depth.routing_weights for record in records(model)]
    assert weights[0] is None
    assert all(torch.equal(weights[i][real] > 0, kept[i][real]) for i in (1, 2))
    assert differs(kept, inputs["attention_mask"])
    before, after = out.hidden_states[1:3]
    skipped = ~kept[1] & real
    assert torch.equal(before[skipped], after[skipped])
    assert not torch.equal(before[kept[1] & real], after[kept[1] & real])


def test_training_at_certainty_is_evaluation():
    """Logits far apart leave the draws no choice."""
    model = learned()
    with torch.no_grad():
        for router in routers(model):
            router.up.weight.mul_(1e4)
    inputs = batch("left")
    with torch.no_grad():
        expected = whole(model, *inputs.values())
        kept = executed(model, *inputs.values())
        assert differs(kept, inputs["attention_mask"])
        close(whole(model.train(), *inputs.values()), expected, inputs["attention_mask"])


def test_labels_end_the_prompt():
    model = learned()
    ids, mask = ragged("right", (10, 10))
    labels = ids.masked_fill(torch.arange(10) < 6, -100)
    with torch.no_grad(), moeroute.track_routing(model):
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    told = torch.stack([record.depth.num_executions for record in records(model)])
    with torch.no_grad():
        alone = executed(model, ids[:, :6], mask[:, :6])
    assert torch.equal(told[..., :6].bool(), alone)


def test_the_guide_fades_with_the_steps_and_its_place_is_saved(tmp_path):
    model = learned(guide_steps=4).train()
    inputs, values = batch(), []
    for _ in range(6):
        torch.manual_seed(0)
        model(**inputs, use_cache=False)
        values.append(moeroute.aux_losses(model).parts["GuideLoss"].item())
        moeroute.post_step(model)
    assert values == pytest.approx([values[0] * share for share in (1, 0.75, 0.5, 0.25, 0, 0)])
    model.save_pretrained(tmp_path)
    again = moeroute.wrap_model(tiny(), FTP(guide_steps=4))
    again.load_adapter(tmp_path, "default")
    assert [int(router.schedule.steps_taken) for router in routers(again)] == [6] * LAYERS
    model.eval()(**inputs)
    moeroute.post_step(model)
    assert int(routers(model)[0].schedule.steps_taken) == 6


def test_routers_come_to_the_rule_and_to_the_sparsity():
    torch.manual_seed(0)
    model = pruned(tiny(), FTP(sparsity=SPARSITY, guide_steps=400)).train()
    ids, mask = ragged("right", (24, 20, 16, 24))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        moeroute.aux_losses(model).total.backward()
        optimizer.step()
        moeroute.post_step(model)
    static = pruned(tiny(), FTP(sparsity=SPARSITY, router="static"))
    with torch.no_grad():
        rule = executed(static, ids, mask)
        found = executed(model.eval(), ids, mask)
    real = mask.bool()
    agree = (rule[1:] == found[1:])[:, real].float().mean().item()
    assert agree > 0.9
    shares = [1 - each[real].float().mean().item() for each in found]
    assert shares == pytest.approx(SPARSITY, abs=0.12)


def test_draws_differ_in_training_and_follow_the_seed():
    model = learned(temperature=2.0).train()
    inputs = batch(lengths=(16, 16))

    def draw(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            model(**inputs, use_cache=False)
        model.eval().train()
        moeroute.aux_losses(model)
        return torch.stack([record.depth.num_executions for record in records(model)])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_activation_checkpointing_gives_the_same_gradients(family, use_reentrant):
    found = []
    for checkpointing in (False, True):
        model = learned(family).train()
        model.enable_input_require_grads()
        if checkpointing:
            checkpoint(model, use_reentrant=use_reentrant)
        torch.manual_seed(7)
        loss = all_losses(model, **batch())
        kept = len(records(model))
        loss.backward()
        assert kept == len(records(model)) == LAYERS
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(found[0], found[1])


def test_a_bfloat16_model_learns():
    model = learned().to(torch.bfloat16).train()
    all_losses(model, **batch()).backward()
    assert all(router.up.weight.grad.isfinite().all() for router in routers(model))


def test_losses_of_another_layer():
    layer = moeroute.layers.MoELayer.build(
        hidden_size=4, intermediate_size=4, num_experts=2, top_k=1
    )
    record = RoutingRecord(
        site="mlp", layer_index=0, routing=layer.router(_tokens(layer)), router=layer.router
    )
    for loss in (GuideLoss(), SkipShareLoss()):
        with pytest.raises(ValueError, match=f"mlp: {type(loss).__name__} needs a router"):
            loss(record)


def _tokens(layer):
    return layer.routing_pass.router_input(torch.randn(3, 4))


def test_certain_agreement_costs_nothing():
    model = pruned(tiny(), FTP(sparsity=SPARSITY, router="static"))
    with torch.no_grad(), moeroute.track_routing(model):
        model(**batch(), use_cache=False)
    for record in records(model):
        followed = replace(record.depth, guide_share=torch.ones(()))
        assert GuideLoss()(replace(record, depth=followed)) == 0
