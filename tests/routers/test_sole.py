import torch

from moeroute.routers.sole import SoleExpert
from moeroute.types import Router, RouterInput


def test_every_token_gets_the_one_expert():
    router = SoleExpert()
    assert isinstance(router, Router)
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        tokens = torch.randn(3, 4, dtype=dtype)
        output = router(RouterInput(hidden_states=tokens, sequence_shape=(1, 3)))
        assert output.routing_weights.dtype == wide
        assert torch.equal(output.routing_weights, torch.ones(3, 1, dtype=wide))
        assert torch.equal(output.selected_experts, torch.zeros(3, 1, dtype=torch.int64))
    assert not list(router.parameters())
