"""MUON: steps whose kernels are orthogonalized, and Adam for what is left."""

import copy

import pytest
import torch
from torch import nn

from lumirlib import build_model, losses, parse_variant
from lumirlib.methods.presets import get_preset
from lumirlib.training import muon
from lumirlib.training.checkpoints import load_optimizer
from lumirlib.training.trainer import make_optimizer


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(module, optimizer, seed=0):
    for number, parameter in enumerate(module.parameters()):
        parameter.grad = random(*parameter.shape, seed=10 * seed + number)
    optimizer.step()


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6), (8, 27 * 8), (1, 5)])
def test_an_orthogonalized_matrix_keeps_its_singular_vectors_and_has_values_near_one(shape):
    matrix = random(*shape)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ muon.orthogonalize(matrix) @ right.T
    assert torch.allclose(found, torch.diag(found.diag()), atol=1e-4)
    assert values.max() / values.min() < 100 and (found.diag() > 0.6).all() and (found.diag() < 1.3).all()
    assert torch.allclose(muon.orthogonalize(1e-6 * matrix), muon.orthogonalize(matrix), atol=1e-4)
    assert not muon.orthogonalize(torch.zeros(shape)).any()


def test_the_steps_are_those_of_the_published_update():
    layer = nn.Linear(7, 5, bias=False)
    before, gradients = layer.weight.detach().clone(), [random(5, 7, seed=seed) for seed in range(3)]
    optimizer = muon.Muon(layer.parameters(), lr=0.01)
    momentum = torch.zeros(5, 7)
    for gradient in gradients:
        layer.weight.grad = gradient
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        before = before - 0.01 * 0.2 * 7**0.5 * muon.orthogonalize(0.05 * gradient + 0.95 * momentum)
    assert torch.allclose(layer.weight, before, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_matrices_move_as_with_the_optimizer_of_torch():
    ours, theirs = nn.Linear(9, 6, bias=False), nn.Linear(9, 6, bias=False)
    theirs.load_state_dict(ours.state_dict())
    start = ours.weight.detach().clone()
    own = muon.Muon(ours.parameters(), lr=0.01)
    peer = torch.optim.Muon(theirs.parameters(), lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for seed in range(5):
        step(ours, own, seed)
        step(theirs, peer, seed)
    moved = (ours.weight - start).norm()
    assert (ours.weight - theirs.weight).norm() < 0.03 * moved  # theirs computes in bfloat16


def test_biases_and_flow_heads_move_as_with_adam():
    network = nn.Sequential(nn.Conv3d(2, 5, 3), nn.Conv3d(5, 3, 3))
    peer = copy.deepcopy(network)
    options = {"lr": 0.01, "amsgrad": True}
    own, adam = muon.Muon(network.parameters(), **options), torch.optim.Adam(peer.parameters(), **options)
    for seed in range(4):
        step(network, own, seed)
        step(peer, adam, seed)
    same = [torch.allclose(a, b, atol=1e-7) for a, b in zip(network.parameters(), peer.parameters(), strict=True)]
    assert same == [False, True, True, True]


def test_a_kernel_is_a_matrix_whatever_its_layout_and_its_step_is_as_large_as_adams():
    layer = nn.Conv3d(4, 6, 3, bias=False)
    start = layer.weight.detach().clone()
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last_3d)
    for each in (layer, other):
        step(each, muon.Muon(each.parameters(), lr=0.5))
    assert torch.allclose(layer.weight, other.weight, atol=1e-6)
    size = (layer.weight - start).square().mean().sqrt()
    assert 0.7 * 0.5 * muon.ADAM_STEP < size < 1.2 * 0.5 * muon.ADAM_STEP


def test_parameters_without_a_gradient_stay_and_a_closure_gives_its_loss():
    torch.manual_seed(0)
    layer = nn.Conv3d(4, 6, 3)
    optimizer, before = muon.Muon(layer.parameters(), lr=0.01), copy.deepcopy(layer.state_dict())
    assert optimizer.step() is None
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items()) and not optimizer.state

    def loss():
        optimizer.zero_grad()
        found = layer(torch.ones(1, 4, 3, 3, 3)).square().sum()
        found.backward()
        return found

    first = optimizer.step(loss).item()
    assert optimizer.step(loss).item() < first
    with pytest.raises(ValueError, match="lr must be above 0, got 0"):
        muon.Muon(layer.parameters(), lr=0)


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped():
    row, preset = parse_variant("COMP+MUON", start_channels=4, levels=2), get_preset("smoke")
    torch.manual_seed(0)
    model = build_model(row)
    optimizer = make_optimizer(model, preset, row.optimizer)
    assert isinstance(optimizer, muon.Muon)
    step(model, optimizer, 1)
    content = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again = build_model(row)
    again.load_state_dict(content["model"])
    resumed = make_optimizer(again, preset, row.optimizer)
    load_optimizer("last.pt", content, resumed)
    for network, its in ((model, optimizer), (again, resumed)):
        step(network, its, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"last.pt: optimizer.state\[.*is not what the optimizer keeps"):
        load_optimizer("last.pt", content, make_optimizer(again, preset))


def test_the_option_is_named_leaves_other_runs_alone_and_lowers_the_loss():
    row = parse_variant("LC-2+MUON")
    assert row.optimizer == "muon" and "Muon" in row.describe() and parse_variant("LC-2").optimizer == "adam"
    with pytest.raises(ValueError, match="optimizer must be one of adam, muon; got 'sgd'"):
        parse_variant("backbone", optimizer="sgd")
    small, preset = parse_variant("COMP+MUON", start_channels=4, levels=2), get_preset("smoke")
    torch.manual_seed(0)
    model, generator = build_model(small), torch.Generator()
    optimizer = make_optimizer(model, preset, small.optimizer)
    fixed, moving = (losses.gaussian_smooth(random(1, 1, 12, 11, 10, seed=seed).sigmoid()) for seed in (0, 1))
    found = []
    for _ in range(8):
        terms = small.loss_terms(model, fixed, moving, preset, generator)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        found.append(terms["total"].item())
    assert found[-1] < found[0]
