"""The README's method table is the registry's, and its Python blocks run.

`MOEROUTE_WRITE_README=1 pytest tests/test_readme.py` writes the table anew.
"""

import os
import re
from pathlib import Path

import pytest

import moeroute

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
HOSTS = {
    "gate": "gate of an MoE block",
    "mlp": "feed-forward block",
    "linear": "linear",
    "decoder_layer": "decoder layer",
}


def method_table() -> str:
    """The registry as a Markdown table."""
    lines = ["| method | class | stands at | paper |", "|---|---|---|---|"]
    for name in moeroute.list_methods():
        method = moeroute.get_method(name)
        paper = method.paper
        link = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv}), {paper.year}"
        lines.append(f"| `{name}` | `{method.__name__}` | {HOSTS[method.site_kind]} | {link} |")
    return "\n".join(lines)


def between(text: str, name: str) -> str:
    """What lies between a pair of markers."""
    found = re.findall(rf"<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->", text, re.DOTALL)
    assert len(found) == 1, f"README.md needs one pair of {name} markers"
    return found[0].strip()


def test_method_table_is_the_registry() -> None:
    text = README.read_text(encoding="utf-8")
    if os.environ.get("MOEROUTE_WRITE_README") == "1":
        text = re.sub(
            r"(?<=<!-- methods:begin -->\n).*?(?=<!-- methods:end -->)",
            method_table() + "\n",
            text,
            flags=re.DOTALL,
        )
        README.write_text(text, encoding="utf-8")
    assert between(text, "methods") == method_table()
    assert all(f"`{name}`" in between(text, "methods") for name in moeroute.list_methods())


def test_links_and_commands_exist() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for target in set(re.findall(r"(?:`|^)make (\w+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


@pytest.mark.hf
def test_python_blocks_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hub ids are replaced by tiny checkpoints of the same architecture, nothing else."""
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 4
    replaced = 0
    make_lora_adapters(tmp_path / "adapters")
    names: dict[str, object] = {}
    for block in blocks:
        for hub_id, folder in tiny_checkpoints(tmp_path).items():
            replaced += block.count(hub_id)
            block = block.replace(hub_id, folder)
        exec(compile(block, "README.md", "exec"), names)
    assert replaced == 3
    assert (tmp_path / "mixed" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "routing.png").is_file()
    for name in ("mixture", "plain", "expert-adapter"):
        assert (tmp_path / name / "adapter_model.safetensors").is_file()


def tiny_checkpoints(folder: Path) -> dict[str, str]:
    """Random models that stand in for the checkpoints that the README names."""
    from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    made = {
        "HuggingFaceTB/SmolLM2-135M": LlamaForCausalLM(LlamaConfig(**sizes)),
        "allenai/OLMoE-1B-7B-0924": OlmoeForCausalLM(
            OlmoeConfig(**sizes, num_experts=4, num_experts_per_tok=2)
        ),
    }
    for hub_id, model in made.items():
        model.save_pretrained(folder / hub_id)
    return {hub_id: str(folder / hub_id) for hub_id in made}


def make_lora_adapters(folder: Path) -> None:
    """Two LoRA adapters of PEFT for the dense stand-in, of different rank and targets."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny_checkpoints(folder)["HuggingFaceTB/SmolLM2-135M"]
    for name, rank, targets in (("math", 4, ["q_proj"]), ("code", 2, ["q_proj", "up_proj"])):
        model = AutoModelForCausalLM.from_pretrained(base)
        config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder / name)
