"""Self-speculative decoding: what the whole model writes, whoever drafts."""

from typing import Any

import pytest
import torch
from integration.depth.depth_models import FAMILIES, LAYERS, VOCAB, tiny
from torch import nn

import moeroute
from moeroute.depth import exit_at, speculate
from moeroute.integration.depth.halves import Halves
from moeroute.layers.early_exit import ExitTransform
from moeroute.methods import DrLLM, EarlyExit

pytestmark = pytest.mark.hf
NEW = 14


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def prompt(tokens: int = 7) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(3, VOCAB, (1, tokens))


def greedy(model: Any, ids: torch.Tensor, new: int = NEW) -> torch.Tensor:
    """Token by token, the whole text each time."""
    for _ in range(new):
        logits = model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


def quiet(model: Any) -> Any:
    """A model whose last layers add little, so that drafts are often right."""
    for layer in list(model.model.layers)[1:]:
        for name, parameter in layer.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.05)
    return model


@pytest.mark.parametrize("length", [1, 3, 5])
@pytest.mark.parametrize("exit_layer", range(1, LAYERS))
@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_what_the_whole_model_writes(family, exit_layer, length):
    model = tiny(family)
    found = speculate(
        model, prompt(), exit_layer=exit_layer, max_new_tokens=NEW, draft_length=length
    )
    assert torch.equal(found.sequences, greedy(model, prompt()))
    assert not [layer for layer in model.modules() if "forward" in layer.__dict__]


def test_good_drafts_save_runs_of_the_later_layers():
    model = quiet(tiny())
    calls = dict.fromkeys(range(LAYERS), 0)

    def count(place: int) -> Any:
        def hook(*_: Any) -> None:
            calls[place] += 1

        return hook

    hooks = [
        layer.mlp.register_forward_hook(count(place))
        for place, layer in enumerate(model.model.layers)
    ]
    found = speculate(model, prompt(), exit_layer=1, max_new_tokens=NEW, draft_length=4)
    for hook in hooks:
        hook.remove()
    assert torch.equal(found.sequences, greedy(model, prompt()))
    assert 0 < found.accepted <= found.drafted
    assert found.verifications < NEW
    assert calls == {0: 1 + found.drafted, 1: found.verifications, 2: found.verifications}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_all_layers_hold_the_same_tokens_after_every_step(family, monkeypatch):
    lengths, crop = [], Halves.crop

    def watched(halves: Halves, tokens: int) -> None:
        crop(halves, tokens)
        lengths.append(halves.lengths())

    monkeypatch.setattr(Halves, "crop", watched)
    speculate(tiny(family), prompt(), exit_layer=2, max_new_tokens=NEW, draft_length=3)
    assert all(len(set(step)) == 1 for step in lengths)
    assert lengths[-1][0] == 7 + NEW - 1


def test_eos_ends_the_text():
    model = tiny()
    text = greedy(model, prompt())[0, 7:].tolist()
    end = text[5]
    found = speculate(model, prompt(), exit_layer=2, max_new_tokens=NEW, eos_token_id=end)
    assert found.sequences[0, 7:].tolist() == text[: text.index(end) + 1]
    one = speculate(model, prompt(1), exit_layer=2, max_new_tokens=1)
    assert torch.equal(one.sequences, greedy(model, prompt(1), 1))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_wrapped_model_drafts_through_its_exit(family):
    model = moeroute.wrap_model(quiet(tiny(family)), EarlyExit()).eval()
    expected = greedy(model, prompt())
    plain = speculate(model, prompt(), exit_layer=2, max_new_tokens=NEW)
    transform = next(module for module in model.modules() if isinstance(module, ExitTransform))
    nn.init.normal_(transform.up, std=3.0)
    spoilt = speculate(model, prompt(), exit_layer=2, max_new_tokens=NEW)
    assert torch.equal(plain.sequences, expected)
    assert torch.equal(spoilt.sequences, expected)
    assert spoilt.accepted < plain.accepted
    with exit_at(model, 2):
        left = speculate(model, prompt(), exit_layer=1, max_new_tokens=NEW).sequences
        assert torch.equal(left, greedy(model, prompt()))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral"])
@pytest.mark.parametrize("fields", [{}, {"threshold": 0.5}, {"exit_layer": 2}], ids=str)
def test_the_assisted_generation_of_transformers_agrees_on_a_wrapped_model(family, fields):
    model = moeroute.wrap_model(tiny(family), EarlyExit(**fields)).eval()
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(prompt(), **options)
    for exit_layer in (1, 2):
        drafted = model.generate(prompt(), assistant_early_exit=exit_layer, **options)
        assert torch.equal(drafted, expected)


def test_what_cannot_be():
    model = tiny()
    options: dict[str, Any] = {"exit_layer": 1, "max_new_tokens": 3}
    with pytest.raises(ValueError, match=r"shape \(2, 7\)"):
        speculate(model, prompt().repeat(2, 1), **options)
    with pytest.raises(ValueError, match="draft_length=0"):
        speculate(model, prompt(), draft_length=0, **options)
    for wrong in (0, LAYERS):
        with pytest.raises(ValueError, match=rf"exit_layer={wrong} is outside 1\.\.2"):
            speculate(model, prompt(), exit_layer=wrong, max_new_tokens=3)
    with pytest.raises(ValueError, match="in training mode"):
        speculate(tiny().train(), prompt(), **options)
    sure = moeroute.wrap_model(tiny(), EarlyExit(threshold=0.5)).eval()
    with pytest.raises(ValueError, match="cannot be cut in two"):
        speculate(sure, prompt(), **options)
    with pytest.raises(ValueError, match="DepthLayer decides"):
        speculate(moeroute.wrap_model(tiny(), DrLLM()).eval(), prompt(), **options)
