"""The table of fused gates: what it takes, what it leaves alone, and that it is proven."""

import pytest
import torch
from integration import tiny_models
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.activations import ACT2FN

from moeroute.integration import expert_gates
from moeroute.integration.expert_gates import fused_gate

pytestmark = pytest.mark.hf

FUSED_ACTS = {
    "silu": "silu_glu",
    "swish": "silu_glu",
    "gelu": "gelu_glu",
    "gelu_python": "gelu_glu",
    "gelu_new": "gelu_tanh_glu",
    "gelu_pytorch_tanh": "gelu_tanh_glu",
    "gelu_python_tanh": "gelu_tanh_glu",
    "relu": "relu_glu",
    "sigmoid": "sigmoid_glu",
}


@pytest.fixture(scope="module")
def mixtral():
    return tiny_models.build("mixtral", implementation="moeroute")


@pytest.fixture
def experts(mixtral):
    module = next(tiny_models.experts_of(mixtral))
    act = module.act_fn
    yield module
    module.act_fn = act


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_every_activation_of_transformers_is_computed_right(experts, name):
    experts.act_fn = ACT2FN[name]
    fused = fused_gate(experts)
    assert (None if fused is None else fused.activation) == FUSED_ACTS.get(name)
    hidden_states = torch.randn(9, 32)
    ids, weights = torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    found = experts(hidden_states, ids, weights)
    experts.config._experts_implementation = "eager"
    expected = experts(hidden_states, ids, weights)
    experts.config._experts_implementation = "moeroute"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_every_row_of_the_table_belongs_to_a_family_and_is_proven():
    met = set()
    for family in tiny_models.registry_families():
        source = tiny_models.modelling_text(family)
        if "def _apply_gate" not in source and family != "mixtral":
            continue
        module = next(tiny_models.experts_of(tiny_models.build(family)))
        function = type(module)._apply_gate
        name = f"{function.__module__}.{function.__qualname__}"
        assert (fused_gate(module) is not None) == (name in expert_gates.KNOWN_GATES)
        met.add(name)
    assert met >= expert_gates.KNOWN_GATES.keys()


def test_a_gate_that_changed_under_its_name_is_not_fused(experts):
    known = type(experts)._apply_gate

    def changed(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate).clamp(max=500.0) * up

    changed.__module__, changed.__qualname__ = known.__module__, known.__qualname__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(experts), "_apply_gate", changed)
        assert fused_gate(experts) is None
    assert fused_gate(experts) is not None


def test_proving_computes_real_numbers_wherever_it_is_asked(experts):
    expert_gates._agrees.cache_clear()
    with FakeTensorMode(), torch.device("meta"):
        assert fused_gate(experts) is not None


def test_a_watched_activation_runs_as_a_module(experts):
    seen = []
    handle = experts.act_fn.register_forward_hook(lambda _, __, out: seen.append(out.shape))
    experts(torch.randn(3, 32), torch.zeros(3, 2, dtype=torch.int64), torch.rand(3, 2))
    handle.remove()
    assert seen == [(6, 48)]


def test_a_limit_that_is_no_number_is_not_fused():
    module = next(tiny_models.experts_of(tiny_models.build("gpt_oss")))
    assert fused_gate(module) is not None
    module.limit = nn.Parameter(torch.tensor(7.0))
    assert fused_gate(module) is None
    del module.limit
    module.limit = None
    assert fused_gate(module) is None
