"""The forms that a grouped product takes on a CPU: every one is taken, and all agree."""

import sys

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from moeroute_kernels import cpu, cpu_memory, grouped_mm


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the products that were called."""
    seen: set[str] = set()

    def spied(owner: object, name: str) -> None:
        inner = getattr(owner, name)

        def spy(*args: object, **kwargs: object) -> Tensor:
            out = kwargs.get("out")
            flipped = name == "mm" and out is None
            seen.add("flipped" if flipped else name)
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)

    spied(torch, "mm")
    spied(torch, "mv")
    spied(torch.nn.functional, "grouped_mm")
    return seen


def make(sizes: list[int], width: int, out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = torch.randn(len(sizes), out, width) * width**-0.5
    return torch.randn(sum(sizes), width).to(dtype), weight.to(dtype)


def ends_of(sizes: list[int]) -> Tensor:
    return torch.tensor(sizes).cumsum(0).int()


@pytest.mark.parametrize(
    ("sizes", "width", "dtype", "expected"),
    [
        ([1, 0, 1], 64, torch.float32, {"grouped_mm"}),
        ([4, 2, 8], 320, torch.float32, {"grouped_mm"}),
        ([4, 16, 48], 1024, torch.float32, {"mm", "flipped"}),
        ([4, 16, 48], 1023, torch.float32, {"mm"}),
        ([4, 8, 16], 1024, torch.float32, {"grouped_mm"}),
        ([65, 1], 320, torch.float32, {"mm", "mv"}),
        ([1, 1], 64, torch.bfloat16, {"mv"}),
        ([2, 6, 7], 64, torch.bfloat16, {"flipped", "mm"}),
        ([70, 2], 64, torch.bfloat16, {"flipped", "mm"}),
        ([5, 3], 63, torch.float32, {"mm"}),
        ([5, 3], 64, torch.float64, {"mm"}),
        ([300, 200], 64, torch.float32, {"mm"}),
    ],
)
def test_the_form_follows_the_rows(
    sizes: list[int], width: int, dtype: torch.dtype, expected: set[str], forms: set[str]
):
    rows, weight = make(sizes, width, 16, dtype)
    seen = cpu.mm_rows(rows, weight, cpu.expert_runs(ends_of(sizes)))
    assert forms == expected
    pairs = zip(rows.double().split(sizes), weight.double(), strict=True)
    assert_close("grouped_mm", seen, torch.cat([piece @ matrix.t() for piece, matrix in pairs]))


def test_a_big_float32_matrix_is_flipped_from_fewer_rows(forms: set[str]):
    sizes = [9, 10]
    rows, weight = make(sizes, 1024, cpu.FLIP_BIG_FLOAT32 // 1024, torch.float32)
    seen = cpu.mm_rows(rows, weight, cpu.expert_runs(ends_of(sizes)))
    assert forms == {"flipped"}
    exact = [p @ w.t() for p, w in zip(rows.double().split(sizes), weight.double(), strict=True)]
    assert_close("grouped_mm", seen, torch.cat(exact))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_weight_is_never_flipped(dtype: torch.dtype, forms: set[str]):
    sizes = [20, 16]
    rows, weight = make(sizes, 1024, 64, dtype)
    stored = weight.transpose(1, 2).contiguous().transpose(1, 2)
    seen = cpu.mm_rows(rows, stored, cpu.expert_runs(ends_of(sizes)))
    assert forms == {"grouped_mm"}
    exact = [p @ w.t() for p, w in zip(rows.double().split(sizes), weight.double(), strict=True)]
    assert_close("grouped_mm", seen, torch.cat(exact))


@pytest.mark.parametrize("offset", [0, 1])
def test_an_address_off_16_bytes_is_no_obstacle(offset: int, forms: set[str]):
    sizes = [3, 5]
    rows, weight = make(sizes, 64, 16, torch.float32)
    storage = torch.empty(weight.numel() + offset)
    moved = storage[offset:].view_as(weight).copy_(weight)
    seen = cpu.mm_rows(rows, moved, cpu.expert_runs(ends_of(sizes)))
    assert forms == ({"mm"} if offset else {"grouped_mm"})
    assert_close("grouped_mm", seen, cpu.mm_rows(rows.double(), weight.double(), runs_of(sizes)))


def runs_of(sizes: list[int]) -> cpu.Runs:
    return cpu.expert_runs(ends_of(sizes))


def test_strided_matrices():
    sizes = [3, 5]
    rows, weight = make(sizes, 64, 16, torch.float32)
    expected = cpu.mm_rows(rows, weight, runs_of(sizes))
    for spread in (torch.stack([weight, weight], -1)[..., 0], torch.cat([weight, weight], 2)):
        assert_close("grouped_mm", cpu.mm_rows(rows, spread[:, :, :64], runs_of(sizes)), expected)


def test_a_weight_of_another_dtype_is_cast_expert_by_expert():
    sizes = [3, 0, 5]
    rows, weight = make(sizes, 64, 16, torch.float16)
    seen = cpu.mm_rows(rows.float(), weight, runs_of(sizes))
    assert seen.dtype == torch.float32
    assert_close("grouped_mm", seen, cpu.mm_rows(rows.double(), weight.double(), runs_of(sizes)))


def test_padded_rows_are_zero():
    sizes = [3, 5]
    rows, weight = make(sizes, 64, 16, torch.float32)
    padded = cpu.mm_rows_padded(rows, weight, runs_of(sizes), 11)
    assert padded.shape == (11, 16)
    assert not padded[8:].any()
    assert torch.equal(padded[:8], cpu.mm_rows_padded(rows, weight, runs_of(sizes), 8))


class TestRuns:
    def test_names_the_experts_that_have_rows(self):
        runs = runs_of([0, 2, 0, 3, 0])
        assert (runs.experts, runs.sizes, runs.filled) == ([1, 3], [2, 3], 5)

    def test_splits_the_filled_rows(self):
        pieces = runs_of([0, 2, 0, 3]).split(torch.arange(7.0)[:, None])
        assert [piece.flatten().tolist() for piece in pieces] == [[0, 1], [2, 3, 4]]

    def test_without_rows(self):
        runs = runs_of([0, 0])
        assert len(runs.split(torch.ones(3, 2))) == len(runs.matrices(torch.ones(2, 4, 4))) == 0

    @pytest.mark.parametrize("sizes", [[1, 0, 0, 0, 0, 0], [1, 2, 0, 1], [1, 1]])
    def test_matrices(self, sizes: list[int]):
        runs = runs_of(sizes)
        weight = torch.randn(len(sizes), 3, 2)
        for expert, matrix in zip(runs.experts, runs.matrices(weight), strict=True):
            assert matrix.data_ptr() == weight[expert].data_ptr()


class TestWeightGradient:
    @pytest.mark.parametrize("lazily", [False, True])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_idle_experts_are_zero(
        self, lazily: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch
    ):
        if lazily:
            monkeypatch.setattr(cpu_memory, "MAP_BYTES", 1)
        sizes = [0, 2, 0, 0, 3, 0]
        left, right = torch.randn(5, 4), torch.randn(5, 6)
        like = torch.randn(6, 6, 4).transpose(1, 2) if transposed else torch.randn(6, 4, 6)
        seen = cpu.mm_weights(left, right, runs_of(sizes), like)
        expected = torch.zeros(6, 4, 6, dtype=torch.float64)
        expected[1] = left[:2].double().t() @ right[:2].double()
        expected[4] = left[2:].double().t() @ right[2:].double()
        assert seen.stride() == like.stride()
        assert_close("grouped_mm", seen, expected)
        assert not seen[[0, 2, 3, 5]].any()


class TestMemory:
    LINUX = sys.platform == "linux"

    @pytest.fixture(autouse=True)
    def pool(self, monkeypatch: pytest.MonkeyPatch) -> cpu_memory.Pool:
        """An empty pool, and every size is big enough for it."""
        pool = cpu_memory.Pool()
        monkeypatch.setattr(cpu_memory, "POOL", pool)
        monkeypatch.setattr(cpu_memory, "MAP_BYTES", 1)
        return pool

    def test_a_small_gradient_is_an_ordinary_tensor(
        self, pool: cpu_memory.Pool, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(cpu_memory, "MAP_BYTES", 1000)
        weight = torch.ones(4, 5, dtype=torch.bfloat16)
        gradient, is_zero = cpu_memory.gradient_like(weight, idle=1.0)
        assert (gradient.shape, gradient.dtype) == (weight.shape, weight.dtype)
        assert not is_zero
        del gradient
        assert pool.free_bytes() == 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("idle", [0.0, 1.0])
    def test_memory_lives_as_long_as_the_views_of_it(self, dtype: torch.dtype, idle: float):
        weight = torch.randn(3, 128, 64).to(dtype)
        gradient, _ = cpu_memory.gradient_like(weight, idle)
        view = gradient.copy_(weight)[1, 3:]
        del gradient
        others = [cpu_memory.gradient_like(weight, idle)[0].fill_(7) for _ in range(3)]
        assert len(others) == 3
        assert torch.equal(view, weight[1, 3:])

    def test_an_idle_gradient_is_zero_whatever_was_there(self):
        weight = torch.randn(3, 128, 64)
        for _ in range(3):
            gradient, is_zero = cpu_memory.gradient_like(weight, idle=0.9)
            assert is_zero == self.LINUX
            assert not is_zero or not gradient.any()
            gradient.fill_(5)
            del gradient

    @pytest.mark.skipif(not LINUX, reason="the pool serves Linux alone")
    def test_a_dead_gradient_leaves_its_memory_to_the_next(self, pool: cpu_memory.Pool):
        weight = torch.randn(3, 128, 64)
        first = cpu_memory.gradient_like(weight, idle=0.0)[0]
        address, view = first.data_ptr(), first[0]
        del first
        assert pool.free_bytes() == 0
        del view
        assert pool.free_bytes() == weight.nbytes
        second = cpu_memory.gradient_like(weight, idle=0.0)[0]
        assert second.data_ptr() == address
        assert cpu_memory.gradient_like(weight, idle=0.0)[0].data_ptr() != address
        assert pool.free_bytes() == weight.nbytes
        del second
        pool.clear()
        assert pool.free_bytes() == 0

    @pytest.mark.skipif(not LINUX, reason="the pool serves Linux alone")
    def test_training_uses_the_same_memory_in_every_step(self, pool: cpu_memory.Pool):
        weight = torch.randn(4, 16, 32, requires_grad=True)
        rows, ends = torch.randn(8, 32), torch.tensor([2, 4, 6, 8])
        addresses = set()
        for _ in range(4):
            grouped_mm(rows, weight, ends).sum().backward()
            assert weight.grad is not None
            addresses.add(weight.grad.data_ptr())
            weight.grad = None
        assert len(addresses) == 1
        assert pool.free_bytes() == weight.nbytes
        # gradients that add up need a second block only for as long as the sum takes
        for _ in range(3):
            grouped_mm(rows, weight, ends).sum().backward()
        assert pool.free_bytes() == weight.nbytes
