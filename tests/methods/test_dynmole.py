"""DynMoLE against its equation, and the entropy that decides between few experts and all."""

import pytest
import torch
from methods.beside import (
    WIDTH,
    assert_same_with_gradients,
    awake,
    loop_over_experts,
    record_of,
    site_at,
)
from methods.two_clusters import information_learned
from torch import nn

import moeroute
from moeroute.methods import DynMoLE
from moeroute.routers.entropy_gated import EntropyGated

FIELDS = {"r": 2, "lora_alpha": 3.0, "num_experts": 4}


def build(**fields):
    base, site = site_at()
    return base, awake(DynMoLE(**{**FIELDS, **fields}).build(site, None))


def tokens(count=8):
    return torch.randn(count, WIDTH, dtype=torch.double)


def entropy_of(probs):
    return (1 - sum((p + 1e-5) ** 1.1 for p in probs)) / (1 - len(probs) ** -0.1)


def active(selection, size=4):
    return (selection.selected_experts < size).sum(1)


def select(top_k=2, top_p=0.75, entropy_threshold=0.9):
    return EntropyGated(top_k, top_p=top_p, entropy_threshold=entropy_threshold)


def test_output_and_gradients_equal_the_equation():
    base, mixture = build(entropy_threshold=0.7)
    kinds = set()

    def weights_of(token):
        probs = torch.softmax(mixture.router.score.weight @ token, dim=0)
        unsure = bool(entropy_of(probs) > 0.7)
        order, reached, kept = probs.sort(descending=True).indices.tolist(), 0.0, []
        for rank, expert in enumerate(order):
            reached += probs[expert].item()
            if unsure or reached <= 0.75 or rank < 2:
                kept.append(expert)
        kinds.add((unsure, len(kept)))
        return torch.stack([p if e in kept else 0 * p for e, p in enumerate(probs)])

    x = tokens(60).requires_grad_()
    reference = loop_over_experts(base, mixture, x, weights_of)
    assert_same_with_gradients(mixture(x, base), reference, [x, *mixture.parameters()])
    assert kinds >= {(True, 4), (False, 2)}


def test_a_sure_router_keeps_exactly_keep_top_k():
    logits = 50 * torch.eye(6)
    for top_k in (1, 2, 3):
        assert active(select(top_k)(logits), 6).tolist() == [top_k] * 6


def test_an_unsure_router_keeps_all_with_weights_that_sum_to_one():
    chosen = select()(torch.zeros(3, 8))
    assert active(chosen, 8).tolist() == [8, 8, 8]
    torch.testing.assert_close(chosen.routing_weights.sum(1), torch.ones(3))


def test_more_experts_the_higher_top_p_and_never_fewer_than_keep_top_k():
    logits, before = 2 * torch.randn(200, 8), None
    for top_p in (0.0, 0.3, 0.6, 0.9, 1.0):
        count = active(select(2, top_p)(logits), 8)
        assert (count >= 2).all()
        assert before is None or (count >= before).all()
        before = count


def test_the_expert_that_crosses_top_p_is_left_out():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    chosen = select(1, 0.75, 1.0)(logits)
    assert chosen.selected_experts.tolist() == [[0, 4, 4, 4]]
    torch.testing.assert_close(chosen.routing_weights, torch.tensor([[0.5, 0.0, 0.0, 0.0]]))
    assert active(select(1, 0.85, 1.0)(logits)).tolist() == [2]


def test_the_threshold_switches_the_broadcast_off_or_everything_on():
    logits = torch.randn(100, 4)
    assert (active(select(2, 0.0, 1.0)(torch.zeros(5, 4))) == 2).all()
    dense = select(entropy_threshold=-1.0)(logits)
    assert (active(dense) == 4).all()
    table = torch.zeros(100, 4).scatter(1, dense.selected_experts, dense.routing_weights)
    torch.testing.assert_close(table, logits.softmax(-1))


def test_weights_are_not_renormalised():
    base, mixture = build()
    total = record_of(mixture, base, 4 * tokens(80)).routing.routing_weights.sum(1)
    assert (total <= 1 + 1e-12).all()
    assert total.min() < 0.95


def test_one_expert_is_plain_lora():
    base, mixture = build(num_experts=1, keep_top_k=1)
    x, bank = tokens(), mixture.bank
    expected = base(x) + bank.scaling * x @ bank.lora_a.T @ bank.lora_b.T
    torch.testing.assert_close(mixture(x, base), expected)
    record = record_of(mixture, base, x)
    assert [loss(record).item() for loss in mixture.losses] == [0.0, pytest.approx(1.0)]


def test_the_losses_equal_their_equations():
    base, mixture = build(entropy_index=1.1)
    record = record_of(mixture, base, tokens(30))
    probs = record.routing.router_logits.softmax(-1)
    entropy, balance = mixture.losses
    assert (entropy.weight, balance.weight) == (0.01, 1e-3)
    expected = torch.stack([entropy_of(row).clamp(0, 1) for row in probs]).mean()
    torch.testing.assert_close(entropy(record), expected)
    chosen, weights = record.routing.selected_experts, record.routing.routing_weights
    means = [weights[chosen == e].sum() / 30 for e in range(4)]
    expected = 4 * sum(mean * probs[:, e].mean() for e, mean in enumerate(means))
    torch.testing.assert_close(balance(record), expected)


def test_both_losses_reach_the_router():
    base, mixture = build()
    for loss in mixture.losses:
        value = loss(record_of(mixture, base, tokens()))
        (gradient,) = torch.autograd.grad(value, mixture.router.score.weight)
        assert gradient.abs().sum() > 0


def test_less_entropy_is_a_surer_router():
    base, mixture = build(router_aux_loss_coef=0.0)
    nn.init.normal_(mixture.router.score.weight, std=0.1)
    optimizer = torch.optim.Adam(mixture.router.parameters(), lr=0.05)
    x, surest = tokens(32), []
    for _ in range(40):
        mixture.train()(x, base)
        optimizer.zero_grad()
        moeroute.aux_losses(mixture).total.backward()
        optimizer.step()
        logits = record_of(mixture, base, x).routing.router_logits
        surest.append(logits.softmax(-1).amax(-1).mean().item())
    assert surest[-1] > surest[0] + 0.3


def test_a_router_tells_two_clusters_apart():
    base, site = site_at()
    method = DynMoLE(
        r=2, num_experts=2, keep_top_k=1, entropy_loss_coef=0.05, router_aux_loss_coef=0.05
    )
    assert information_learned(base, method.build(site, None).double(), WIDTH) > 0.9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_top_k": 0}, r"keep_top_k=0 is outside 1..6"),
        ({"keep_top_k": 7}, r"keep_top_k=7 is outside 1..6"),
        ({"top_p": 1.5}, "top_p=1.5 is outside"),
        ({"entropy_index": 0.0}, "entropy_index=0.0 is outside"),
        ({"entropy_eps": 0.0}, "entropy_eps=0.0 is outside"),
        ({"entropy_loss_coef": -0.1}, "entropy_loss_coef=-0.1 is outside"),
        ({"router_aux_loss_coef": -0.1}, "would reward imbalance"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        DynMoLE(**fields)
