"""A model of one's own, built of Hugging Face's blocks and our layers."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import moeroute
from moeroute.losses import BalanceLoss

IDS = torch.randint(0, 61, (3, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(3, 8, dtype=torch.int64)
MASK[1, :5] = 0


def model(connected=True, weight=0.5):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    made = LlamaForCausalLM(config)
    for block in made.model.layers:
        block.mlp = moeroute.MoELayer.build(
            hidden_size=32,
            intermediate_size=16,
            num_experts=4,
            top_k=2,
            losses=(BalanceLoss(weight=weight),),
        )
    return moeroute.connect_layers(made) if connected else made


def test_the_losses_are_in_the_loss_once():
    alone, connected = model(connected=False).train(), model().train()
    plain = alone(input_ids=IDS, labels=IDS)
    extra = moeroute.aux_losses(alone).total
    ours = connected(input_ids=IDS, labels=IDS)
    assert torch.equal(ours.logits, plain.logits)
    torch.testing.assert_close(ours.loss, plain.loss + extra)
    assert list(moeroute.aux_losses(connected).parts) == ["BalanceLoss"]
    assert torch.equal(connected.eval()(input_ids=IDS, labels=IDS).loss, plain.loss)


def test_padding_is_left_out_of_the_losses():
    connected = model().train()
    inputs = {"labels": IDS, "attention_mask": MASK}
    connected(input_ids=IDS, **inputs)
    expected = moeroute.aux_losses(connected).total
    other = torch.where(MASK.bool(), IDS, 7)
    connected(input_ids=other, **inputs)
    torch.testing.assert_close(moeroute.aux_losses(connected).total, expected)


def test_task_ids_reach_the_routers_and_not_the_model():
    connected, seen = model().train(), []
    hook = connected.model.layers[0].mlp.routing_pass
    with hook.listening(seen.append):
        connected(input_ids=IDS, labels=IDS, task_ids=torch.tensor([2, 0, 1]))
    assert [record.site for record in seen] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert seen[0].task_ids.tolist() == [2, 0, 1]
    assert seen[0].sequence_shape == (3, 8)


def test_a_copy_has_a_pass_of_its_own():
    connected = model().train()
    connected(input_ids=IDS, labels=IDS)
    twin = copy.deepcopy(connected)
    assert twin.model.layers[0].mlp.routing_pass is twin.model.layers[1].mlp.routing_pass
    assert twin.model.layers[0].mlp.routing_pass is not connected.model.layers[0].mlp.routing_pass
    torch.testing.assert_close(
        twin(input_ids=IDS, labels=IDS).loss, connected(input_ids=IDS, labels=IDS).loss
    )


def test_routing_is_seen_and_text_generated():
    connected = model().eval()
    with moeroute.track_routing(connected) as stats:
        connected(input_ids=IDS)
    assert len(stats.layers) == 2
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached = connected.generate(input_ids=IDS, **settings)
    assert torch.equal(cached, connected.generate(input_ids=IDS, use_cache=False, **settings))


def test_a_forgotten_loss_is_said():
    connected = model().train()
    connected(input_ids=IDS)
    with pytest.warns(UserWarning, match="reached no loss"):
        connected(input_ids=IDS, labels=IDS)


def test_trainer_accumulates_the_same_loss(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(2, 1)[:4]]
    trained = []
    for size, steps in ((4, 1), (1, 4)):
        made = model(weight=0.0)
        settings = TrainingArguments(
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            report_to=[],
            use_cpu=True,
        )
        Trainer(made, settings, train_dataset=rows).train()
        trained.append(made.model.layers[1].mlp.router.score.weight.detach())
    torch.testing.assert_close(*trained, rtol=1e-3, atol=1e-6)


def test_a_model_without_routed_layers():
    with pytest.raises(ValueError, match="Linear holds no routed layer"):
        moeroute.connect_layers(torch.nn.Linear(2, 2))
