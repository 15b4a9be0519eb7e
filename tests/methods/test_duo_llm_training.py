"""How Duo-LLM trains: its stages, its losses, its sharpness."""

from dataclasses import replace

import pytest
import torch
from integration.depth.depth_models import LAYERS, ragged, tiny, whole
from methods.duo_models import blocks, duo, records, rows
from torch.nn.functional import cross_entropy

import moeroute
from moeroute.depth import Width, force_widths, train_only
from moeroute.integration.depth.force_widths import width_layers
from moeroute.losses import BudgetLoss, DistilLoss
from moeroute.methods import DrLLM, DuoLLM
from moeroute.outputs import DistilOutput
from moeroute.routers.step_schedule import StepSchedule
from moeroute.types import RouterOutput, RoutingRecord

pytestmark = pytest.mark.hf


def staged(part, family="llama", **fields):
    """A model in training, at one stage."""
    model = duo(family, scale=0.1, **fields).train()
    train_only(model, part)
    return model


def inputs():
    """A batch with labels on its real tokens."""
    ids, mask = ragged("right")
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def told(out, labels):
    """The model's own loss."""
    return cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def gradients(model):
    """Name -> gradient of every parameter that has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def named(model, *parts):
    """Names of the parameters of "small" or "router"."""
    return {n for n, _ in model.named_parameters() for part in parts if f".{part}." in n}


def checkpoint(model, *, use_reentrant):
    """Switch activation checkpointing on."""
    base = model.get_base_model()
    newer = getattr(base, "activation_checkpointing_enable", None)
    (newer or base.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()


def inputs_of_blocks(model):
    """Hooks that note what each big block is given and answers, and the list that they fill."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        big.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
        for big, _ in blocks(model)
    ]
    return seen, hooks


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_small_blocks_learn_beside_the_unmodified_model(family):
    model, base, given = staged("small", family, distil_loss_coef=0.5), tiny(family), inputs()
    seen, _ = inputs_of_blocks(model)
    with rows(model) as counts:
        out = model(**given)
    assert counts == [[given["input_ids"].numel()] * 2] * LAYERS
    with torch.no_grad():
        plain = base(**given)
    assert torch.equal(out.logits, plain.logits)
    real = given["attention_mask"].bool()
    each = [
        (small(u.detach())[real] - big.detach()[real]).square().mean()
        for (u, big), (_, small) in zip(seen, blocks(model), strict=True)
    ]
    error = torch.stack(each).mean()
    torch.testing.assert_close(out.loss, plain.loss + 0.5 * error)
    assert set(moeroute.aux_losses(model).parts) == {"DistilLoss"}
    del given["labels"]
    torch.testing.assert_close(model(**given).loss, 0.5 * error)  # it needs no labels
    out.loss.backward()
    found = gradients(model)
    assert set(found) == named(model, "small")
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_a_small_block_is_taught_by_its_own_layer_alone():
    model = duo(scale=0.1).train()
    model(**inputs())
    for place, record in enumerate(records(model)):
        found = torch.autograd.grad(
            DistilLoss()(record),
            [p for p in model.parameters() if p.requires_grad],
            allow_unused=True,
            retain_graph=True,
        )
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        reached = {name for name, each in zip(names, found, strict=True) if each is not None}
        assert reached == {n for n in named(model, "small") if f"layers.{place}." in n}


def test_distillation_is_not_touched_by_padding_even_if_it_is_nan():
    taught = torch.tensor([[1.0, 2.0], [torch.nan, 0.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0], [torch.nan, torch.nan]])
    weights, mask = torch.ones(2, 1), torch.tensor([True, False])
    routing = DistilOutput(
        router_logits=torch.zeros(2, 2),
        routing_weights=weights,
        selected_experts=torch.ones(2, 1, dtype=torch.int64),
        taught=taught,
        target=target,
    )
    loss = DistilLoss()(replace(routed(torch.ones(2, 2), mask), routing=routing))
    assert loss.item() == 2.0
    loss.backward()
    assert taught.grad.tolist() == [[0.0, 2.0], [0.0, 0.0]]


def test_small_blocks_that_nothing_teaches_are_an_error():
    model = staged("small", distil_loss_coef=0.0)
    with pytest.raises(ValueError, match=r"layers.0.mlp: nothing teaches the small block"):
        model(**inputs())


def test_small_blocks_come_to_answer_like_big_ones():
    model = moeroute.wrap_model(tiny(), DuoLLM(small_intermediate_size=48)).train()
    train_only(model, "small")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = model(input_ids=inputs()["input_ids"]).loss
        loss.backward()
        optimizer.step()
        moeroute.post_step(model)
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(not layer.router.select.sharpness.steps_taken for layer in width_layers(model))


def test_random_routing_sends_its_share_through_small_blocks():
    model = staged("small", random_share=0.5, distil_loss_coef=0.0)
    ids = torch.randint(3, 60, (16, 25))
    torch.manual_seed(0)
    with moeroute.track_routing(model) as stats:
        out = model(input_ids=ids, labels=ids)
    for layer in stats.layers:
        assert layer.load[Width.SMALL].item() == pytest.approx(0.5, abs=0.1)
        assert layer.counts[Width.BYPASS] == 0
    torch.testing.assert_close(out.loss, told(out, ids))
    out.loss.backward()
    assert set(gradients(model)) == named(model, "small")
    widths = [r.routing.selected_experts.reshape(ids.shape) for r in tracked(model, ids)]
    with force_widths(model, torch.stack(widths, -1)), torch.no_grad():
        again = model(input_ids=ids).logits
    torch.testing.assert_close(again, out.logits.detach(), rtol=1e-3, atol=1e-3)


def tracked(model, ids):
    """The records of the same draw."""
    torch.manual_seed(0)
    with moeroute.track_routing(model), torch.no_grad():
        model(input_ids=ids)
    return records(model)


def test_routers_weigh_all_widths_and_are_charged_one_budget():
    model = staged("routers", budget=0.3, budget_loss_coef=2.0, sharpness_start=3.0)
    given = inputs()
    real = given["attention_mask"].bool()
    outputs: list[torch.Tensor] = []
    seen, _ = inputs_of_blocks(model)
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_hook(lambda _, __, out: outputs.append(out))
    out = model(**given)
    shares = []
    for layer, mixed, (u, big), (_, small) in zip(
        width_layers(model), outputs, seen, blocks(model), strict=True
    ):
        probs = (3.0 * u @ layer.router.score.weight.T).softmax(-1)
        expected = probs[..., [Width.BIG]] * big + probs[..., [Width.SMALL]] * small(u)
        torch.testing.assert_close(mixed, expected)
        shares.append(probs[..., Width.BIG][real])
    budget = (torch.cat(shares).mean() - 0.3) ** 2
    torch.testing.assert_close(moeroute.aux_losses(model).parts["BudgetLoss"], budget)
    apart = torch.stack([(share.mean() - 0.3) ** 2 for share in shares]).mean()
    assert (apart - budget).abs() > 1e-4  # it is one number, not one a layer
    torch.testing.assert_close(out.loss, told(out, given["labels"]) + 2.0 * budget)
    out.loss.backward()
    found = gradients(model)
    assert set(found) == named(model, "router")
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_a_fresh_router_weighs_alike_in_training_and_learns_from_there():
    model = moeroute.wrap_model(tiny(), DuoLLM(bypass=True)).train()
    train_only(model, "routers")
    out = model(**inputs())
    for record in records(model):
        torch.testing.assert_close(
            record.routing.routing_weights, torch.full_like(record.routing.routing_weights, 1 / 3)
        )
    out.loss.backward()
    assert all(gradient.abs().sum() > 0 for gradient in gradients(model).values())


def test_everything_learns_after_wrapping_and_base_weights_do_not():
    model, given = duo(scale=0.1).train(), inputs()
    state = {k: v.clone() for k, v in model.state_dict().items() if "moeroute_site" not in k}
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    model(**given).loss.backward()
    assert set(moeroute.aux_losses(model).parts) == {"BudgetLoss", "DistilLoss"}
    assert set(gradients(model)) == named(model, "small", "router")
    optimizer.step()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_routers_come_to_the_budget():
    for budget in (0.25, 0.75):
        model = staged("routers", budget=budget, budget_loss_coef=50.0, bypass=False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            model(**inputs()).loss.backward()
            optimizer.step()
            moeroute.post_step(model)
        report = moeroute.aux_losses(model).parts["BudgetLoss"]
        assert report < 0.05**2


def routed(weights, mask=None):
    """The record of a layer of (T, X) weights."""
    ids = torch.arange(weights.shape[1]).expand(weights.shape)
    routing = RouterOutput(
        router_logits=torch.zeros_like(weights), routing_weights=weights, selected_experts=ids
    )
    return RoutingRecord(site="mlp", layer_index=0, routing=routing, token_mask=mask)


def test_the_budget_loss_is_zero_at_the_budget_however_it_is_spent():
    loss = BudgetLoss(budget=0.5)
    spent = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])]
    assert loss.over([routed(each) for each in spent]).item() == 0.0
    first, second = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[0.0, 1.0]] * 2)
    assert loss.over([routed(first), routed(second)]).item() == 0.0  # two layers, far apart
    assert loss(routed(first)).item() == 0.25
    mask = torch.tensor([True, False])
    nan = torch.tensor([[0.5, 0.5], [torch.nan, torch.nan]])
    assert loss(routed(nan, mask)).item() == 0.0
    assert BudgetLoss(budget=1.0)(routed(first[:0])).item() == 0.0
    with pytest.raises(ValueError, match=r"budget=2 is outside"):
        BudgetLoss(budget=2)
    with pytest.raises(ValueError, match=r"mlp: BudgetLoss is of expert 4"):
        BudgetLoss(expert=4)(routed(first))
    with pytest.raises(ValueError, match=r"mlp: DistilLoss needs"):
        DistilLoss()(routed(first))


def test_sharp_weights_come_to_the_hard_choice():
    ids, mask = ragged("left")
    distance = []
    for sharpness in (1.0, 10.0, 1e6):
        model = duo(sharpness_start=sharpness, sharpness_end=1e6)
        with torch.no_grad():
            hard = whole(model, ids, mask)
            soft = whole(model.train(), ids, mask)
        distance.append((soft - hard)[mask.bool()].abs().max().item())
    assert distance[0] > distance[1] > distance[2]
    assert distance[2] < 1e-3 < distance[1]


def test_sharpness_grows_with_optimizer_steps_and_not_with_batches():
    model = staged("routers", sharpness_start=1.0, sharpness_end=5.0, sharpness_steps=4)
    schedule = width_layers(model)[0].router.select.sharpness
    seen = []
    for _ in range(6):
        seen.append(schedule().item())
        for _ in range(2):
            model(**inputs()).loss.backward()
        moeroute.post_step(model)
        moeroute.post_step(model)  # nothing was seen since
    assert seen == [1.0, 2.0, 3.0, 4.0, 5.0, 5.0]
    with torch.no_grad():
        model.eval()(**inputs())
    moeroute.post_step(model)
    assert schedule.steps_taken == 6
    assert StepSchedule(start=1.0, end=3.0, steps=0)().item() == 3.0
    model.to(torch.bfloat16)
    assert schedule.steps_taken.dtype == torch.int64
    with pytest.raises(ValueError, match="steps=-1 is below 0"):
        StepSchedule(start=1.0, end=2.0, steps=-1)


@pytest.mark.parametrize("part", ["small", "routers", "all"])
@pytest.mark.parametrize("random_share", [0.0, 0.5])
def test_checkpointing_changes_no_gradient(part, random_share):
    found = []
    for checkpointing in (False, True):
        model = staged(part, random_share=random_share)
        if checkpointing:
            checkpoint(model, use_reentrant=False)
        torch.manual_seed(3)
        model(**inputs()).loss.backward()
        found.append(gradients(model))
        moeroute.post_step(model)
        taken = {int(layer.router.select.sharpness.steps_taken) for layer in width_layers(model)}
        assert taken == {0 if part == "small" else 1}
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.parametrize("part", ["small", "routers"])
def test_reentrant_checkpointing_is_an_error(part):
    model = staged(part)
    checkpoint(model, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model(**inputs())


@pytest.mark.parametrize("part", ["small", "routers"])
def test_padding_changes_no_loss(part):
    model = staged(part)
    ids, mask = ragged("right")
    longer = torch.nn.functional.pad(ids, (0, 4)), torch.nn.functional.pad(mask, (0, 4))
    totals = []
    for tokens, real in ((ids, mask), longer):
        model(input_ids=tokens, attention_mask=real)
        totals.append(moeroute.aux_losses(model).total.item())
    assert totals[1] == pytest.approx(totals[0], rel=1e-5)


def test_forced_widths_hold_in_training_and_charge_nothing():
    model = duo().train()
    with rows(model) as counts, force_widths(model, [Width.SMALL, Width.BIG, Width.BYPASS]):
        out = model(**inputs())
    tokens = inputs()["input_ids"].numel()
    assert counts == [[0, tokens], [tokens, 0], [0, 0]]
    assert not moeroute.aux_losses(model).parts
    torch.testing.assert_close(out.loss, told(out, inputs()["labels"]))
    out.loss.backward()
    assert {name.split("layers.")[1][0] for name in gradients(model)} == {"0"}
    assert set(gradients(model)) <= named(model, "small")


def test_stages_are_known_by_name_and_of_the_active_adapter():
    model = duo()
    with pytest.raises(ValueError, match="part='big' is none of small, routers and all"):
        train_only(model, "big")
    for part, parts in (
        ("small", ["small"]),
        ("routers", ["router"]),
        ("all", ["small", "router"]),
    ):
        train_only(model, part)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == named(model, *parts)
    moeroute.wrap_model(model, DuoLLM(), adapter_name="other")
    model.set_adapter("other")
    train_only(model, "small")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in named(model, "small") if ".other." in name}
    with pytest.raises(ValueError, match="learns in stages"):
        train_only(moeroute.wrap_model(tiny(), DrLLM()), "small")
    with model.disable_adapter(), pytest.raises(ValueError, match="no active adapter"):
        train_only(model, "small")


def test_nothing_is_kept_in_evaluation():
    model = duo().train()
    model(**inputs())
    assert len(moeroute.aux_losses(model).parts) == 2
    assert len(records(model)) == LAYERS
    with torch.no_grad():
        model.eval()(**inputs())
    assert records(model) == []
