"""SMoRA against its equation, rank by rank, and the bias that balances its ranks."""

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint

import moeroute
from moeroute.integration.adapters.sites import make_site
from moeroute.methods import SMoRA

WIDTH, OUT = 5, 7


def build(**fields):
    torch.manual_seed(0)
    base = nn.Linear(WIDTH, OUT).double()
    site = make_site(base, "q_proj", base, "linear")
    settings = {"r": 6, "top_k": 4, "lora_alpha": 3.0, **fields}
    mixture = SMoRA(**settings).build(site, None).double()
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.5)
    return base, mixture


def bias_of(mixture):
    return mixture.router.select.selection_bias.e_score_correction_bias


def by_the_paper(base, mixture, method, x):
    """One token and one rank after the other."""
    bias = bias_of(mixture).double()
    rows = []
    for token in x:
        clean = torch.sigmoid(mixture.router.score.weight @ token)
        scores = (clean + bias).repeat_interleave(method.rank_partition)
        picked = scores.sort(descending=True, stable=True).indices[: method.top_k].tolist()
        gates = scores if method.bias_in_gate else clean.repeat_interleave(method.rank_partition)
        total = sum(gates[rank] for rank in picked)
        scale = method.lora_alpha / (method.top_k**0.5 if method.use_rslora else method.top_k)
        row = base(token)
        for rank in picked:
            gate = method.top_k * gates[rank] / total
            middle = mixture.bank.lora_a[rank] @ token
            row = row + scale * gate * middle * mixture.bank.lora_b[:, rank]
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("partition", [1, 2])
@pytest.mark.parametrize("options", [{}, {"bias_in_gate": False}, {"use_rslora": True}], ids=str)
def test_output_and_gradients_equal_the_equation(partition, options):
    fields = {"rank_partition": partition, **options}
    base, mixture = build(**fields)
    bias_of(mixture).copy_(torch.linspace(-0.1, 0.1, 6 // partition))
    x = torch.randn(9, WIDTH, dtype=torch.double, requires_grad=True)
    ours = mixture(x, base)
    method = SMoRA(r=6, top_k=4, lora_alpha=3.0, **fields)
    paper = by_the_paper(base, mixture, method, x)
    torch.testing.assert_close(ours, paper)
    inputs, upstream = [x, *mixture.parameters()], torch.randn_like(ours)
    for left, right in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(paper, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_all_ranks_with_equal_scores_are_plain_lora():
    base, mixture = build(top_k=6)
    nn.init.zeros_(mixture.router.score.weight)
    x = torch.randn(4, WIDTH, dtype=torch.double)
    bank = mixture.bank
    torch.testing.assert_close(mixture(x, base), base(x) + 0.5 * x @ bank.lora_a.T @ bank.lora_b.T)


def test_gates_sum_to_k_over_exactly_k_ranks_whatever_their_common_factor():
    _, mixture = build()
    select = mixture.router.select
    logits = torch.randn(50, 6, dtype=torch.double)
    chosen = select(logits)
    weights = chosen.routing_weights
    assert weights.shape == (50, 4)
    assert (weights > 0).all()
    assert all(len(set(row)) == 4 for row in chosen.selected_experts.tolist())
    torch.testing.assert_close(weights.sum(1), torch.full((50,), 4.0, dtype=torch.double))
    halved = select(torch.logit(torch.sigmoid(logits) / 2))
    torch.testing.assert_close(halved.routing_weights, weights)
    assert torch.equal(halved.selected_experts, chosen.selected_experts)


def test_blocks_of_ranks_are_experts_with_one_gate_a_block():
    base, mixture = build(rank_partition=2)
    x = torch.randn(6, WIDTH, dtype=torch.double)
    kept = []
    with mixture.routing_pass.listening(kept.append):
        ours = mixture(x, base)
    routing, bank = kept[0].routing, mixture.bank
    gates = torch.zeros(6, 3, dtype=torch.double).scatter(
        1, routing.selected_experts, routing.routing_weights
    )
    a, b = bank.lora_a.unflatten(0, (3, 2)), bank.lora_b.unflatten(1, (3, 2))
    experts = torch.einsum("te,oer,eri,ti->to", gates, b, a, x)
    torch.testing.assert_close(ours, base(x) + 0.75 * experts)


def test_identical_tokens_pick_identical_ranks_and_idle_ranks_get_no_gradient():
    base, mixture = build()
    x = torch.randn(1, WIDTH, dtype=torch.double).expand(5, WIDTH)
    kept = []
    with mixture.routing_pass.listening(kept.append):
        mixture(x, base).square().sum().backward()
    picks = kept[0].routing.selected_experts
    assert (picks == picks[0]).all()
    idle = sorted(set(range(6)) - set(picks[0].tolist()))
    assert mixture.bank.lora_a.grad[idle].abs().sum() == 0
    assert (mixture.bank.lora_a.grad[picks[0]].abs().sum(1) > 0).all()


def test_the_bias_moves_by_u_a_step_and_evens_the_picks():
    base, mixture = build(top_k=2, bias_update_rate=0.01)
    nn.init.zeros_(mixture.router.score.weight)
    x = torch.rand(200, WIDTH, dtype=torch.double) + 0.1
    with torch.no_grad():
        mixture.router.score.weight[0] = 1.0  # everybody picks rank 0
    picks = []
    with mixture.routing_pass.listening(
        lambda record: picks.append(record.routing.selected_experts.flatten().bincount(minlength=6))
    ):
        for step in range(40):
            mixture(x, base)
            if step == 0:
                before = bias_of(mixture).clone()
            moeroute.post_step(mixture)
            if step == 0:
                after = bias_of(mixture).clone()
    assert picks[0][0] == 200
    assert (after - before)[0] == pytest.approx(-0.01)
    assert picks[-1].max() - picks[-1].min() < picks[0].max() - picks[0].min()
    assert not any(key.endswith("bias") for key, _ in mixture.router.named_parameters())


def test_the_bias_is_frozen_in_eval_and_counts_a_recomputation_once():
    """The reference code moves the bias in forward: twice under activation checkpointing."""
    base, mixture = build(bias_update_rate=0.5)
    x = torch.randn(3, WIDTH, dtype=torch.double, requires_grad=True)
    plain = mixture.router.select.selection_bias
    mixture.eval()(x, base)
    moeroute.post_step(mixture)
    assert bias_of(mixture).abs().sum() == 0
    mixture.train()(x, base)
    counted = plain._counts.clone()
    plain.update(torch.zeros(6))
    checkpoint(mixture, x, base, use_reentrant=False).sum().backward()
    assert torch.equal(plain._counts, counted)
    assert bias_of(mixture).abs().sum() == 0  # nothing moves before the step
    moeroute.post_step(mixture)
    expected = 0.5 * torch.sign(counted.float().mean() - counted)
    assert torch.equal(bias_of(mixture), expected)


def test_the_bias_is_saved_in_float32_with_the_adapter_of_a_bfloat16_base(tmp_path):
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    base = LlamaForCausalLM(config).bfloat16()
    model = moeroute.wrap_model(base, SMoRA(r=4, top_k=2), target_modules=["q_proj"])
    biases = {k: v for k, v in model.state_dict().items() if k.endswith("correction_bias")}
    for value in biases.values():
        value.copy_(torch.linspace(0.1, 1 / 3, 4))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    (found,) = (value for key, value in saved.items() if key.endswith("correction_bias"))
    assert torch.equal(found, torch.linspace(0.1, 1 / 3, 4))
    again = PeftModel.from_pretrained(LlamaForCausalLM(config).bfloat16(), tmp_path)
    loaded = {k: v for k, v in again.state_dict().items() if k.endswith("correction_bias")}
    assert all(torch.equal(value, biases[key]) for key, value in loaded.items())
    assert len(loaded) == len(biases) == 1


def test_no_tensor_is_as_wide_as_tokens_by_outputs_by_ranks():
    """The reference code's dense form makes one of (T, O, r)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Widest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    base, mixture = build()
    with Widest() as widest:
        mixture(torch.randn(40, WIDTH, dtype=torch.double), base).sum().backward()
    assert widest.numel <= 40 * OUT


def test_very_negative_biases_and_saturated_scores_leave_finite_gates():
    _, mixture = build()
    bias_of(mixture).fill_(-2.0)
    weights = mixture.router.select(torch.randn(8, 6)).routing_weights
    torch.testing.assert_close(weights, torch.ones(8, 4))
    bias_of(mixture).zero_()
    for logits in (torch.full((8, 6), -200.0), torch.full((8, 6), 200.0)):
        torch.testing.assert_close(mixture.router.select(logits).routing_weights, torch.ones(8, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 4, "top_k": 5}, r"top_k=5 is outside 1..4"),
        ({"r": 4, "top_k": 0}, r"top_k=0 is outside 1..4"),
        ({"r": 8, "top_k": 3, "rank_partition": 2}, "rank_partition=2 does not divide"),
        ({"r": 9, "top_k": 4, "rank_partition": 2}, "rank_partition=2 does not divide"),
        ({"r": 8, "top_k": 1}, "the router would get no gradient"),
        ({"bias_update_rate": -1.0}, "would reward imbalance"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0 is outside"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SMoRA(**fields)
