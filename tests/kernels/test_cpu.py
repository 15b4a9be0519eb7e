"""The forms that a grouped product takes on a CPU: every one is taken, and all agree."""

import sys

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from moeroute_kernels import cpu, cpu_memory


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
        ([4, 9, 32], 320, torch.float32, {"mm", "flipped"}),
        ([33, 1], 320, torch.float32, {"mm", "mv"}),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_weight_is_never_flipped(dtype: torch.dtype, forms: set[str]):
    sizes = [20, 10]
    rows, weight = make(sizes, 320, 64, dtype)
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
    SHAPE = (3, 1024, 1024)
    CPU = torch.device("cpu")

    def test_a_small_buffer_is_an_ordinary_one(self):
        tensor, is_zero = cpu_memory.allocate((4, 5), torch.bfloat16, self.CPU)
        assert tensor.shape == (4, 5)
        assert tensor.dtype == torch.bfloat16
        assert not is_zero

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_a_big_one_is_zero_writable_and_lives_as_long_as_its_views(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(cpu_memory, "MAP_BYTES", 2**20)
        tensor, is_zero = cpu_memory.allocate(self.SHAPE, dtype, self.CPU)
        assert is_zero == sys.platform.startswith("linux")
        view = tensor[1, 3:]
        view.fill_(2)
        del tensor
        assert (view == 2).all()

    def test_idle_buffers_are_mapped_sooner(self):
        size = cpu_memory.MAP_IDLE_BYTES // 4
        assert cpu_memory.MAP_IDLE_BYTES < cpu_memory.MAP_BYTES
        busy = cpu_memory.allocate((size,), torch.float32, self.CPU, idle=0.2)
        idle = cpu_memory.allocate((size,), torch.float32, self.CPU, idle=0.8)
        assert not busy[1]
        assert idle[1] == sys.platform.startswith("linux")
        assert not idle[0].any() or not idle[1]

    def test_no_elements(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(cpu_memory, "MAP_BYTES", 0)
        assert cpu_memory.empty((0, 4), torch.float32, self.CPU).shape == (0, 4)
