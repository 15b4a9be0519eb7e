"""The search of sparsities on tiny models."""

import pytest
import torch
from integration.depth.depth_models import LAYERS, VOCAB, tiny
from torch.nn.functional import kl_div, log_softmax

import moeroute
from moeroute.depth import search_sparsity
from moeroute.methods import FTP, MixtureOfDepths
from moeroute.search import GeneticSettings

pytestmark = pytest.mark.hf

QUICK = GeneticSettings(population=6, generations=3, elite=2, most_last=0.9, grid=0.1)


def batches():
    torch.manual_seed(0)
    return [{"input_ids": torch.randint(3, VOCAB, (2, 10))}]


def divergence(model, sparsity):
    given = batches()[0]
    with torch.no_grad():
        base = log_softmax(model(**given).logits.float(), -1)
        wrapped = moeroute.wrap_model(model, FTP(sparsity=sparsity, router="static")).eval()
        pruned = log_softmax(wrapped(**given).logits.float(), -1)
    moeroute.unwrap_model(wrapped)
    return kl_div(pruned, base, log_target=True, reduction="none").sum(-1).mean().item()


def test_what_it_finds_is_what_it_costs():
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = search_sparsity(model, batches(), 0.4, settings=QUICK, show_progress=False)
    assert len(found.sparsity) == LAYERS
    assert found.sparsity[0] == 0.0
    assert sum(found.sparsity) / LAYERS == pytest.approx(0.4, abs=0.05)
    assert found.divergence == pytest.approx(divergence(tiny(), found.sparsity), rel=1e-3)
    assert found.divergence <= found.even_divergence
    again = search_sparsity(model, batches(), 0.4, settings=QUICK, show_progress=False)
    assert again == found
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_wrapped_model_is_searched_with_its_own_routers_and_left_as_it_was():
    model = moeroute.wrap_model(tiny(), FTP(sparsity=0.5)).eval()
    expected = model(**batches()[0]).logits
    found = search_sparsity(model, batches(), 0.3, settings=QUICK, show_progress=False)
    assert found.divergence == 0.0  # fresh routers run every token
    assert torch.equal(model(**batches()[0]).logits, expected)


def test_what_cannot_be_searched():
    with pytest.raises(ValueError, match="no batches"):
        search_sparsity(tiny(), [], 0.3)
    with pytest.raises(ValueError, match="0.9"):
        search_sparsity(tiny(), batches(), 0.9, show_progress=False)
    with pytest.raises(ValueError, match="wrapped already"):
        search_sparsity(moeroute.wrap_model(tiny(), MixtureOfDepths()), batches(), 0.3)
