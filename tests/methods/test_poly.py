"""Poly against its equation and its checkable properties."""

import pytest
import torch
from torch import nn

from moeroute.integration.adapters.sites import make_site
from moeroute.layers.averaged_mixture import AveragedLoRAMixture
from moeroute.methods import Poly
from moeroute.routing_pass import SampleInputs

TASKS = torch.tensor([2, 0, 2])


def build(**fields):
    torch.manual_seed(0)
    base = nn.Linear(6, 4).double()
    site = make_site(base, "q_proj", base, "linear")
    mixture = Poly(**({"num_tasks": 3, "r": 2, "num_experts": 3} | fields)).build(site, None)
    mixture = mixture.double().eval()
    for parameter in mixture.parameters():
        nn.init.normal_(parameter)
    mixture.routing_pass.samples = SampleInputs(task_ids=TASKS)
    return base, mixture


def skills(mixture):
    bank = mixture.bank
    return bank.lora_a.unflatten(0, (-1, bank.r)), bank.lora_b.unflatten(1, (-1, bank.r))


def weights_of(mixture):
    z = torch.sigmoid(mixture.router.score.task_table.weight[TASKS])
    return z / z.sum(1, keepdim=True)


def by_the_paper(base, mixture, x, mix):
    (a, b), w = skills(mixture), weights_of(mixture)
    if mix == "output":
        return base(x) + torch.einsum("be,oer,erh,bsh->bso", w, b, a, x) / 2
    mean_a, mean_b = torch.einsum("be,erh->brh", w, a), torch.einsum("be,oer->bor", w, b)
    return base(x) + torch.einsum("bor,brh,bsh->bso", mean_b, mean_a, x) / 2


@pytest.mark.parametrize("mix", ["parameter", "output"])
def test_output_and_gradients_equal_the_equation(mix):
    base, mixture = build(mix=mix)
    x = torch.randn(3, 4, 6, dtype=torch.double, requires_grad=True)
    ours, paper = mixture(x, base), by_the_paper(base, mixture, x, mix)
    torch.testing.assert_close(ours, paper)
    inputs, upstream = [x, *mixture.parameters()], torch.randn_like(ours)
    for left, right in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(paper, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_the_two_mixes_agree_where_one_skill_has_all_the_weight():
    outputs = []
    for mix in ("parameter", "output"):
        base, mixture = build(mix=mix)
        with torch.no_grad():
            mixture.router.score.task_table.weight.fill_(-50)[:, 1] = 50
        outputs.append(mixture(torch.ones(3, 4, 6, dtype=torch.double), base))
    torch.testing.assert_close(*outputs)


def test_one_skill_alone_is_a_lora_scaled_by_its_rank():
    base, mixture = build(num_experts=1)
    x = torch.randn(3, 4, 6, dtype=torch.double)
    bank = mixture.bank
    torch.testing.assert_close(mixture(x, base), base(x) + x @ bank.lora_a.T @ bank.lora_b.T / 2)


def test_training_draws_and_eval_does_not():
    base, mixture = build()
    x = torch.randn(3, 4, 6, dtype=torch.double)
    assert torch.equal(mixture(x, base), mixture(x, base))
    mixture.train()
    assert not torch.equal(mixture(x, base), mixture(x, base))
    torch.manual_seed(5)
    first = mixture(x, base)
    torch.manual_seed(5)
    assert torch.equal(mixture(x, base), first)


def test_draws_are_relaxed_bernoulli():
    """At a logit of 0 and temperature 1 the draw is uniform on (0, 1)."""
    _, mixture = build(num_tasks=1, num_experts=2)
    router = mixture.router.train()
    nn.init.zeros_(router.score.task_table.weight)
    logits = torch.zeros(20000, 2).double()
    draw = torch.rand_like(logits)
    noisy = torch.sigmoid(logits + torch.log(draw) - torch.log1p(-draw))
    torch.testing.assert_close(noisy, draw)


def test_merged_equals_unmerged():
    base, mixture = build()
    assert isinstance(mixture, AveragedLoRAMixture)
    x = torch.randn(3, 4, 6, dtype=torch.double)
    for sample, task in enumerate(TASKS.tolist()):
        merged = base.weight + mixture.task_delta(task)
        expected = nn.functional.linear(x[sample], merged, base.bias)
        torch.testing.assert_close(mixture(x, base)[sample], expected)
    with pytest.raises(ValueError, match="task 3 is none of 3"):
        mixture.task_delta(3)


def test_a_new_task_of_known_skills_is_fitted_by_its_table_alone():
    base, mixture = build(num_tasks=1)
    mixture.routing_pass.samples = SampleInputs(task_ids=torch.zeros(3, dtype=torch.int64))
    table = mixture.router.score.task_table.weight
    x = torch.randn(3, 20, 6, dtype=torch.double)
    with torch.no_grad():
        table.copy_(torch.tensor([[3.0, -3.0, 1.0]]))
        target = mixture(x, base)
        table.zero_()
    optimizer, losses = torch.optim.Adam([table], lr=0.1), []
    for _ in range(200):
        loss = (mixture(x, base) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_tasks": 0}, "num_tasks=0 is below 1"),
        ({"mix": "both"}, "mix='both'; use 'parameter' or 'output'"),
        ({"num_experts": 0}, "num_experts=0 is below 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Poly(**fields)


def test_samples_must_be_told_apart():
    base, mixture = build()
    with pytest.raises(ValueError, match="does not tell samples apart"):
        mixture(torch.randn(3, 6, dtype=torch.double), base)
    with pytest.raises(ValueError, match="speak of 3 samples but the batch has 2"):
        mixture(torch.randn(2, 4, 6, dtype=torch.double), base)
