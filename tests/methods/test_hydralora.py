"""HydraLoRA against its equation, head by head, and what keeps its heads apart."""

import pytest
import torch
from methods.beside import OUT, WIDTH, assert_same_with_gradients, awake, record_of, site_at
from torch import nn

from moeroute.methods import HydraLoRA


def build(**fields):
    base, site = site_at()
    return base, awake(HydraLoRA(**{"r": 2, "lora_alpha": 3.0, **fields}).build(site, None))


def by_the_paper(base, mixture, x):
    bank, rows = mixture.bank, []
    for token in x:
        weights = torch.softmax(mixture.router.score.weight @ token, dim=0)
        middle = bank.lora_a @ token
        row = base(token)
        for head, weight in enumerate(weights):
            lora_b = bank.lora_b[:, head * bank.r : (head + 1) * bank.r]
            row = row + bank.scaling * weight * (lora_b @ middle)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"num_experts": 3}], ids=str)
def test_output_and_gradients_equal_the_equation(options):
    base, mixture = build(**options)
    x = torch.randn(6, WIDTH, dtype=torch.double, requires_grad=True)
    inputs = [x, *mixture.parameters()]
    assert_same_with_gradients(mixture(x, base), by_the_paper(base, mixture, x), inputs)


def test_one_head_is_plain_lora():
    base, mixture = build(num_experts=1)
    x = torch.randn(6, WIDTH, dtype=torch.double)
    bank = mixture.bank
    expected = base(x) + 1.5 * x @ bank.lora_a.T @ bank.lora_b.T
    torch.testing.assert_close(mixture(x, base), expected)


def test_equal_heads_do_not_feel_the_router():
    base, mixture = build()
    head = torch.randn(OUT, 2, dtype=torch.double)
    with torch.no_grad():
        mixture.bank.lora_b.copy_(head.repeat(1, 4))
    x = torch.randn(6, WIDTH, dtype=torch.double)
    before = mixture(x, base)
    nn.init.normal_(mixture.router.score.weight)
    torch.testing.assert_close(mixture(x, base), before)


def test_every_head_takes_part_and_there_is_one_a():
    base, mixture = build()
    routing = record_of(mixture, base, torch.randn(2, 3, WIDTH, dtype=torch.double)).routing
    assert routing.routing_weights.shape == (6, 4)
    assert (routing.routing_weights > 0).all()
    torch.testing.assert_close(routing.routing_weights.sum(1), torch.ones(6, dtype=torch.double))
    assert mixture.bank.lora_a.shape == (2, WIDTH)
    assert mixture.bank.lora_b.shape == (OUT, 8)


def test_a_fresh_router_tells_tokens_and_heads_apart():
    """Heads that start at zero under equal weights would stay equal for ever."""
    base, site = site_at()
    mixture = HydraLoRA().build(site, None)
    weight = mixture.router.score.weight
    assert weight.abs().max() <= WIDTH**-0.5
    assert weight.abs().max() > 0.5 * WIDTH**-0.5
    mixture.double()(torch.randn(9, WIDTH, dtype=torch.double), base).square().sum().backward()
    gradients = mixture.bank.lora_b.grad.unflatten(1, (4, 4)).transpose(0, 1)
    assert all((gradients[0] - other).abs().max() > 1e-3 for other in gradients[1:])


def test_bad_fields():
    with pytest.raises(ValueError, match="num_experts=0 is below 1"):
        HydraLoRA(num_experts=0)
    with pytest.raises(ValueError, match="lora_dropout=1.0 is outside"):
        HydraLoRA(lora_dropout=1.0)
