"""T2MIR's own properties, and those of its contrast between pairs."""

import math

import pytest
import torch

import moeroute
from moeroute.losses import SamePairLoss
from moeroute.methods import T2MIR

EXPERTS, HIDDEN = 4, 6


def make(**fields):
    torch.manual_seed(0)
    return T2MIR(**fields).layer(HIDDEN, 5, EXPERTS)


def task_branch(layer):
    return layer.branches[1]


def routed(layer, x):
    kept = []
    branch = task_branch(layer)
    with branch.routing_pass.listening(kept.append):
        layer(x)
    return kept[-1]


def test_each_branch_gives_half_of_the_features():
    layer, x = make().eval(), torch.randn(2, 5, HIDDEN)
    halves = [branch(x) for branch in layer.branches]
    assert [half.shape[-1] for half in halves] == [3, 3]
    assert torch.equal(layer(x), torch.cat(halves, -1))


def test_a_branch_is_its_equation():
    branch, x = task_branch(make()).eval(), torch.randn(7, HIDDEN)
    score, experts = branch.router.score, branch.experts
    logits = torch.tanh(x @ score.inner.weight.T) @ score.outer.weight.T
    top, ids = logits.topk(2, dim=1)
    expected = torch.zeros(7, 3)
    for token in range(7):
        for weight, expert in zip(top[token].softmax(0), ids[token], strict=True):
            up = experts.up_proj[expert] @ x[token] + experts.up_proj_bias[expert]
            hidden = torch.nn.functional.leaky_relu(up)
            answer = experts.down_proj[expert] @ hidden + experts.down_proj_bias[expert]
            expected[token] += weight * answer
    torch.testing.assert_close(branch(x), expected)


def info_nce(queries, keys, w):
    half = queries.shape[0] // 2
    first = queries[:half] @ w @ keys[half:].T
    second = queries[half:] @ w @ keys[:half].T
    own = [torch.log_softmax(table, 1).diagonal().mean() for table in (first, second)]
    return -(own[0] + own[1]) / 2


@pytest.mark.parametrize("by_sequence", [False, True])
def test_the_contrast_is_the_papers(by_sequence):
    layer, x = make(by_sequence=by_sequence), torch.randn(6, 5, HIDDEN)
    record = routed(layer, x)
    router = task_branch(layer).router
    router = router.router if by_sequence else router
    with torch.no_grad():
        router.bilinear.mul_(3)
        logits = router.score.outer.weight @ torch.tanh(
            router.score.inner.weight @ (x.mean(1) if by_sequence else x.flatten(0, 1)).T
        )
    features = logits.T if by_sequence else logits.T.softmax(1).reshape(6, 5, -1).mean(1)
    torch.testing.assert_close(record.routing.features, features)
    loss = SamePairLoss()(record)
    torch.testing.assert_close(loss, info_nce(features, features, router.bilinear))
    loss.backward()
    assert router.bilinear.grad.abs().sum() > 0
    assert router.score.inner.weight.grad.abs().sum() > 0
    assert not list(router.momentum.parameters())
    tasks = torch.tensor([2, 0, 1, 5, 3, 4])  # tasks and their pairs in another order
    torch.testing.assert_close(SamePairLoss()(routed(layer, x[tasks])), loss.detach())
    with torch.no_grad():
        router.bilinear.zero_()
    torch.testing.assert_close(SamePairLoss()(record), torch.tensor(math.log(3)))
    assert SamePairLoss()(routed(layer, x[[0, 3]])) == 0


def test_the_momentum_gate_follows_once_a_step():
    layer = make(momentum=0.25)
    router = task_branch(layer).router
    before = router.momentum.inner.weight.clone()
    with torch.no_grad():
        router.score.inner.weight.add_(1.0)
    moeroute.post_step(layer)
    assert torch.equal(router.momentum.inner.weight, before)  # nothing was trained
    for _ in range(3):
        layer.train()(torch.randn(2, 4, HIDDEN))
        moeroute.post_step(layer)
    expected = before * 0.75**3 + router.score.inner.weight * (1 - 0.75**3)
    torch.testing.assert_close(router.momentum.inner.weight, expected)
    assert "momentum.inner.weight" in router.state_dict()


def test_by_sequence_all_tokens_of_a_sample_have_the_same_experts():
    routing = routed(make(by_sequence=True), torch.randn(2, 5, HIDDEN)).routing
    ids = routing.selected_experts.reshape(2, 5, -1)
    assert torch.equal(ids, ids[:, :1].expand_as(ids))


def test_both_branches_are_charged():
    layer = make()
    layer(torch.randn(4, 3, HIDDEN))
    assert set(moeroute.aux_losses(layer).parts) == {"ImportanceLoss", "SamePairLoss"}
    layer(torch.randn(3, 3, HIDDEN))
    with pytest.raises(ValueError, match="got 3 samples; give B/2 tasks"):
        moeroute.aux_losses(layer)


@pytest.mark.parametrize(
    ("fields", "told"),
    [({"top_k": 9}, "top_k=9"), ({"momentum": 0.0}, "momentum=0"), ({"num_experts": 0}, "=0")],
)
def test_fields_out_of_range(fields, told):
    with pytest.raises(ValueError, match=told):
        T2MIR(**fields)


def test_an_odd_width_cannot_be_halved():
    with pytest.raises(ValueError, match="hidden_size=5 is odd"):
        T2MIR().layer(5, 4, 3)
