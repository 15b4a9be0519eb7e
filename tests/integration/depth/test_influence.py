"""Which layers matter, by how much they change their input."""

import pytest
import torch
from integration.depth.depth_models import LAYERS, ragged, tiny

from moeroute.depth import block_influence

pytestmark = pytest.mark.hf


def test_it_is_the_cosine_over_real_tokens():
    model, (ids, mask) = tiny(), ragged("left")
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        raw = []
        hooks = [
            layer.register_forward_hook(lambda _, args, output: raw.append((args[0], output)))
            for layer in model.model.layers
        ]
        model(input_ids=ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    assert torch.equal(raw[1][0], out.hidden_states[1])
    real = mask.bool()
    expected = [
        1 - torch.cosine_similarity(a[real].double(), b[real].double(), dim=-1).mean()
        for a, b in raw
    ]
    found = block_influence(model, [{"input_ids": ids, "attention_mask": mask}])
    torch.testing.assert_close(found, torch.stack(expected))
    halves = [{"input_ids": ids[:2], "attention_mask": mask[:2]}]
    halves.append({"input_ids": ids[2:], "attention_mask": mask[2:]})
    torch.testing.assert_close(block_influence(model, halves), found, rtol=1e-4, atol=1e-6)


def test_a_layer_that_does_nothing_has_none():
    model, (ids, _) = tiny(), ragged("left", (6,))
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[1].get_submodule(name).weight.zero_()
    found = block_influence(model, [{"input_ids": ids}])
    assert found.shape == (LAYERS,)
    assert found[1].abs() < 1e-9
    assert found.argmin() == 1
    with pytest.raises(ValueError, match="no batches"):
        block_influence(model, [])
