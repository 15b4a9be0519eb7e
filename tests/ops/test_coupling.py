"""The coupling of router and experts against its double sum."""

import math

import pytest
import torch

from moeroute.ops.coupling import coupling_loss, specialization

E, D, H = 6, 4, 10


def parts(dtype=torch.float64, requires_grad=False):
    return (
        torch.randn(E, H, dtype=dtype, requires_grad=requires_grad),
        torch.randn(E, D, H, dtype=dtype, requires_grad=requires_grad),
        torch.rand(E, H, dtype=dtype),
    )


def by_the_paper(rows, weights, alpha, draw):
    total = 0.0
    with torch.no_grad():
        bounds = []
        for i in range(E):
            nearest = min((rows[i] - rows[j]).norm() for j in range(E) if j != i)
            bounds.append(nearest / (2 * rows[i].norm()))
    strength = [
        [(weights[j] @ (rows[i] * (1 + (2 * draw[i] - 1) * bounds[i]))).norm() for j in range(E)]
        for i in range(E)
    ]
    for i in range(E):
        for j in range(E):
            if i != j:
                total = total + torch.relu(strength[i][j] - alpha * strength[i][i])
                total = total + torch.relu(strength[j][i] - alpha * strength[i][i])
    return total / E**2


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_it_is_the_double_sum_with_its_gradients(alpha):
    rows, weights, draw = parts(requires_grad=True)
    ours = coupling_loss(rows, weights, alpha=alpha, draw=draw)
    paper = by_the_paper(rows, weights, alpha, draw)
    torch.testing.assert_close(ours, paper)
    for left, right in zip(
        torch.autograd.grad(ours, (rows, weights)),
        torch.autograd.grad(paper, (rows, weights)),
        strict=True,
    ):
        torch.testing.assert_close(left, right)
        assert left.norm() > 0


def test_gradcheck_with_the_bound_held_fixed():
    rows, weights, _ = parts(requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: coupling_loss(r, w), (rows, weights))


def test_every_stretched_row_is_nearest_to_itself():
    rows, _, _ = parts()
    for _ in range(50):
        corners = torch.randint(0, 2, (E, H)).double()
        for draw in (torch.rand(E, H).double(), corners):
            stretch = (2 * draw - 1) * specialization(rows).unsqueeze(1)
            nearest = torch.cdist(rows * (1 + stretch), rows).argmin(1)
            assert nearest.tolist() == list(range(E))


def test_scales_permutation_and_alpha():
    rows, weights, draw = parts()
    loss = coupling_loss(rows, weights, draw=draw)
    torch.testing.assert_close(coupling_loss(3 * rows, weights, draw=draw), 3 * loss)
    torch.testing.assert_close(coupling_loss(rows, 2 * weights, draw=draw), 2 * loss)
    order = torch.randperm(E)
    torch.testing.assert_close(coupling_loss(rows[order], weights[order], draw=draw[order]), loss)
    values = [coupling_loss(rows, weights, alpha=a, draw=draw) for a in (0, 0.3, 0.5, 1, 2)]
    assert values == sorted(values, reverse=True)


def test_perfect_coupling_costs_nothing():
    rows = torch.eye(4)
    weights = torch.eye(4).unsqueeze(1)
    assert coupling_loss(rows, weights, alpha=0.1) < 1e-5
    torch.testing.assert_close(specialization(rows), torch.full((4,), math.sqrt(0.5)))


def test_no_matrices_larger_than_the_experts_answers():
    rows, weights = torch.randn(64, 32, requires_grad=True), torch.randn(64, 16, 32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, id):
        coupling_loss(rows, weights, draw=torch.rand(64, 32))
    assert max(kept) <= 64 * 64 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edges(dtype):
    assert coupling_loss(torch.randn(1, H, dtype=dtype), torch.randn(1, D, H, dtype=dtype)) == 0
    zeros = torch.zeros(3, H, dtype=dtype, requires_grad=True)
    loss = coupling_loss(zeros, torch.randn(3, D, H, dtype=dtype), draw=torch.rand(3, H))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(zeros.grad).all()
    same = torch.ones(3, H, dtype=dtype)
    assert specialization(same).max() == 0
    assert torch.isfinite(coupling_loss(same, torch.randn(3, D, H, dtype=dtype)))
