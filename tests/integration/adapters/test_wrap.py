"""Bad input to wrap_model and to adapter loading: a clear error before anything has changed."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import moeroute
from moeroute.methods import MixLoRA, MoLoRA


def tiny_llama(hidden_size=32):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=hidden_size,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


SMALL = MixLoRA(r=2, num_experts=4)


def unchanged(model, names):
    return [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"top_k": 9}, ["top_k=9", "num_experts=8"]),
        ({"top_k": 0}, ["top_k=0"]),
        ({"num_experts": 0}, ["num_experts=0"]),
        ({"r": 0}, ["r=0"]),
        ({"lora_dropout": 1.0}, ["lora_dropout=1.0"]),
        ({"router_aux_loss_coef": -1.0}, ["router_aux_loss_coef"]),
    ],
)
@pytest.mark.parametrize("method", [MixLoRA, MoLoRA])
def test_fields_out_of_range(method, fields, words):
    with pytest.raises(ValueError, match=method.__name__) as error:
        method(**fields)
    assert all(word in str(error.value) for word in words)


def test_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match="mixlora"):
        moeroute.wrap_model(tiny_llama(), "mixlra")


def test_unknown_field_of_a_method_names_the_nearest():
    with pytest.raises(ValueError, match="num_experts"):
        moeroute.MoeRouteConfig(method="mixlora", method_fields={"num_expert": 4})


def test_unknown_peft_field():
    with pytest.raises(ValueError, match="target_moduls"):
        moeroute.wrap_model(tiny_llama(), SMALL, target_moduls=["mlp"])


def test_a_name_takes_fields_of_both_kinds():
    model = moeroute.wrap_model(
        tiny_llama(), "mixlora", r=2, num_experts=4, target_modules=["layers.1.mlp"]
    )
    assert model.peft_config["default"].method_fields["r"] == 2
    assert len(moeroute.routers(model)) == 1


def test_no_target_matched_names_the_nearest_and_changes_nothing():
    model = tiny_llama()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="q_proj") as error:
        moeroute.wrap_model(model, MoLoRA(), target_modules=["q_prj"])
    assert "q_prj" in str(error.value)
    assert unchanged(model, names)


def test_one_idle_entry_of_several_is_named():
    model = tiny_llama()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="w_proj"):
        moeroute.wrap_model(model, MoLoRA(), target_modules=["q_proj", "w_proj"])
    assert unchanged(model, names)


def test_target_of_the_wrong_kind():
    model = tiny_llama()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="not a mlp site"):
        moeroute.wrap_model(model, SMALL, target_modules=["mlp", "self_attn"])
    assert unchanged(model, names)


def test_a_block_that_computes_something_else_is_refused():
    model = tiny_llama()
    block = type(model.model.layers[0].mlp)

    class Doubled(block):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[1].mlp.__class__ = Doubled
    with pytest.raises(ValueError, match="does not compute"):
        moeroute.wrap_model(model, SMALL)


def test_wrapping_twice():
    model = moeroute.wrap_model(tiny_llama(), SMALL)
    with pytest.raises(ValueError, match="another adapter_name"):
        moeroute.wrap_model(model, SMALL)
    with pytest.raises(ValueError, match="unwrap it first"):
        moeroute.wrap_model(model.get_base_model(), SMALL)


def test_wrapping_a_model_with_plain_lora():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="LORA"):
        moeroute.wrap_model(model, SMALL)


def test_unwrapping_a_plain_model():
    with pytest.raises(ValueError, match="not wrapped"):
        moeroute.unwrap_model(tiny_llama())


def test_two_active_adapters_are_refused():
    model = moeroute.wrap_model(tiny_llama(), SMALL)
    moeroute.wrap_model(model, SMALL, adapter_name="second")
    with pytest.raises(ValueError, match="cannot be active together"):
        model.base_model.set_adapter(["default", "second"])


def test_mixed_batches_are_refused():
    model = moeroute.wrap_model(tiny_llama(), SMALL, task_type="CAUSAL_LM").eval()
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long), adapter_names=["default"])


@pytest.fixture
def adapter(tmp_path):
    model = moeroute.wrap_model(tiny_llama(), SMALL)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_base_of_another_shape(adapter):
    with pytest.raises(ValueError, match="another shape"):
        PeftModel.from_pretrained(tiny_llama(hidden_size=40), adapter)


def test_missing_and_foreign_tensors(adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "router" in key)
    save_file({name: value for name, value in tensors.items() if name != key}, path)
    with pytest.raises(ValueError, match="1 tensors missing.*take the whole folder"):
        PeftModel.from_pretrained(tiny_llama(), adapter)
    save_file(tensors | {key + "_old": tensors[key].clone()}, path)
    with pytest.raises(ValueError, match="1 unknown"):
        PeftModel.from_pretrained(tiny_llama(), adapter)


def test_truncated_file(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match="(?i)incomplete|deserializing|not fully covered"):
        PeftModel.from_pretrained(tiny_llama(), adapter)


def test_config_with_an_unknown_method(adapter):
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    config["method"] = "nosuch"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown method 'nosuch'"):
        PeftModel.from_pretrained(tiny_llama(), adapter)


def test_config_names_version_and_method(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["peft_type"] == "MOEROUTE"
    assert config["method"] == "mixlora"
    assert config["method_fields"]["num_experts"] == 4
    assert config["moeroute_version"] == moeroute.__version__
