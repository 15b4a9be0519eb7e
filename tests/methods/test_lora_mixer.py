"""LoRA-Mixer against its equation, stage by stage."""

import pytest
import torch
from integration.adapters.lora_folders import make_base
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

import moeroute
from moeroute.methods import LoRAMixer

PRESENT = [index for index, rank in enumerate(RANKS) if rank]
IDS = torch.randint(0, 31, (3, 6), generator=torch.Generator().manual_seed(0))
QUIET = {"router_aux_loss_coef": 0.0, "entropy_coef": 0.0, "preserve_coef": 0.0}


def build(ranks=RANKS, **fields):
    base, mixture = build_site(LoRAMixer, ranks, **fields)
    nn.init.normal_(router_weight(mixture))
    return base, mixture


def router_weight(mixture):
    return next(p for name, p in mixture.named_parameters() if name.startswith("router"))


def probabilities(mixture, token):
    return torch.softmax((router_weight(mixture) @ token)[PRESENT], 0)


def by_the_paper(base, mixture, x, labels=None, top_k=None):
    rows = []
    for sample, tokens in enumerate(x):
        label = -1 if labels is None else int(labels[sample])
        for token in tokens:
            if label >= 0:
                rows.append(base(token) + lora(mixture, label, token))
                continue
            weights, chosen = probabilities(mixture, token).topk(top_k or len(PRESENT))
            outputs = [lora(mixture, PRESENT[index], token) for index in chosen]
            parts = zip(weights / weights.sum(), outputs, strict=True)
            rows.append(base(token) + sum(w * out for w, out in parts))
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("labels", [None, [-1, -1, -1], [2, -1, 0], [1, 1, 3]])
def test_training_equals_the_equation(labels):
    base, mixture = build(train_experts=True)
    labels = None if labels is None else torch.tensor(labels)
    tell(mixture.train(), labels)
    x = torch.randn(3, 5, WIDTH, dtype=torch.double, requires_grad=True)
    ours, paper = mixture(x, base), by_the_paper(base, mixture, x, labels)
    torch.testing.assert_close(ours, paper)
    wanted, upstream = [x, *mixture.parameters()], torch.randn_like(ours)
    for left, right in zip(
        torch.autograd.grad(ours, wanted, upstream),
        torch.autograd.grad(paper, wanted, upstream, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(left, torch.zeros_like(left) if right is None else right)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_inference_is_sparse_and_looks_at_no_label(top_k):
    base, mixture = build(top_k=top_k)
    x = torch.randn(2, 5, WIDTH).double()
    tell(mixture.eval(), torch.tensor([1, 0]))
    output, routing = routing_of(mixture, base, x)
    torch.testing.assert_close(output, by_the_paper(base, mixture, x, top_k=top_k))
    assert routing.selected_experts.shape == (10, top_k)
    torch.testing.assert_close(routing.routing_weights.sum(1), torch.ones(10).double())


def test_all_experts_in_inference_are_the_soft_mixture():
    base, mixture = build(top_k=len(RANKS))
    x = torch.randn(2, 5, WIDTH).double()
    torch.testing.assert_close(mixture.eval()(x, base), mixture.train()(x, base))


def test_equal_experts_leave_nothing_to_the_router():
    base, mixture = build(ranks=(2, 2, 2))
    mixture.bank.scaling_of_rank.fill_(2.0)
    for index in (1, 2):
        own, first = mixture.bank.expert(index), mixture.bank.expert(0)
        mixture.bank.set_expert(index, mixture.bank.lora_a[first], mixture.bank.lora_b[:, first])
        assert own != first
    x = torch.randn(2, 5, WIDTH).double()
    before = mixture(x, base)
    nn.init.normal_(router_weight(mixture), std=3.0)
    torch.testing.assert_close(mixture(x, base), before)


@pytest.mark.parametrize(("coefficient", "sharpens"), [(0.5, True), (-0.5, False)])
def test_the_sign_of_the_entropy(coefficient, sharpens):
    base, mixture = build(**QUIET | {"entropy_coef": coefficient})
    x = torch.randn(1, 40, WIDTH).double()
    mixture.train()

    def entropy():
        probs = torch.stack([probabilities(mixture, token) for token in x[0]])
        return -(probs * probs.log()).sum(1).mean().item()

    before = entropy()
    mixture.routing_pass.begin()
    mixture(x, base)
    mixture.routing_pass.end()
    moeroute.aux_losses(mixture).total.backward()
    with torch.no_grad():
        router_weight(mixture).sub_(0.1 * router_weight(mixture).grad)
    assert (entropy() < before) == sharpens


def test_labelled_samples_teach_no_router():
    base, mixture = build(preserve_coef=0.0)
    tell(mixture.train(), torch.tensor([0, 1]))
    mixture(torch.randn(2, 5, WIDTH).double(), base)
    mixture.routing_pass.end()
    moeroute.aux_losses(mixture).total.backward()
    assert router_weight(mixture).grad.abs().max() == 0


def test_balance_is_pushed_in_the_soft_stage():
    base, mixture = build(ranks=(1, 1), **QUIET | {"router_aux_loss_coef": 1.0}, top_k=1)
    x = torch.randn(1, 60, WIDTH).double().abs()
    with torch.no_grad():
        router_weight(mixture)[0].fill_(0.3)
        router_weight(mixture)[1].fill_(0.0)
    shares = []
    for _ in range(30):
        mixture.train().routing_pass.begin()
        mixture(x, base)
        mixture.routing_pass.end()
        total = moeroute.aux_losses(mixture).total
        (gradient,) = torch.autograd.grad(total, router_weight(mixture))
        with torch.no_grad():
            router_weight(mixture).sub_(0.1 * gradient)
        shares.append(torch.stack([probabilities_of(mixture, t, 2) for t in x[0]]).mean(0)[0])
    assert shares[0] > 0.7
    assert abs(shares[-1] - 0.5) < 0.1


def probabilities_of(mixture, token, size):
    return torch.softmax((router_weight(mixture) @ token)[:size], 0)


def test_tuned_experts_are_pulled_back_to_what_they_were(tmp_path):
    model = mix_folders(tmp_path, LoRAMixer(train_experts=True, preserve_coef=10.0))
    model.train()(input_ids=IDS, labels=IDS)
    assert moeroute.aux_losses(model).parts["PreserveLoss"] == 0
    train(model, 3, lr=0.5, input_ids=IDS)
    model(input_ids=IDS, labels=IDS)
    drift = moeroute.aux_losses(model).parts["PreserveLoss"]
    assert drift > 0
    expected = sum(
        ((bank.lora_a - bank.anchor_a) ** 2).sum() + ((bank.lora_b - bank.anchor_b) ** 2).sum()
        for bank in (m for m in model.modules() if hasattr(m, "anchor_a"))
    )
    sites = sum(hasattr(m, "anchor_a") for m in model.modules())
    torch.testing.assert_close(drift, expected / sites)
    check_round_trip(model, tmp_path, input_ids=IDS)


def test_frozen_experts_stay_as_they_were_bit_for_bit(tmp_path):
    model = mix_folders(tmp_path, LoRAMixer())
    frozen = frozen_state(model)
    losses = train(model, 5, lr=1.0, input_ids=IDS)
    assert losses[-1] < losses[0]
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".router." in name for name in learned)
    assert all(torch.equal(frozen[key], value) for key, value in frozen_state(model).items())
    check_round_trip(model, tmp_path, input_ids=IDS)


def test_experts_of_its_own_are_trained_by_label_and_then_mixed(tmp_path):
    method = LoRAMixer(num_experts=2, r=2, top_k=1)
    model = moeroute.wrap_model(make_base(), method, target_modules=["q_proj", "o_proj"])
    router = {n: p.clone() for n, p in model.named_parameters() if ".router." in n}
    losses = train(model, 10, lr=1.0, input_ids=IDS, task_ids=torch.tensor([0, 1, 1]))
    assert losses[-1] < losses[0]
    state = dict(model.named_parameters())
    assert all(torch.equal(state[name], value) for name, value in router.items())
    for index, name in enumerate(("math", "code")):
        moeroute.merge(model, f"expert:{index}").save(tmp_path / name)
    folders = {"math": tmp_path / "math", "code": tmp_path / "code"}
    mixed = moeroute.mix_adapters(make_base(), folders, LoRAMixer(top_k=1), same_base=True)
    labels = torch.tensor([1, 0, 1])
    inputs = {"input_ids": IDS, "labels": IDS, "task_ids": labels}
    hard = mixed.train()(**inputs).logits
    torch.testing.assert_close(hard, model.train()(**inputs).logits)
    train(mixed, 3, input_ids=IDS)


def test_labels_that_no_expert_has():
    base, mixture = build()
    x = torch.randn(2, 5, WIDTH).double()
    tell(mixture.train(), torch.tensor([0, len(RANKS)]))
    with pytest.raises(ValueError, match="training by label: task_ids are in 0..4"):
        mixture(x, base)
    tell(mixture, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="give one integer a sample|one a sample"):
        mixture(x, base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k=0 is below 1"),
        ({"r": 0}, "r=0 is below 1"),
        ({"num_experts": 0}, "num_experts=0 is below 1"),
        ({"router_aux_loss_coef": -1.0}, "would reward imbalance"),
        ({"preserve_coef": -1.0}, "preserve_coef=-1.0 is below 0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        LoRAMixer(**fields)
