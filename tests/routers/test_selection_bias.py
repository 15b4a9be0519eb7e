import pytest
import torch
from torch import nn

from moeroute.routers import SelectionBias, deepseek_v3_router


def test_update_moves_against_the_load():
    bias = SelectionBias(4, update_rate=1e-3)
    bias.update(torch.tensor([5, 1, 3, 3]))
    torch.testing.assert_close(bias.e_score_correction_bias, torch.tensor([-1e-3, 1e-3, 0.0, 0.0]))
    bias.update(torch.tensor([3, 3, 3, 3]))
    assert bias.e_score_correction_bias[2] == 0


def test_it_evens_out_a_skewed_load():
    torch.manual_seed(0)
    bias = SelectionBias(4, update_rate=0.02)
    probs = torch.rand(512, 4) * torch.tensor([1.0, 0.7, 0.6, 0.5])
    for _ in range(60):
        counts = bias(probs).argmax(-1).bincount(minlength=4)
        bias.update(counts)
    assert counts.max() / counts.float().mean() < 1.25
    assert probs.argmax(-1).bincount(minlength=4).max() / 128 > 1.7


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_casting_the_model_leaves_the_bias_alone(cast):
    router = deepseek_v3_router(4, 8, 2)
    bias = router.select.selection_bias
    bias.e_score_correction_bias.fill_(0.1234567)
    cast(router)
    assert bias.e_score_correction_bias.dtype == torch.float32
    assert bias.e_score_correction_bias[0] == torch.tensor(0.1234567)
    assert router.score.weight.dtype != torch.float32


def test_it_is_saved_and_is_no_parameter():
    router = deepseek_v3_router(4, 8, 2)
    assert "select.selection_bias.e_score_correction_bias" in router.state_dict()
    assert [name for name, _ in router.named_parameters()] == ["score.weight"]


def test_bad_counts_and_sizes():
    with pytest.raises(ValueError, match="one count an expert"):
        SelectionBias(4).update(torch.ones(3))
    with pytest.raises(ValueError, match="num_experts=0"):
        SelectionBias(0)
