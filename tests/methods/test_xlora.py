"""X-LoRA against its equations, its two limits, and PEFT's own code where that is right."""

import pytest
import torch
from integration.adapters.lora_folders import make_base, save_lora
from methods.mixed import check_round_trip, frozen_state, mix_folders, train
from peft import PeftModel, XLoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import moeroute
from moeroute.methods import XLoRA
from moeroute.routers.first_pass import FirstPassHead

IDS = torch.randint(0, 31, (3, 6), generator=torch.Generator().manual_seed(0))
SITES = 6  # q_proj, v_proj of one adapter, q_proj, down_proj of the other, in two layers


def head_of(model):
    return next(module for module in model.modules() if isinstance(module, FirstPassHead))


def build(tmp_path, **fields):
    """A mixture of two adapters of different ranks and targets, its head awake."""
    model = mix_folders(tmp_path, XLoRA(head_width=8, **fields)).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in head_of(model).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def mixtures_of(model):
    """(name of the linear, mixture), in the model's order."""
    root = model.get_base_model()
    return [
        (name, host.moeroute_site["default"])
        for name, host in root.named_modules()
        if hasattr(host, "moeroute_site")
    ]


def by_hand(model, weights_of, base=None):
    """Logits of a base whose linears add each adapter by itself, scaled by weights_of(place)."""
    base = (base or make_base()).double()
    for place, (name, mixture) in enumerate(mixtures_of(model)):
        bank, weights = mixture.bank, weights_of(place)

        def add(linear, args, output, bank=bank, weights=weights):
            for index in range(bank.num_experts):
                own = bank.expert(index)
                if bank.ranks[index]:
                    delta = args[0] @ bank.lora_a[own].T @ bank.lora_b[:, own].T
                    scaling = bank.scaling_of_rank[own][0]
                    output = output + weights[..., index : index + 1] * scaling * delta
            return output

        base.get_submodule(name).register_forward_hook(add)
    return base(input_ids=IDS).logits


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("depth", [1, 3])
def test_output_and_gradients_equal_two_passes_by_hand(tmp_path, layerwise, depth):
    model = build(tmp_path, layerwise=layerwise, head_depth=depth, temperature=0.7).double()
    mlp = head_of(model).mlp
    with torch.no_grad():
        base = make_base().double()
        states = base(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    inner = states
    for linear in mlp.inner:
        inner = torch.relu(linear(inner))
    logits = mlp.out(inner).unflatten(-1, (-1, 2)) / 0.7  # (B, S, places, E)
    weights = torch.softmax(logits, -1)
    paper = by_hand(model, lambda place: weights[..., place if layerwise else 0, :])
    ours = model(input_ids=IDS).logits
    torch.testing.assert_close(ours, paper)
    upstream = torch.randn_like(ours)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(wanted) == 2 * depth
    torch.testing.assert_close(
        torch.autograd.grad(ours, wanted, upstream), torch.autograd.grad(paper, wanted, upstream)
    )


def set_scalings(model, values):
    """Let the head say the same of every token."""
    out = head_of(model).mlp.out
    with torch.no_grad():
        out.weight.zero_()
        out.bias.copy_(torch.tensor(values).repeat(out.bias.shape[0] // len(values)))


def test_constant_scalings_are_a_weighted_sum_of_the_adapters(tmp_path):
    model = build(tmp_path, softmax=False, global_weight=2.0).double()
    set_scalings(model, [0.4, -0.3])
    weights = torch.tensor([0.8, -0.6]).double()
    torch.testing.assert_close(model(input_ids=IDS).logits, by_hand(model, lambda _: weights))


@pytest.mark.parametrize(("place", "name"), [(0, "math"), (1, "code")])
@pytest.mark.parametrize("top_k", [None, 1])
def test_one_hot_scalings_are_that_adapter(tmp_path, place, name, top_k):
    model = build(tmp_path, top_k=top_k)
    set_scalings(model, [200.0 * (place == 0), 200.0 * (place == 1)])
    alone = PeftModel.from_pretrained(make_base(), tmp_path / name).eval()
    torch.testing.assert_close(model(input_ids=IDS).logits, alone(input_ids=IDS).logits)


FAITHFUL = [
    ({}, {}),
    ({"layerwise_scalings": True}, {"layerwise": True}),
    ({"xlora_depth": 3}, {"head_depth": 3}),
    ({"softmax_temperature": 0.3}, {"temperature": 0.3}),
    ({"enable_softmax": False}, {"softmax": False}),
    ({"top_k_lora": 2}, {"top_k": 2}),
    (
        {"top_k_lora": 2, "enable_softmax_topk": True, "enable_softmax": False},
        {"top_k": 2, "normalize_top_k": True},
    ),
    ({"scaling_pass_value": 0.5}, {"first_pass_weight": 0.5}),
    ({"global_scaling_weight": 3.0}, {"global_weight": 3.0}),
]


@pytest.mark.parametrize(("theirs", "ours"), FAITHFUL)
def test_equals_peft_where_that_works(tmp_path, theirs, ours):
    folders = {str(i): save_lora(tmp_path / str(i), seed=i) for i in range(3)}
    base = make_base()
    base.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=16, adapters=folders, xlora_size=8, **theirs
    )
    peer = get_peft_model(base, config).eval()
    named = {f"adapter_{key}": path for key, path in folders.items()}
    method = XLoRA(head_width=8, **ours)
    model = moeroute.mix_adapters(make_base(), named, router=method, task_type="CAUSAL_LM").eval()
    mlp = head_of(model).mlp
    layers = [
        layer
        for layer in peer.base_model.internal_xlora_classifier.layers
        if isinstance(layer, nn.Linear)
    ]
    for own, layer in zip([*mlp.inner, mlp.out], layers, strict=True):
        nn.init.normal_(layer.weight)
        own.load_state_dict(layer.state_dict())
    expected, plain = peer(input_ids=IDS).logits, make_base()(input_ids=IDS).logits
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-6)


def test_ties_at_zero_are_scaled_alike(tmp_path):
    # a mask that tells the chosen by `!= 0` makes these NaN
    model = build(tmp_path, top_k=2, normalize_top_k=True).double()
    set_scalings(model, [0.0, 0.0])
    half = torch.tensor([0.5, 0.5]).double()
    torch.testing.assert_close(model(input_ids=IDS).logits, by_hand(model, lambda _: half))


def test_top_k_leaves_the_others_out_of_the_routing(tmp_path):
    model, kept = build(tmp_path, top_k=1), []
    with mixtures_of(model)[0][1].routing_pass.listening(kept.append):
        model(input_ids=IDS)
    assert len(kept) == SITES
    for record in kept:
        probs = torch.softmax(record.routing.router_logits, -1)
        torch.testing.assert_close(record.routing.routing_weights, probs.amax(-1, keepdim=True))


class CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def test_no_product_is_added_for_one_more_adapter(tmp_path):
    counts = []
    for number in (2, 4):
        folders = {f"a{i}": save_lora(tmp_path / f"{number}_{i}") for i in range(number)}
        model = moeroute.mix_adapters(make_base(), folders, router=XLoRA(top_k=1)).eval()
        with CountProducts() as products, torch.no_grad():
            model(input_ids=IDS)
        counts.append(products.count)
    linears, sites = 2 * 7, 2 * 2
    assert counts == [2 * linears + 2 * sites + 2] * 2  # two passes, two halves, two heads


def test_an_adapter_keeps_its_share_where_it_has_no_linear(tmp_path):
    model, kept = build(tmp_path), []
    with mixtures_of(model)[0][1].routing_pass.listening(kept.append):
        model(input_ids=IDS)
    first = kept[0].routing.routing_weights
    assert all(torch.equal(record.routing.routing_weights, first) for record in kept)


def test_training_moves_the_head_alone_and_the_result_is_an_adapter(tmp_path):
    model = mix_folders(tmp_path, XLoRA())
    frozen = frozen_state(model)
    assert any("lora_a" in key for key in frozen)
    losses = train(model, 5, lr=5.0, input_ids=IDS)
    assert losses[-1] < losses[0]
    assert all(torch.equal(frozen[key], value) for key, value in frozen_state(model).items())
    check_round_trip(model, tmp_path, input_ids=IDS)


def test_names_of_digits_lose_nothing(tmp_path):
    folders = {str(i): save_lora(tmp_path / str(i), seed=i) for i in range(2)}
    model = moeroute.mix_adapters(make_base(), folders, router=XLoRA(), adapter_name="0").eval()
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "mixed")
    again = PeftModel.from_pretrained(make_base(), tmp_path / "mixed" / "0", adapter_name="1")
    assert torch.equal(again.eval()(input_ids=IDS).logits, expected)


def test_neither_generate_nor_forward_thaws_or_freezes_anything(tmp_path):
    model = mix_folders(tmp_path, XLoRA())
    before = {key: value.requires_grad for key, value in model.named_parameters()}
    model.generate(input_ids=IDS, max_new_tokens=2, pad_token_id=0)
    model(input_ids=IDS)
    with model.disable_adapter():
        model(input_ids=IDS)
    assert {key: value.requires_grad for key, value in model.named_parameters()} == before
    assert [key for key, trains in before.items() if trains] == [
        key for key in before if ".head.mlp.out." in key
    ]


def test_adapters_train_along_if_asked(tmp_path):
    model = build(tmp_path, train_adapters=True).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    grown = [key for key, value in model.named_parameters() if value.grad is not None]
    assert sum("bank.lora" in key for key in grown) == 2 * SITES
    assert all(value.grad.abs().sum() > 0 for value in model.parameters() if value.requires_grad)


def test_the_head_finds_the_adapter_that_helps(tmp_path):
    model = mix_folders(tmp_path, XLoRA())
    alone = PeftModel.from_pretrained(make_base(), tmp_path / "code").eval()
    target = alone(input_ids=IDS).logits.detach()
    optimizer = torch.optim.Adam(head_of(model).parameters(), lr=0.1)
    for _ in range(100):
        loss = nn.functional.mse_loss(model(input_ids=IDS).logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kept = []
    with mixtures_of(model)[0][1].routing_pass.listening(kept.append):
        model(input_ids=IDS)
    assert torch.softmax(kept[0].routing.router_logits, -1)[:, 1].mean() > 0.95


def test_one_row_a_sample_sees_no_padding_and_lasts_through_generation(tmp_path):
    model, kept = build(tmp_path, per_sample=True), []
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with mixtures_of(model)[0][1].routing_pass.listening(kept.append), torch.no_grad():
        changed = model(input_ids=IDS.masked_fill(mask == 0, 7), attention_mask=mask)
        same = model(input_ids=IDS, attention_mask=mask)
        model.generate(input_ids=IDS, attention_mask=mask, **settings)
    assert torch.equal(changed.logits[:, 2:], same.logits[:, 2:])
    rows = kept[0].routing.router_logits.unflatten(0, IDS.shape)[:, 0]
    assert len(kept) == SITES * (2 + 4)
    for record in kept:
        said = record.routing.router_logits.unflatten(0, record.sequence_shape)
        torch.testing.assert_close(said, rows.unsqueeze(1).expand_as(said))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k=0 is below 1"),
        ({"temperature": 0.0}, "temperature=0.0 is not above 0"),
        ({"head_depth": 0}, "head of depth=0"),
        ({"head_dropout": 1.0}, r"dropout=1.0.*in \[0, 1\)"),
        ({"normalize_top_k": True}, "needs a top_k"),
        ({"normalize_top_k": True, "top_k": 1}, "needs a top_k of 2 or more"),
        ({"normalize_top_k": True, "top_k": 2, "softmax": False}, "softmax=True"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        XLoRA(**fields)


def test_nothing_to_mix_and_nowhere_to_read(tmp_path):
    with pytest.raises(ValueError, match="call moeroute.mix_adapters"):
        XLoRA().build_shared(())
    folders = {"math": save_lora(tmp_path / "math", target_modules=["v_proj"])}
    root = nn.Module()
    root.model = make_base().model
    with pytest.raises(ValueError, match="tells no hidden_size"):
        moeroute.mix_adapters(root, folders, router=XLoRA())
