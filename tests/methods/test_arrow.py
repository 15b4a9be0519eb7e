"""Arrow against its equation, its invariances, and PEFT's own implementation."""

import pytest
import torch
from torch import nn

from moeroute.integration.adapters.sites import make_site
from moeroute.methods import Arrow
from moeroute.methods.existing import LoRAExpert
from moeroute.routers.prototypes import PrototypeScore, top_direction

RANKS, SCALINGS = (2, 3, 1, 0), (1.5, 0.5, 2.0, 1.0)


def build(**fields):
    torch.manual_seed(0)
    base = nn.Linear(6, 7).double()
    experts = tuple(
        LoRAExpert(name=f"adapter_{index}", ranks=(rank,), scalings=(scaling,))
        for index, (rank, scaling) in enumerate(zip(RANKS, SCALINGS, strict=True))
    )
    site = make_site(base, "q_proj", base, "linear")
    mixture = Arrow(sites=("q_proj",), experts=experts, **fields).build(site, None).double()
    bank = mixture.bank
    nn.init.normal_(bank.lora_a)
    nn.init.normal_(bank.lora_b)
    score = next(m for m in mixture.modules() if isinstance(m, PrototypeScore))
    score.set_experts(*weights_of(bank))
    return base, mixture


def weights_of(bank):
    slices = [bank.expert(index) for index in range(bank.num_experts)]
    return [bank.lora_a[own] for own in slices], [bank.lora_b[:, own] for own in slices]


def by_the_paper(base, mixture, x, top_k, temperature=1.0):
    deltas, logits = [], []
    for a, b, scaling in zip(*weights_of(mixture.bank), SCALINGS, strict=True):
        deltas.append(scaling * x @ a.T @ b.T)
        if a.shape[0]:
            direction = torch.linalg.svd(b @ a).Vh[0]
            logits.append((x @ direction).abs() / temperature)
        else:
            logits.append(torch.full(x.shape[:1], float("-inf")).double())
    kept, chosen = torch.stack(logits, 1).topk(top_k, dim=1)
    weights = torch.softmax(kept, dim=1)
    table = torch.zeros(len(x), len(RANKS)).double().scatter(1, chosen, weights)
    return base(x) + torch.einsum("te,eto->to", table, torch.stack(deltas))


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_output_and_gradient_equal_the_equation(top_k, temperature):
    base, mixture = build(top_k=top_k, temperature=temperature)
    x = torch.randn(9, 6, dtype=torch.double, requires_grad=True)
    ours, paper = mixture(x, base), by_the_paper(base, mixture, x, top_k, temperature)
    torch.testing.assert_close(ours, paper)
    upstream = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, x, upstream), torch.autograd.grad(paper, x, upstream)
    )


def test_directions_are_the_singular_vectors_of_the_product():
    for rank in (1, 2, 5):
        a, b = torch.randn(rank, 8), torch.randn(6, rank)
        direction = top_direction(a, b)
        expected = torch.linalg.svd((b @ a).double()).Vh[0]
        assert abs(direction @ expected) == pytest.approx(1.0, abs=1e-6)
        # another factorisation of the same product
        change = torch.randn(rank, rank).double()
        other = top_direction(change @ a.double(), b.double() @ torch.linalg.inv(change))
        assert abs(direction @ other) == pytest.approx(1.0, abs=1e-6)


def test_an_adapter_that_does_nothing_has_no_direction():
    assert torch.equal(top_direction(torch.randn(2, 5), torch.zeros(4, 2)).float(), torch.zeros(5))
    assert torch.equal(top_direction(torch.zeros(0, 5), torch.zeros(4, 0)).float(), torch.zeros(5))


def test_the_sign_of_a_direction_does_not_matter():
    base, mixture = build()
    x = torch.randn(4, 6).double()
    expected = mixture(x, base)
    for part in mixture.modules():
        if isinstance(part, PrototypeScore):
            part.prototypes.neg_()
    torch.testing.assert_close(mixture(x, base), expected)


def test_an_adapter_without_this_linear_is_never_weighed():
    base, mixture = build(top_k=4)
    kept = []
    with mixture.routing_pass.listening(kept.append):
        mixture(torch.randn(5, 6).double(), base)
    routing = kept[0].routing
    absent = routing.selected_experts == 3
    assert torch.all(routing.routing_weights[absent] == 0)
    torch.testing.assert_close(routing.routing_weights.sum(1), torch.ones(5).double())
    assert torch.all(routing.router_logits[:, 3] == float("-inf"))


def test_cosine_logits_do_not_see_the_length_of_a_token():
    base, mixture = build(cosine=True)
    x, kept = torch.randn(5, 6).double(), []
    with mixture.routing_pass.listening(kept.append):
        mixture(x, base)
        mixture(10 * x, base)
    torch.testing.assert_close(kept[0].routing.router_logits, kept[1].routing.router_logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k=0 is below 1"),
        ({"temperature": 0.0}, r"temperature=0.0 is not above 0"),
        (
            {"sites": ("a", "b"), "experts": (LoRAExpert(name="x", ranks=(1,), scalings=(1.0,)),)},
            "1 ranks and 1 scalings for 2 sites",
        ),
        (
            {"sites": (), "experts": (LoRAExpert(name="x", ranks=(), scalings=()),) * 2},
            "two adapters of one name",
        ),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Arrow(**fields)


def test_nothing_to_mix():
    with pytest.raises(ValueError, match="call moeroute.mix_adapters"):
        Arrow().build_shared(())
