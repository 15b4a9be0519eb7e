"""Adapters that exist become one model: what is read, what is refused, what is kept."""

import json

import pytest
import torch
from integration.adapters.lora_folders import make_base, save_lora
from peft import PeftModel

import moeroute
from moeroute.methods import Arrow

IDS = torch.randint(0, 31, (2, 6), generator=torch.Generator().manual_seed(0))


def plain(path):
    return PeftModel.from_pretrained(make_base(), path).eval()(input_ids=IDS).logits


@pytest.fixture
def folders(tmp_path):
    return {
        "math": save_lora(tmp_path / "math", seed=1),
        "code": save_lora(tmp_path / "code", seed=2, r=5, target_modules=["q_proj", "down_proj"]),
    }


def test_one_adapter_alone_is_that_adapter(tmp_path):
    for changes in (
        {},
        {"use_rslora": True},
        {"r": 4, "rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"layers.1.self_attn.v_proj": 12}},
    ):
        path = save_lora(tmp_path / f"only{len(changes)}", **changes)
        mixed = moeroute.mix_adapters(make_base(), {"only": path}, router="arrow").eval()
        torch.testing.assert_close(mixed(input_ids=IDS).logits, plain(path))


def test_ranks_and_targets_may_differ(folders):
    mixed = moeroute.mix_adapters(make_base(), folders, router=Arrow(top_k=1)).eval()
    config = mixed.peft_config["default"].build_method()
    assert [expert.name for expert in config.experts] == ["math", "code"]
    by_site = zip(*(expert.ranks for expert in config.experts), strict=True)
    ranks = dict(zip(config.sites, by_site, strict=True))
    assert ranks["model.layers.0.self_attn.q_proj"] == (3, 5)
    assert ranks["model.layers.0.self_attn.v_proj"] == (3, 0)
    assert ranks["model.layers.1.mlp.down_proj"] == (0, 5)
    assert not torch.equal(mixed(input_ids=IDS).logits, make_base()(input_ids=IDS).logits)


def test_the_mixture_needs_the_files_no_more(folders, tmp_path):
    mixed = moeroute.mix_adapters(make_base(), folders, router=Arrow(top_k=2)).eval()
    expected = mixed(input_ids=IDS).logits
    mixed.save_pretrained(tmp_path / "mixed")
    again = PeftModel.from_pretrained(make_base(), tmp_path / "mixed").eval()
    assert torch.equal(again(input_ids=IDS).logits, expected)


def test_files_are_left_alone_by_subtraction(folders, tmp_path):
    general = save_lora(tmp_path / "general", seed=3)
    one = {"math": folders["math"]}
    expected = plain(folders["math"])
    mixed = moeroute.mix_adapters(make_base(), one, router="arrow", subtract=[general]).eval()
    assert not torch.allclose(mixed(input_ids=IDS).logits, expected)
    nothing = moeroute.mix_adapters(make_base(), one, router="arrow", subtract=[folders["math"]])
    torch.testing.assert_close(
        nothing.eval()(input_ids=IDS).logits, make_base()(input_ids=IDS).logits
    )
    assert torch.equal(plain(folders["math"]), expected)
    with pytest.raises(ValueError, match="different ranks at"):
        moeroute.mix_adapters(make_base(), one, router="arrow", subtract=[folders["code"]])


def refused(match, adapters, base=None, router="arrow", **fields):
    base = base or make_base()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=match):
        moeroute.mix_adapters(base, adapters, router=router, **fields)
    assert [name for name, _ in base.named_modules()] == names


def test_what_cannot_be_mixed_is_refused(folders, tmp_path):
    refused("got no adapters", {})
    refused("trains experts of its own", folders, router="mixlora")
    refused("unknown method", folders, router="arow")
    refused(
        "expects model.layers.0.* to be 16 -> 16 but it is 32 -> 32",
        folders,
        base=make_base(hidden_size=32),
    )
    refused("does not have", folders, base=make_base(num_hidden_layers=1))
    dora = save_lora(tmp_path / "dora", use_dora=True)
    refused("uses DoRA", {"dora": dora})
    saved = save_lora(tmp_path / "saved", modules_to_save=["lm_head"])
    refused("no LoRA weight of a linear", {"saved": saved})
    wrapped = moeroute.wrap_model(make_base(), "molora", r=2)
    wrapped.save_pretrained(tmp_path / "mixture")
    refused("only LoRA adapters can be mixed", {"mixture": str(tmp_path / "mixture")})


def test_adapters_of_different_bases(tmp_path):
    paths = {}
    for name in ("math", "code"):
        paths[name] = save_lora(tmp_path / name)
        config = tmp_path / name / "adapter_config.json"
        known = {**json.loads(config.read_text()), "base_model_name_or_path": f"someone/{name}"}
        config.write_text(json.dumps(known))
    refused("different bases: 'math' for someone/math", paths)
    moeroute.mix_adapters(make_base(), paths, router="arrow", same_base=True)


def test_adapters_are_not_rounded_to_the_precision_of_the_base(folders, tmp_path):
    mixed = moeroute.mix_adapters(make_base().bfloat16(), folders, router="arrow")
    exact = moeroute.mix_adapters(make_base(), folders, router="arrow").state_dict()
    own = {key: value for key, value in mixed.state_dict().items() if "moeroute_site" in key}
    assert own
    assert all(torch.equal(value, exact[key]) for key, value in own.items())
    mixed.save_pretrained(tmp_path / "mixed")
    again = PeftModel.from_pretrained(make_base().bfloat16(), tmp_path / "mixed").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in own.items())
