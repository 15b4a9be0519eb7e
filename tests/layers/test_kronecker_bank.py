"""A bank of Kronecker experts against the transposed convolution that defines it."""

import pytest
import torch
from torch import nn

from moeroute.layers import KroneckerBank


def make(kernel_sizes=(2, 4, 2, 3), width=12, out=24, rank=3, **fields):
    bank = KroneckerBank(
        kernel_sizes=kernel_sizes, r=rank, in_features=width, out_features=out, **fields
    ).double()
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    return bank


def deconvolved(bank, expert):
    """The expert's matrix as the paper makes it: pruned meta matrix, then a deconvolution."""
    size = bank.kernel_sizes[expert]
    rows, columns = -(-bank.out_features // size), -(-bank.in_features // size)
    seed = bank.meta_b[:rows] @ bank.meta_a[:, :columns]
    kernel = bank.kernels[str(size)][bank.kernel_sizes[:expert].count(size)]
    weight = nn.functional.conv_transpose2d(seed[None, None], kernel[None, None], stride=size)
    return weight[0, 0, : bank.out_features, : bank.in_features] * bank.scaling


@pytest.mark.parametrize("tokens", [3, 100])
@pytest.mark.parametrize(("width", "out"), [(12, 24), (10, 7), (5, 17)])
def test_equals_the_deconvolved_matrices(tokens, width, out):
    bank = make(width=width, out=out, scaling=0.7)
    x, base = torch.randn(tokens, width).double(), torch.randn(tokens, out).double()
    ids, weights = torch.randint(0, 5, (tokens, 2)), torch.rand(tokens, 2).double()  # 4 is empty
    expected = base.clone()
    for token in range(tokens):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            if expert < 4:
                expected[token] += weight * (deconvolved(bank, expert) @ x[token])
    torch.testing.assert_close(bank(base, x, ids, weights), expected)
    for expert in range(4):
        torch.testing.assert_close(bank.expert_weight(expert), deconvolved(bank, expert))


@pytest.mark.parametrize("tokens", [7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fresh_kernels_change_no_bit(tokens, dtype):
    bank = KroneckerBank(kernel_sizes=(2, 3), r=2, in_features=5, out_features=4)
    base, x = torch.randn(tokens, 4).to(dtype), torch.randn(tokens, 5).to(dtype)
    ids = torch.randint(0, 2, (tokens, 2))
    assert torch.equal(bank(base, x, ids, torch.rand(tokens, 2)), base)


def test_a_kernel_of_one_number_is_plain_lora():
    bank = make(kernel_sizes=(1,))
    with torch.no_grad():
        bank.kernels["1"].fill_(1.0)
    x, base = torch.randn(6, 12).double(), torch.randn(6, 24).double()
    ours = bank(base, x, torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1).double())
    torch.testing.assert_close(ours, base + x @ bank.meta_a.T @ bank.meta_b.T)


def test_ranks_multiply():
    bank = make(kernel_sizes=(4,), width=32, out=32, rank=3)
    assert torch.linalg.matrix_rank(bank.expert_weight(0)) == 3 * 4
    with torch.no_grad():
        bank.kernels["4"][:, 2:] = 0
    assert torch.linalg.matrix_rank(bank.expert_weight(0)) == 3 * 2


def test_an_expert_costs_its_kernel_alone():
    def numbers(sizes):
        return sum(parameter.numel() for parameter in make(kernel_sizes=sizes).parameters())

    assert numbers((2, 2, 4, 4)) - numbers((2, 2, 4)) == 16


def test_an_expert_without_tokens_gets_a_zero_gradient():
    bank = make()
    ids = torch.zeros(5, 1, dtype=torch.int64)
    out = bank(torch.zeros(5, 24).double(), torch.randn(5, 12).double(), ids, torch.ones(5, 1))
    out.sum().backward()
    assert bank.kernels["2"].grad[0].any()
    assert not bank.kernels["2"].grad[1].any()
    assert not bank.kernels["4"].grad.any()


def test_padding_of_nan_stays_in_its_own_rows():
    bank, x = make(), torch.randn(100, 12).double()
    base, ids, weights = (
        torch.zeros(100, 24).double(),
        torch.ones(100, 1).long(),
        torch.ones(100, 1),
    )
    expected = bank(base, x, ids, weights)
    x[3] = float("nan")
    keep = torch.arange(100) != 3
    torch.testing.assert_close(bank(base, x, ids, weights)[keep], expected[keep])


@pytest.mark.parametrize("sizes", [(), (2, 0)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="one size of at least 1"):
        make(kernel_sizes=sizes)
