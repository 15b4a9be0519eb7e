"""What a caller says of each sample reaches the routers, through PEFT, beams and generation."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moeroute
from moeroute.integration.adapters.site_host import SiteHost
from moeroute.routers.samples import require_task_ids


class Listening(torch.nn.Module):
    """A router that keeps what it was told."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.num_experts, self.heard = inner, inner.num_experts, []

    def forward(self, router_input):
        self.heard.append(router_input)
        return self.inner(router_input)


def listen(model):
    """Put a listener before the model's one router."""
    mixture = next(m for m in model.modules() if isinstance(m, SiteHost)).active_module()
    mixture.router = Listening(mixture.router)
    return mixture.router.heard


def wrapped(*, silent=False, **fields):
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    model = moeroute.wrap_model(base, "molora", target_modules=["q_proj"], **fields)
    return model, [] if silent else listen(model)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_forward_takes_them_by_name(task_type):
    model, heard = wrapped(task_type=task_type)
    tasks, embeddings = torch.tensor([2, 0]), torch.randn(2, 3)
    ids = torch.randint(0, 31, (2, 5))
    model(input_ids=ids, task_ids=tasks, sample_embeddings=embeddings)
    assert torch.equal(heard[0].task_ids, tasks)
    assert torch.equal(heard[0].sample_embeddings, embeddings)
    model(input_ids=ids)
    assert heard[1].task_ids is None


def test_they_stand_inside_the_block_and_repeat_for_beams():
    model, heard = wrapped(task_type="CAUSAL_LM")
    ids = torch.randint(1, 31, (2, 4))
    with moeroute.routing_inputs(model, task_ids=torch.tensor([2, 0])):
        model.eval().generate(input_ids=ids, num_beams=3, max_new_tokens=3, pad_token_id=0)
    assert len(heard) == 3
    for router_input in heard:
        assert router_input.task_ids.tolist() in ([2, 2, 2, 0, 0, 0], [2, 0])
        assert router_input.memory is not None
    model(input_ids=ids)
    assert heard[-1].task_ids is None


def test_a_call_overrules_the_block():
    model, heard = wrapped()
    with moeroute.routing_inputs(model, task_ids=torch.tensor([1, 1])):
        model(input_ids=torch.randint(0, 31, (2, 5)), task_ids=torch.tensor([2, 0]))
    assert heard[0].task_ids.tolist() == [2, 0]


def test_memory_follows_the_cache_that_the_first_call_returned():
    model, heard = wrapped()
    model.eval()
    ids = torch.randint(0, 31, (2, 5))
    first = model(input_ids=ids, use_cache=True)
    heard[0].memory["kept"] = torch.tensor(7)
    model(input_ids=ids[:, :1], past_key_values=first.past_key_values)
    assert heard[1].memory["kept"] == 7
    model(input_ids=ids)
    assert heard[2].memory == {}
    model.train()
    model(input_ids=ids)
    assert heard[3].memory is None


def test_bad_inputs_say_what_is_wanted():
    model, _ = wrapped()
    with (
        pytest.raises(ValueError, match=r"task_ids has shape \(2, 1\)"),
        moeroute.routing_inputs(model, task_ids=torch.zeros(2, 1)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="holds no routed layer"),
        moeroute.routing_inputs(torch.nn.Linear(2, 2), task_ids=torch.zeros(2)),
    ):
        pass
    with pytest.raises(ValueError, match="speak of 3 samples but the batch has 2"):
        model(input_ids=torch.randint(0, 31, (2, 5)), task_ids=torch.zeros(3, dtype=torch.int64))


def test_a_reloaded_model_says_how_to_take_them(tmp_path):
    from peft import PeftModel

    model, _ = wrapped(silent=True, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(moeroute.unwrap_model(model), tmp_path)
    heard = listen(again)
    tasks, ids = torch.tensor([2, 0]), torch.randint(0, 31, (2, 5))
    again(input_ids=ids, task_ids=tasks)
    with pytest.raises(ValueError, match="accept_routing_inputs"):
        require_task_ids(heard[-1], 3, "a router")
    moeroute.accept_routing_inputs(moeroute.accept_routing_inputs(again))(
        input_ids=ids, task_ids=tasks
    )
    assert require_task_ids(heard[-1], 3, "a router").tolist() == [2, 0]
