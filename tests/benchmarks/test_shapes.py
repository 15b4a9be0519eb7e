"""Sizes stand in one file, and tokens choose their experts as the routing says."""

import ast
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks import shapes
from benchmarks.shapes import EXPERT_SHAPES, ROUTINGS, make_routing

FOLDER = Path(str(benchmarks.__file__)).parent
SMALLEST_SIZE = 16


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_no_expert_stands_twice_in_a_token(routing: str, tokens: int):
    shape = EXPERT_SHAPES["E64k8"]
    ids, weights = make_routing(routing, tokens, shape, torch.Generator().manual_seed(0))
    assert ids.shape == weights.shape == (tokens, shape.top_k)
    assert ids.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert all(len(set(row)) == shape.top_k for row in ids.tolist())
    assert ((ids >= 0) & (ids < shape.num_experts)).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(tokens))


def test_the_skew_grows_from_uniform_to_one_hot():
    shape = EXPERT_SHAPES["E64k8"]
    drawn = [
        make_routing(routing, 300, shape, torch.Generator().manual_seed(0))[0]
        for routing in ("uniform", "zipf", "one_hot")
    ]
    uniform, zipf, one_hot = (int(ids.flatten().bincount().max()) for ids in drawn)
    assert 2 * uniform < zipf < one_hot == 300


def test_an_unknown_routing_is_named():
    with pytest.raises(ValueError, match="unknown routing 'even'; use one of uniform, zipf"):
        make_routing("even", 1, EXPERT_SHAPES["tiny"], torch.Generator())


def test_sizes_are_literals_of_their_files():
    sizes = {
        value
        for value in (
            *shapes.CPU_TOKENS,
            *shapes.GPU_TOKENS,
            shapes.ROTATE_BELOW_TOKENS,
            *(size for shape in EXPERT_SHAPES.values() for size in astuple(shape)[1:]),
        )
        if isinstance(value, int) and value >= SMALLEST_SIZE
    }
    found = [
        f"{path.name}:{node.lineno}: {node.value}"
        for path in FOLDER.glob("*.py")
        if path.name not in ("shapes.py", "gate_shapes.py", "depth_shapes.py", "lora_baselines.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in sizes
    ]
    assert found == []
