"""Dr.LLM's own properties; what decoder layers do with decisions is in tests/integration/depth."""

import math

import pytest
import torch
from integration.depth.depth_models import LAYERS, close, grown, ragged, tiny, whole
from peft import PeftModel

import moeroute
from moeroute.layers.routed import routing_passes
from moeroute.methods import DrLLM
from moeroute.routers.prompt_windows import PromptWindowRouter, blended
from moeroute.types import RouterInput

pytestmark = pytest.mark.hf
H = 32


def wrapped(family="llama", seed=3, **fields):
    torch.manual_seed(seed)
    model = moeroute.wrap_model(tiny(family), DrLLM(bottleneck=16, **fields))
    with torch.no_grad():  # far from ties
        for name, parameter in model.named_parameters():
            if "depth_host" in name and parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def decisions(model, ids, mask):
    """(B, L) actions that the routers take."""
    with moeroute.track_routing(model), torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        records = routing_passes(model)[0].records
    rows = [record.depth.num_executions for record in records.values()]
    return torch.stack(rows, 1)


def test_parameters_as_the_paper_counts_them():
    model = moeroute.wrap_model(tiny(), DrLLM())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == LAYERS * (128 * H + 128 + 3 * 128 + 3)


def test_the_router_is_the_papers_formula():
    router = PromptWindowRouter(H, bottleneck=16, num_windows=8)
    x = torch.randn(1, 21, H)
    windows = x[0, :16].reshape(8, 2, H).mean(1)  # the last five tokens fill no window
    hidden = torch.nn.functional.gelu(router.down(windows), approximate="tanh")
    expected = router.up(hidden).mean(0)
    found = router(RouterInput(hidden_states=x[0], sequence_shape=(1, 21))).router_logits[0]
    torch.testing.assert_close(found, expected)
    longer = torch.cat([x[0, :16], torch.randn(3, H)])  # 19 tokens, the same windows
    again = router(RouterInput(hidden_states=longer, sequence_shape=(1, 19)))
    torch.testing.assert_close(again.router_logits[0], expected)


def test_order_within_and_of_windows_does_not_matter():
    router = PromptWindowRouter(H, bottleneck=16, num_windows=4)
    x = torch.randn(8, H)
    expected = router(RouterInput(hidden_states=x, sequence_shape=(1, 8))).router_logits
    for order in ([1, 0, 2, 3, 4, 5, 7, 6], [6, 7, 0, 1, 4, 5, 2, 3]):
        found = router(RouterInput(hidden_states=x[order], sequence_shape=(1, 8)))
        torch.testing.assert_close(found.router_logits, expected)


@pytest.mark.parametrize(
    ("penalty", "action"), [(-1.0, [0, 0]), (-0.5, [1, 2]), (0.5, [1, 1]), (1.0, [2, 2])]
)
def test_the_knob(penalty, action):
    probs = torch.tensor([[0.2, 0.5, 0.3], [0.3, 0.3, 0.4]])
    assert blended(probs, penalty).argmax(-1).tolist() == action
    torch.testing.assert_close(blended(probs, penalty).sum(-1), torch.ones(2))


def test_less_penalty_never_spends_less():
    probs = torch.rand(50, 3).softmax(-1)
    spent = [blended(probs, p).argmax(-1).sum().item() for p in torch.linspace(-1, -0.5, 9)]
    assert spent == sorted(spent)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_all_run_is_the_base_and_the_decision_is_what_force_depth_does(family):
    base = tiny(family)
    ids, mask = ragged("left")
    with torch.no_grad():
        expected = whole(base, ids, mask)
        assert torch.equal(whole(wrapped(family, router_penalty=0.5), ids, mask), expected)
        model = wrapped(family)
        chosen = decisions(model, ids, mask)
        assert len(set(chosen.flatten().tolist())) > 1
        found = whole(model, ids, mask)
        with moeroute.force_depth(base, chosen):
            close(found, whole(base, ids, mask), mask)


def test_a_sequence_decides_alone_as_in_a_batch():
    model = wrapped()
    together = decisions(model, *ragged("left", (7, 4, 9, 12)))
    ids, mask = ragged("left", (7, 4, 9, 12))
    for row in range(4):
        real = mask[row].bool()
        alone = decisions(model, ids[row : row + 1, real], mask[row : row + 1, real])
        assert torch.equal(alone[0], together[row])


def test_routers_are_asked_once_a_generation_and_not_about_what_is_written():
    model = wrapped()
    ids, mask = ragged("left")
    asked = []
    hooks = [
        module.register_forward_hook(lambda *_: asked.append(1))
        for module in model.modules()
        if isinstance(module, PromptWindowRouter)
    ]
    text = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for hook in hooks:
        hook.remove()
    assert len(asked) == LAYERS
    with moeroute.routing_inputs(model, prompt_lengths=mask.sum(1)):
        again = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=False
        )
    assert torch.equal(text, again)


def test_labels_end_the_prompt():
    model = wrapped()
    ids, mask = grown(*ragged("right", (6, 6, 6)), 5)
    labels = ids.masked_fill(torch.arange(11) < 6, -100)
    alone = decisions(model, ids[:, :6], mask[:, :6])
    with moeroute.track_routing(model), torch.no_grad():
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
        records = routing_passes(model)[0].records.values()
    chosen = torch.stack([record.depth.num_executions for record in records], 1)
    assert torch.equal(chosen, alone)


def test_the_loss_is_focal_over_the_labelled_path():
    counts = (10, 200, 30)
    model = wrapped(class_counts=counts).train()
    ids, mask = ragged("left")
    labels = torch.tensor([[0, 1, 2], [1, 1, 0], [2, 0, 1]])
    loss = model(input_ids=ids, attention_mask=mask, depth_labels=labels).loss
    records = list(routing_passes(model)[0].records.values())
    weights = torch.tensor([(1 - 0.999) / (1 - 0.999**n) for n in counts], dtype=torch.float64)
    alpha = (weights / weights.mean()).float()
    expected = []
    for layer, record in enumerate(records):
        log_probs = record.depth.router_logits.log_softmax(-1)
        for row in range(3):
            label = labels[row, layer]
            log_p = log_probs[row, label]
            expected.append(-alpha[label] * (1 - log_p.exp()) ** 2 * log_p)
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    with moeroute.force_depth(model, labels), torch.no_grad():
        forced = whole(model.eval(), ids, mask)
    with torch.no_grad():
        executed = model.train()(input_ids=ids, attention_mask=mask, depth_labels=labels).logits
    close(executed, forced, mask)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("depth_host" in name)


def test_a_tuple_without_a_loss_gets_one_in_front():
    model = wrapped().train()
    ids, mask = ragged("left")
    inputs = {"input_ids": ids, "attention_mask": mask, "depth_labels": torch.ones(3, 3).long()}
    expected = model(**inputs)
    loss, logits, *_ = model(**inputs, return_dict=False)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)


def test_training_learns_the_labels():
    model = wrapped(class_counts=(1, 1, 1)).train()
    ids, mask = ragged("left")
    labels = torch.tensor([[0, 1, 2], [1, 1, 0], [2, 0, 1]])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, depth_labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert torch.equal(decisions(model.eval(), ids, mask), labels)


def test_saved_and_loaded_it_decides_the_same(tmp_path):
    model = wrapped(num_windows=4)
    ids, mask = ragged("left")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(whole(again, ids, mask), whole(model, ids, mask))
    base = moeroute.unwrap_model(model)
    assert not any("depth_host" in name for name, _ in base.named_modules())
    with torch.no_grad():
        assert torch.equal(whole(base, ids, mask), whole(tiny(), ids, mask))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.ones(3, 4, dtype=torch.int64), "speak of 4 layers but the model has 3"),
        (torch.full((3, 3), 3), "knows the actions 0 to 2"),
        (torch.ones(2, 3, dtype=torch.int64), "2 samples"),
    ],
)
def test_labels_of_another_model(labels, message):
    model = wrapped().train()
    ids, mask = ragged("left")
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, attention_mask=mask, depth_labels=labels)


def test_labels_in_eval_mode_are_not_forgotten_without_a_word():
    ids, mask = ragged("left")
    with pytest.warns(UserWarning, match="the model is in eval mode"):
        wrapped()(input_ids=ids, attention_mask=mask, depth_labels=torch.ones(3, 3).long())


def test_nothing_to_decide_from():
    ids, mask = ragged("left", (7, 4))
    mask[1] = 0
    with pytest.raises(ValueError, match="sequence 1 has no real prompt token"):
        wrapped()(input_ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match="bottleneck=0"):
        DrLLM(bottleneck=0)
    assert math.isclose(sum(DrLLM().class_counts), 126812)
