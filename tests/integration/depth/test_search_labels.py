"""Labels are searched on real models, can be cut short, and are what the model then does."""

import json

import pytest
import torch
from integration.depth.depth_models import LAYERS, VOCAB, tiny
from transformers import BertConfig, BertModel, Qwen3NextConfig, Qwen3NextForCausalLM

import moeroute
from moeroute.integration.depth.answers import (
    Question,
    exact_match,
    judge,
    log_likelihood,
    multiple_choice,
)
from moeroute.integration.depth.search_labels import DepthLabels, search_labels
from moeroute.search import SearchSettings

pytestmark = pytest.mark.hf


def questions(count=6):
    """Answers that the model gives only if its middle layer is skipped, or as it is."""
    model, found = tiny(), []
    for index in range(count):
        torch.manual_seed(index)
        prompt = tuple(torch.randint(3, VOCAB, (5,)).tolist())
        with moeroute.force_depth(model, [1, index % 2, 1]), torch.no_grad():
            token = int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
        found.append(Question(prompt=prompt, answer=(token,)))
    return found


def test_a_label_is_right_where_the_plain_model_is_wrong(tmp_path):
    model = tiny().train()
    found = search_labels(model, questions(), tmp_path, show_progress=False)
    assert model.training
    assert not any("depth_host" in name for name, _ in model.named_modules())
    assert found.labels.shape == (6, LAYERS)
    assert (found.plain_rewards[1::2] == 1).all()
    assert (found.rewards == 1).all()
    assert found.kept[found.plain_rewards == 0].all()
    for question, actions in zip(questions(), found.labels, strict=True):
        with moeroute.force_depth(model.eval(), actions.tolist()):
            assert exact_match(model, question) == 1.0


def test_it_goes_on_where_it_stopped_and_ends_the_same(tmp_path):
    asked, calls = questions(), []

    def dying(model, question):
        calls.append(question)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return exact_match(model, question)

    dying.__name__ = "exact_match"
    with pytest.raises(KeyboardInterrupt):
        search_labels(tiny(), asked, tmp_path / "cut", score=dying, show_progress=False)
    with pytest.raises(FileNotFoundError, match="has not ended"):
        DepthLabels.load(tmp_path / "cut")
    log = tmp_path / "cut" / "search.jsonl"
    done = len(log.read_text().splitlines()) - 1
    assert 0 < done < 6
    log.write_text(log.read_text() + '{"actions": [1')  # the last line was being written
    resumed = search_labels(tiny(), asked, tmp_path / "cut", show_progress=False)
    whole = search_labels(tiny(), asked, tmp_path / "whole", show_progress=False)
    for name in ("labels", "kept", "rewards", "plain_rewards"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))
        assert torch.equal(getattr(DepthLabels.load(tmp_path / "cut"), name), getattr(whole, name))
    assert json.loads((tmp_path / "cut" / "search.json").read_text())["kept"] == whole.kept.sum()


def test_another_search_is_not_overwritten(tmp_path):
    search_labels(tiny(), questions(2), tmp_path, show_progress=False)
    with pytest.raises(ValueError, match="differs in seed; give another folder"):
        search_labels(tiny(), questions(2), tmp_path, seed=1, show_progress=False)


def test_graded_scores(tmp_path):
    settings = SearchSettings(solved=None, stop_early=False)
    found = search_labels(
        tiny(), questions(2), tmp_path, score=log_likelihood, settings=settings, show_progress=False
    )
    assert (found.rewards >= found.plain_rewards).all()


def test_exact_match_is_what_generation_gives():
    model = tiny()
    prompt = torch.randint(3, VOCAB, (1, 6), generator=torch.Generator().manual_seed(1))
    text = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, 6:]
    right = Question(prompt=tuple(prompt[0].tolist()), answer=tuple(text.tolist()))
    assert exact_match(model, right) == 1.0
    wrong = Question(prompt=right.prompt, answer=(*right.answer[:-1], 0))
    assert exact_match(model, wrong) == 0.0


def test_answers_of_several_lengths_are_judged_as_each_alone():
    model = tiny()
    answers = [(5,), (7, 8, 9), (4, 4)]
    together = judge(model, (3, 4, 5), answers)
    for row, answer in enumerate(answers):
        alone = judge(model, (3, 4, 5), [answer]).log_likelihoods[0]
        torch.testing.assert_close(together.log_likelihoods[row], alone, rtol=1e-4, atol=1e-4)
    best = answers[int(together.log_likelihoods.argmax())]
    for answer in answers:
        question = Question(prompt=(3, 4, 5), answer=answer, options=tuple(answers))
        assert multiple_choice(model, question) == float(answer == best)


def test_bad_questions_models_and_budgets(tmp_path):
    with pytest.raises(ValueError, match="at least a token"):
        Question(prompt=(), answer=(1,))
    with pytest.raises(ValueError, match="none of the options"):
        Question(prompt=(1,), answer=(1,), options=((2,),))
    with pytest.raises(ValueError, match="use exact_match"):
        multiple_choice(tiny(), Question(prompt=(1,), answer=(1,)))
    with pytest.raises(ValueError, match="no questions"):
        search_labels(tiny(), [], tmp_path)
    with pytest.raises(ValueError, match="cannot be met"):
        search_labels(
            tiny(), questions(1), tmp_path, settings=SearchSettings(budget=0, simulations=2)
        )
    encoder = BertModel(
        BertConfig(
            vocab_size=9,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    )
    with pytest.raises(ValueError, match=r"encoder|no decoder layers"):
        search_labels(encoder, questions(1), tmp_path)
    hybrid = Qwen3NextForCausalLM(
        Qwen3NextConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
            linear_num_key_heads=1,
            linear_num_value_heads=2,
        )
    )
    with pytest.raises(ValueError, match="keep a state that cannot be skipped"):
        search_labels(hybrid, questions(1), tmp_path)
