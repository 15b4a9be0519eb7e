"""The physical limit of a layer, and layers named by their sizes."""

import pytest

from benchmarks.floors import Row
from benchmarks.roofline import Ceiling, ceilings, least_seconds, limits, operations
from benchmarks.run import main
from benchmarks.shapes import EXPERT_SHAPES, expert_shape

FREE_MEMORY = Ceiling(flops=1.0, bytes=float("inf"))
FREE_PRODUCTS = Ceiling(flops=float("inf"), bytes=1.0)


def row(mode: str, shape: str, tokens: int) -> Row:
    return Row(("routed_mlp", mode, shape, tokens, "bf16", "uniform"), {})


def test_products_by_hand():
    # 5 tokens in 2 slots, three matrices of 8 x 4, two operations each
    forward = 5 * 2 * 3 * 8 * 4 * 2
    assert least_seconds(row("fwd", "8x4-E3k2", 5), FREE_MEMORY) == forward
    assert least_seconds(row("fwd_bwd", "8x4-E3k2", 5), FREE_MEMORY) == 3 * forward


def test_traffic_by_hand():
    # one token in one slot of one expert: x and y, three matrices, the activated row, its output
    elements = 2 * 8 + 3 * 8 * 4 + 2 * 4 + 2 * 8
    assert least_seconds(row("fwd", "8x4-E1k1", 1), FREE_PRODUCTS) == 2 * elements


def test_more_tokens_hit_more_experts():
    one, many = (least_seconds(row("fwd", "E64k8", t), FREE_PRODUCTS) for t in (1, 8))
    assert one < many < 8 * one


def lora(op: str, mode: str, shape: str, tokens: int) -> Row:
    return Row((op, mode, shape, tokens, "bf16", "uniform"), {})


def test_a_mixture_over_one_linear_by_hand():
    # 3 tokens, 2 slots, rank 8, 1024 wide: the linear, then A and B of each slot
    linear, pairs = 2 * 3 * 1024**2, 2 * 3 * 2 * 8 * 2048
    forward, both = (lora("gated_lora", mode, "E4k2r8", 3) for mode in ("fwd", "fwd_bwd"))
    assert operations(forward.key) == linear + pairs
    # backward: the frozen linear has a gradient of its input alone, the pairs of both
    assert operations(both.key) == 2 * linear + 3 * pairs
    hit = 4 * (1 - 0.5**3)
    moved = 2 * 3 * 1024 + 1024**2 + hit * 8 * 2048
    assert least_seconds(forward, FREE_PRODUCTS) == 2 * moved


def test_lora_on_experts_by_hand():
    # one token, 2 slots of 4 experts of 32 -> 2 * 16, rank 2: every group is hit at most once
    forward, both = (lora("grouped_lora", mode, "tiny-r2", 1) for mode in ("fwd", "fwd_bwd"))
    matrix, pair = 32 * 32, 2 * (32 + 32)
    assert operations(forward.key) == 2 * 2 * (matrix + pair)
    assert operations(both.key) == 2 * 2 * (2 * matrix + 3 * pair)
    moved = 2 * (32 + 32) + 2 * matrix + 2 * pair
    assert least_seconds(forward, FREE_PRODUCTS) == 2 * moved


def test_a_layer_with_lora_on_its_experts_by_hand():
    # 1 token, 2 slots of 4 experts of 32 -> 2 * 16 and 16 -> 32, rank 2
    forward, both = (lora("expert_lora", mode, "tiny-r2", 1) for mode in ("fwd", "fwd_bwd"))
    matrix, pairs = 3 * 32 * 16, 2 * (32 + 32) + 2 * (16 + 32)
    assert operations(forward.key) == 2 * 2 * (matrix + pairs)
    assert operations(both.key) == 2 * 2 * (2 * matrix + 3 * pairs)
    # x and y, the activated row written and read, the row of each slot likewise
    moved = 2 * 32 + 2 * 2 * (16 + 32) + 2 * (matrix + pairs)
    assert least_seconds(forward, FREE_PRODUCTS) == 2 * moved


def test_only_times_have_a_limit():
    rows = [row(mode, "tiny", 4) for mode in ("fwd", "fwd_bwd", "mem", "launches", "graph")]
    found = limits(rows, {"bf16": Ceiling(flops=1e12, bytes=1e12)})
    assert list(found) == [row("fwd", "tiny", 4).key, row("fwd_bwd", "tiny", 4).key]
    assert found[rows[1].key] > found[rows[0].key] > 0


def test_ceilings_are_measured():
    seen = ceilings(["fp32"], "cpu")["fp32"]
    assert 1e9 < seen.flops < 1e14
    assert 1e8 < seen.bytes < 1e12


def test_a_shape_is_read_off_its_name():
    shape = expert_shape("2048x768-E128k8")
    sizes = (shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k)
    assert sizes == (2048, 768, 128, 8)
    assert expert_shape("E8k2") is EXPERT_SHAPES["E8k2"]


@pytest.mark.parametrize("name", ["8x0-E4k2", "8x8-E2k3"])
def test_sizes_that_no_layer_has(name: str):
    with pytest.raises(ValueError, match="every size is at least 1, and K at most E"):
        expert_shape(name)


def test_a_layer_of_ones_own(capsys: pytest.CaptureFixture[str]):
    sizes = "--hidden-size 24 --intermediate-size 16 --experts 4 --top-k 2 --tokens 3"
    assert main([*sizes.split(), "--modes", "fwd", "--dtype", "fp32", "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "24x16-E4k2" in out
    assert "limit" in out


def test_half_a_layer(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--hidden-size", "24", "--experts", "4"])
    assert "takes all of --hidden-size, --intermediate-size" in capsys.readouterr().err
