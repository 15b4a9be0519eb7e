"""Loss against layers executed, as numbers and on the command line."""

import re

import pytest
import torch
from integration.depth.depth_models import LAYERS, VOCAB, tiny
from typer.testing import CliRunner

import moeroute
from moeroute.cli import app
from moeroute.depth import block_influence, depth_curve

pytestmark = pytest.mark.hf


def batches():
    torch.manual_seed(0)
    return [torch.randint(3, VOCAB, (2, 9)), torch.randint(3, VOCAB, (1, 5))]


def test_each_point_is_a_forced_depth():
    model = tiny()
    points = depth_curve(model, batches(), most_skipped=2)
    order = block_influence(model, [{"input_ids": ids} for ids in batches()]).argsort().tolist()
    assert [point.layers for point in points] == [3, 2, 1]
    assert [point.skipped for point in points] == [(), tuple(order[:1]), tuple(order[:2])]
    assert points[0].flops > points[1].flops > points[2].flops
    for point in points:
        actions = [int(layer not in point.skipped) for layer in range(LAYERS)]
        total, count = 0.0, 0
        with moeroute.force_depth(model, actions), torch.no_grad():
            for ids in batches():
                loss = model(input_ids=ids, labels=ids).loss.item()
                total, count = total + loss * ids[:, 1:].numel(), count + ids[:, 1:].numel()
        assert point.loss == pytest.approx(total / count, rel=1e-4)


def test_more_layers_than_there_are():
    with pytest.raises(ValueError, match="most_skipped=4, but the model has 3 layers"):
        depth_curve(tiny(), batches(), most_skipped=4)
    with pytest.raises(ValueError, match="no token to predict"):
        depth_curve(tiny(), [torch.ones(2, 1, dtype=torch.int64)])


def test_the_command_prints_the_curve(tmp_path):
    from transformers import ByT5Tokenizer

    tiny(vocab_size=384).save_pretrained(tmp_path / "checkpoint")
    ByT5Tokenizer().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "text.txt").write_text("So much depends upon a red wheel barrow. " * 4)
    arguments = [
        str(tmp_path / "checkpoint"),
        "--text",
        str(tmp_path / "text.txt"),
        "--length",
        "32",
    ]
    done = CliRunner().invoke(app, ["depth", *arguments, "--skip", "3"])
    assert done.exit_code == 0, done.output
    assert [int(row) for row in re.findall(r"│ +(\d) │", done.output)] == [3, 2, 1, 0]
    done = CliRunner().invoke(app, ["depth", *arguments, "--skip", "4"])
    assert done.exit_code == 1
    assert "the model has 3 layers" in done.output
