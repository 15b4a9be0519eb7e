"""Trainer with `PostStepCallback` moves biases as a plain loop does, and resumes as if unbroken."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import moeroute

ROWS, BATCH, ACCUMULATED, RATE = 24, 3, 2, 0.01


def make_model():
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    method = moeroute.get_method("smora")(r=6, top_k=2, bias_update_rate=RATE)
    return moeroute.wrap_model(base, method, target_modules=["q_proj", "down_proj"])


def make_rows():
    torch.manual_seed(1)
    ids = torch.randint(0, 31, (ROWS, 5))
    mask = (torch.arange(5) < torch.randint(2, 6, (ROWS, 1))).long()
    labels = ids.masked_fill(mask == 0, -100)
    return [
        {"input_ids": ids[row], "attention_mask": mask[row], "labels": labels[row]}
        for row in range(ROWS)
    ]


def biases(model):
    return {
        key: value.clone()
        for key, value in model.state_dict().items()
        if key.endswith("e_score_correction_bias")
    }


def train(folder, steps=4, resume=None, recomputes=False, callback=True):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED,
        max_steps=steps,
        lr_scheduler_type="constant",
        learning_rate=0.05,
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_steps=2,
        train_sampling_strategy="sequential",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    model = make_model()
    if recomputes:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.enable_input_require_grads()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=make_rows(),
        callbacks=[moeroute.PostStepCallback()] if callback else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model, losses


def plain_loop(steps=4):
    """The same batches with what Trainer does about accumulation written out."""
    model, rows = make_model().train(), make_rows()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    batches = [
        {key: torch.stack([row[key] for row in rows[start : start + BATCH]]) for key in rows[0]}
        for start in range(0, ROWS, BATCH)
    ]
    for step in range(steps):
        now = batches[step * ACCUMULATED : (step + 1) * ACCUMULATED]
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in now)
        for batch in now:
            model(**batch, num_items_in_batch=items).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moeroute.post_step(model)
    return model


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_biases_are_those_of_a_plain_loop(tmp_path, recomputes):
    expected = biases(plain_loop())
    found = biases(train(tmp_path, recomputes=recomputes)[0])
    assert len(found) == 4
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    steps = torch.stack(list(found.values())).abs() / RATE
    assert steps.max() > 1.5  # some rank was pushed more than once
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)


def test_without_it_no_bias_moves(tmp_path):
    found = biases(train(tmp_path, callback=False)[0])
    assert all(value.abs().sum() == 0 for value in found.values())


def test_resuming_continues_as_if_unbroken(tmp_path):
    model, whole = train(tmp_path / "whole")
    train(tmp_path / "half", steps=2)
    again, resumed = train(tmp_path / "half", resume=str(tmp_path / "half" / "checkpoint-2"))
    assert resumed[-2:] == whole[-2:]
    expected = biases(model)
    assert all(torch.equal(value, expected[key]) for key, value in biases(again).items())
