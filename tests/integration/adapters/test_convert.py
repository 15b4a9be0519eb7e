"""Adapters in the formats that others load."""

import json

import pytest
import torch
from integration import tiny_models
from integration.adapters.lora_folders import make_base, save_lora
from integration.adapters.test_expert_lora import adapted
from integration.adapters.test_merge import logits, mixture, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from typer.testing import CliRunner

import moeroute
from moeroute.cli import app
from moeroute.integration.adapters.convert import convert_adapter
from moeroute.layers.ragged_bank import RaggedLoRABank
from moeroute.methods import MHR, Arrow, MixLoRA

pytestmark = pytest.mark.hf


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base of which only the config is there."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().config.save_pretrained(folder)
    return str(folder)


def save(model, folder, base):
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(tmp_path, base):
    return save(mixture(), tmp_path / "adapter", base)


def test_one_plain_lora_per_expert(saved, tmp_path):
    folders = convert_adapter(saved, tmp_path / "out")
    assert [folder.name for folder in folders] == [f"expert_{index}" for index in range(4)]
    model = mixture()
    for index, folder in enumerate(folders):
        assert sorted(path.name for path in folder.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        plain = PeftModel.from_pretrained(tiny_llama(), folder).eval()
        expected = moeroute.merge(model, f"expert:{index}").put_on(tiny_llama()).eval()
        assert torch.equal(logits(plain), logits(expected))
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_one_plain_lora_per_task(tmp_path, base):
    model = mixture(MHR(num_tasks=2, r=2, num_experts=3, heads=2))
    folders = convert_adapter(save(model, tmp_path / "adapter", base), tmp_path / "out")
    assert [folder.name for folder in folders] == ["task_0", "task_1"]
    for task, folder in enumerate(folders):
        plain = PeftModel.from_pretrained(tiny_llama(), folder).eval()
        expected = logits(model, task_ids=torch.full((3,), task))
        torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("names", "written"),
    [(("math", "code"), ["math", "code"]), (("../out", "code"), ["expert_0", "expert_1"])],
)
def test_adapters_that_were_mixed(tmp_path, names, written):
    folders = {
        name: save_lora(tmp_path / str(seed), seed=seed, r=2 + seed)
        for seed, name in enumerate(names)
    }
    make_base().config.save_pretrained(tmp_path / "base")
    model = moeroute.mix_adapters(make_base(), folders, Arrow(top_k=1))
    source = save(model, tmp_path / "mixed", str(tmp_path / "base"))
    found = convert_adapter(source, tmp_path / "out")
    assert [folder.relative_to(tmp_path / "out").as_posix() for folder in found] == written
    ids = torch.randint(0, 31, (2, 9))
    for folder, adapter in zip(found, folders.values(), strict=True):
        one, other = (PeftModel.from_pretrained(make_base(), f).eval() for f in (folder, adapter))
        torch.testing.assert_close(logits(one, input_ids=ids), logits(other, input_ids=ids))


def test_experts_of_other_ranks(tmp_path, base, monkeypatch):
    """Buffers that no file holds (which rank belongs to which expert) must survive."""

    def ragged(_, widths, size):
        return RaggedLoRABank(
            ranks=[1, 2, 3, 4],
            scalings=[0.5, 1, 2, 4],
            in_features=widths[0],
            out_features=widths[1],
        )

    monkeypatch.setattr("moeroute.methods.molora.lora_bank", ragged)
    model = mixture()
    folders = convert_adapter(save(model, tmp_path / "adapter", base), tmp_path / "out")
    for index, folder in enumerate(folders):
        plain = PeftModel.from_pretrained(tiny_llama(), folder).eval()
        assert plain.peft_config["default"].r == index + 1
        expected = moeroute.merge(model, f"expert:{index}").put_on(tiny_llama()).eval()
        assert torch.equal(logits(plain), logits(expected))


@pytest.mark.parametrize("parameters", [("gate_up_proj", "down_proj"), ("gate_up_proj",)])
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3"])
def test_lora_on_stacked_experts_by_expert(family, parameters, tmp_path):
    model = adapted(family, parameters)
    model.get_base_model().config.save_pretrained(tmp_path / "base")
    save(model, tmp_path / "adapter", str(tmp_path / "base"))
    assert convert_adapter(tmp_path / "adapter", tmp_path / "out", to="vllm") == [tmp_path / "out"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = LoraConfig.from_pretrained(str(tmp_path / "out"))
    scaling = config.lora_alpha / config.r
    compared = set()
    for name, wrapper in model.get_base_model().named_modules():
        if not isinstance(wrapper, ParamWrapper):
            continue
        place = "base_model.model." + name.removesuffix(".base_layer")
        delta = wrapper.get_delta_weight("default")
        for expert, matrix in enumerate(delta):
            modules = {"down_proj": matrix}
            if wrapper.parameter_name == "gate_up_proj":
                gate, up = matrix.chunk(2)
                modules = {"gate_proj": gate, "up_proj": up}
            for module, expected in modules.items():
                key = f"{place}.{expert}.{module}.lora_"
                found = scaling * tensors[key + "B.weight"] @ tensors[key + "A.weight"]
                torch.testing.assert_close(found, expected)
                compared |= {key + "B.weight", key + "A.weight"}
    assert compared == tensors.keys()
    assert not config.target_parameters


def test_linears_beside_the_experts_stay_as_they_are(tmp_path):
    model = tiny_models.build("qwen3_moe")
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    model = get_peft_model(model, config)
    model.get_base_model().config.save_pretrained(tmp_path / "base")
    save(model, tmp_path / "adapter", str(tmp_path / "base"))
    convert_adapter(tmp_path / "adapter", tmp_path / "out", to="vllm")
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    linears = {key for key in before if "q_proj" in key}
    assert linears
    assert all(torch.equal(before[key], after[key]) for key in linears)
    assert LoraConfig.from_pretrained(str(tmp_path / "out")).target_modules == {
        "q_proj",
        "down_proj",
    }


def test_the_command(saved, tmp_path):
    result = CliRunner().invoke(app, ["convert", str(saved), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert result.output.count("wrote") == 4
    again = CliRunner().invoke(app, ["convert", str(saved), str(tmp_path / "out")])
    assert again.exit_code == 1
    assert "not an empty folder" in " ".join(again.output.split())
    assert "Traceback" not in again.output


def test_a_failure_half_way_writes_nothing(saved, tmp_path, monkeypatch):
    from moeroute.integration.adapters import merged

    written = []

    def full_disk(tensors, path, **_):
        written.append(path)
        if len(written) == 3:
            raise OSError("no space left on device")
        open(path, "wb").close()

    monkeypatch.setattr(merged, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        convert_adapter(saved, tmp_path / "out")
    assert len(written) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


class TestBadInput:
    def test_formats(self, saved, tmp_path):
        with pytest.raises(ValueError, match="unknown format 'gguf'; choose peft or vllm"):
            convert_adapter(saved, tmp_path / "out", to="gguf")
        with pytest.raises(ValueError, match='is a mixture; choose to="peft"'):
            convert_adapter(saved, tmp_path / "out", to="vllm")

    def test_no_adapter(self, tmp_path):
        with pytest.raises(ValueError, match="holds no adapter_config.json"):
            convert_adapter(tmp_path, tmp_path / "out")
        (tmp_path / "adapter_config.json").write_text("{}")
        with pytest.raises(ValueError, match="holds no adapter_model.safetensors"):
            convert_adapter(tmp_path, tmp_path / "out")

    def test_a_mixture_over_blocks(self, tmp_path, base):
        folder = save(mixture(MixLoRA(r=2, num_experts=4)), tmp_path / "adapter", base)
        with pytest.raises(ValueError, match="not defined for mixlora"):
            convert_adapter(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_no_base(self, tmp_path):
        folder = save(mixture(), tmp_path / "adapter", None)
        with pytest.raises(ValueError, match="names no base model"):
            convert_adapter(folder, tmp_path / "out")

    def test_a_base_of_another_shape(self, tmp_path, saved):
        config = tiny_llama().config
        config.hidden_size = 64
        config.save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="another shape"):
            convert_adapter(saved, tmp_path / "out", base=str(tmp_path / "other"))

    def test_plain_lora(self, tmp_path, base):
        plain = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
        folder = save(plain, tmp_path / "adapter", base)
        with pytest.raises(ValueError, match="is a plain LoRA already"):
            convert_adapter(folder, tmp_path / "out")

    @pytest.mark.parametrize(
        ("family", "fields", "to", "words"),
        [
            ("qwen3_moe", {}, "peft", "in PEFT's own format; choose"),
            ("gpt_oss", {}, "vllm", "gpt_oss does not name its experts"),
            ("mixtral", {}, "vllm", "mixtral does not name its experts"),
            (
                "qwen3_moe",
                {"parameters": ("down_proj",), "modules_to_save": ["lm_head"]},
                "vllm",
                "modules_to_save",
            ),
        ],
    )
    def test_lora_on_experts(self, family, fields, to, words, tmp_path):
        model = adapted(family, **fields)
        model.get_base_model().config.save_pretrained(tmp_path / "base")
        save(model, tmp_path / "adapter", str(tmp_path / "base"))
        with pytest.raises(ValueError, match=words):
            convert_adapter(tmp_path / "adapter", tmp_path / "out", to=to)
        assert not (tmp_path / "out").exists()

    def test_lora_on_routers(self, tmp_path):
        config = LoraConfig(target_modules=[], target_parameters=["mlp.gate.weight"])
        model = get_peft_model(tiny_models.build("qwen3_moe"), config)
        model.get_base_model().config.save_pretrained(tmp_path / "base")
        save(model, tmp_path / "adapter", str(tmp_path / "base"))
        with pytest.raises(ValueError, match=r"mlp.gate.weight.*have no per-expert layout"):
            convert_adapter(tmp_path / "adapter", tmp_path / "out", to="vllm")
