"""What every mixture method must do, over the whole registry."""

import copy
import subprocess
import sys

import pytest
import torch
from contracts.method_cases import case_of, loss_of_output, skip_exceptions, small, with_tasks
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import moeroute
from moeroute.integration.adapters.site_host import SiteHost
from moeroute.methods.registry import method_field_names
from moeroute.routing_pass import SampleInputs

METHODS = [
    name
    for name in moeroute.list_methods()
    if moeroute.get_method(name).site_kind != "decoder_layer"
]

RELOAD = """
import sys
import torch, moeroute
from peft import PeftModel
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
base = AutoModelForCausalLM.from_pretrained(folder + "/base")
model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
logits = model(**torch.load(folder + "/batch.pt")).logits
print((logits - torch.load(folder + "/expected.pt")).abs().max().item())
"""

pytestmark = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(autouse=True)
def _only_what_applies(request, name):
    skip_exceptions(name, request.node.name)


@pytest.fixture
def batch(name):
    torch.manual_seed(1)
    ids = torch.randint(0, 61, (3, 9))
    return with_tasks(name, {"input_ids": ids, "labels": ids.clone()})


def wake(model, scale=0.3):
    """Give every tensor of the adapter a value, so that the adapter does something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "moeroute_site" in key and tensor.is_floating_point():
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    return model


def loss_of(name, model, batch):
    """What the method trains on."""
    return case_of(name).loss_of(model, batch)


def tell_tasks(host, name, samples):
    """Give a layer that is called by itself the task of each sample, if its router asks."""
    task_ids = with_tasks(name, {"input_ids": torch.zeros(samples, 1)}).get("task_ids")
    host.routing_pass.begin(samples=SampleInputs(task_ids=task_ids))
    host.routing_pass.end()


def checkpoint_layers(model, settings):
    """Switch activation checkpointing on, by its name in older and newer transformers."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(settings)


def wrapped(make_llama, name, **fields):
    return moeroute.wrap_model(make_llama(), small(name, **fields), task_type="CAUSAL_LM")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_fresh_adapter_equals_the_base_bit_for_bit(name, make_llama, batch, dtype, training):
    del batch["labels"]  # a loss of one training forward is not every method's
    base = make_llama().to(dtype).train(training)
    expected = base(**batch).logits
    dropout = {"lora_dropout": 0.2} if "lora_dropout" in method_field_names(name) else {}
    model = moeroute.wrap_model(copy.deepcopy(base), small(name, **dropout)).train(training)
    assert torch.equal(model(**batch).logits, expected)


def test_defaults_build_on_any_model_that_has_the_site(name, make_llama, batch):
    model = moeroute.wrap_model(make_llama(), moeroute.get_method(name)())
    if case_of(name).by_task:
        batch["task_ids"].zero_()  # by default there is one task
    assert torch.isfinite(loss_of(name, model, batch))


def test_base_is_frozen_and_everything_added_trains(name, make_llama, batch):
    model = wake(wrapped(make_llama, name)).train()
    loss_of(name, model, batch).backward()
    for key, parameter in model.named_parameters():
        if "moeroute_site" in key:
            assert parameter.requires_grad
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key
        else:
            assert not parameter.requires_grad, key
            assert parameter.grad is None, key


def test_disable_adapter_equals_the_base(name, make_llama, batch):
    expected = make_llama()(**batch).logits
    model = wake(wrapped(make_llama, name)).eval()
    assert not torch.equal(model(**batch).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)
    assert not torch.equal(model(**batch).logits, expected)


def test_unwrap_restores_the_very_modules(name, make_llama, batch):
    base = make_llama()
    modules = {key: id(module) for key, module in base.named_modules()}
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = wake(moeroute.wrap_model(base, small(name)))
    again = moeroute.unwrap_model(model)
    assert {key: id(module) for key, module in again.named_modules()} == modules
    assert not again._forward_hooks
    assert not again._forward_pre_hooks
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    moeroute.wrap_model(again, small(name))


def test_save_and_load_through_peft_and_transformers(name, make_llama, batch, tmp_path):
    base_dir, adapter_dir = tmp_path / "base", tmp_path / "adapter"
    make_llama().save_pretrained(base_dir)
    model = wake(
        moeroute.wrap_model(
            AutoModelForCausalLM.from_pretrained(base_dir), small(name), task_type="CAUSAL_LM"
        )
    ).eval()
    expected = model(**batch).logits
    model.save_pretrained(adapter_dir)
    assert (adapter_dir / "adapter_config.json").is_file()
    assert (adapter_dir / "adapter_model.safetensors").is_file()
    fresh = AutoModelForCausalLM.from_pretrained(base_dir)
    loaded = PeftModel.from_pretrained(fresh, adapter_dir).eval()
    loaded = moeroute.accept_routing_inputs(loaded)
    assert torch.equal(loaded(**batch).logits, expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    renamed = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_dir),
        adapter_dir,
        adapter_name="other",
        is_trainable=True,
    ).eval()
    renamed = moeroute.accept_routing_inputs(renamed)
    assert torch.equal(renamed(**batch).logits, expected)
    trainable = any(parameter.requires_grad for parameter in renamed.parameters())
    assert trainable == case_of(name).trains
    auto = AutoModelForCausalLM.from_pretrained(adapter_dir).eval()
    assert torch.equal(auto(**batch).logits, expected)


def test_a_new_process_needs_only_the_import(name, make_llama, batch, tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    model = wake(
        moeroute.wrap_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), small(name))
    ).eval()
    torch.save(model(**batch).logits, tmp_path / "expected.pt")
    model.save_pretrained(tmp_path / "adapter")
    torch.save(batch, tmp_path / "batch.pt")
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout.strip().splitlines()[-1]) < 1e-5


def test_two_adapters_on_one_base(name, make_llama, batch):
    model = wake(wrapped(make_llama, name)).eval()
    first = model(**batch).logits
    other = small(name, **case_of(name).second)
    moeroute.wrap_model(model, other, adapter_name="second")
    assert torch.equal(model(**batch).logits, first)
    model.set_adapter("second")
    assert torch.equal(model(**batch).logits, make_llama()(**batch).logits)
    trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert bool(trainable) == case_of(name).trains
    assert all(".second." in key for key in trainable)
    model.set_adapter("default")
    assert torch.equal(model(**batch).logits, first)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert not any(".default." in key for key in model.state_dict())


def test_merge_raises_and_says_what_to_do(name, make_llama):
    model = wrapped(make_llama, name)
    with pytest.raises(ValueError, match="unwrap_model"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="depend on the token"):
        model.merge_adapter()


def test_generate_with_a_cache_equals_without(name, make_llama, batch):
    model = wake(wrapped(make_llama, name)).eval()
    prompt = batch["input_ids"][:, :5]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with moeroute.routing_inputs(model, task_ids=batch.get("task_ids")):
        cached = model.generate(input_ids=prompt, use_cache=True, **settings)
        again = model.generate(input_ids=prompt, use_cache=False, **settings)
    assert torch.equal(cached, again)


def test_gradient_checkpointing_changes_no_gradient(name, make_llama, batch):
    gradients = []
    for checkpointing in (False, True):
        model = wake(wrapped(make_llama, name)).train()
        if checkpointing:
            checkpoint_layers(model, {"use_reentrant": False})
            model.enable_input_require_grads()
        loss_of(name, model, batch).backward()
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


def test_compiles_without_graph_breaks(name, make_llama, batch):
    model = wake(wrapped(make_llama, name)).eval()
    expected = model(**batch).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).logits, expected)


def test_compiled_training_step_gives_the_same_gradients(name, make_llama, batch):
    gradients = []
    for compiling in (False, True):
        model = wake(wrapped(make_llama, name)).train()
        forward = torch.compile(model, backend="aot_eager") if compiling else model
        loss_of(name, forward, batch).backward()
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-6, msg=key)


def test_a_copy_is_independent(name, make_llama, batch):
    model = wake(wrapped(make_llama, name)).train()
    if case_of(name).trains:
        loss_of(name, model, batch).backward()
    twin = copy.deepcopy(model).train()
    hosts = [module for module in twin.modules() if isinstance(module, SiteHost)]
    originals = [module for module in model.modules() if isinstance(module, SiteHost)]
    assert hosts[0].routing_pass is hosts[-1].routing_pass
    assert hosts[0].routing_pass is not originals[0].routing_pass
    torch.testing.assert_close(loss_of(name, twin, batch), loss_of(name, model, batch))
    wake(twin, scale=0.6)
    assert not torch.equal(twin.eval()(**batch).logits, model.eval()(**batch).logits)


def test_tokens_do_not_depend_on_their_neighbours(name, make_llama):
    model = wake(wrapped(make_llama, name)).double().eval()
    inputs = with_tasks(name, {"input_ids": torch.randint(0, 61, (4, 7))})
    whole = model(**inputs).logits
    rows = [{key: value[row : row + 1] for key, value in inputs.items()} for row in range(4)]
    single = torch.cat([model(**row).logits for row in rows])
    torch.testing.assert_close(whole, single, rtol=1e-9, atol=1e-9)


def test_permuting_experts_leaves_the_output_unchanged(name, make_llama, batch):
    model = wake(wrapped(make_llama, name)).double().eval()
    expected = model(**batch).logits
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "moeroute_site" in key:
                tensor.copy_(case_of(name).permute(key, tensor, order))
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-9, atol=1e-9)


def test_equals_get_peft_model(name, make_llama, batch):
    torch.manual_seed(5)
    ours = moeroute.wrap_model(make_llama(), small(name))
    torch.manual_seed(5)
    fields = dict(case_of(name).fields)
    theirs = get_peft_model(
        make_llama(), moeroute.MoeRouteConfig(method=name, method_fields=fields)
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(wake(ours).eval()(**batch).logits, wake(theirs).eval()(**batch).logits)


def test_every_tensor_of_the_adapter_is_saved(name, make_llama, tmp_path):
    from safetensors.torch import load_file

    model = wake(wrapped(make_llama, name))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    own = {key for key in model.state_dict() if "moeroute_site" in key}
    assert {key.replace(".moeroute_site.default.", ".moeroute_site.") for key in own} == set(saved)


def test_autocast_agrees_with_full_precision(name, make_llama, batch):
    model = wake(wrapped(make_llama, name), scale=0.05).train()
    expected = loss_of(name, model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(name, model, batch)
    assert (loss - expected).abs() < 0.02 * expected
    loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(parameter.grad).all(), key


def test_low_precision_base_keeps_its_adapter_in_float32(name, make_llama, batch):
    for dtype in (torch.bfloat16, torch.float16):
        model = moeroute.wrap_model(make_llama().to(dtype), small(name)).train()
        added = {p.dtype for k, p in model.named_parameters() if "moeroute_site" in k}
        assert added == {torch.float32}
        with torch.no_grad():
            assert wake(model, scale=0.05)(**batch).logits.dtype == dtype
        loss = loss_of(name, model, batch)
        loss.backward()
        full = wake(moeroute.wrap_model(make_llama(), small(name)), scale=0.05)
        exact = loss_of(name, full, batch)
        assert (loss - exact).abs() < 0.02 * exact


def test_no_tokens_no_trouble(name, make_llama):
    model = wake(wrapped(make_llama, name)).train()
    host = next(module for module in model.modules() if isinstance(module, SiteHost))
    shapes = [(0, 5, 32), (2, 0, 32)]
    for shape in shapes if case_of(name).by_task else [*shapes, (0, 32)]:
        tell_tasks(host, name, shape[0])
        out = host(torch.zeros(shape, requires_grad=True))
        assert out.shape[:-1] == shape[:-1]
        out.sum().backward()


def test_strided_and_expanded_inputs(name, make_llama):
    model = wake(wrapped(make_llama, name), scale=0.05).eval()
    host = next(module for module in model.modules() if isinstance(module, SiteHost))
    token = torch.randn(1, 1, 32)
    expanded = token.expand(2, 3, 32)
    strided = torch.randn(2, 32, 5).transpose(1, 2)
    tell_tasks(host, name, 2)
    torch.testing.assert_close(host(expanded), host(expanded.contiguous()))
    torch.testing.assert_close(host(strided), host(strided.contiguous()))


def test_trains_with_trainer_and_resumes_with_the_same_losses(name, make_llama, batch, tmp_path):
    from transformers import TrainingArguments

    rows = [{key: value[row % 3] for key, value in batch.items()} for row in range(12)]

    def train(steps, folder, resume=None):
        torch.manual_seed(7)
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=3,
            max_steps=steps,
            lr_scheduler_type="constant",
            learning_rate=0.01,
            logging_steps=1,
            save_steps=2,
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        model = wrapped(make_llama, name)
        model = wake(model) if case_of(name).waits else model
        trainer = case_of(name).trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = train(4, tmp_path / "whole")
    train(2, tmp_path / "half")
    resumed = train(4, tmp_path / "half", resume=str(tmp_path / "half" / "checkpoint-2"))
    assert whole[-1] < whole[0]
    assert resumed[-2:] == pytest.approx(whole[-2:], rel=1e-4)


def test_padding_changes_neither_real_tokens_nor_losses(name, make_llama):
    model = wake(wrapped(make_llama, name)).double()
    plain = with_tasks(name, {"input_ids": torch.randint(1, 61, (2, 6))})
    padded = {**plain, "input_ids": nn.functional.pad(plain["input_ids"], (0, 4))}
    padded["attention_mask"] = nn.functional.pad(torch.ones(2, 6, dtype=torch.int64), (0, 4))
    model.eval()
    expected = model(**plain).logits
    torch.testing.assert_close(model(**padded).logits[:, :6], expected, rtol=1e-9, atol=1e-9)
    if case_of(name).loss_of is not loss_of_output:
        return  # it draws, and another number of tokens draws otherwise
    losses = []
    model.train()
    for inputs in (plain, padded):
        torch.manual_seed(0)
        model(**inputs)
        losses.append(moeroute.aux_losses(model).total)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-9)


def test_auxiliary_losses_reach_a_router(name, make_llama, batch):
    if case_of(name).loss_of is not loss_of_output:
        return  # its loss is no sum of auxiliary ones
    model = wake(wrapped(make_llama, name)).train()
    model(**batch)
    report = moeroute.aux_losses(model)
    if not report.parts:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(report.total, trained, allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in gradients)


class OpaqueLinear(nn.Module):
    """A quantised linear as adapters see one: sizes and a forward, no floating weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("codes", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype))


def test_a_base_that_only_answers_calls_is_enough(name, make_llama, batch):
    base = make_llama()
    for layer in base.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for key, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, key, OpaqueLinear(child))
    expected = base(**batch).logits
    model = moeroute.wrap_model(base, small(name)).eval()
    assert torch.equal(model(**batch).logits, expected)
    codes = {key: buffer.clone() for key, buffer in model.named_buffers() if "codes" in key}
    if case_of(name).trains:
        wake(model, 0.05).train()
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        loss_of(name, model, batch).backward()
        optimizer.step()
    assert len(codes) == 14
    assert all(torch.equal(model.get_buffer(key), old) for key, old in codes.items())
