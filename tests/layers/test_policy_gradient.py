"""`policy_gradient_loss`: what it adds, what it leaves alone, what it refuses."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import moeroute
from moeroute.layers import LoRABank, LoRAMixture
from moeroute.losses import BalanceLoss, rloo_surrogate
from moeroute.losses.policy_gradient import NeedsCopies
from moeroute.ops.subsets import subset_log_prob
from moeroute.routers import ComposedRouter, LinearScore, TopK
from moeroute.routers.granularity import PerSequence
from moeroute.routers.subset import SubsetRouter

WIDTH, EXPERTS = 4, 5
GUARD = (NeedsCopies(),)


class Net(nn.Module):
    """Two linears with mixtures, each layer with a routing pass of its own."""

    def __init__(self, wrap=lambda router: router, losses=GUARD):
        super().__init__()
        torch.manual_seed(0)
        self.bases = nn.ModuleList(nn.Linear(WIDTH, WIDTH).double() for _ in range(2))
        self.mixtures = nn.ModuleList(
            LoRAMixture(
                router=wrap(SubsetRouter(LinearScore(WIDTH, EXPERTS, init_std=0.5), 2)),
                bank=LoRABank(
                    num_experts=EXPERTS,
                    r=2,
                    in_features=WIDTH,
                    out_features=WIDTH,
                    lora_alpha=2.0,
                ),
                losses=losses,
            ).double()
            for _ in range(2)
        )
        self.bases.requires_grad_(False)
        for mixture in self.mixtures:
            nn.init.normal_(mixture.bank.lora_b, std=0.5)
        self.recomputes = None

    def forward(self, x, mask=None):
        for mixture, base in zip(self.mixtures, self.bases, strict=True):
            mixture.routing_pass.begin(token_mask=mask)
            if self.recomputes is None:
                x = torch.tanh(mixture(x, base))
            else:
                x = torch.tanh(checkpoint(mixture, x, base, use_reentrant=self.recomputes))
        return x


def tokens():
    torch.manual_seed(1)
    return torch.randn(3, 4, WIDTH, dtype=torch.double)


def squares(net, x, mask=None):
    return lambda: net(x, mask).square().mean()


def gradients(net):
    return {key: p.grad.clone() for key, p in net.named_parameters() if p.grad is not None}


def of_real_tokens(record):
    """By the definition, from logits and ids."""
    routing, mask = record.routing, record.token_mask
    log_prob = subset_log_prob(routing.router_logits, routing.selected_experts)
    return (log_prob if mask is None else log_prob[mask]).sum()


def of_real_samples(record):
    real = record.token_mask.reshape(record.sequence_shape).any(1)
    routing = record.routing
    logits, ids = (
        rows.unflatten(0, record.sequence_shape)[:, 0]
        for rows in (routing.router_logits, routing.selected_experts)
    )
    return subset_log_prob(logits, ids)[real].sum()


def by_hand(net, x, copies, mask=None, log_prob=of_real_tokens):
    """Each copy's loss, and the log-probability of every real draw, gathered by a listener."""
    losses, log_probs = [], []
    for _ in range(copies):
        kept = []
        with ExitStack() as stack:
            for mixture in net.mixtures:
                stack.enter_context(mixture.routing_pass.listening(kept.append))
            losses.append(net(x, mask).square().mean())
        log_probs.append(sum(log_prob(record) for record in kept))
    return torch.stack(losses), torch.stack(log_probs)


@pytest.mark.parametrize("copies", [2, 3])
def test_value_is_the_mean_loss_and_gradient_has_the_surrogates(copies):
    net, x = Net(), tokens()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    torch.manual_seed(2)
    loss = moeroute.policy_gradient_loss(net, squares(net, x, mask), copies)
    loss.backward()
    found = gradients(net)
    net.zero_grad()
    torch.manual_seed(2)
    losses, log_probs = by_hand(net, x, copies, mask)
    torch.testing.assert_close(loss, losses.mean())
    (losses.mean() + rloo_surrogate(losses, log_probs)).backward()
    expected = gradients(net)
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], msg=key)
    assert found["mixtures.0.router.score.weight"].abs().sum() > 0


def test_experts_get_the_gradient_of_the_mean_loss_alone():
    net, x = Net(), tokens()
    torch.manual_seed(2)
    moeroute.policy_gradient_loss(net, squares(net, x)).backward()
    found = gradients(net)
    net.zero_grad()
    torch.manual_seed(2)
    by_hand(net, x, 2)[0].mean().backward()
    without = gradients(net)
    for key, gradient in without.items():
        torch.testing.assert_close(gradient, found[key], rtol=0, atol=0, msg=key)
    # and the loss by itself tells the routers nothing
    assert {key for key in found if key not in without} == {
        f"mixtures.{index}.router.score.weight" for index in range(2)
    }


def test_everybody_drawn_gives_the_router_exactly_no_gradient():
    net = Net(wrap=lambda router: SubsetRouter(router.score, EXPERTS))
    moeroute.policy_gradient_loss(net, squares(net, tokens())).backward()
    weight = net.mixtures[0].router.score.weight
    assert weight.grad.abs().max() < 1e-12


def test_the_order_of_a_draw_does_not_change_the_answer():
    net, x = Net(), tokens().reshape(-1, WIDTH)
    bank, base = net.mixtures[0].bank, net.bases[0]
    ids, ones = torch.randint(0, EXPERTS, (12, 2)), torch.ones(12, 2, dtype=torch.double)
    torch.testing.assert_close(bank(base(x), x, ids, ones), bank(base(x), x, ids.flip(1), ones))


def test_a_draw_for_a_sample_counts_once():
    net, x = Net(wrap=PerSequence), tokens()
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    torch.manual_seed(2)
    moeroute.policy_gradient_loss(net, squares(net, x, mask)).backward()
    found = gradients(net)
    net.zero_grad()
    torch.manual_seed(2)
    losses, log_probs = by_hand(net, x, 2, mask, of_real_samples)
    (losses.mean() + rloo_surrogate(losses, log_probs)).backward()
    expected = gradients(net)
    assert found["mixtures.1.router.router.score.weight"].abs().sum() > 0
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], msg=key)


def test_checkpointing_changes_no_gradient():
    found = []
    for recomputes in (None, False):
        net, x = Net(), tokens().requires_grad_()
        net.recomputes = recomputes
        torch.manual_seed(2)
        moeroute.policy_gradient_loss(net, squares(net, x)).backward()
        found.append(gradients(net))
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, msg=key)


def test_reentrant_checkpointing_is_refused():
    net, x = Net(), tokens().requires_grad_()
    net.recomputes = True
    with pytest.raises(RuntimeError, match="use_reentrant"):
        moeroute.policy_gradient_loss(net, squares(net, x))


def test_other_losses_stay_and_the_guard_comes_back_even_after_an_error():
    losses = (BalanceLoss(weight=0.5), NeedsCopies())
    net, x = Net(losses=losses), tokens()

    def with_balance():
        loss = net(x).square().mean()
        report = moeroute.aux_losses(net)
        assert list(report.parts) == ["BalanceLoss"]
        return loss + report.total

    assert moeroute.policy_gradient_loss(net, with_balance) > 0
    assert net.mixtures[0].losses == losses
    with pytest.raises(ZeroDivisionError):
        moeroute.policy_gradient_loss(net, lambda: 1 / 0)
    assert net.mixtures[1].losses == losses
    net(x)
    with pytest.raises(RuntimeError, match="PolicyGradientMixin"):
        moeroute.aux_losses(net)


def test_without_gradients_it_is_the_mean_loss():
    net, x = Net(), tokens()
    with torch.no_grad():
        assert not moeroute.policy_gradient_loss(net, squares(net, x)).requires_grad


def test_frozen_routers_are_no_error():
    net, x = Net(), tokens()
    for mixture in net.mixtures:
        mixture.router.requires_grad_(requires_grad=False)
    moeroute.policy_gradient_loss(net, squares(net, x)).backward()
    assert net.mixtures[0].router.score.weight.grad is None
    assert net.mixtures[0].bank.lora_b.grad.abs().sum() > 0


def test_what_it_refuses():
    net, x = Net(), tokens()
    with pytest.raises(ValueError, match="copies=1"):
        moeroute.policy_gradient_loss(net, squares(net, x), copies=1)
    with pytest.raises(ValueError, match="shape \\(3, 4, 4\\)"):
        moeroute.policy_gradient_loss(net, lambda: net(x))
    with pytest.raises(RuntimeError, match="drew no experts"):
        moeroute.policy_gradient_loss(net, lambda: torch.zeros(()))
    with pytest.raises(RuntimeError, match=r"model\.train\(\)"):
        moeroute.policy_gradient_loss(net.eval(), squares(net, x))
    plain = Net(wrap=lambda router: ComposedRouter(router.score, TopK(2)), losses=())
    with pytest.raises(ValueError, match="no router that draws"):
        moeroute.policy_gradient_loss(plain, squares(plain, x))
