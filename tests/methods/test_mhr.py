"""MHR against its equation, Poly, and PEFT's own implementation."""

import pytest
import torch
from peft import PolyConfig, get_peft_model
from torch import nn

from moeroute.integration.adapters.sites import make_site
from moeroute.methods import MHR, Poly
from moeroute.routing_pass import SampleInputs

TASKS = torch.tensor([2, 0, 2])
HEADS, SKILLS, RANK, WIDTH, OUT = 2, 3, 2, 6, 4


def build(method):
    torch.manual_seed(0)
    base = nn.Linear(WIDTH, OUT).double()
    site = make_site(base, "q_proj", base, "linear")
    mixture = method.build(site, None).double().eval()
    for parameter in mixture.parameters():
        nn.init.normal_(parameter)
    mixture.routing_pass.samples = SampleInputs(task_ids=TASKS)
    return base, mixture


def mhr(**fields):
    return MHR(**({"num_tasks": 3, "r": RANK, "num_experts": SKILLS, "heads": HEADS} | fields))


def by_the_paper(base, mixture, x):
    z = torch.sigmoid(mixture.router.score.task_table.weight[TASKS]).unflatten(1, (HEADS, SKILLS))
    weights = z / z.sum(2, keepdim=True)
    rows = []
    for sample, w in enumerate(weights):
        a = torch.zeros(RANK, WIDTH, dtype=torch.double)
        b = torch.zeros(OUT, RANK, dtype=torch.double)
        for head in range(HEADS):
            into = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            out = slice(head * OUT // HEADS, (head + 1) * OUT // HEADS)
            for skill in range(SKILLS):
                own = slice(skill * RANK, (skill + 1) * RANK)
                mask_a, mask_b = torch.zeros_like(a), torch.zeros_like(b)
                mask_a[:, into], mask_b[out] = 1, 1
                a = a + w[head, skill] * mask_a * mixture.bank.lora_a[own]
                b = b + w[head, skill] * mask_b * mixture.bank.lora_b[:, own]
        rows.append(base(x[sample]) + x[sample] @ a.T @ b.T / RANK)
    return torch.stack(rows)


def test_output_and_gradients_equal_the_equation():
    base, mixture = build(mhr())
    x = torch.randn(3, 5, WIDTH, dtype=torch.double, requires_grad=True)
    ours, paper = mixture(x, base), by_the_paper(base, mixture, x)
    torch.testing.assert_close(ours, paper)
    inputs, upstream = [x, *mixture.parameters()], torch.randn_like(ours)
    for left, right in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(paper, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_one_head_is_poly():
    base, one = build(mhr(heads=1))
    _, poly = build(Poly(num_tasks=3, r=RANK, num_experts=SKILLS))
    poly.load_state_dict(one.state_dict())
    x = torch.randn(3, 5, WIDTH, dtype=torch.double)
    assert torch.equal(one(x, base), poly(x, base))


def test_heads_of_equal_weights_are_poly():
    base, mixture = build(mhr())
    _, poly = build(Poly(num_tasks=3, r=RANK, num_experts=SKILLS))
    with torch.no_grad():
        table = mixture.router.score.task_table.weight
        table[:, SKILLS:] = table[:, :SKILLS]
        poly.router.score.task_table.weight.copy_(table[:, :SKILLS])
        poly.bank.load_state_dict(mixture.bank.state_dict())
    x = torch.randn(3, 5, WIDTH, dtype=torch.double)
    torch.testing.assert_close(mixture(x, base), poly(x, base))


def test_the_weights_of_every_head_sum_to_one():
    base, mixture = build(mhr())
    kept = []
    for mode in (mixture.eval(), mixture.train()):
        with mixture.routing_pass.listening(kept.append):
            mode(torch.randn(3, 5, WIDTH, dtype=torch.double), base)
    for record in kept:
        sums = record.routing.routing_weights.unflatten(1, (HEADS, SKILLS)).sum(2)
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_equals_peft():
    base, mixture = build(mhr())
    config = PolyConfig(
        r=RANK, target_modules=["linear"], n_tasks=3, n_skills=SKILLS, n_splits=HEADS
    )
    theirs = get_peft_model(nn.ModuleDict({"linear": base}), config).double().eval()
    layer = theirs.base_model.model["linear"]
    bank = mixture.bank
    with torch.no_grad():
        a = bank.lora_a.unflatten(0, (SKILLS, RANK)).unflatten(2, (HEADS, -1))
        b = bank.lora_b.unflatten(1, (SKILLS, RANK)).unflatten(0, (HEADS, -1))
        layer.poly_lora_A["default"].copy_(a.permute(2, 0, 3, 1))
        layer.poly_lora_B["default"].copy_(b.permute(0, 2, 3, 1))
        layer.poly_router["default"].module_logits.copy_(mixture.router.score.task_table.weight)
    x = torch.randn(3, 5, WIDTH, dtype=torch.double)
    expected = layer(x, task_ids=TASKS)
    torch.testing.assert_close(mixture(x, layer.base_layer), expected)


def test_merged_equals_unmerged():
    base, mixture = build(mhr())
    x = torch.randn(3, 5, WIDTH, dtype=torch.double)
    for sample, task in enumerate(TASKS.tolist()):
        merged = base.weight + mixture.task_delta(task)
        expected = nn.functional.linear(x[sample], merged, base.bias)
        torch.testing.assert_close(mixture(x, base)[sample], expected)


def test_bad_heads():
    with pytest.raises(ValueError, match="heads=0 is below 1"):
        MHR(heads=0)
    with pytest.raises(ValueError, match="heads=4 do not divide a linear of 6 -> 4"):
        build(mhr(heads=4))
