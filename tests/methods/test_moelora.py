"""MOELoRA against its equation: one mixture a task."""

import pytest
import torch
from torch import nn

from moeroute.integration.adapters.sites import make_site
from moeroute.methods import MOELoRA
from moeroute.routing_pass import SampleInputs

TASKS = torch.tensor([2, 0, 2])


def build(**fields):
    torch.manual_seed(0)
    base = nn.Linear(5, 7).double()
    site = make_site(base, "q_proj", base, "linear")
    settings = {"num_tasks": 3, "r": 8, "num_experts": 4, "lora_alpha": 4.0} | fields
    mixture = MOELoRA(**settings).build(site, None).double()
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.5)
    mixture.routing_pass.samples = SampleInputs(task_ids=TASKS)
    return base, mixture


def by_the_paper(base, mixture, x):
    score, bank = mixture.router.score, mixture.bank
    weights = torch.softmax(score.task_table.weight[TASKS] @ score.to_logits.weight.T, dim=-1)
    a = bank.lora_a.unflatten(0, (4, 2))
    b = bank.lora_b.unflatten(1, (4, 2))
    return base(x) + 4.0 / 8 * torch.einsum("be,oer,erh,bsh->bso", weights, b, a, x)


def test_output_and_gradients_equal_the_equation():
    base, mixture = build()
    x = torch.randn(3, 4, 5, dtype=torch.double, requires_grad=True)
    ours, paper = mixture(x, base), by_the_paper(base, mixture, x)
    torch.testing.assert_close(ours, paper)
    inputs, upstream = [x, *mixture.parameters()], torch.randn_like(ours)
    for left, right in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(paper, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_a_task_is_a_plain_lora():
    base, mixture = build()
    x = torch.randn(3, 4, 5, dtype=torch.double)
    score, bank = mixture.router.score, mixture.bank
    weights = torch.softmax(score.to_logits(score.task_table.weight[2]), dim=-1)
    merged = base.weight + bank.scaling * torch.einsum(
        "e,oer,erh->oh", weights, bank.lora_b.unflatten(1, (4, 2)), bank.lora_a.unflatten(0, (4, 2))
    )
    expected = nn.functional.linear(x[0], merged, base.bias)
    torch.testing.assert_close(mixture(x, base)[0], expected)


def test_the_experts_share_the_rank_and_its_scaling():
    _, mixture = build()
    assert mixture.bank.r == 2
    assert mixture.bank.scaling == pytest.approx(4.0 / 8)
    assert build(use_rslora=True)[1].bank.scaling == pytest.approx(4.0 / 8**0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 9}, "num_experts=8 does not divide r=9"),
        ({"num_tasks": 0}, "num_tasks=0 is below 1"),
        ({"num_experts": 0}, "num_experts=0 is below 1"),
        ({"task_embedding_dim": 0}, "task_embedding_dim=0 is below 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        MOELoRA(**fields)


def test_tasks_must_be_told():
    base, mixture = build()
    mixture.routing_pass.samples = SampleInputs()
    with pytest.raises(ValueError, match="got no task_ids"):
        mixture(torch.randn(3, 4, 5, dtype=torch.double), base)
