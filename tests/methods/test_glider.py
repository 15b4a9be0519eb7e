"""GLIDER against its equation, and against PHATGOOSE."""

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

import moeroute
from moeroute.methods import GLIDER, PHATGOOSE

DIM = 4
NAMES = [f"adapter_{index}" for index in range(len(RANKS))]
IDS = torch.randint(0, 31, (3, 6), generator=torch.Generator().manual_seed(0))


def gates_of(mixture):
    return next(parameter for parameter in mixture.parameters() if parameter.requires_grad)


def build(ranks=RANKS, **fields):
    base, mixture = build_site(GLIDER, ranks, instruction_dim=DIM, **fields)
    nn.init.normal_(gates_of(mixture))
    embeddings = dict(zip(NAMES, 3 * torch.randn(len(ranks), DIM), strict=False))
    moeroute.layers.set_instruction_embeddings(mixture, embeddings)
    return base, mixture.eval(), torch.stack(list(embeddings.values())).double()


def by_the_paper(base, mixture, x, experts, samples, rule, top_k=2, shift=0.0):
    rows = []
    present = [index for index, rank in enumerate(mixture.bank.ranks) if rank]
    for sample, embedding in zip(x, samples.double(), strict=True):
        likeness = functional.cosine_similarity(experts, embedding.unsqueeze(0)) + shift
        c = rule(likeness.max() - shift)
        for token in sample:
            unit = functional.layer_norm(token, (WIDTH,))
            gates = functional.layer_norm(gates_of(mixture), (WIDTH,))
            logits = (gates @ unit / WIDTH**0.5 + c * likeness)[present]
            kept, chosen = torch.softmax(logits, 0).topk(top_k)
            outputs = [lora(mixture, present[index], token) for index in chosen]
            mixed = sum(w * out for w, out in zip(kept / kept.sum(), outputs, strict=True))
            rows.append(base(token) + mixed)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("fields", [{}, {"beta": 0.0}, {"gamma": 0.5, "beta": 1.5}])
def test_output_and_gradients_equal_the_equation(fields):
    base, mixture, experts = build(threshold=0.7, **fields)
    gamma, beta = fields.get("gamma", 3.0), fields.get("beta", 100.0)
    samples = torch.stack([experts[1] + 0.1, -experts.sum(0), torch.randn(DIM).double()])
    tell(mixture, sample_embeddings=samples)
    x = torch.randn(3, 5, WIDTH, dtype=torch.double, requires_grad=True)

    def rule(nearest):
        return gamma + beta * float(nearest >= 0.7)

    ours = mixture(x, base)
    paper = by_the_paper(base, mixture, x, experts, samples, rule)
    torch.testing.assert_close(ours, paper)
    shifted = by_the_paper(base, mixture, x, experts, samples, rule, shift=0.25)
    torch.testing.assert_close(ours, shifted)  # a constant on all cosines does nothing
    upstream, wanted = torch.randn_like(ours), (x, gates_of(mixture))
    torch.testing.assert_close(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(paper, wanted, upstream)
    )


def test_the_rule_tells_near_samples_from_others():
    base, mixture, experts = build(ranks=(2, 2, 2), gamma=3.0, beta=100.0, threshold=0.8)
    samples = torch.stack([experts[2], torch.cross(*experts[:2, :3], dim=0).new_ones(DIM)])
    cosines = functional.cosine_similarity(experts, samples.unsqueeze(1), dim=-1)
    assert cosines[0].max() >= 0.8 > cosines[1].max()
    tell(mixture, sample_embeddings=samples)
    x = torch.randn(1, 1, WIDTH).double().expand(2, 1, WIDTH)
    _, routing = routing_of(mixture, base, x)
    tell(mixture, sample_embeddings=torch.zeros(2, DIM))
    _, local = routing_of(mixture, base, x)
    expected = torch.stack([103 * cosines[0], 3 * cosines[1]])
    torch.testing.assert_close(routing.router_logits - local.router_logits, expected)


def test_without_likeness_it_is_phatgoose():
    base, mixture, _ = build(gamma=0.0, beta=0.0)
    _, other = build_site(PHATGOOSE)
    with torch.no_grad():
        gates_of(other).copy_(gates_of(mixture))
    other.bank.load_state_dict(mixture.bank.state_dict())
    x = torch.randn(2, 5, WIDTH).double()
    assert torch.equal(mixture(x, base), other.eval()(x, base))
    tell(mixture.train(), torch.tensor([1, 0]))
    tell(other.train(), torch.tensor([1, 0]))
    assert torch.equal(mixture(x, base), other(x, base))


def test_much_likeness_decides_for_every_token():
    base, mixture, experts = build(ranks=(2, 3, 1), gamma=1e4, beta=0.0)
    samples = torch.randn(4, DIM)
    tell(mixture, sample_embeddings=samples)
    _, routing = routing_of(mixture, base, torch.randn(4, 6, WIDTH).double())
    cosines = functional.cosine_similarity(experts, samples.double().unsqueeze(1), dim=-1)
    best = cosines.argsort(1, descending=True)[:, :2].repeat_interleave(6, 0)
    assert torch.equal(routing.selected_experts, best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_sum_to_one_however_large_c_is(dtype):
    base, mixture, experts = build(gamma=100.0, beta=0.0)
    base, mixture = base.to(dtype), mixture.float()
    samples = torch.stack([experts[0], -experts[0]]).float()
    tell(mixture, sample_embeddings=samples)
    output, routing = routing_of(mixture, base, torch.randn(2, 3, WIDTH).to(dtype))
    assert torch.isfinite(output).all()
    assert routing.routing_weights.dtype == torch.float32
    torch.testing.assert_close(routing.routing_weights.sum(1), torch.ones(6))


def test_each_sample_of_a_batch_has_its_own_embedding():
    # the release holds one embedding a task: a mixed batch would be routed by one of its samples
    base, mixture, experts = build(gamma=100.0, beta=0.0)
    samples = experts[:3]
    x = torch.randn(1, 4, WIDTH).double().expand(3, 4, WIDTH)
    tell(mixture, sample_embeddings=samples)
    together, routing = routing_of(mixture, base, x)
    assert routing.selected_experts[:, 0].reshape(3, 4)[:, 0].tolist() == [0, 1, 2]
    for row in range(3):
        tell(mixture, sample_embeddings=samples[row : row + 1])
        torch.testing.assert_close(mixture(x[:1], base)[0], together[row])


def test_gates_train_without_embeddings_and_the_result_is_an_adapter(tmp_path):
    model = mix_folders(tmp_path, GLIDER(top_k=1, instruction_dim=DIM))
    frozen = frozen_state(model)
    losses = train(model, 5, lr=5.0, input_ids=IDS, task_ids=torch.tensor([1, 0, 1]))
    assert losses[-1] < losses[0]
    assert all(torch.equal(frozen[key], value) for key, value in frozen_state(model).items())
    told = {"math": torch.eye(DIM)[0], "code": torch.eye(DIM)[1]}
    moeroute.layers.set_instruction_embeddings(model, told)
    samples = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]])
    check_round_trip(model, tmp_path, input_ids=IDS, sample_embeddings=samples)
    first = model(input_ids=IDS[:1], sample_embeddings=samples[:1]).logits
    second = model(input_ids=IDS[:1], sample_embeddings=samples[1:2]).logits
    assert not torch.allclose(first, second)


def test_what_is_missing_is_named(tmp_path):
    model = mix_folders(tmp_path, GLIDER(instruction_dim=DIM)).eval()
    with pytest.raises(ValueError, match="got no sample_embeddings; call model"):
        model(input_ids=IDS)
    samples = torch.randn(3, DIM)
    with pytest.raises(ValueError, match=r"experts \['math', 'code'\] have no instruction"):
        model(input_ids=IDS, sample_embeddings=samples)
    told = {"math": torch.randn(DIM), "code": torch.randn(DIM)}
    moeroute.layers.set_instruction_embeddings(model, told)
    model(input_ids=IDS, sample_embeddings=samples)
    with pytest.raises(ValueError, match=r"sample_embeddings is \(3, 5\) but .* 4 wide"):
        model(input_ids=IDS, sample_embeddings=torch.randn(3, 5))
    with pytest.raises(ValueError, match="speak of 2 samples but the batch has 3"):
        model(input_ids=IDS, sample_embeddings=torch.randn(2, DIM))


def test_wrong_instructions_change_nothing(tmp_path):
    model = mix_folders(tmp_path, GLIDER(instruction_dim=DIM)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for told, message in (
        ({"math": torch.ones(DIM)}, r"embeddings for \['math'\].*\('math', 'code'\)"),
        ({"math": torch.ones(DIM), "code": torch.ones(9)}, r"of 'code' is \(9,\)"),
        ({"math": torch.ones(DIM), "law": torch.ones(DIM)}, r"embeddings for \['law', 'math'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            moeroute.layers.set_instruction_embeddings(model, told)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k=0 is below 1"),
        ({"instruction_dim": 0}, "instruction_dim=0 is below 1"),
        ({"gamma": -1.0}, "gamma=-1.0, beta=100.0: below 0"),
        ({"threshold": 1.5}, "threshold=1.5 is no cosine"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        GLIDER(**fields)


def test_nothing_to_mix():
    with pytest.raises(ValueError, match="call moeroute.mix_adapters"):
        GLIDER().build_shared(())
