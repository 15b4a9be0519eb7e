"""What every method at the gate of an MoE checkpoint must do, over registry and families."""

import copy

import pytest
import torch
from contracts.gate_cases import FAMILIES, GATE_METHODS, gate_case, small_gate
from integration import tiny_models
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import moeroute
from moeroute.integration.adapters.gate_host import hosted_gates

pytestmark = pytest.mark.hf
every_method = pytest.mark.parametrize("name", GATE_METHODS)
some_families = pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _only_what_applies(request):
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    test = request.node.name.partition("[")[0]
    reason = gate_case(name).exceptions.get(test) if name else None
    if reason:
        pytest.skip(f"{name}: {reason}")


@pytest.fixture
def batch():
    ids = tiny_models.token_ids()
    return {"input_ids": ids, "labels": ids.clone()}


def wake(model, scale=0.3):
    """Give every parameter of the adapter a value, so that it routes its own way."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "moeroute_site" in key:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def wrapped(name, family="mixtral", base=None, **fields):
    base = tiny_models.build(family) if base is None else base
    return moeroute.wrap_model(base, small_gate(name, **fields), task_type="CAUSAL_LM")


def checkpoint_layers(model, settings):
    """Switch activation checkpointing on, by its name in older and newer transformers."""
    base = model.get_base_model()
    enable = getattr(base, "activation_checkpointing_enable", None)
    (enable or base.gradient_checkpointing_enable)(settings)
    model.enable_input_require_grads()


def gradients(model, batch, **settings):
    """Loss and gradients of one training forward, with the same draws at every call."""
    torch.manual_seed(11)
    model.zero_grad()
    loss = model(**batch, **settings).loss
    loss.backward()
    return loss, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@every_method
@every_family
def test_routers_train_and_the_checkpoint_does_not(name, family, batch):
    model = wake(wrapped(name, family)).train()
    loss, _ = gradients(model, batch)
    assert torch.isfinite(loss)
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == ("moeroute_site" in key), key
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key


@every_method
@every_family
def test_a_fresh_method_keeps_the_routing_where_it_says_so(name, family, batch):
    base = tiny_models.build(family)
    expected = base(**batch).logits
    logits = wrapped(name, base=base).eval()(**batch).logits
    if gate_case(name).keeps_routing:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    else:
        assert not torch.equal(logits, expected)


@every_method
@every_family
def test_off_and_unwrapped_the_checkpoint_answers(name, family, batch):
    base = tiny_models.build(family)
    expected = base(**batch).logits
    hooks = {key: len(module._forward_hooks) for key, module in base.named_modules()}
    modules = {key: id(module) for key, module in base.named_modules()}
    model = wake(wrapped(name, base=base)).eval()
    assert not torch.equal(model(**batch).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)
    again = moeroute.unwrap_model(model)
    assert torch.equal(again(**batch).logits, expected)
    assert {key: id(module) for key, module in again.named_modules()} == modules
    assert {key: len(m._forward_hooks) for key, m in again.named_modules()} == hooks
    moeroute.wrap_model(again, small_gate(name))


@every_method
@every_family
@pytest.mark.parametrize("captured_before", [False, True])
def test_router_logits_are_the_routers(name, family, batch, captured_before):
    base = tiny_models.build(family)
    if captured_before:
        base(**batch, output_router_logits=True)
    model = wake(wrapped(name, base=base)).train()
    torch.manual_seed(11)
    output = model(**batch, output_router_logits=True)
    with moeroute.track_routing(model) as stats:
        model(**batch)
    assert len(output.router_logits) == len(list(hosted_gates(model))) == len(stats.layers)
    kept = next(iter(hosted_gates(model)))[1].route_host.routing_pass.records.values()
    for theirs, record in zip(output.router_logits, kept, strict=True):
        torch.testing.assert_close(theirs, record.routing.router_logits)


@every_method
@every_family
def test_checkpointing_changes_no_gradient(name, family, batch):
    found = []
    for checkpointing in (False, True):
        model = wake(wrapped(name, family)).train()
        if checkpointing:
            checkpoint_layers(model, {"use_reentrant": False})
        found.append(gradients(model, batch)[1])
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, msg=key)


@every_method
@some_families
def test_generating_with_a_cache_equals_without(name, family, batch):
    model = wake(wrapped(name, family)).eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = batch["input_ids"][:, :4]
    cached = model.generate(input_ids=prompt, use_cache=True, **settings)
    again = model.generate(input_ids=prompt, use_cache=False, **settings)
    assert torch.equal(cached, again)


@every_method
@every_family
def test_saved_and_loaded_it_routes_the_same(name, family, batch, tmp_path):
    tiny_models.build(family).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = wake(wrapped(name, base=base)).eval()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    own = {key for key in model.state_dict() if "moeroute_site" in key}
    assert {key.replace(".moeroute_site.default.", ".moeroute_site.") for key in own} == set(saved)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", adapter_name="other").eval()
    assert torch.equal(loaded(**batch).logits, expected)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(auto(**batch).logits, expected)
    plain = moeroute.unwrap_model(auto)
    assert not list(hosted_gates(plain))


@every_method
def test_two_adapters_on_one_base(name, batch):
    base = tiny_models.build("mixtral")
    expected = base(**batch).logits
    model = wake(wrapped(name, base=base)).eval()
    first = model(**batch).logits
    other = small_gate(name, **gate_case(name).second)
    moeroute.wrap_model(model, other, adapter_name="second")
    assert torch.equal(model(**batch).logits, first)
    model.set_adapter("second")
    assert not torch.equal(model(**batch).logits, first)
    trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all(".second." in key for key in trainable)
    model.set_adapter("default")
    assert torch.equal(model(**batch).logits, first)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert not any(".default." in key for key in model.state_dict())
    assert torch.equal(moeroute.unwrap_model(model)(**batch).logits, expected)


@every_method
@some_families
def test_a_copy_asks_its_own_routers(name, family, batch):
    model = wake(wrapped(name, family)).train()
    gradients(model, batch)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(gradients(twin, batch)[0], gradients(model, batch)[0])
    hosts = [next(iter(hosted_gates(one)))[1].route_host for one in (model, twin)]
    assert hosts[0].routing_pass is not hosts[1].routing_pass
    assert hosts[0].gate_experts is not hosts[1].gate_experts
    assert any(module is hosts[1].gate_experts for module in twin.modules())
    before = model.eval()(**batch).logits
    wake(twin, scale=0.9)
    assert torch.equal(model(**batch).logits, before)
    assert not torch.equal(twin.eval()(**batch).logits, before)


@every_method
@some_families
def test_compiles_without_graph_breaks(name, family, batch):
    model = wake(wrapped(name, family, base=tiny_models.build(family, implementation="moeroute")))
    model.eval()
    expected = model(**batch).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).logits, expected)


@every_method
def test_a_compiled_training_step_gives_the_same_gradients(name, batch):
    found = []
    for compiling in (False, True):
        base = tiny_models.build("mixtral", implementation="moeroute")
        model = wake(wrapped(name, base=base)).train()
        forward = torch.compile(model, backend="aot_eager") if compiling else model
        torch.manual_seed(11)
        forward(**batch).loss.backward()
        found.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-4, atol=1e-6, msg=key)


@every_method
@every_family
def test_padding_changes_neither_real_tokens_nor_losses(name, family):
    model = wake(wrapped(name, family)).double()
    plain = {"input_ids": torch.randint(3, 61, (2, 6))}
    padded = {
        "input_ids": nn.functional.pad(plain["input_ids"], (0, 4)),
        "attention_mask": nn.functional.pad(torch.ones(2, 6, dtype=torch.int64), (0, 4)),
    }
    expected = model.eval()(**plain).logits
    torch.testing.assert_close(model(**padded).logits[:, :6], expected, rtol=1e-9, atol=1e-9)
    losses = []
    for inputs in (plain, padded):
        model.train()(**inputs)
        losses.append(moeroute.aux_losses(model).total)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-9)


@every_method
def test_a_low_precision_base_keeps_its_routers_in_float32(name, batch):
    model = wake(wrapped(name, base=tiny_models.build("mixtral").to(torch.bfloat16))).train()
    assert {p.dtype for k, p in model.named_parameters() if "moeroute_site" in k} == {torch.float32}
    output = model(**batch, output_router_logits=True)
    assert {logits.dtype for logits in output.router_logits} == {torch.bfloat16}
    output.loss.backward()
    assert moeroute.doctor(model) == []


@every_method
def test_auxiliary_losses_reach_the_loss_and_a_router(name, batch):
    model = wake(wrapped(name)).train()
    charged = model(**batch).loss
    report = moeroute.aux_losses(model)
    model.base_model.model.config.use_cache = False
    for _, gate in hosted_gates(model):
        for layer in gate.route_host.moeroute_site.values():
            layer.losses = ()
    torch.testing.assert_close(charged - model(**batch).loss, report.total.detach().to(charged))
    if report.parts:
        trained = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(report.total, trained, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in found)


@every_method
def test_reentrant_checkpointing_raises_or_agrees(name, batch):
    model = wake(wrapped(name)).train()
    expected = gradients(model, batch)[1]
    checkpoint_layers(model, {"use_reentrant": True})
    loses_its_graph = gate_case(name).recurrent or bool(moeroute.aux_losses(model).parts)
    if loses_its_graph:
        with pytest.raises(RuntimeError, match="use_reentrant"):
            gradients(model, batch)
        return
    found = gradients(model, batch)[1]
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, msg=key)
