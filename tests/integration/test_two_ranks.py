"""Two data-parallel ranks train as one process over both halves of the batch does."""

import subprocess
import sys

import pytest

RANK = """
import sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM
import moeroute

rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
ids = torch.randint(0, 31, (4, 6), generator=torch.Generator().manual_seed(5))


def make(method, **fields):
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    model = moeroute.wrap_model(base, method, target_modules=["q_proj"], **fields)
    for key, parameter in model.named_parameters():
        if key.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.train()
"""

BIASES = """
def biases(ours, model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(3):
        for shift in (step, step + 1):
            turned = ours.roll(shift, 1)
            model(input_ids=turned, labels=turned).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moeroute.post_step(model)
    state = model.state_dict().items()
    return torch.stack([value for key, value in state if key.endswith("correction_bias")])


fields = {"r": 6, "top_k": 2, "bias_update_rate": 0.01}
found = biases(ids[2 * rank : 2 * rank + 2], DistributedDataParallel(make("smora", **fields)))
distributed.destroy_process_group()
expected = biases(ids, make("smora", **fields))
assert expected.abs().max() > 0.015, expected
assert torch.equal(found, expected), (found, expected)
"""

DRAWS = """
def gradients(model, parts):
    for part in parts:
        torch.manual_seed(100 + part)
        mine = ids[2 * part : 2 * part + 2]
        loss = moeroute.policy_gradient_loss(
            model, lambda: model(input_ids=mine, labels=mine).loss
        )
        (loss / len(parts)).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


found = gradients(DistributedDataParallel(make("remix")), [rank])
distributed.destroy_process_group()
for seen, wanted in zip(found, gradients(make("remix"), [0, 1]), strict=True):
    assert wanted.abs().sum() > 0
    torch.testing.assert_close(seen, wanted)
"""

LOADS = """
from moeroute.layers import MoELayer, SwiGLUExperts
from moeroute.losses import BalanceLoss, GlobalBalanceLoss
from moeroute.routers import ComposedRouter, LinearScore, RunningLoad, TopK

tokens = torch.eye(4).repeat(2, 1)  # the first rank sees experts 0 and 1, the second 2 and 3


def layer(loss):
    torch.manual_seed(0)
    router = ComposedRouter(LinearScore(4, 4), RunningLoad(TopK(1, normalize=False)))
    with torch.no_grad():
        router.score.weight.copy_(5 * torch.eye(4))
    made = MoELayer(router=router, experts=SwiGLUExperts(4, 4, 4), losses=(loss,))
    return moeroute.connect_layers(torch.nn.Sequential(made)).train()


def charged(model, rows):
    model(rows)
    return moeroute.aux_losses(model).parts.popitem()[1]


mine = tokens[2 * rank : 2 * rank + 2]
alone = charged(layer(BalanceLoss()), mine)
both = charged(layer(GlobalBalanceLoss()), mine)
gathered = both.detach().clone()
distributed.all_reduce(gathered)
distributed.destroy_process_group()
assert alone > 1.9, alone
torch.testing.assert_close(gathered / 2, charged(layer(GlobalBalanceLoss()), tokens[:4]))
torch.testing.assert_close(gathered / 2, torch.tensor(1.0))
"""


@pytest.mark.parametrize("script", [BIASES, DRAWS, LOADS], ids=["biases", "draws", "loads"])
def test_two_ranks_are_one_process(tmp_path, script):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK + script, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
