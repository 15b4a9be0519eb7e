"""Saving beside and renaming: the old adapter or the new one, never half of each."""

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import moeroute
from moeroute.methods import MixLoRA


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def test_saves_what_peft_saves(tmp_path):
    model = moeroute.wrap_model(tiny_llama(), MixLoRA(r=2, num_experts=4))
    moeroute.wrap_model(model, MixLoRA(r=2, num_experts=3), adapter_name="second")
    model.save_pretrained(tmp_path / "theirs")
    moeroute.save_adapter(model, tmp_path / "deep" / "ours")
    names = [
        sorted(str(path.relative_to(tmp_path / folder)) for path in (tmp_path / folder).rglob("*"))
        for folder in ("theirs", "deep/ours")
    ]
    assert names[0] == names[1]
    assert "second/adapter_model.safetensors" in names[0]
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "deep" / "ours")


def test_a_failing_save_leaves_the_old_adapter_alone(tmp_path, monkeypatch):
    model = moeroute.wrap_model(tiny_llama(), MixLoRA(r=2, num_experts=4))
    moeroute.save_adapter(model, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def full_disk(self, directory, **kwargs):
        open(f"{directory}/adapter_model.safetensors", "wb").close()
        raise OSError("no space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="no space"):
        moeroute.save_adapter(model, tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    model = moeroute.wrap_model(tiny_llama(), MixLoRA(r=2, num_experts=4))
    with pytest.raises(ValueError, match="is a file"):
        moeroute.save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"
