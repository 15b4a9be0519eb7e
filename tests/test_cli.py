"""The command line on a tiny checkpoint."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import moeroute
from moeroute.cli import app

TEXT = "the quick brown fox jumps over the lazy dog " * 40
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "text.txt").write_text(TEXT)
    (folder / "empty.txt").write_text("")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel()
    tokenizer.train_from_iterator([TEXT], BpeTrainer(vocab_size=80, show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    torch.manual_seed(0)
    moe = MixtralForCausalLM(MixtralConfig(vocab_size=len(fast), num_local_experts=4, **SIZES))
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), **SIZES))
    for name, model in (("moe", moe), ("dense", dense)):
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    base = LlamaForCausalLM.from_pretrained(folder / "dense")
    moeroute.wrap_model(base, "mixlora", r=2).save_pretrained(folder / "adapter")
    return folder


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})


def test_methods_lists_the_registry():
    result = run("methods")
    assert result.exit_code == 0
    for name in moeroute.list_methods():
        assert name in result.output


def test_version():
    result = run("--version")
    assert result.output.strip() == f"moeroute {moeroute.__version__}"


def test_inspect_prints_writes_and_counts(folder, tmp_path):
    plot, data = tmp_path / "load.png", tmp_path / "load.json"
    result = run(
        "inspect",
        folder / "moe",
        "--text",
        folder / "text.txt",
        "--plot",
        plot,
        "--json",
        data,
        "--max-tokens",
        100,
        "--length",
        16,
    )
    assert result.exit_code == 0, result.output
    assert "entropy" in result.output
    assert plot.stat().st_size > 1000
    layers = json.loads(data.read_text())["layers"]
    assert [layer["tokens"] for layer in layers] == [100, 100]
    assert layers[1]["name"] == "model.layers.1.mlp.experts"


@pytest.mark.parametrize("beside", [True, False])
def test_inspect_an_adapter(folder, beside):
    target = [folder / "dense", "--adapter", folder / "adapter"] if beside else [folder / "adapter"]
    result = run("inspect", *target, "--text", folder / "text.txt", "--max-tokens", 40)
    assert result.exit_code == 0, result.output
    assert "40 tokens" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["inspect", "{}/dense", "--text", "{}/text.txt"], "no routed layer"),
        (["inspect", "{}/nosuch", "--text", "{}/text.txt"], "no such folder"),
        (["inspect", "{}/moe", "--text", "{}/nosuch.txt"], "does not exist"),
        (["inspect", "{}/moe", "--text", "{}/empty.txt"], "holds no tokens"),
        (["doctor", "{}/nosuch"], "no such folder"),
    ],
)
def test_user_errors_are_one_message(folder, args, words):
    result = run(*(arg.replace("{}", str(folder)) for arg in args))
    assert result.exit_code in (1, 2)
    assert words in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_doctor_tells_of_a_balance_loss_that_training_would_lack(folder):
    result = run("doctor", folder / "moe")
    assert result.exit_code == 0
    assert "without a balance loss" in " ".join(result.output.split())


def test_bench_hands_its_arguments_on(capfd):
    assert run("bench", "--help").exit_code == 0
    told = capfd.readouterr().out
    for option in ("--suite", "--hidden-size", "--experts", "--tokens", "--plot"):
        assert option in told
    assert run("bench", "--experts", "none").exit_code == 2
    assert "--experts" in capfd.readouterr().err


def test_bench_times_a_layer_of_ones_own_and_writes_where_one_stands(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()  # a folder of that name is not taken for the benchmarks
    sizes = "--hidden-size 24 --intermediate-size 16 --experts 4 --top-k 2 --tokens 3"
    measured = "--modes fwd --dtype fp32 --rounds 2 --json here.json"
    assert run("bench", *sizes.split(), *measured.split()).exit_code == 0
    told = capfd.readouterr().out
    assert "24x16-E4k2" in told
    assert "limit" in told
    records = json.loads((tmp_path / "here.json").read_text())["records"]
    assert {record["shape_name"] for record in records} == {"24x16-E4k2"}
