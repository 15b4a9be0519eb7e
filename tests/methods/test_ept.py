"""EPT against its equation, its gates, and its contrast of tasks."""

import pytest
import torch
from torch import nn

from moeroute.integration.adapters.sites import make_site
from moeroute.layers import LoRAMixture
from moeroute.layers.routed import aux_losses
from moeroute.methods import EPT
from moeroute.routing_pass import SampleInputs

IN, OUT = 12, 10  # neither 3 nor 4 divides 10: those experts are cropped
SMALL = {"num_tasks": 3, "r": 2, "kernel_sizes": (2, 3, 4, 4)}


def build(**fields):
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT).double()
    site = make_site(base, "q_proj", base, "linear")
    layer = EPT(**(SMALL | fields)).build(site, None).double()
    assert isinstance(layer, LoRAMixture)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    layer.routing_pass.samples = SampleInputs(task_ids=torch.tensor([2, 0]))
    return base, layer


def by_the_paper(base, layer, x, *, normalize, scaling):
    bank, score = layer.bank, layer.router.composed.score
    rows = []
    for token in x.flatten(0, 1):
        probs = torch.softmax(score.weight @ token / 0.05, 0)
        kept, chosen = probs.topk(2)
        row = base(token)
        for weight, expert in zip(kept / kept.sum() if normalize else kept, chosen, strict=True):
            size = bank.kernel_sizes[expert]
            seed = bank.meta_b[: -(-OUT // size)] @ bank.meta_a[:, : -(-IN // size)]
            kernel = bank.kernels[str(size)][int(expert == 3)]
            row = row + scaling * weight * (torch.kron(seed, kernel)[:OUT, :IN] @ token)
        rows.append(row)
    return torch.stack(rows).view(*x.shape[:2], OUT)


@pytest.mark.parametrize(("normalize", "scaling"), [(False, 1.0), (True, 0.3)])
@pytest.mark.parametrize("length", [4, 40])
def test_output_and_gradients_equal_the_equation(normalize, scaling, length):
    base, layer = build(normalize=normalize, scaling=scaling)
    x = torch.randn(2, length, IN, dtype=torch.double, requires_grad=True)
    ours = layer(x, base)
    paper = by_the_paper(base, layer, x, normalize=normalize, scaling=scaling)
    torch.testing.assert_close(ours, paper)
    inputs = [x, layer.router.composed.score.weight, *layer.bank.parameters()]
    upstream = torch.randn_like(ours)
    for left, right in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(paper, inputs, upstream, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(left, torch.zeros_like(left) if right is None else right)


def weights_of(layer, base, x):
    kept = []
    with layer.routing_pass.listening(kept.append):
        layer(x, base)
    return kept[0].routing.routing_weights


def test_gates_sum_to_less_than_one_unless_they_are_normalised():
    x = torch.randn(2, 6, IN, dtype=torch.double)
    for normalize in (False, True):
        base, layer = build(normalize=normalize, temperature=1.0)
        sums = weights_of(layer, base, x).sum(-1)
        assert torch.all(sums < 1) != normalize
        if normalize:
            torch.testing.assert_close(sums, torch.ones_like(sums))


def test_the_gates_are_nearly_hard_at_the_papers_temperature():
    x = torch.randn(2, 6, IN, dtype=torch.double)
    first = {}
    for temperature in (0.05, 1.0):
        base, layer = build(temperature=temperature)
        first[temperature] = weights_of(layer, base, x)[:, 0].mean()
    assert first[0.05] > 0.9
    assert first[1.0] < 0.7


def test_the_default_is_the_papers_pyramid():
    method = EPT()
    assert method.kernel_sizes == (2, 2, 4, 4, 6, 6, 8, 8)
    assert (method.top_k, method.temperature, method.contrast_coef) == (2, 0.05, 0.1)


def test_the_contrast_separates_tasks_by_their_routing():
    base, layer = build(kernel_sizes=(2, 2, 4, 4))
    centres = torch.randn(3, IN, dtype=torch.double)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        task_ids = torch.randint(0, 3, (12,))
        layer.routing_pass.samples = SampleInputs(task_ids=task_ids)
        layer(centres[task_ids].unsqueeze(1) + 0.1 * torch.randn(12, 4, IN).double(), base)
        loss = aux_losses(layer).parts["TaskContrastLoss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


def test_tasks_are_asked_for_where_the_contrast_trains():
    x = torch.randn(2, 4, IN, dtype=torch.double)
    base, layer = build()
    assert layer.router.task_embeddings.shape == (3, 4)
    layer.routing_pass.samples = SampleInputs()
    layer.eval()(x, base)
    with pytest.raises(ValueError, match="got no task_ids"):
        layer.train()(x, base)
    base, layer = build(contrast_coef=0.0)
    layer.routing_pass.samples = SampleInputs()
    layer.train()(x, base)
    assert not any("task" in name for name, _ in layer.named_parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel_sizes": ()}, "one size of at least 1"),
        ({"kernel_sizes": (2, 0)}, "one size of at least 1"),
        ({"kernel_sizes": (2, 2), "top_k": 3}, r"outside 1\.\.2"),
        ({"temperature": 0.0}, "above 0"),
        ({"contrast_coef": -0.1}, "use 0 or more"),
        ({"num_tasks": 0}, "num_tasks=0"),
        ({"r": 0}, "r=0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        EPT(**fields)
