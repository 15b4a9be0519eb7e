"""LoRA on the experts of MoE checkpoints: the fast path against PEFT's own."""

import copy
import pickle

import pytest
import torch
from integration import tiny_models
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

import moeroute
from moeroute.integration.adapters import expert_lora

pytestmark = pytest.mark.hf

BOTH = ("gate_up_proj", "down_proj")
FAMILIES = {
    "mixtral": BOTH,
    "qwen3_moe": BOTH,
    "olmoe": BOTH,
    "deepseek_v3": BOTH,
    "gpt_oss": BOTH,  # (E, in, out), biases, gate and up interleaved, own gate
    "openai_privacy_filter": BOTH,  # the same, concatenated
    "aria": BOTH,  # (E, in, out)
    "muse_spark": BOTH,  # a norm after each expert
    "nemotron_h": ("up_proj", "down_proj"),  # no gate
}


def lora_config(parameters=BOTH, **fields):
    fields = {"r": 3, "lora_alpha": 5, "target_modules": []} | fields
    return LoraConfig(target_parameters=[f"experts.{name}" for name in parameters], **fields)


def fill(model, seed=0):
    """Draw every LoRA parameter, so that B is not zero."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def adapted(family="mixtral", parameters=BOTH, **fields):
    config = lora_config(parameters, **fields)
    return fill(get_peft_model(tiny_models.build(family), config)).eval()


def logits(model, ids=None):
    ids = tiny_models.token_ids() if ids is None else ids
    return model(input_ids=ids, use_cache=False)[0]


def outputs_and_gradients(model, *, head):
    model.zero_grad()
    out = logits(model)
    (out * head).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients


def compare(model, *, tolerance=1e-5):
    """PEFT's path, then the fast path, on the same model."""
    head = torch.randn_like(logits(model))
    expected, gradients = outputs_and_gradients(model, head=head)
    assert gradients
    with moeroute.fast_expert_lora(model):
        found, fast_gradients = outputs_and_gradients(model, head=head)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert fast_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(
            fast_gradients[name] / scale,
            gradient / scale,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_peft(family):
    compare(adapted(family, FAMILIES[family]))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "moeroute"])
def test_equals_peft_whatever_the_experts_implementation(implementation):
    model = adapted()
    model.get_base_model().set_experts_implementation(implementation)
    compare(model)
    with moeroute.fast_expert_lora(model):
        assert model.get_base_model().get_experts_implementation() == {"": implementation}


@pytest.mark.parametrize("parameters", [("gate_up_proj",), ("down_proj",)])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_one_of_the_two_alone(family, parameters):
    compare(adapted(family, parameters))


@pytest.mark.parametrize("r", [1, 2, 5, 8])
def test_any_rank(r):
    compare(adapted(r=r, use_rslora=True))


def test_routers_biases_and_linears_beside_it():
    model = tiny_models.build("gpt_oss")
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=[
            "experts.gate_up_proj",
            "experts.down_proj",
            "experts.down_proj_bias",
            "router.weight",
        ],
    )
    compare(fill(get_peft_model(model, config)))


def test_trainable_experts_get_their_gradient():
    model = adapted()
    for experts in tiny_models.experts_of(model):
        experts.requires_grad_(True)
    compare(model)


def test_nothing_as_large_as_the_stack_is_made(monkeypatch):
    model = adapted()
    monkeypatch.setattr(torch.nn.utils.parametrize, "register_parametrization", _fail)
    moeroute.fast_expert_lora(model)
    logits(model).sum().backward()


def _fail(*_, **__):
    raise AssertionError("PEFT rebuilt the stack")


def test_several_adapters():
    model = adapted()
    model.add_adapter("other", lora_config(r=7, lora_alpha=2))
    with moeroute.fast_expert_lora(model):
        fill(model, seed=2)
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        compare(model)


def test_adapters_that_come_later_are_fast(tmp_path):
    adapted(r=2).save_pretrained(tmp_path)
    model = adapted()
    moeroute.fast_expert_lora(model)
    model.load_adapter(tmp_path, "later")
    model.set_adapter("later")
    found = logits(model)
    expert_lora.restore_expert_lora(model)
    torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)


def test_disabled_adapters_leave_the_model_as_it_was():
    base = tiny_models.build("mixtral")
    expected = logits(base)
    model = fill(get_peft_model(base, lora_config()))
    moeroute.fast_expert_lora(model)
    changed = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), changed)
    assert not torch.equal(changed, expected)


def test_merge_unmerge_and_unload_are_pefts():
    model = adapted()
    expected = logits(model)
    moeroute.fast_expert_lora(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        frozen = logits(model)
    assert torch.equal(logits(model.unload()), frozen)


def test_files_are_pefts(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "slow")
    moeroute.fast_expert_lora(model)
    model.save_pretrained(tmp_path / "fast")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "slow" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes()
    again = PeftModel.from_pretrained(tiny_models.build("mixtral"), tmp_path / "fast").eval()
    expected = logits(again)
    moeroute.fast_expert_lora(again)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)


def test_on_a_model_that_transformers_adapted():
    model = tiny_models.build("mixtral")
    model.add_adapter(lora_config())
    compare(fill(model))


def test_gradient_checkpointing():
    model = adapted().train()
    head = torch.randn_like(logits(model))
    expected, gradients = outputs_and_gradients(model, head=head)
    moeroute.fast_expert_lora(model, lora_dropout=0.0)
    base = model.get_base_model()
    newer = getattr(base, "activation_checkpointing_enable", None)  # since transformers 5.23
    (newer or base.gradient_checkpointing_enable)({"use_reentrant": False})
    found, fast_gradients = outputs_and_gradients(model, head=head)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fast_gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_compiles_as_one_graph(family):
    torch.compiler.reset()
    model = adapted(family)
    moeroute.fast_expert_lora(model)
    ids = tiny_models.token_ids()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False)[0]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(input_ids=ids, use_cache=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_base_with_float32_adapters():
    model = adapted().bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    expected = logits(model)
    moeroute.fast_expert_lora(model)
    found = logits(model)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.3)


def test_autocast():
    model = adapted()
    expected = logits(model)
    moeroute.fast_expert_lora(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(model)
    assert not torch.equal(found.float(), expected)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.4)


def test_generates_the_same_tokens():
    model = adapted()
    ids = tiny_models.token_ids()
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(input_ids=ids, **settings)
    moeroute.fast_expert_lora(model)
    assert torch.equal(model.generate(input_ids=ids, **settings), expected)


def test_routing_is_tracked_and_copies_are_their_own():
    model = adapted()
    moeroute.fast_expert_lora(model)
    with moeroute.track_routing(model) as stats, torch.no_grad():
        expected = logits(model)
    assert all(layer.tokens == tiny_models.token_ids().numel() for layer in stats.layers)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301
    for twin in twins:
        with torch.no_grad():
            assert torch.equal(logits(twin), expected)
            fill(twin, seed=5)
            assert not torch.equal(logits(twin), expected)
            assert torch.equal(logits(model), expected)


class TestDropout:
    def test_is_exact_in_the_mean_and_off_in_eval(self):
        model = adapted(parameters=("down_proj",))
        experts = next(m for m in model.modules() if isinstance(m, ParamWrapper))
        tokens = torch.randn(5, 32)
        ids, weights = torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
        with torch.no_grad():
            expected = experts(tokens, ids, weights)
            moeroute.fast_expert_lora(model, lora_dropout=0.25)
            torch.testing.assert_close(experts(tokens, ids, weights), expected)
            experts.train()
            torch.manual_seed(0)
            draws = torch.stack([experts(tokens, ids, weights) for _ in range(4000)])
        error = (draws.mean(0) - expected) / (draws.std(0) / 4000**0.5)
        assert draws.std(0).min() > 0
        assert error.abs().max() < 5  # standard errors, over 160 elements

    def test_equals_a_reference_with_the_same_mask(self):
        model = adapted(parameters=("gate_up_proj",), r=2).train()
        wrapper = next(m for m in model.modules() if isinstance(m, ParamWrapper))
        experts = wrapper.get_base_layer()
        tokens, ids, weights = torch.randn(1, 32), torch.tensor([[2]]), torch.ones(1, 1)
        moeroute.fast_expert_lora(model, lora_dropout=0.5)
        torch.manual_seed(3)
        found = wrapper(tokens, ids, weights)
        torch.manual_seed(3)
        dropped = nn.functional.dropout(tokens, 0.5)
        lora_a = wrapper.lora_A["default"].weight[4:6]  # expert 2, by expert
        lora_b = wrapper.lora_B["default"].weight[:, 2::4]  # expert 2 of 4, by rank
        delta = 2.5 * dropped @ lora_a.T @ lora_b.T
        hidden = experts._apply_gate(tokens @ experts.gate_up_proj[2].T + delta)
        torch.testing.assert_close(found, hidden @ experts.down_proj[2].T)

    def test_is_the_same_when_recomputed(self):
        model = adapted().train()
        head = torch.randn_like(logits(model))
        moeroute.fast_expert_lora(model, lora_dropout=0.3)
        torch.manual_seed(7)
        expected, gradients = outputs_and_gradients(model, head=head)
        base = model.get_base_model()
        newer = getattr(base, "activation_checkpointing_enable", None)
        (newer or base.gradient_checkpointing_enable)({"use_reentrant": False})
        torch.manual_seed(7)
        found, again = outputs_and_gradients(model, head=head)
        torch.testing.assert_close(found, expected)
        for name, gradient in gradients.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5)


class TestRemoving:
    def test_gives_pefts_path_back(self, monkeypatch):
        model = adapted()
        before = {name: set(vars(module)) for name, module in model.named_modules()}
        expected = logits(model)
        handle = moeroute.fast_expert_lora(model)
        handle.remove()
        handle.remove()
        assert {name: set(vars(module)) for name, module in model.named_modules()} == before
        assert torch.equal(logits(model), expected)
        monkeypatch.setattr(torch.nn.utils.parametrize, "register_parametrization", _fail)
        with pytest.raises(AssertionError, match="rebuilt"):
            logits(model)

    def test_under_accelerates_hooks(self):
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        model = adapted()
        expected = logits(model)
        for experts in tiny_models.experts_of(model):
            add_hook_to_module(experts, AlignDevicesHook("cpu", offload=True))
            assert experts.gate_up_proj.device.type == "meta"
        handle = moeroute.fast_expert_lora(model)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        handle.remove()
        with model.disable_adapter():
            assert logits(model).isfinite().all()


class TestWrapModel:
    def test_is_peft_and_then_fast(self):
        model = moeroute.wrap_model(tiny_models.build("mixtral"), lora_config())
        expected = get_peft_model(tiny_models.build("mixtral"), lora_config())
        assert [name for name, _ in model.named_parameters()] == [
            name for name, _ in expected.named_parameters()
        ]
        assert expert_lora.is_fast_expert_lora(model)
        torch.testing.assert_close(
            logits(fill(model)), logits(fill(expected)), rtol=1e-5, atol=1e-5
        )

    def test_takes_a_second_adapter(self):
        model = moeroute.wrap_model(tiny_models.build("mixtral"), lora_config())
        moeroute.wrap_model(model, lora_config(r=1), adapter_name="other")
        assert set(model.peft_config) == {"default", "other"}
        with pytest.raises(ValueError, match="has an adapter 'other'"):
            moeroute.wrap_model(model, lora_config(), adapter_name="other")

    def test_takes_dropout_and_leaves_pefts_config_loadable(self, tmp_path):
        model = moeroute.wrap_model(tiny_models.build("mixtral"), lora_config(lora_dropout=0.5))
        fill(model).train()
        assert not torch.equal(logits(model), logits(model))
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_models.build("mixtral"), tmp_path).eval()
        torch.testing.assert_close(logits(again), logits(model.eval()), rtol=1e-5, atol=1e-5)

    def test_unwraps(self):
        base = tiny_models.build("mixtral")
        names = [name for name, _ in base.named_modules()]
        expected = logits(base)
        bare = moeroute.unwrap_model(fill(moeroute.wrap_model(base, lora_config())))
        assert [name for name, _ in bare.named_modules()] == names
        assert not any("forward" in vars(module) for module in bare.modules())
        assert torch.equal(logits(bare), expected)

    @pytest.mark.parametrize(
        ("config", "fields", "words"),
        [
            (LoraConfig(target_modules=["q_proj"]), {}, "names no target_parameters"),
            (lora_config(), {"r": 8}, "unknown field 'r'"),
            (lora_config(lora_dropout=0.1, target_modules=["q_proj"]), {}, "linears and experts"),
            (lora_config(lora_dropout=0.1, target_modules=None), {}, r"target_modules=\[\]"),
        ],
    )
    def test_bad_configs(self, config, fields, words):
        with pytest.raises(ValueError, match=words):
            moeroute.wrap_model(tiny_models.build("mixtral"), config, **fields)

    def test_models_with_another_adapter(self):
        model = get_peft_model(tiny_models.build("mixtral"), LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="add_adapter"):
            moeroute.wrap_model(model, lora_config(), adapter_name="experts")
        with pytest.raises(ValueError, match="carries an adapter already"):
            moeroute.wrap_model(model.get_base_model(), lora_config())

    def test_what_cannot_be_fast_leaves_the_model_as_it_was(self):
        model = Stacked()
        with pytest.raises(ValueError, match="computes its experts itself"):
            moeroute.wrap_model(model, lora_config())
        assert isinstance(model.experts, OwnExperts)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert not hasattr(model, "peft_config")


class TestBadInput:
    def test_a_model_without_such_an_adapter(self):
        with pytest.raises(ValueError, match="has no LoRA on stacked experts.*target_parameters"):
            moeroute.fast_expert_lora(tiny_models.build("mixtral"))
        linears = get_peft_model(
            tiny_models.build("mixtral"), LoraConfig(target_modules=["q_proj"])
        )
        with pytest.raises(ValueError, match="has no LoRA on stacked experts"):
            moeroute.fast_expert_lora(linears)

    def test_twice(self):
        model = adapted()
        handle = moeroute.fast_expert_lora(model)
        with pytest.raises(ValueError, match=r"fast already; call remove\(\)"):
            moeroute.fast_expert_lora(model)
        handle.remove()
        moeroute.fast_expert_lora(model)

    @pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
    def test_dropout_outside_its_range(self, dropout):
        with pytest.raises(ValueError, match=r"lora_dropout=.*\[0, 1\)"):
            moeroute.fast_expert_lora(adapted(), lora_dropout=dropout)

    def test_experts_that_compute_themselves(self):
        model = fill(get_peft_model(Stacked(), lora_config()))
        expected = model(torch.ones(2, 4))
        with pytest.raises(ValueError, match="OwnExperts computes its experts itself"):
            moeroute.fast_expert_lora(model)
        assert torch.equal(model(torch.ones(2, 4)), expected)

    def test_a_forward_that_was_replaced(self):
        model = adapted()
        experts = next(tiny_models.experts_of(model))
        experts.forward = experts.forward
        with pytest.raises(ValueError, match="was replaced"):
            moeroute.fast_expert_lora(model)

    def test_quantised_experts(self):
        model = adapted()
        experts = next(tiny_models.experts_of(model))
        experts.down_proj = nn.Parameter(
            experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False
        )
        with pytest.raises(TypeError, match="float8_e4m3fn.*Dequantise"):
            moeroute.fast_expert_lora(model)


class OwnExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = 2
        self.gate_up_proj = nn.Parameter(torch.randn(2, 4, 4))
        self.down_proj = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x):
        return x @ self.gate_up_proj[0] @ self.down_proj[1]


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = OwnExperts()

    def forward(self, x):
        return self.experts(x)
