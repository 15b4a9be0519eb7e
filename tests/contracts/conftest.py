import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def make_llama():
    def make(**changes):
        torch.manual_seed(0)
        settings = {
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        return LlamaForCausalLM(LlamaConfig(**(settings | changes)))

    return make


@pytest.fixture
def name():
    """Each test of the suite is parametrised by the name of a method."""
    raise AssertionError("parametrise by name")


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.randint(0, 61, (3, 9))
    return {"input_ids": ids, "labels": ids.clone()}
