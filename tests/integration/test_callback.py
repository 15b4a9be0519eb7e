"""RoutingCallback in a real Trainer."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import moeroute
from moeroute.methods import MixLoRA


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def train(folder, callback, coef=0.01, model=None, **arguments):
    if model is None:
        method = MixLoRA(r=2, num_experts=4, router_aux_loss_coef=coef)
        model = moeroute.wrap_model(tiny_llama(), method, task_type="CAUSAL_LM")
    rows = [{"input_ids": ids, "labels": ids.clone()} for ids in torch.randint(0, 61, (8, 6))]
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**(settings | arguments)),
        train_dataset=rows,
        callbacks=[callback],
    )
    trainer.train()
    return trainer


def test_logs_hold_the_routing_and_the_losses(tmp_path):
    trainer = train(tmp_path, moeroute.RoutingCallback())
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert 0.0 < entry["moe/entropy"] <= 1.0
        assert entry["moe/cv"] >= 0.0
        assert entry["moe/max_violation"] >= 0.0
        assert entry["moe/dead_experts"] >= 0.0
        assert entry["moe/BalanceLoss"] > 0.9


def test_the_model_is_as_before_when_training_is_over(tmp_path):
    trainer = train(tmp_path, moeroute.RoutingCallback())
    layer = next(module for module in trainer.model.modules() if hasattr(module, "routing_pass"))
    assert not layer.routing_pass._listeners


def test_log_every_skips_logs(tmp_path):
    trainer = train(tmp_path, moeroute.RoutingCallback(log_every=4))
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["moe/entropy" in entry for entry in entries] == [False, True]


def test_plots_land_in_the_output_directory(tmp_path):
    train(tmp_path, moeroute.RoutingCallback(plot="plots/routing.png"))
    assert (tmp_path / "plots" / "routing.png").stat().st_size > 1000


def test_label_smoothing_would_drop_the_losses(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1"):
        train(tmp_path, moeroute.RoutingCallback(), label_smoothing_factor=0.1)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.*is deprecated:FutureWarning")
def test_reentrant_checkpointing_would_take_their_gradient(tmp_path):
    with pytest.raises(ValueError, match="use_reentrant"):
        train(
            tmp_path,
            moeroute.RoutingCallback(),
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )


def test_both_are_fine_without_losses(tmp_path):
    trainer = train(tmp_path, moeroute.RoutingCallback(), coef=0.0, label_smoothing_factor=0.1)
    assert any("moe/entropy" in entry for entry in trainer.state.log_history)


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no routed layer"):
        train(tmp_path, moeroute.RoutingCallback(), model=tiny_llama())
