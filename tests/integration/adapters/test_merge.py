"""A mixture over linears as one plain PEFT LoRA."""

import pytest
import torch
from contracts.method_cases import ADAPTERS, small
from integration.adapters.lora_folders import make_base, save_lora
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import moeroute
from moeroute.integration.adapters.site_host import SiteHost
from moeroute.layers.constant_lora import num_slots
from moeroute.layers.ragged_bank import RaggedLoRABank
from moeroute.layers.shared_down_bank import SharedDownLoRABank
from moeroute.methods import MHR, Arrow, MixLoRA, MOELoRA, MoLoRA, Poly
from moeroute.types import RouterOutput

E = 4


def tiny_llama(layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def mixture(method=None, base=None, **fields):
    method = method or MoLoRA(r=2, num_experts=E, top_k=2)
    model = moeroute.wrap_model(base or tiny_llama(), method, **fields)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter, std=0.3)
        if "router" in name:
            nn.init.normal_(parameter, std=2.0)
    return model.eval()


def token_ids(rows=3, length=11):
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(2))


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**{"input_ids": token_ids(), **kwargs}).logits


def sites(model):
    return {
        name: host.moeroute_site["default"]
        for name, host in model.get_base_model().named_modules()
        if isinstance(host, SiteHost)
    }


class Constant(nn.Module):
    """A router that gives every token the same weights."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights
        self.num_experts = weights.shape[0]

    def forward(self, router_input):
        size = router_input.hidden_states.shape[0]
        weights = self.weights.float().expand(size, -1)
        return RouterOutput(
            router_logits=weights,
            routing_weights=weights,
            selected_experts=torch.arange(self.num_experts).expand(size, -1),
        )


def logits_under(model, weights):
    """What the mixture answers when each linear's router gives these weights to every token."""
    layers = sites(model)
    routers = {name: layer.router for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.router = Constant(weights[name])
    found = logits(model)
    for name, layer in layers.items():
        layer.router = routers[name]
    return found


def check_equals(merged, expected, base=None):
    found = logits(merged.put_on(base or tiny_llama()).eval())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_uniform_is_the_mixture_with_uniform_weights():
    model = mixture()
    merged = moeroute.merge(model)
    check_equals(merged, logits_under(model, dict.fromkeys(sites(model), torch.full((E,), 1 / E))))
    assert merged.error is None
    assert merged.config.r == E * 2
    assert merged.config.lora_alpha / merged.config.r == 4.0  # the experts' own scaling
    assert "q_proj" in merged.config.target_modules


def test_usage_is_the_mixture_with_the_mean_weights_of_the_text():
    model = mixture()
    tables = {name: [] for name in sites(model)}
    hooks = [
        layer.router.register_forward_hook(
            lambda _, __, out, name=name: tables[name].append(
                torch.zeros(out.routing_weights.shape[0], E).scatter(
                    1, out.selected_experts, out.routing_weights
                )
            )
        )
        for name, layer in sites(model).items()
    ]
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, :4] = 0
    logits(model, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    weights = {name: rows[0][mask.flatten().bool()].mean(0) for name, rows in tables.items()}
    text = [{"input_ids": token_ids()[:1], "attention_mask": mask[:1]}, token_ids()[1:]]
    merged = moeroute.merge(model, "usage", text=text)
    check_equals(merged, logits_under(model, weights))
    assert merged.error.tokens == 3 * 11 - 4


def test_one_expert_is_its_plain_lora():
    model = mixture()
    merged = moeroute.merge(model, "expert:2")
    weights = torch.zeros(E)
    weights[2] = 1.0
    check_equals(merged, logits_under(model, dict.fromkeys(sites(model), weights)))
    assert merged.config.r == 2
    for name, layer in sites(model).items():
        key = f"base_model.model.{name}.lora_A.weight"
        assert torch.equal(merged.tensors[key], layer.bank.lora_a[4:6])


def test_reports_the_error_on_the_text():
    model = mixture()
    merged = moeroute.merge(model, "uniform", text=token_ids())
    first, second = logits(model), logits(merged.put_on(tiny_llama()).eval())
    difference = (first - second).abs()
    kl = nn.functional.kl_div(
        second.log_softmax(-1).flatten(0, 1),
        first.log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    error = merged.error
    assert error.tokens == 33
    assert error.max_abs == pytest.approx(float(difference.max()), rel=1e-3)
    assert error.mean_abs == pytest.approx(float(difference.mean()), rel=1e-3)
    assert error.kl == pytest.approx(float(kl), rel=1e-3)
    assert error.kl > 1e-3
    same = (first.argmax(-1) == second.argmax(-1)).float().mean()
    assert error.same_top == pytest.approx(float(same))
    assert "33 tokens" in str(error)


def test_a_mixture_that_is_constant_has_no_error():
    model = mixture(MoLoRA(r=2, num_experts=E))
    for layer in sites(model).values():
        for parameter in layer.router.parameters():
            nn.init.zeros_(parameter)
    for strategy in ("uniform", "usage"):
        error = moeroute.merge(model, strategy, text=token_ids()).error
        assert error.max_abs < 1e-4
        assert error.kl < 1e-6
        assert error.same_top == 1.0


def test_changes_nothing_of_the_model():
    model = mixture().train()
    model.get_base_model().model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    moeroute.merge(model, "usage", text=token_ids())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_is_an_ordinary_adapter_folder(tmp_path):
    model = mixture(target_modules=["q_proj", "layers.1.mlp.down_proj"], task_type="CAUSAL_LM")
    merged = moeroute.merge(model)
    merged.save(tmp_path / "deep" / "plain")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "deep" / "plain").eval()
    assert again.peft_config["default"].peft_type == "LORA"
    check_equals(merged, logits(again))
    names = [name for name, module in again.named_modules() if hasattr(module, "lora_A")]
    assert len(names) == 3
    dense = again.merge_and_unload()
    check_equals(merged, logits(dense))


def test_banks_of_other_kinds_and_ranks():
    model = mixture(target_modules=["q_proj", "v_proj"])
    weights = {}
    for index, (name, layer) in enumerate(sites(model).items()):
        widths = {
            "in_features": layer.bank.lora_a.shape[1],
            "out_features": layer.bank.lora_b.shape[0],
        }
        if index == 0:
            ranks, scalings = [1, 0, 3], [2.0, 1.0, 0.5]
            layer.bank = RaggedLoRABank(ranks=ranks, scalings=scalings, **widths)
        elif index == 1:
            layer.bank = SharedDownLoRABank(num_experts=3, r=5, lora_alpha=2, **widths)
        nn.init.normal_(layer.bank.lora_b, std=0.3)
        size = layer.bank.num_experts
        weights[name] = torch.full((size,), 1 / size)
    merged = moeroute.merge(model)
    check_equals(merged, logits_under(model, weights))
    assert sorted(merged.config.rank_pattern.values()) == [4, 5]
    for name, size in weights.items():
        weights[name] = torch.eye(4)[3, : size.shape[0]]
    last = moeroute.merge(model, "expert:3")  # the first two linears have no such expert
    assert len(last.tensors) == 4
    check_equals(last, logits_under(model, weights))


def test_linears_of_gpt2():
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4)

    def base():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()

    model = mixture(base=base(), target_modules=["c_attn"])
    weights = dict.fromkeys(sites(model), torch.full((E,), 1 / E))
    check_equals(moeroute.merge(model), logits_under(model, weights), base())


def test_modules_that_were_saved_whole_come_along(tmp_path):
    model = mixture(target_modules=["q_proj"], modules_to_save=["lm_head"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    expected = logits_under(model, dict.fromkeys(sites(model), torch.full((E,), 1 / E)))
    merged = moeroute.merge(model)
    check_equals(merged, expected)
    merged.save(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


def test_the_active_adapter_is_merged():
    model = mixture()
    moeroute.wrap_model(model, MoLoRA(r=1, num_experts=2), adapter_name="other")
    model.set_adapter("other")
    assert moeroute.merge(model).config.r == 2


def test_on_the_base_of_the_mixture_itself():
    model = mixture()
    merged = moeroute.merge(model)
    expected = logits_under(model, dict.fromkeys(sites(model), torch.full((E,), 1 / E)))
    check_equals(merged, expected, moeroute.unwrap_model(model))


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_method_merges_or_says_why_not(name):
    model = mixture(small(name), target_modules=None)
    try:
        merged = moeroute.merge(model)
    except ValueError as error:
        assert f"is not defined for {name}" in str(error)  # noqa: PT017
        of_linears = moeroute.get_method(name).site_kind == "linear"
        assert not of_linears or name == "ept"  # noqa: PT017
        return
    banks = {site: layer.bank for site, layer in sites(model).items()}
    weights = {
        site: torch.full((num_slots(bank),), 1 / bank.num_experts) for site, bank in banks.items()
    }
    check_equals(merged, logits_under(model, weights))


BY_TASK = {
    "poly": Poly(num_tasks=3, r=2),
    "poly_outputs": Poly(num_tasks=3, r=2, mix="output"),
    "mhr": MHR(num_tasks=3, r=2, num_experts=3, heads=2),
    "moelora": MOELoRA(num_tasks=3, r=8, num_experts=4),
}


class TestByTask:
    @pytest.fixture(params=BY_TASK)
    def model(self, request):
        return mixture(BY_TASK[request.param])

    def test_a_task_is_one_plain_lora_and_loses_nothing(self, model):
        answers = []
        for task in range(3):
            task_ids = torch.full((3,), task)
            text = {"input_ids": token_ids(), "task_ids": task_ids}
            merged = moeroute.merge(model, f"task:{task}", text=text)
            answers.append(logits(model, task_ids=task_ids))
            check_equals(merged, answers[-1])
            assert merged.error.max_abs < 1e-4
        assert not torch.allclose(answers[0], answers[1], atol=0.01)

    def test_one_expert(self, model):
        weights = {}
        for name, layer in sites(model).items():
            bank = layer.bank
            weights[name] = torch.eye(bank.num_experts)[2].repeat(
                num_slots(bank) // bank.num_experts
            )
        check_equals(moeroute.merge(model, "expert:2"), logits_under(model, weights))

    def test_usage_is_that_of_the_tasks_of_the_text(self, model):
        text = {"input_ids": token_ids(), "task_ids": torch.full((3,), 1)}
        merged = moeroute.merge(model, "usage", text=text)
        check_equals(merged, logits(model, task_ids=text["task_ids"]))
        with pytest.raises(ValueError, match="got no task_ids"):
            moeroute.merge(model, "usage", text=token_ids())

    @pytest.mark.parametrize("task", ["3", "-1", "", "math"])
    def test_tasks_that_there_are_not(self, model, task):
        with pytest.raises(ValueError, match=f"unknown task '{task}'; give a number from 0 to 2"):
            moeroute.merge(model, f"task:{task}")


def test_an_adapter_that_was_mixed_comes_out_by_its_name(tmp_path):
    folders = {
        "math": save_lora(tmp_path / "math", seed=1),
        "code": save_lora(tmp_path / "code", seed=2, r=2, target_modules=["q_proj", "up_proj"]),
    }
    model = moeroute.mix_adapters(make_base(), folders, Arrow(top_k=1)).eval()
    ids = token_ids() % 31
    for name, folder in folders.items():
        alone = PeftModel.from_pretrained(make_base(), folder).eval()
        merged = moeroute.merge(model, f"expert:{name}").put_on(make_base()).eval()
        torch.testing.assert_close(logits(merged, input_ids=ids), logits(alone, input_ids=ids))
        assert merged.targeted_module_names == alone.targeted_module_names
    with pytest.raises(ValueError, match="a number from 0 to 1 or a name of math, code"):
        moeroute.merge(model, "expert:law")


class TestBadInput:
    @pytest.mark.parametrize(
        ("strategy", "words"),
        [
            ("mean", "unknown strategy 'mean'; choose"),
            ("uniform:2", "takes nothing after it, found '2'"),
            ("expert:4", "unknown expert '4'; give a number from 0 to 3"),
            ("expert:-1", "unknown expert '-1'"),
            ("expert:", "unknown expert ''"),
            ("expert", "unknown expert ''"),
            ("expert:math", "unknown expert 'math'"),
            ("task:0", "not defined for molora: it routes by what it reads"),
            ("usage", "give text=input_ids"),
        ],
    )
    def test_strategies(self, strategy, words):
        with pytest.raises(ValueError, match=words):
            moeroute.merge(mixture(), strategy)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (torch.zeros(0, 4, dtype=torch.long), "holds no tokens"),
            ([], "holds no tokens"),
            (
                {
                    "input_ids": torch.ones(2, 3, dtype=torch.long),
                    "attention_mask": torch.zeros(2, 3, dtype=torch.long),
                },
                "holds no tokens",
            ),
            (torch.ones(3, dtype=torch.long), r"must be \(B, S\) token ids"),
            ("hello", r"must be \(B, S\) token ids.*str"),
        ],
    )
    def test_text(self, text, words):
        with pytest.raises(ValueError, match=words):
            moeroute.merge(mixture(), "usage", text=text)

    def test_a_mixture_over_blocks(self):
        model = mixture(MixLoRA(r=2, num_experts=E))
        with pytest.raises(ValueError, match="not defined for mixlora.*Keep the adapter"):
            moeroute.merge(model)

    def test_other_models(self):
        with pytest.raises(ValueError, match="is no PeftModel"):
            moeroute.merge(tiny_llama())
        plain = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="merge_and_unload"):
            moeroute.merge(plain)

    def test_another_base(self):
        merged = moeroute.merge(mixture())
        with pytest.raises(ValueError, match="no place for"):
            merged.put_on(tiny_llama(layers=1))
        with pytest.raises(ValueError, match="no values for 28"):
            merged.put_on(tiny_llama(layers=4))
        wide = tiny_llama().config
        wide.hidden_size = 64
        with pytest.raises(ValueError, match="does not fit this base"):
            merged.put_on(LlamaForCausalLM(wide))
