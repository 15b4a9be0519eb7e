"""PHATGOOSE against its equations, in training and after it."""

import pytest
import torch
from methods.mixed import (
    RANKS,
    WIDTH,
    build_site,
    check_round_trip,
    frozen_state,
    lora,
    mix_folders,
    routing_of,
    tell,
    train,
)
from torch import nn
from torch.nn import functional

from moeroute.integration.adapters.inputs import expert_ids
from moeroute.methods import PHATGOOSE

IDS = torch.randint(0, 31, (3, 6), generator=torch.Generator().manual_seed(0))
TASKS = torch.tensor([1, 0, 1])


def gates_of(mixture):
    return next(parameter for parameter in mixture.parameters() if parameter.requires_grad)


def build(ranks=RANKS, gates=True, **fields):
    base, mixture = build_site(PHATGOOSE, ranks, **fields)
    if gates:
        nn.init.normal_(gates_of(mixture))
    return base, mixture


def by_the_paper_in_eval(base, mixture, x, top_k):
    rows = []
    present = [index for index, rank in enumerate(mixture.bank.ranks) if rank]
    for token in x:
        unit = functional.layer_norm(token, (WIDTH,))
        gates = [functional.layer_norm(gates_of(mixture)[index], (WIDTH,)) for index in present]
        probs = torch.softmax(torch.stack([gate @ unit / WIDTH**0.5 for gate in gates]), 0)
        kept, chosen = probs.topk(min(top_k, len(present)))
        experts = [lora(mixture, present[index], token) for index in chosen]
        mixed = sum(w * out for w, out in zip(kept / kept.sum(), experts, strict=True))
        rows.append(base(token) + mixed)
    return torch.stack(rows)


def by_the_paper_in_training(base, mixture, x, labels):
    rows = []
    for sample, label in zip(x, labels, strict=True):
        opened = torch.sigmoid(sample @ gates_of(mixture)[label]).unsqueeze(-1)
        rows.append(base(sample) + opened * lora(mixture, label, sample))
    return torch.stack(rows)


def assert_same_gradients(ours, paper, mixture, x):
    upstream = torch.randn_like(ours)
    wanted = (x, gates_of(mixture))
    torch.testing.assert_close(ours, paper)
    torch.testing.assert_close(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(paper, wanted, upstream)
    )


@pytest.mark.parametrize("top_k", [1, 2, 4, 9])
def test_output_and_gradients_in_eval_equal_the_equation(top_k):
    base, mixture = build(top_k=top_k)
    mixture.eval()
    x = torch.randn(9, WIDTH, dtype=torch.double, requires_grad=True)
    ours, paper = mixture(x, base), by_the_paper_in_eval(base, mixture, x, top_k)
    assert_same_gradients(ours, paper, mixture, x)


def test_output_and_gradients_in_training_equal_the_equation():
    base, mixture = build()
    labels = torch.tensor([2, 0, 3, 2, 1])
    tell(mixture, labels)
    x = torch.randn(5, 4, WIDTH, dtype=torch.double, requires_grad=True)
    ours, paper = mixture(x, base), by_the_paper_in_training(base, mixture, x, labels)
    assert_same_gradients(ours, paper, mixture, x)
    assert torch.equal(ours[2], base(x)[2])  # an adapter without this linear


def test_a_gate_learns_from_its_own_samples_alone():
    base, mixture = build()
    labels = torch.tensor([0, 1, 0, 2])
    x, upstream = torch.randn(4, 5, WIDTH).double(), torch.randn(4, 5, 7).double()

    def gradient(rows):
        tell(mixture, labels[rows])
        return torch.autograd.grad(mixture(x[rows], base), gates_of(mixture), upstream[rows])[0]

    together, alone = gradient([0, 1, 2, 3]), gradient([0, 2])
    torch.testing.assert_close(alone[0], together[0])
    assert torch.count_nonzero(alone[1:]) == 0
    with torch.no_grad():
        gates_of(mixture)[1:] += 1.0
    torch.testing.assert_close(gradient([0, 1, 2, 3])[0], together[0])


def test_fresh_gates_are_half_open_and_tie_in_eval():
    base, mixture = build(gates=False)
    tell(mixture, torch.tensor([1, 2]))
    x = torch.randn(2, 3, WIDTH).double()
    expected = torch.stack(
        [base(x[0]) + 0.5 * lora(mixture, 1, x[0]), base(x[1]) + 0.5 * lora(mixture, 2, x[1])]
    )
    torch.testing.assert_close(mixture(x, base), expected)
    output, routing = routing_of(mixture.eval(), base, x)
    assert torch.isfinite(output).all()
    assert torch.count_nonzero(routing.router_logits[:, :3]) == 0
    assert torch.all(routing.routing_weights == 0.5)


def test_scores_see_neither_the_length_of_a_token_nor_that_of_a_gate():
    base, mixture = build()
    x = 10 * torch.randn(8, WIDTH).double()
    _, routing = routing_of(mixture.eval(), base, x)
    _, longer = routing_of(mixture, base, 100 * x + 3)
    torch.testing.assert_close(longer.router_logits, routing.router_logits, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        gates_of(mixture).mul_(1e4)
    _, sharper = routing_of(mixture, base, x)
    torch.testing.assert_close(sharper.router_logits, routing.router_logits, rtol=1e-3, atol=1e-4)


def test_equal_gates_have_equal_scores():
    base, mixture = build()
    with torch.no_grad():
        gates_of(mixture).copy_(gates_of(mixture)[:1].expand(4, -1))
    _, routing = routing_of(mixture.eval(), base, torch.randn(5, WIDTH).double())
    torch.testing.assert_close(
        routing.router_logits[:, 1:3], routing.router_logits[:, :1].expand(-1, 2)
    )


def test_one_more_adapter_enters_the_best_or_changes_nothing():
    base, fewer = build(ranks=(2, 3, 1))
    _, more = build(ranks=(2, 3, 1, 2))
    with torch.no_grad():
        gates_of(more)[:3].copy_(gates_of(fewer))
        for index in range(3):
            own = fewer.bank.expert(index)
            more.bank.set_expert(index, fewer.bank.lora_a[own], fewer.bank.lora_b[:, own])
    x = torch.randn(40, WIDTH).double()
    before, known = routing_of(fewer.eval(), base, x)
    after, grown = routing_of(more.eval(), base, x)
    torch.testing.assert_close(grown.router_logits[:, :3], known.router_logits)
    entered = (grown.selected_experts == 3).any(1)
    assert entered.any()
    assert not entered.all()
    torch.testing.assert_close(after[~entered], before[~entered])
    kept = grown.selected_experts[entered]
    kept = kept[kept != 3]
    assert torch.equal(kept, known.selected_experts[entered, 0])  # the lowest was evicted


def test_an_adapter_without_this_linear_takes_no_part():
    base, mixture = build(top_k=4)
    output, routing = routing_of(mixture.eval(), base, torch.randn(5, WIDTH).double())
    assert torch.isfinite(output).all()
    assert torch.all(routing.router_logits[:, 3] == float("-inf"))
    assert torch.all(routing.routing_weights[routing.selected_experts == 3] == 0)
    torch.testing.assert_close(routing.routing_weights.sum(1), torch.ones(5).double())
    tell(mixture.train(), torch.tensor([3]))
    _, routing = routing_of(mixture, base, torch.randn(1, 5, WIDTH).double())
    assert torch.all(routing.selected_experts == 4)
    assert torch.all(routing.routing_weights == 0)


def test_trained_gates_find_the_cluster_of_their_adapter():
    base, mixture = build(ranks=(2, 2), gates=False, top_k=1)
    centres = torch.tensor([[3.0, 0, 0, 1, 0, 0], [0, 0, 3.0, 0, -1, 0]]).double()
    labels = torch.arange(20) % 2
    x = centres[labels].unsqueeze(1) + 0.3 * torch.randn(20, 8, WIDTH).double()
    wanted = torch.stack([base(s) + lora(mixture, e, s) for s, e in zip(x, labels, strict=True)])
    optimizer = torch.optim.Adam([gates_of(mixture)], lr=5e-3)
    tell(mixture, labels)
    for _ in range(100):
        loss = functional.mse_loss(mixture(x, base), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _, routing = routing_of(mixture.eval(), base, x)
    found = routing.selected_experts[:, 0] == labels.repeat_interleave(8)
    assert found.double().mean() > 0.95


def test_training_moves_the_gates_alone_and_the_result_is_an_adapter(tmp_path):
    model = mix_folders(tmp_path, PHATGOOSE(top_k=1))
    frozen = frozen_state(model)
    assert any("lora_a" in key for key in frozen)
    losses = train(model, 5, lr=5.0, input_ids=IDS, task_ids=TASKS)
    assert losses[-1] < losses[0]
    assert all(torch.equal(frozen[key], value) for key, value in frozen_state(model).items())
    check_round_trip(model, tmp_path, input_ids=IDS)


def test_task_ids_by_name(tmp_path):
    model = mix_folders(tmp_path, PHATGOOSE())
    assert expert_ids(model, ["code", "math", "code"]).tolist() == TASKS.tolist()
    with pytest.raises(ValueError, match=r"mixes \['math', 'code'\].*belongs to 'law'"):
        expert_ids(model, ["law"])


def test_training_without_task_ids_says_what_is_missing(tmp_path):
    model = mix_folders(tmp_path, PHATGOOSE()).train()
    with pytest.raises(ValueError, match="training of gates routes by task but got no task_ids"):
        model(input_ids=IDS)
    with pytest.raises(ValueError, match=r"task_ids are in 0..2 but it knows 2 tasks"):
        model(input_ids=IDS, task_ids=torch.arange(3))
    model.eval()(input_ids=IDS)


def test_bad_fields():
    with pytest.raises(ValueError, match="top_k=0 is below 1"):
        PHATGOOSE(top_k=0)
    with pytest.raises(ValueError, match="call moeroute.mix_adapters"):
        PHATGOOSE().build_shared(())
