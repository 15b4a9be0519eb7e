import subprocess
import sys

import pytest
import torch
from torch import nn

from moeroute.routers import SelectionBias, deepseek_v3_router
from moeroute.routers.selection_bias import FORWARDS_WITHOUT_A_STEP
from moeroute.types import RouterOutput, RoutingRecord


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


def routed(ids, mask=None):
    ids = torch.tensor(ids)
    routing = RouterOutput(
        router_logits=torch.zeros(ids.shape[0], 4),
        routing_weights=torch.ones(ids.shape),
        selected_experts=ids,
    )
    return RoutingRecord(site="", layer_index=0, routing=routing, token_mask=mask)


def test_a_step_moves_by_all_that_was_observed_without_padding():
    bias = SelectionBias(4, update_rate=0.5)
    bias.observe(routed([[0, 1], [0, 2]]))
    bias.observe(routed([[0, 4], [3, 3], [3, 3]], torch.tensor([True, False, False])))
    assert bias.e_score_correction_bias.abs().sum() == 0
    bias.post_step()  # counts 3, 1, 1, 0; mean 1.25
    assert bias.e_score_correction_bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    bias.post_step()
    assert bias.e_score_correction_bias.tolist() == [-0.5, 0.5, 0.5, 0.5]


def test_a_rate_of_zero_keeps_the_bias():
    bias = SelectionBias(4, update_rate=0.0)
    for _ in range(FORWARDS_WITHOUT_A_STEP):
        bias.observe(routed([[0, 1]]))
    bias.post_step()
    assert bias.e_score_correction_bias.abs().sum() == 0


def test_it_says_once_that_nothing_moves_it():
    bias = SelectionBias(4)
    for _ in range(FORWARDS_WITHOUT_A_STEP - 1):
        bias.observe(routed([[0, 1]]))
    with pytest.warns(UserWarning, match=r"moeroute\.post_step\(model\) after every"):
        bias.observe(routed([[0, 1]]))
    bias.observe(routed([[0, 1]]))
    assert bias.e_score_correction_bias.abs().sum() == 0


def test_steps_keep_it_quiet():
    bias = SelectionBias(4)
    for _ in range(FORWARDS_WITHOUT_A_STEP + 1):
        bias.observe(routed([[0, 1]]))
        bias.post_step()


TWO_RANKS = """
import sys
import torch
from torch import distributed
from moeroute.routers import SelectionBias
from moeroute.types import RouterOutput, RoutingRecord

rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
bias = SelectionBias(3, update_rate=0.5)
for ids in ([[0], [0], [1]], None) if rank == 0 else ([[2], [2], [2], [1]], None):
    if ids is not None:
        ids = torch.tensor(ids)
        routing = RouterOutput(
            router_logits=torch.zeros(len(ids), 3),
            routing_weights=torch.ones(ids.shape),
            selected_experts=ids,
        )
        bias.observe(RoutingRecord(site="", layer_index=0, routing=routing))
    bias.post_step()
if rank == 1:  # only one of the two has seen anything
    bias.observe(RoutingRecord(site="", layer_index=0, routing=routing))
bias.post_step()
print(bias.e_score_correction_bias.tolist())
distributed.destroy_process_group()
"""


def test_counts_are_summed_over_ranks(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in ranks]
    # counts 2, 2, 3, mean 2.33; then nothing; then 0, 1, 3, mean 1.33
    assert said == ["[1.0, 1.0, -1.0]"] * 2


def test_a_proportional_update_moves_by_the_share_an_expert_is_off():
    bias = SelectionBias(4, update_rate=0.1, proportional=True)
    bias.update(torch.tensor([8, 4, 4, 0]))
    torch.testing.assert_close(bias.e_score_correction_bias, torch.tensor([-0.1, 0.0, 0.0, 0.1]))
    bias.update(torch.tensor([80, 40, 40, 0]))  # ten times the tokens, the same step
    torch.testing.assert_close(bias.e_score_correction_bias, torch.tensor([-0.2, 0.0, 0.0, 0.2]))
    bias.update(torch.zeros(4))
    torch.testing.assert_close(bias.e_score_correction_bias, torch.tensor([-0.2, 0.0, 0.0, 0.2]))
