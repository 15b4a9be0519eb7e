import pytest
import torch

from moeroute.routers import TopKSoftmax
from moeroute.routers.by_label import OneGateInTraining
from moeroute.routers.expert_gates import GateScore
from moeroute.types import RouterInput


def given(tokens, shape=None, labels=None):
    shape = shape or (1, tokens.shape[0])
    return RouterInput(hidden_states=tokens, sequence_shape=shape, task_ids=labels)


def test_by_hand():
    score = GateScore(2, 2)
    with torch.no_grad():
        score.weight.copy_(torch.tensor([[2.0, 0.0], [3.0, 7.0]]))
    tokens = given(torch.tensor([[5.0, 1.0]]))
    torch.testing.assert_close(score(tokens), torch.tensor([[10.0, 22.0]]))
    # layer norms are (1, -1), (1, -1) and (-1, 1); divided by sqrt(2)
    expected = torch.tensor([[2**0.5, -(2**0.5)]])
    torch.testing.assert_close(score.eval()(tokens), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_float32_under_autocast_and_for_tokens_of_lower_precision(training):
    score = GateScore(8, 3).train(training)
    torch.nn.init.normal_(score.weight)
    tokens = torch.randn(5, 8).bfloat16()
    expected = score(given(tokens.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score(given(tokens)), expected)
    assert expected.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
@pytest.mark.parametrize("training", [False, True])
def test_no_tokens(shape, training):
    router = OneGateInTraining(GateScore(4, 3), TopKSoftmax(2)).train(training)
    labels = torch.zeros(shape[0], dtype=torch.int64)
    routing = router(given(torch.zeros(0, 4), shape, labels))
    assert routing.selected_experts.shape == (0, 1 if training else 2)


def test_another_width_is_refused():
    with pytest.raises(ValueError, match="tokens are 5 wide but the router was made for 4"):
        GateScore(4, 3)(given(torch.zeros(2, 5)))
