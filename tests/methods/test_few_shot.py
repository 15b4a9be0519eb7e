"""Poly and MHR on a task that their skills were not trained on."""

import pytest
import torch
from methods.mixed import make_base
from peft import PeftModel

import moeroute
from moeroute.integration.adapters.site_host import SiteHost
from moeroute.methods import MHR, MoLoRA, Poly

IDS = torch.randint(0, 31, (2, 6), generator=torch.Generator().manual_seed(0))
TASKS = torch.tensor([0, 0])
METHODS = [Poly(num_tasks=3, r=2), MHR(num_tasks=3, r=2, num_experts=4, heads=2)]


def trained(method):
    """A wrapped model whose skills and tables hold something."""
    torch.manual_seed(0)
    model = moeroute.wrap_model(make_base(), method, target_modules=["q_proj", "up_proj"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "moeroute_site" in key:
                parameter.normal_(0, 1.5 if "task_table" in key else 0.4)
    return model


def own(model, adapter):
    return {key: value for key, value in model.state_dict().items() if f".{adapter}." in key}


def logits(model, task=0):
    return model.eval()(input_ids=IDS, task_ids=TASKS + task).logits


@pytest.mark.parametrize("method", METHODS)
def test_only_the_table_learns(method, tmp_path):
    model = trained(method)
    before = {key: value.clone() for key, value in own(model, "default").items()}
    moeroute.transfer_skills(model, task_names=["law"])
    assert model.active_adapters == ["few_shot"]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all(name.endswith("few_shot.router.score.task_table.weight") for name in names)
    skills = {key: value.clone() for key, value in own(model, "few_shot").items() if "bank" in key}
    assert all(
        torch.equal(value, before[key.replace("few_shot", "default")])
        for key, value in skills.items()
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()(input_ids=IDS, labels=IDS, task_ids=TASKS).loss.backward()
    optimizer.step()
    after = {**own(model, "few_shot"), **own(model, "default")}
    assert all(torch.equal(after[key], value) for key, value in {**skills, **before}.items())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_base(), tmp_path / "few_shot", is_trainable=True)
    again = moeroute.accept_routing_inputs(again)
    assert torch.equal(logits(again), logits(model))
    assert again.peft_config["default"].method_fields["task_names"] == ("law",)
    assert [n for n, p in again.named_parameters() if p.requires_grad][0].endswith("table.weight")


@pytest.mark.parametrize("method", METHODS)
def test_with_free_skills_all_of_it_learns(method):
    model = moeroute.transfer_skills(trained(method), 2, freeze_skills=False)
    learns = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {"weight", "lora_a", "lora_b"}
    assert model.peft_config["few_shot"].method_fields["num_tasks"] == 2


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_of_the_skills_starts_a_plain_lora(method):
    model = trained(method)
    lora = moeroute.merge(model, "uniform").put_on(make_base())
    assert any(p.requires_grad for p in lora.parameters())
    with torch.no_grad():
        for host in model.modules():
            if isinstance(host, SiteHost):
                host.moeroute_site["default"].router.score.task_table.weight.zero_()
    torch.testing.assert_close(lora.eval()(input_ids=IDS).logits, logits(model))


def test_a_mixture_of_known_skills_is_found_by_the_table_alone():
    """The new task is a mixture of skills that no trained task has."""
    model = trained(Poly(num_tasks=3, r=2))
    wanted = torch.tensor([4.0, -4.0, 0.5, -4.0])
    with torch.no_grad():
        for host in model.modules():
            if isinstance(host, SiteHost):
                host.moeroute_site["default"].router.score.task_table.weight[2] = wanted
        target = logits(model, task=2)
    moeroute.transfer_skills(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(200):
        loss = (logits(model) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_coarse_table_is_one_for_all_linears(method, tmp_path):
    from dataclasses import replace

    model = trained(replace(method, coarse=True))
    tables = [name for name, _ in model.named_parameters() if "task_table" in name]
    assert len(tables) == 1
    hosts = [host for host in model.modules() if isinstance(host, SiteHost)]
    routers = {id(host.moeroute_site["default"].router) for host in hosts}
    assert len(hosts) > 1
    assert len(routers) == 1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_base(), tmp_path)
    assert torch.equal(logits(moeroute.accept_routing_inputs(again)), logits(model))
    assert len([name for name, _ in again.named_parameters() if "task_table" in name]) == 1


def test_what_cannot_be_transferred_is_named():
    model = moeroute.wrap_model(make_base(), MoLoRA(r=2, num_experts=2))
    with pytest.raises(ValueError, match="takes adapters of mhr, poly"):
        moeroute.transfer_skills(model)
    model = trained(METHODS[0])
    with pytest.raises(ValueError, match="has an adapter 'default'"):
        moeroute.transfer_skills(model, adapter_name="default")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("method", [Poly, MHR])
def test_names_count_the_tasks(method):
    assert method(task_names=["math", "law"]).num_tasks == 2
    with pytest.raises(ValueError, match="two tasks of one name"):
        method(task_names=("law", "law"))
    with pytest.raises(ValueError, match="num_tasks=3 but task_names holds 2"):
        method(num_tasks=3, task_names=("math", "law"))
