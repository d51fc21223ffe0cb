"""Group consistency: triplets of scans, their loss, and a row trained on them."""

from dataclasses import replace

import pytest
import torch
from small_cohorts import write_small_cohort
from small_runs import CPU, TINY, small_run

from lumirlib import build_model, parse_variant
from lumirlib.data import Pair
from lumirlib.losses.consistency import group_consistency_loss
from lumirlib.methods.presets import get_preset
from lumirlib.training import trainer
from lumirlib.training.config import make_config
from lumirlib.training.pairs import epoch_pairs, with_third

PRESET = get_preset("smoke", window=3)


def test_a_third_scan_is_neither_of_the_pair_and_varies(cohort):
    pair = Pair(fixed=cohort.train[0], moving=cohort.train[1])
    found = [with_third(pair, cohort.train, 0, 0, place) for place in range(20)]
    assert all(first == pair and second.moving == pair.fixed for first, second in found)
    assert {second.fixed for _, second in found} == set(cohort.train[2:])
    assert found == [with_third(pair, cohort.train, 0, 0, place) for place in range(20)]
    with pytest.raises(ValueError, match="triplets need at least 3 training scans, the cohort has 2"):
        with_third(pair, cohort.train[:2], 0, 0, 0)


@pytest.mark.parametrize("name", ["GROUP", "SYM+GROUP"])
def test_the_loss_is_that_of_three_registrations_and_of_their_agreement(name):
    torch.manual_seed(0)
    model = build_model("backbone", start_channels=4, head_channels=5, levels=2)
    for estimator in model.estimators:
        torch.nn.init.normal_(estimator.conv3.weight, std=0.02)
    a, b, c = torch.rand(3, 1, 1, 9, 8, 7)
    pairs = [(b, a), (c, b), (c, a)]
    variant = parse_variant(name, group_weight=0.3)
    terms = variant.loss_terms(model, torch.cat([b, c]), torch.cat([a, b]), PRESET, torch.Generator())
    alone = replace(variant, group_weight=0.0)
    expected = [alone.loss_terms(model, *pair, PRESET, torch.Generator()) for pair in pairs]
    with torch.no_grad():
        error = float(group_consistency_loss(*(model(*pair) for pair in pairs)))
    assert error > 0 and float(terms["group_consistency"]) == pytest.approx(error, rel=1e-3)
    mean = sum(float(one["total"]) for one in expected) / 3
    assert float(terms["total"]) == pytest.approx(mean + 0.3 * error, rel=1e-3)


def test_a_row_trains_on_triplets_of_the_pairs_it_would_have_trained_on(small_cohort_json, tmp_path, monkeypatch):
    seen = []
    loss_terms = type(parse_variant("GROUP")).loss_terms

    def noted(self, model, fixed, moving, *rest):
        seen.append((fixed.clone(), moving.clone()))
        return loss_terms(self, model, fixed, moving, *rest)

    monkeypatch.setattr(type(parse_variant("GROUP")), "loss_terms", noted)
    run = small_run(small_cohort_json, tmp_path, variant="GROUP", epochs=1, batch_size=2, steps_per_epoch=4)
    history = run.train(progress=False).history
    assert len(seen) == 4 and history["group_consistency"].iloc[1] > 0
    for pair, (fixed, moving) in zip(epoch_pairs(run.cohort.train, 0, 0, 4), seen, strict=True):
        assert fixed.shape[0] == moving.shape[0] == 2
        assert torch.equal(fixed[:1], run.cohort.image(pair.fixed)) and torch.equal(moving[1:], fixed[:1])
        assert torch.equal(moving[:1], run.cohort.image(pair.moving))


def test_a_run_on_triplets_resumes_with_the_same_ones(cohort, tmp_path):
    config = make_config(parse_variant("GROUP"), replace(TINY, epochs=1), cohort, 0, head_channels=4)
    whole = trainer.Trainer(config, cohort, tmp_path / "whole", CPU, progress=False)
    pairs = list(whole.batches())
    whole.state.step = 2
    assert list(whole.batches()) == pairs[2:] and len(pairs[0]) == 2


def test_a_cohort_of_two_scans_is_refused(tmp_path):
    path = write_small_cohort(tmp_path / "two", training=2)
    with pytest.raises(ValueError, match="triplets need at least 3 training scans, the cohort has 2"):
        small_run(path, tmp_path, variant="GROUP").train(progress=False)
    with pytest.raises(ValueError, match="group_weight must be 0 or more, got -1"):
        parse_variant("GROUP", group_weight=-1)
