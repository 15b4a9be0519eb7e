"""Trainer with `PolicyGradientMixin`, and what a wrapped model does without it."""

from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import moeroute
from moeroute.integration.adapters.site_host import SiteHost
from moeroute.losses import BalanceLoss

ROWS, BATCH, ACCUMULATED = 12, 3, 2


class DrawingTrainer(moeroute.PolicyGradientMixin, Trainer):
    """What a user writes."""


class SeedSteps(TrainerCallback):
    """The same random numbers for a step here and in a plain loop."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(state.global_step)


def make_model(method="remix", **fields):
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
    model = moeroute.wrap_model(
        base, method, target_modules=["q_proj"], task_type="CAUSAL_LM", **fields
    )
    for host in (module for module in model.modules() if isinstance(module, SiteHost)):
        torch.nn.init.normal_(host.active_module().bank.lora_b, std=0.5)
    return model.train()


def make_rows():
    torch.manual_seed(1)
    ids = torch.randint(0, 31, (ROWS, 6))
    mask = (torch.arange(6) < torch.randint(3, 7, (ROWS, 1))).long()
    labels = ids.masked_fill(mask == 0, -100)
    return [
        {"input_ids": ids[row], "attention_mask": mask[row], "labels": labels[row]}
        for row in range(ROWS)
    ]


def make_trainer(folder, model=None, kind=DrawingTrainer, copies=3, settings=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED,
        max_steps=2,
        lr_scheduler_type="constant",
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        train_sampling_strategy="sequential",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **(settings or {}),
    )
    if kind is DrawingTrainer:
        options["policy_gradient_copies"] = copies
    return kind(
        model=make_model() if model is None else model,
        args=arguments,
        train_dataset=make_rows(),
        eval_dataset=make_rows(),
        **options,
    )


def batches():
    rows = make_rows()
    stacked = [
        {key: torch.stack([row[key] for row in rows[start : start + BATCH]]) for key in rows[0]}
        for start in range(0, ROWS, BATCH)
    ]
    return [stacked[at : at + ACCUMULATED] for at in range(0, len(stacked), ACCUMULATED)]


def plain_loop(loss_of):
    model = make_model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, reported = torch.optim.SGD(trained, lr=0.1), []
    for step, now in enumerate(batches()):
        torch.manual_seed(step)
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in now)
        total = 0.0
        for batch in now:
            loss = moeroute.policy_gradient_loss(
                model, partial(loss_of, model, batch, items), copies=3
            )
            loss.backward()
            total += loss.item()
        reported.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return model, reported


def check_same(trainer, expected, reported):
    before = {key: value.clone() for key, value in make_model().state_dict().items()}
    trainer.add_callback(SeedSteps())
    trainer.train()
    found, wanted = trainer.model.state_dict(), expected.state_dict()
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], msg=key)
    moved = {key for key, value in found.items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".")[2] for key in moved} == {"lora_a", "lora_b", "weight"}
    assert sum(key.endswith("score.weight") for key in moved) == 2
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(reported, rel=1e-3)


def test_equals_a_plain_loop_with_accumulation(tmp_path):
    expected = plain_loop(lambda model, batch, items: model(**batch, num_items_in_batch=items).loss)
    check_same(make_trainer(tmp_path), *expected)


def test_label_smoothing_and_a_custom_loss_work_where_they_drop_nothing(tmp_path):
    def custom(outputs, labels, num_items_in_batch=None):
        logits, labels = outputs.logits[:, :-1], labels[:, 1:]
        total = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1
        )
        return total / num_items_in_batch

    def by_hand(model, batch, items):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return custom(model(**inputs), batch["labels"], items)

    expected = plain_loop(by_hand)
    check_same(make_trainer(tmp_path / "custom", compute_loss_func=custom), *expected)
    smoothed = make_trainer(tmp_path / "smooth", settings={"label_smoothing_factor": 0.1})
    smoothed.train()
    for key, value in smoothed.model.state_dict().items():
        assert value.isfinite().all(), key


def test_losses_that_would_be_dropped_are_named(tmp_path):
    model = make_model()
    for host in (module for module in model.modules() if isinstance(module, SiteHost)):
        host.active_module().losses += (BalanceLoss(),)
    with pytest.raises(ValueError, match="drops the model's BalanceLoss"):
        make_trainer(tmp_path, model, settings={"label_smoothing_factor": 0.1})
    with pytest.raises(ValueError, match="drops the model's BalanceLoss"):
        make_trainer(tmp_path, model, compute_loss_func=lambda *_, **__: None)
    make_trainer(tmp_path, model).train()


def test_evaluation_runs_once_and_outputs_come_back(tmp_path):
    trainer = make_trainer(tmp_path)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    batch = batches()[0][0]
    loss, outputs = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    assert loss.requires_grad
    assert outputs.logits.shape == (3, 6, 31)
    assert "labels" in batch


def test_what_it_refuses(tmp_path):
    with pytest.raises(ValueError, match="copies=1"):
        make_trainer(tmp_path, copies=1)
    with pytest.raises(ValueError, match="leave PolicyGradientMixin out"):
        make_trainer(tmp_path, make_model("molora", r=2))


def test_a_plain_trainer_raises_instead_of_leaving_the_router_untrained(tmp_path):
    with pytest.raises(RuntimeError, match=r"\(moeroute\.PolicyGradientMixin, Trainer\)"):
        make_trainer(tmp_path, kind=Trainer).train()


def test_a_plain_loop_that_makes_its_own_loss_is_told():
    model, inputs = make_model(), {"input_ids": torch.randint(0, 31, (2, 5))}
    model(**inputs).logits.sum().backward()
    with pytest.warns(UserWarning, match="2 routed layers reached no loss"):
        model(**inputs)
    with pytest.raises(RuntimeError, match=r"moeroute\.policy_gradient_loss"):
        moeroute.aux_losses(model)
    with torch.no_grad():
        assert model(**inputs, labels=inputs["input_ids"]).loss.isfinite()


def test_the_routing_callback_reads_what_was_drawn(tmp_path):
    for settings in ({}, {"label_smoothing_factor": 0.1}):
        callbacks = [moeroute.RoutingCallback()]
        trainer = make_trainer(tmp_path, callbacks=callbacks, settings=settings)
        trainer.train()
        assert "moe/entropy" in trainer.state.log_history[0]
