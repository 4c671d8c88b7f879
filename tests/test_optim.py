"""Losses, rates, decay and averages are what their formulas say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from nsam.train.lora import LowRank, add_lora
from nsam.train.losses import map_losses, soft_dice, total
from nsam.train.model import NucleusNet
from nsam.train.optim import Ema, make_optimiser, make_schedule
from nsam.train.settings import NSAM


def test_lora_s_update_is_scaled_by_alpha_over_rank() -> None:
    update = LowRank(3, 5, rank=2, alpha=8)
    torch.nn.init.normal_(update.b)
    weight = torch.randn(3, 5)
    torch.testing.assert_close(update(weight) - weight, 4 * update.b @ update.a)


def test_losses_are_what_the_formulas_say() -> None:
    targets = torch.zeros(1, 2, 12, 12)
    targets[:, 0, 0, 0] = 0.25
    maps = torch.zeros(1, 2, 12, 12)
    near = []
    for i in range(12):  # how far from the nucleus an error of its distance counts
        wrong = maps.clone()
        wrong[0, 1, 0, i] = 1
        near.append(float(map_losses(wrong, targets, ("nucleus", "distance"), dice=False)["distance"]) > 0)
    assert near == [True] * 4 + [False] * 8
    wrong = maps.clone()
    wrong[:, 1] = 1.0
    terms = map_losses(wrong, targets, ("nucleus", "distance"), dice=True)
    assert float(terms["distance"]) == pytest.approx(2 * 0.95)  # twice smooth L1, linear from .1 on
    assert float(terms["bce"]) == pytest.approx(math.log(2))
    assert float(total(terms)) == pytest.approx(sum(map(float, terms.values())))
    assert float(soft_dice(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))) == pytest.approx(1 - 3 / 4)
    empty = map_losses(maps, torch.zeros_like(targets), ("nucleus", "distance"), dice=True)
    assert float(empty["distance"]) == 0


def test_rates_rise_then_fall_like_half_a_cosine() -> None:
    def rates(**options: object) -> list[float]:
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        schedule = make_schedule(optimiser, replace(NSAM, **options), 100)
        found = []
        for _ in range(100):
            found.append(optimiser.param_groups[0]["lr"] / 2)
            optimiser.step()
            schedule.step()
        return found

    found = rates(warmup=0.1)
    np.testing.assert_allclose(found[:11], [*np.arange(1, 11) / 10, 1])
    assert found[55] == pytest.approx(0.5)
    assert found[99] < 0.001
    assert found[10:] == sorted(found[10:], reverse=True)
    assert rates(warmup=0.1, cosine=False)[9:] == [1] * 91
    assert rates(warmup=0.0, cosine=False) == [1] * 100


def test_who_decays_and_who_learns_faster() -> None:
    model = NucleusNet()
    model.requires_grad_(False)
    add_lora(model.encoder.vit.stages)
    model.requires_grad_(True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = make_optimiser(model, replace(NSAM, lr=1.0, lora_plus=16.0, weight_decay=0.5)).param_groups
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert set(found) == set(names.values())
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or "attention_biases" in name or "embed" in name
        is_b = name.endswith("parametrizations.weight.0.b")
        assert found[name] == (16 if is_b else 1, 0 if exempt else 0.5), name
    assert sum(rate == 16 for rate, _ in found.values()) == 40
    for kind, cls in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        assert type(make_optimiser(model, replace(NSAM, optimiser=kind))) is cls


def test_young_averages_forget_faster() -> None:
    model = torch.nn.BatchNorm1d(1)
    ema = Ema(model, 0.5)
    wanted = 1.0
    for step in range(1, 20):
        with torch.no_grad():
            model.weight.fill_(step)
            model.running_mean.fill_(step)
            model.running_var.fill_(step)
        ema.update(model)
        decay = min(0.5, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * step
        assert float(ema.shadow["weight"]) == pytest.approx(wanted)
        assert float(ema.shadow["running_var"]) == pytest.approx(wanted)
    resumed = Ema(model, 0.5)
    resumed.load(ema.shadow)
    resumed.update(model)
    assert float(resumed.shadow["updates"]) == 20
