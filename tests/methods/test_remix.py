"""ReMix against its equation, its constant weights, and whether its router finds the best."""

from itertools import combinations, permutations

import pytest
import torch
from torch import nn

import moeroute
from moeroute.integration.adapters.sites import make_site
from moeroute.methods import ReMix
from moeroute.ops.subsets import subset_log_prob


def build(width=5, out=7, **fields):
    torch.manual_seed(0)
    base = nn.Linear(width, out).double()
    site = make_site(base, "up_proj", base, "linear")
    mixture = ReMix(**{"r": 2, "num_experts": 4, **fields}).build(site, None).double()
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.5)
    return base, mixture


def listen(mixture, base, x):
    kept = []
    with mixture.routing_pass.listening(kept.append):
        out = mixture(x, base)
    return out, kept[0].routing


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("rslora", "omega"), [(True, 2 / (3 * 2) ** 0.5), (False, 2 / (3 * 2))])
def test_output_and_gradients_equal_the_equation(training, rslora, omega):
    base, mixture = build(top_k=3, use_rslora=rslora)
    x = torch.randn(6, 5, dtype=torch.double, requires_grad=True)
    ours, routing = listen(mixture.train(training), base, x)
    a = mixture.bank.lora_a.unflatten(0, (4, 2))
    b = mixture.bank.lora_b.unflatten(1, (4, 2))
    rows = []
    for token, chosen in zip(x, routing.selected_experts.tolist(), strict=True):
        assert len(set(chosen)) == 3
        experts = [b[:, index] @ (a[index] @ token) for index in chosen]
        rows.append(base(token) + omega * torch.stack(experts).sum(0))
    paper = torch.stack(rows)
    torch.testing.assert_close(ours, paper)
    inputs, upstream = [x, mixture.bank.lora_a, mixture.bank.lora_b], torch.randn_like(ours)
    for left, right in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(paper, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_the_active_share_one_weight_and_eval_takes_the_most_likely():
    base, mixture = build(top_k=2)
    x = torch.randn(6, 5, dtype=torch.double)
    _, drawn = listen(mixture, base, x)
    assert (drawn.routing_weights == 1).all()
    first, routing = listen(mixture.eval(), base, x)
    assert torch.equal(first, mixture(x, base))
    probs = torch.softmax(x @ mixture.router.score.weight.T, -1)
    assert torch.equal(routing.selected_experts, probs.argsort(descending=True)[:, :2])


def test_a_loss_without_the_policy_gradient_leaves_the_router_alone():
    base, mixture = build()
    mixture(torch.randn(6, 5, dtype=torch.double), base).square().sum().backward()
    assert mixture.router.score.weight.grad is None
    with pytest.raises(RuntimeError, match=r"moeroute\.policy_gradient_loss"):
        moeroute.aux_losses(mixture)


def test_one_expert_is_plain_lora():
    base, mixture = build(num_experts=1, top_k=1, use_rslora=False)
    x, bank = torch.randn(6, 5, dtype=torch.double), mixture.bank
    torch.testing.assert_close(mixture(x, base), base(x) + x @ bank.lora_a.T @ bank.lora_b.T)


def test_a_sequence_shares_its_draw():
    base, mixture = build(granularity="sequence")
    _, routing = listen(mixture, base, torch.randn(3, 4, 5, dtype=torch.double))
    ids = routing.selected_experts.unflatten(0, (3, 4))
    assert (ids == ids[:, :1]).all()
    assert routing.log_prob.shape == (3,)


@pytest.mark.parametrize(("experts", "top_k"), [(3, 1), (4, 2)])
def test_the_router_finds_the_best_subset_in_300_steps(experts, top_k):
    """Experts of fixed and different worth; the sum of the best ones is what is wanted."""
    base, mixture = build(width=2, out=3, num_experts=experts, top_k=top_k, r=1)
    x = torch.ones(1, 2, dtype=torch.double)
    mixture.bank.requires_grad_(requires_grad=False)
    with torch.no_grad():
        mixture.router.score.weight.zero_()
        a, b = mixture.bank.lora_a, mixture.bank.lora_b
        worth = torch.stack([(b[:, e] * (a[e] @ x[0])) for e in range(experts)])
    best = tuple(range(experts - top_k, experts))
    target = base(x).detach() + mixture.bank.scaling * worth[list(best)].sum(0)
    optimizer = torch.optim.Adam(mixture.router.parameters(), lr=0.1)
    start = probability_of(mixture, x, best)
    for _ in range(300):
        loss = moeroute.policy_gradient_loss(
            mixture, lambda: (mixture(x, base) - target).square().sum()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert start == pytest.approx(1 / len(list(combinations(range(experts), top_k))))
    assert probability_of(mixture, x, best) > 0.9
    _, routing = listen(mixture.eval(), base, x)
    assert sorted(routing.selected_experts[0].tolist()) == list(best)


def probability_of(mixture, x, subset):
    """Of drawing the subset in any order."""
    orders = torch.tensor(list(permutations(subset)))
    with torch.no_grad():
        logits = x @ mixture.router.score.weight.T
        return subset_log_prob(logits.expand(len(orders), -1), orders).exp().sum().item()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, r"top_k=9 is outside 1..8"),
        ({"top_k": 0}, r"top_k=0 is outside 1..8"),
        ({"granularity": "word"}, "granularity='word' is none of token, sequence"),
        ({"r": 0}, "r=0 is below 1"),
        ({"num_experts": 0}, "num_experts=0 is below 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ReMix(**fields)
