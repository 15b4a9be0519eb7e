"""Auxiliary losses reach output.loss, with the right weight, or somebody is told."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import moeroute
from moeroute.methods import MixLoRA, MoLoRA

COEF = 10.0


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
            max_position_embeddings=64,
        )
    )


def tiny_wrapped(coef=COEF):
    model = tiny_llama()
    return moeroute.wrap_model(
        model, MixLoRA(r=2, num_experts=4, router_aux_loss_coef=coef), task_type="CAUSAL_LM"
    )


def checkpoint_layers(model, settings):
    """Switch activation checkpointing on, by its name in older and newer transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(settings)


def rows(count=16, length=12):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 61, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def as_batch(items):
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def test_loss_is_language_model_loss_plus_weighted_losses():
    model = tiny_wrapped().train()
    batch = as_batch(rows(4))
    output = model(**batch)
    report = moeroute.aux_losses(model)
    with_zero = tiny_wrapped(coef=0.0).train()(**batch).loss
    torch.testing.assert_close(output.loss, with_zero + report.total)
    assert report.total > 0.9 * COEF
    output.loss.backward()
    gradients = [p.grad for k, p in model.named_parameters() if "router" in k]
    assert gradients
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_tuple_outputs_carry_the_losses_too():
    model = tiny_wrapped().train()
    batch = as_batch(rows(4))
    loss = model(**batch).loss
    torch.testing.assert_close(model(**batch, return_dict=False)[0], loss)


def test_eval_loss_is_the_language_model_loss_alone():
    batch = as_batch(rows(4))
    assert torch.equal(
        tiny_wrapped().eval()(**batch).loss, tiny_wrapped(coef=0.0).eval()(**batch).loss
    )


def test_padding_changes_no_auxiliary_loss():
    model = tiny_wrapped().train()
    batch = as_batch(rows(3))
    model(**batch)
    alone = moeroute.aux_losses(model).total
    pad = torch.zeros(3, 5, dtype=torch.long)
    mask = torch.cat([torch.ones_like(batch["input_ids"]), pad], dim=1)
    model(
        input_ids=torch.cat([batch["input_ids"], pad], dim=1),
        labels=torch.cat([batch["labels"], pad - 100], dim=1),
        attention_mask=mask,
    )
    torch.testing.assert_close(moeroute.aux_losses(model).total, alone)


def train_once(accumulation, tmp_path, data):
    model = tiny_wrapped()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=0.0,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def test_gradient_accumulation_does_not_multiply_the_losses(tmp_path):
    data = rows(16)
    losses = [train_once(steps, tmp_path, data) for steps in (1, 2, 4, 8)]
    assert losses[0] > COEF
    assert max(losses) - min(losses) < 0.03 * losses[0], losses


def test_without_labels_the_next_forward_warns():
    model = tiny_wrapped().train()
    ids = as_batch(rows(2))["input_ids"]
    model(input_ids=ids)
    with pytest.warns(UserWarning, match="reached no loss"):
        model(input_ids=ids)


def test_reading_the_losses_silences_the_warning(recwarn):
    model = tiny_wrapped().train()
    ids = as_batch(rows(2))["input_ids"]
    for _ in range(2):
        model(input_ids=ids)
        assert moeroute.aux_losses(model).total.requires_grad
    assert not [w for w in recwarn if "reached no loss" in str(w.message)]


def test_reentrant_checkpointing_with_a_loss_raises():
    model = tiny_wrapped().train()
    checkpoint_layers(model, {"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model(**as_batch(rows(2)))


def test_reentrant_checkpointing_without_a_loss_is_right():
    gradients = []
    for reentrant in (None, True):
        model = tiny_wrapped(coef=0.0).train()
        if reentrant:
            checkpoint_layers(model, {"use_reentrant": True})
            model.enable_input_require_grads()
        model(**as_batch(rows(2))).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_recomputation_counts_no_layer_twice():
    model = tiny_wrapped().train()
    checkpoint_layers(model, {"use_reentrant": False})
    model.enable_input_require_grads()
    batch = as_batch(rows(2))
    output = model(**batch)
    before = moeroute.aux_losses(model)
    output.loss.backward()
    after = moeroute.aux_losses(model)
    assert before.parts.keys() == after.parts.keys()
    assert torch.equal(before.total, after.total)


def test_plain_loop_learns():
    model = tiny_wrapped(coef=0.01).train()
    batch = as_batch(rows(4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    first = last = None
    for _ in range(40):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = first if first is not None else loss.item(), loss.item()
    assert last < first - 0.2


def test_models_without_routed_layers_are_told():
    with pytest.raises(ValueError, match="no routed layer"):
        moeroute.aux_losses(tiny_llama())


def test_a_soft_mixture_refuses_a_balance_loss():
    with pytest.raises(ValueError, match="soft mixture"):
        MoLoRA(router_aux_loss_coef=0.1)
