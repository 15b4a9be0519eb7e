"""The head of a first pass, and the routers that listen to it."""

from dataclasses import replace

import pytest
import torch

from moeroute.routers.first_pass import MLP, EqualInFirstPass, FirstPassHead, FirstPassScore
from moeroute.types import RouterInput, RouterOutput

TOKENS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
INPUT = RouterInput(hidden_states=TOKENS, sequence_shape=(2, 3))


def test_each_site_takes_the_columns_of_its_place():
    head = FirstPassHead(MLP(4, 6), 2, ["a", "b", "c"], temperature=0.5)
    said = head(INPUT)
    torch.testing.assert_close(said, 2 * head.mlp(TOKENS))
    scores = [head.score(site) for site in "abc"]
    places = [score(replace(INPUT, first_pass=said)) for score in scores]
    assert torch.equal(torch.cat(places, 1), said)
    assert [score.head is head for score in scores] == [True, False, False]


def test_sites_that_share_one_place_hear_the_same():
    head = FirstPassHead(MLP(4, 2), 2, ["a", "b", "c"])
    heard = replace(INPUT, first_pass=head(INPUT))
    assert torch.equal(head.score("a")(heard), head.score("c")(heard))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_are_of_full_precision_under_autocast(dtype):
    mlp = MLP(4, 3, depth=3, width=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = mlp(TOKENS.to(dtype))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, mlp(TOKENS.to(dtype).float()))
    assert mlp.double()(TOKENS).dtype == torch.float64


def test_a_sample_is_the_mean_of_its_real_tokens_and_is_remembered():
    head = FirstPassHead(MLP(4, 2), 2, ["a"], per_sample=True)
    mask = torch.tensor([True, True, False, True, True, True])
    poisoned = TOKENS.masked_fill(~mask.unsqueeze(1), float("nan"))
    memory = {}
    assert head.recall(memory, (2, 3)) is None
    said = head(replace(INPUT, hidden_states=poisoned, token_mask=mask, memory=memory))
    means = torch.stack([TOKENS[:2].mean(0), TOKENS[3:].mean(0)])
    torch.testing.assert_close(said, head.mlp(means).repeat_interleave(3, 0))
    assert torch.equal(head.recall(memory, (2, 1)), said[::3])
    assert not head.recall(memory, (2, 1)).requires_grad
    with pytest.raises(ValueError, match="filled with 2 samples but this call has 3"):
        head.recall(memory, (3, 1))


def test_tokens_are_never_remembered():
    head, memory = FirstPassHead(MLP(4, 2), 2, ["a"]), {}
    head(replace(INPUT, memory=memory))
    assert not memory
    assert head.recall(memory, (2, 1)) is None


def test_a_first_pass_over_other_tokens_or_none():
    score = FirstPassScore(2)
    with pytest.raises(ValueError, match="there was no first pass"):
        score(INPUT)
    with pytest.raises(ValueError, match="ended in 5 tokens but this linear is asked for 6"):
        score(replace(INPUT, first_pass=torch.zeros(5, 2)))


def test_every_expert_weighs_the_same_in_the_first_pass():
    def second(router_input):
        return RouterOutput(
            router_logits=router_input.first_pass,
            routing_weights=router_input.first_pass[:, :1],
            selected_experts=torch.zeros(6, 1, dtype=torch.int64),
        )

    second.num_experts = 2
    router = EqualInFirstPass(second, 0.25)
    routing = router(replace(INPUT, first_pass=torch.zeros(6, 0)))
    assert torch.equal(routing.routing_weights, torch.full((6, 2), 0.25))
    assert torch.equal(routing.selected_experts, torch.tensor([[0, 1]]).expand(6, 2))
    said = torch.randn(6, 2)
    assert torch.equal(router(replace(INPUT, first_pass=said)).router_logits, said)
    with pytest.raises(TypeError):
        router(INPUT)  # nobody ran a first pass: the second's router is asked


def test_bad_sizes():
    with pytest.raises(ValueError, match="depth=0"):
        MLP(4, 2, depth=0)
    with pytest.raises(ValueError, match="5 numbers, neither 2 for all sites nor so many"):
        FirstPassHead(MLP(4, 5), 2, ["a", "b"])
    with pytest.raises(ValueError, match="3 wide but the router was made for 4"):
        MLP(4, 2)(torch.zeros(1, 3))
