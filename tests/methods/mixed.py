"""What the tests of methods that mix existing adapters share: one site, a loop, a round trip."""

import torch
from integration.adapters.lora_folders import make_base, save_lora
from peft import PeftModel
from torch import nn

import moeroute
from moeroute.integration.adapters.sites import make_site
from moeroute.methods.existing import LoRAExpert
from moeroute.routing_pass import SampleInputs

RANKS, SCALINGS = (2, 3, 1, 0), (1.5, 0.5, 2.0, 1.0)
WIDTH, OUT = 6, 7


def build_site(method, ranks=RANKS, seed=0, **fields):
    """A float64 linear and a mixture over it, every tensor of the adapters with some value."""
    torch.manual_seed(seed)
    base = nn.Linear(WIDTH, OUT).double().requires_grad_(requires_grad=False)
    scalings = [SCALINGS[index % len(SCALINGS)] for index in range(len(ranks))]
    experts = tuple(
        LoRAExpert(name=f"adapter_{index}", ranks=(rank,), scalings=(scaling,))
        for index, (rank, scaling) in enumerate(zip(ranks, scalings, strict=True))
    )
    site = make_site(base, "q_proj", base, "linear")
    method = method(sites=("q_proj",), experts=experts, **fields)
    mixture = method.build(site, method.build_shared([site])).double()
    with torch.no_grad():
        for index, rank in enumerate(ranks):
            a, b = torch.randn(rank, WIDTH), torch.randn(OUT, rank)
            mixture.bank.set_expert(index, a, b)
    return base, mixture


def tell(mixture, task_ids=None, sample_embeddings=None):
    """Say of the samples of the next calls what `model(..., task_ids=...)` would."""
    mixture.routing_pass.begin(
        samples=SampleInputs(task_ids=task_ids, embeddings=sample_embeddings)
    )


def lora(mixture, index, x):
    """One adapter's own output, its scaling included."""
    own, bank = mixture.bank.expert(index), mixture.bank
    scaling = SCALINGS[index % len(SCALINGS)]
    return scaling * x @ bank.lora_a[own].T @ bank.lora_b[:, own].T


def routing_of(mixture, base, x):
    """The output and what was routed."""
    kept = []
    with mixture.routing_pass.listening(kept.append):
        output = mixture(x, base)
    return output, kept[0].routing


def mix_folders(tmp_path, router):
    """Two adapters of different ranks and targets over a tiny Llama."""
    folders = {
        "math": save_lora(tmp_path / "math", seed=1),
        "code": save_lora(tmp_path / "code", seed=2, r=5, target_modules=["q_proj", "down_proj"]),
    }
    return moeroute.mix_adapters(make_base(), folders, router=router, task_type="CAUSAL_LM")


def train(model, steps, lr=0.05, **inputs):
    """Train on one batch; the losses."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=lr)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def frozen_state(model):
    """Every tensor but the trainable ones, copied."""
    trainable = {key for key, value in model.named_parameters() if value.requires_grad}
    return {k: v.clone() for k, v in model.state_dict().items() if k not in trainable}


def check_round_trip(model, tmp_path, **inputs):
    """Saved and loaded it answers the same, writes the same, and needs no cache for it."""
    expected = model.eval()(**inputs).logits
    model.save_pretrained(tmp_path / "mixed")
    again = PeftModel.from_pretrained(make_base(), tmp_path / "mixed").eval()
    moeroute.accept_routing_inputs(again)
    assert torch.equal(again(**inputs).logits, expected)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    prompt = {"input_ids": inputs.pop("input_ids")}
    written = []
    for known in (model, again):
        for beams in (1, 2):
            with moeroute.routing_inputs(known, **inputs):
                written.append(known.generate(**prompt, **settings, num_beams=beams))
                uncached = known.generate(**prompt, **settings, num_beams=beams, use_cache=False)
            assert torch.equal(written[-1], uncached)
    assert torch.equal(written[0], written[2])
    assert torch.equal(written[1], written[3])
