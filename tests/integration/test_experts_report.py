"""Who decides a model's experts, and the warning for those whom nobody asks."""

import warnings

import pytest
from torch import nn
from transformers import (
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from moeroute.integration.experts_report import experts_report, warn_if_ignored
from moeroute.layers import SwiGLUExperts

pytestmark = pytest.mark.hf

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def llama4(implementation="eager"):
    return Llama4ForCausalLM(
        Llama4TextConfig(
            **SIZES,
            intermediate_size_mlp=16,
            head_dim=8,
            num_local_experts=2,
            interleave_moe_layer_step=1,
            pad_token_id=0,
            experts_implementation=implementation,
        )
    )


def jetmoe(implementation="eager"):
    config = JetMoeConfig(**SIZES, kv_channels=8, num_local_experts=2, num_experts_per_tok=1)
    config._experts_implementation = implementation
    return JetMoeForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "class_name"), [(llama4, "Llama4TextExperts"), (jetmoe, "JetMoeParallelExperts")]
)
def test_building_for_moeroute_names_the_experts_that_ignore_it(build, class_name):
    with pytest.warns(UserWarning, match=f"no effect on {class_name}") as caught:
        model = build("moeroute")
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=f"no effect on {class_name}"):
        report = warn_if_ignored(model)
    assert {name for _, name in report.ignored} == {class_name}
    assert report.dispatched == ()
    assert len(report.ignored) >= 2


@pytest.mark.parametrize("build", [llama4, jetmoe])
def test_nothing_is_said_when_moeroute_was_not_asked_for(build):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = warn_if_ignored(build())
    assert report.ignored


def test_a_dense_model_and_layers_of_ours_are_not_reported():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, experts_implementation="moeroute"))
    model.extra = SwiGLUExperts(2, 4, 4)
    report = warn_if_ignored(model)
    assert report == experts_report(nn.Linear(1, 1))
