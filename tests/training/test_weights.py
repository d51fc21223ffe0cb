"""Packaged weights: exported from a run, read with suspicion, checked, and started from."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_cohorts import write_small_cohort

import lumirlib
from lumirlib import cli, load_cohort
from lumirlib.methods.presets import get_preset
from lumirlib.methods.variants import parse_variant
from lumirlib.provenance import project_root
from lumirlib.study import model_cards, results
from lumirlib.study.run import Run
from lumirlib.training import weights
from lumirlib.training.registrar import choose_registrar
from lumirlib.training.trainer import Trainer

ROOT = project_root()
NAME = "small-1mm"
OPTIONS = {
    "resolution_mm": 1,
    "levels": 2,
    "epochs": 2,
    "steps_per_epoch": 2,
    "start_channels": 4,
    "head_channels": 4,
    "validation_pairs": 1,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on two joined cohorts, its results, and another cohort to evaluate on."""
    root = tmp_path_factory.mktemp("weights")
    first = write_small_cohort(root / "first", training=2, validation=2, name="First")
    second = write_small_cohort(root / "second", training=2, validation=2, name="Second")
    run = Run.prepare("backbone", "smoke", f"{first}+{second}", out=str(root / "out"), engine="cpu", options=OPTIONS)
    run.evaluate(run.train(progress=False), progress=False)
    others = write_small_cohort(root / "others", training=1, validation=2, name="Others")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(weights, "FOLDER", root / "packaged")
        model_cards.export(run.config.run, NAME, root / "out", str(others), progress=False, command="this test")
    return run, root, others


@pytest.fixture
def packaged(made, tmp_path, monkeypatch):
    """The folder of the packaged weights, a copy that a test may change."""
    folder = shutil.copytree(made[1] / "packaged", tmp_path / "packaged")
    monkeypatch.setattr(weights, "FOLDER", folder)
    return folder


def rewritten(path: Path, change) -> None:
    """Write a file of weights again, its tensors and metadata changed."""
    with safetensors.safe_open(path, framework="pt") as file:
        tensors, stored = {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, stored)
    path.unlink()
    safetensors.torch.save_file(tensors, path, stored)


# export and reading --------------------------------------------------------------------------------------------------


def test_packaged_weights_are_those_of_the_runs_best_epoch(made, packaged):
    run, root, others = made
    model = lumirlib.pretrained(NAME, "cpu")
    best = lumirlib.training.weights.read_checkpoint(root / "out" / "checkpoints" / run.config.run / "best.pt")
    assert not model.training and model.state_dict().keys() == best.tensors.keys()
    assert all(torch.equal(value, best.tensors[name]) for name, value in model.state_dict().items())
    cohort = load_cohort(others)
    pair = cohort.validation_pairs[0]
    with torch.no_grad():
        found = model(cohort.image(pair.fixed), cohort.image(pair.moving))
    assert found.shape == (1, 3, *cohort.shape) and torch.isfinite(found).all()


def test_the_card_says_what_the_run_and_the_evaluation_wrote(made, packaged):
    run, root, _ = made
    card = (packaged / f"{NAME}.md").read_text(encoding="utf-8")
    facts = weights.read_packaged(NAME).facts
    about = json.loads((root / "out" / "metrics" / f"{run.config.run}.json").read_text())
    measured = json.loads((root / "out" / "pretrained" / f"{NAME}.json").read_text())
    assert about["trained_on"].startswith("images of 2 people, First") and about["trained_on"] in card
    assert facts["steps"] == 4 and facts["epochs"] == 2 and f"{facts['parameters']:,} parameters" in card
    assert f"Others, scored at 1 mm, 2 pairs, {measured['scored_labels']} labels" in card
    assert measured["memory_mib"] > 0 and f" and {measured['memory_mib']:,} MiB besides" in card
    dice = results.read_results(root / "out" / "pretrained" / f"{NAME}.csv")[0].groupby("metric")["value"].mean()
    assert f"{100 * dice['dice_before']:.2f} ± " in card and f"{100 * dice['dice']:.2f} ± " in card
    for words in (
        run.config.run,
        about["trained_by"][0].split(", ")[0],
        "not for clinical use",
        "on **cpu, 1 threads",
        "2 epochs instead of 200",
        "random weights",
        "Apache-2.0",
        "`this test`",
    ):
        assert words.replace("1 threads", f"{torch.get_num_threads()} threads") in card, words
    assert str(root) not in card and str(root) not in json.dumps(facts)


def test_an_unknown_name_lists_the_choices(packaged):
    with pytest.raises(ValueError, match=f"no pretrained weights 'ours': choose from {NAME}"):
        lumirlib.pretrained("ours")
    shutil.rmtree(packaged)
    with pytest.raises(ValueError, match="choose from none, none are packaged"):
        lumirlib.pretrained(NAME)


def flip(tensors, stored):
    next(iter(tensors.values())).view(-1)[0] += 1e-6


def lose_a_tensor(tensors, stored):
    del tensors[next(iter(tensors))]


def not_finite(tensors, stored):
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def no_row(tensors, stored):
    stored["config"] = json.dumps({**json.loads(stored["config"]), "variant": {"name": "backbone", "levels": 10**6}})


def no_facts(tensors, stored):
    stored["facts"] = "{}"


def foreign(tensors, stored):
    stored["format"] = "another"


def no_size(tensors, stored):
    config = json.loads(stored["config"])
    stored["config"] = json.dumps({**config, "preset": {**config["preset"], "resolution_mm": "1"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip, "damaged, the digest of its weights"),
        (lose_a_tensor, "weights do not fit the network: 1 differ"),
        (not_finite, "must hold finite values only"),
        (no_row, "config.variant.levels must be at most"),
        (no_facts, r"facts.name must be str, got nothing"),
        (foreign, "is not of this package: expected format"),
        (no_size, "config.preset.resolution_mm must be a voxel size in mm, got '1'"),
    ],
)
def test_a_file_that_is_not_what_export_wrote_is_refused(packaged, change, message):
    rewritten(packaged / f"{NAME}.safetensors", change)
    with pytest.raises(ValueError, match=message):
        weights.read_packaged(NAME)


def test_a_torn_file_and_one_that_is_too_large_are_refused(packaged, monkeypatch):
    path = packaged / f"{NAME}.safetensors"
    whole = path.read_bytes()
    for torn in (b"", whole[:7], whole[:100], whole[:-1], whole + b"0"):
        path.write_bytes(torn)
        with pytest.raises(ValueError, match=f"cannot read .*{NAME}.safetensors as safetensors"):
            weights.read_weights(path)
    monkeypatch.setattr(weights, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"expected at most 1000 bytes, got \d+"):
        weights.read_weights(path)
    with pytest.raises(FileNotFoundError, match="no such weights"):
        weights.read_weights(packaged / "none.safetensors")


@pytest.mark.parametrize("name", ["ours", "ours-1", "ours-1mm-2mm", "Ours-1mm", "../ours-1mm"])
def test_a_name_must_say_the_voxel_size(made, packaged, name):
    with pytest.raises(ValueError, match="say one voxel size between hyphens, as in ours-1mm; got"):
        model_cards.export(made[0].config.run, name, made[1] / "out", str(made[2]), progress=False)


def test_how_weights_register_can_be_set_when_they_are_packaged(made, packaged):
    run, root, others = made
    given = {"progress": False, "options": {"unfolding": 2}}
    model_cards.export(run.config.run, "unfolded-1mm", root / "out", str(others), **given)
    found, plain = (weights.read_packaged(name) for name in ("unfolded-1mm", NAME))
    assert found.row.unfolding == found.network("cpu").unfolding == 2 and plain.row.unfolding == 0
    assert found.digest == plain.digest
    assert "folds smoothed in 2 rounds" in (packaged / "unfolded-1mm.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="option must be one of refinements, unfolding; got 'passes'"):
        model_cards.export(run.config.run, NAME, root / "out", str(others), options={"passes": 2})


def test_weights_are_packaged_for_other_voxels_than_they_were_trained_at(made, packaged):
    run, root, others = made
    model_cards.export(run.config.run, "passed-2mm", root / "out", str(others), progress=False)
    found, trained = weights.read_packaged("passed-2mm"), weights.read_packaged(NAME)
    assert (found.name, found.resolution_mm, trained.resolution_mm) == ("passed-2mm", 2, 1)
    assert found.digest == trained.at_resolution(2).digest != trained.digest
    # on finer voxels alone a network tells tissues apart as it did in training
    assert [trained.at_resolution(mm).network("cpu").finer for mm in (2, 1, 0.5)] == [1, 1, 2]
    card = (packaged / "passed-2mm.md").read_text(encoding="utf-8")
    assert card == model_cards.model_card(found.facts)
    assert "trained at voxels of **1 mm** on **cpu" in card and "**, passed on to **2 mm**:" in card
    assert json.loads((root / "out" / "pretrained" / "passed-2mm.json").read_text())["digest"] == found.digest
    assert model_cards.check("passed-2mm", str(others), progress=False)
    with pytest.raises(ValueError, match="resolutions must differ by powers of two, got 1 mm and 3 mm"):
        model_cards.export(run.config.run, "passed-3mm", root / "out", str(others), progress=False)


def test_people_that_chose_the_epoch_do_not_evaluate_it(made, packaged):
    run, root, _ = made
    with pytest.raises(ValueError, match=r"'Second', which .* is to be evaluated on, has chosen its epoch"):
        model_cards.export(run.config.run, NAME, root / "out", str(root / "second" / "dataset.json"), progress=False)


def test_weights_beyond_the_limit_are_not_packaged(made, packaged, monkeypatch):
    monkeypatch.setattr(weights, "MAX_BYTES", 10_000)
    with pytest.raises(ValueError, match=r"would hold \d+ bytes of weights with other-1mm, more than 10000"):
        model_cards.export(made[0].config.run, "other-1mm", made[1] / "out", str(made[2]), progress=False)


# check and command line -----------------------------------------------------------------------------------------------


def test_check_measures_again_and_tells_a_card_that_is_wrong(made, packaged, capsys):
    arguments = [NAME, "--cohort", str(made[2]), "--device", "cpu", "--quiet"]
    assert cli.main(["weights", "check", *arguments]) == 0
    assert "the same to 0.1 point" in capsys.readouterr().out

    def praise(tensors, stored):
        facts = json.loads(stored["facts"])
        facts["figures"]["dice"]["mean"] += 0.0011
        stored["facts"] = json.dumps(facts)

    rewritten(packaged / f"{NAME}.safetensors", praise)
    assert cli.main(["weights", "check", *arguments]) == 1
    assert f"{NAME}.md is not the card of the facts" in capsys.readouterr().out
    assert cli.main(["weights", "cards"]) == 0
    assert cli.main(["weights", "check", *arguments]) == 1
    assert "NOT the same to 0.1 point" in capsys.readouterr().out


def test_command_line_lists_and_explains(made, packaged, capsys):
    assert cli.main(["weights", "list"]) == 0
    assert f"{NAME}: backbone, 1 mm, Dice " in capsys.readouterr().out
    assert cli.main(["weights", "export", "--run", "none", "--name", NAME, "--results", str(made[1] / "out")]) == 2
    assert "no such file" in capsys.readouterr().err
    shutil.rmtree(packaged)
    assert cli.main(["weights", "check"]) == 2
    assert "no weights are packaged" in capsys.readouterr().err


# starting from them --------------------------------------------------------------------------------------------------


def started(made, out, init, variant="backbone", **more):
    return Run.prepare(
        variant,
        "smoke",
        str(made[1] / "second" / "dataset.json"),
        out=str(out),
        engine="cpu",
        options={**OPTIONS, **more, "init": init},
    )


def test_a_run_starts_from_packaged_weights_or_from_a_checkpoint_and_is_named_for_it(made, packaged, tmp_path):
    best = made[1] / "out" / "checkpoints" / made[0].config.run / "best.pt"
    wanted = weights.read_packaged(NAME)
    for init in (NAME, "pretrained", str(best)):
        run = started(made, tmp_path, init)
        trainer = Trainer(run.config, run.cohort, tmp_path, run.engine, False, run.start.tensors)
        assert all(torch.equal(value, wanted.tensors[name]) for name, value in trainer.model.state_dict().items())
        assert run.config.init_digest == wanted.digest and str(best) not in run.command + run.title
    forced = started(made, tmp_path, NAME, "backbone+FORCE")
    assert set(wanted.tensors) < set(forced.start.tensors) and len(forced.start.tensors) == len(wanted.tensors) + 2
    assert not any(forced.start.tensors[f"estimators.{level}.of_forces.weight"].any() for level in range(2))
    plain = [started(made, tmp_path, init) for init in ("", "random", None)]
    assert len({one.config.run for one in plain}) == 1 and "init" not in str(plain[0].config.as_dict())
    assert run.config.run != plain[0].config.run and plain[0].start is None
    assert any("started from the weights" in words for words in run.config.preset.differences_from_paper())
    with pytest.raises(ValueError, match=r"starts from .* got none"):
        Trainer(run.config, run.cohort, tmp_path, run.engine, False)


def test_tables_keep_runs_apart_by_what_they_started_from(made, packaged, tmp_path):
    for init in ("", NAME):
        run = started(made, tmp_path, init)
        run.evaluate(run.train(progress=False), progress=False)
    found = {
        init: [
            about["run"]
            for _, about in results.find_runs(
                tmp_path, parse_variant("backbone"), "smoke", "second", {**OPTIONS, "init": init}
            )
        ]
        for init in ("", NAME)
    }
    assert found[NAME] == [run.config.run] and len(found[""]) == 1 and found[""] != found[NAME]
    about = json.loads((tmp_path / "metrics" / f"{run.config.run}.json").read_text())
    assert about["started_from"] == f"{NAME}, {weights.read_packaged(NAME).digest}"


@pytest.mark.parametrize(
    ("init", "more", "message"),
    [
        (NAME, {"start_channels": 5}, f"{NAME} for backbone .*weights do not fit the network"),
        ("pretrained", {"cascade": "compositional"}, f"no pretrained weights are of the network .*there are {NAME}"),
        ("pretraind", {}, f"init must be one of random, pretrained, {NAME}, or the path of a best.pt; got 'pretraind'"),
    ],
)
def test_weights_of_another_network_are_refused(made, packaged, tmp_path, init, more, message):
    with pytest.raises(ValueError, match=message):
        started(made, tmp_path, init, **more)


def test_what_is_not_trained_starts_from_nothing(packaged):
    with pytest.raises(ValueError, match="deedsBCV is not trained"):
        weights.starting_weights(NAME, lumirlib.methods.parse_row("deedsBCV"), 1)


def test_of_several_weights_of_a_network_those_of_the_row_are_taken_and_a_tie_is_told(packaged):
    row = weights.read_packaged(NAME).row
    shutil.copy(packaged / f"{NAME}.safetensors", packaged / "another-1mm-cpu.safetensors")
    with pytest.raises(ValueError, match=f"several pretrained weights are .*another-1mm-cpu: backbone.*{NAME}"):
        weights.starting_weights("pretrained", row, 1)

    def rename(tensors, stored):
        config = json.loads(stored["config"])
        stored["config"] = json.dumps({**config, "variant": {**config["variant"], "name": "NDV", "ndv_weight": 10.0}})

    rewritten(packaged / "another-1mm-cpu.safetensors", rename)
    assert weights.starting_weights("pretrained", row, 1).name == NAME
    assert weights.starting_weights("pretrained", replace(row, unfolding=4, refinements=1), 1).name == NAME
    assert weights.starting_weights("pretrained", replace(row, name="NDV"), 1).name == "another-1mm-cpu"


def test_own_scans_are_registered_with_packaged_weights(packaged):
    registrar = choose_registrar(pretrained=NAME, device="cpu")
    assert (registrar.name, registrar.resolution_mm, registrar.facts["pretrained"]) == ("backbone", 1, NAME)
    with pytest.raises(ValueError, match="give one of weights, run, method and pretrained"):
        choose_registrar(pretrained=NAME, method="affine")


# what the package carries --------------------------------------------------------------------------------------------


def test_a_wheel_carries_the_weights_and_loads_them_elsewhere(made, tmp_path):
    pytest.importorskip("setuptools", "77", reason="builds a wheel")
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "lumirlib", source / "lumirlib", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(made[1] / "packaged", source / "lumirlib" / "pretrained_weights", dirs_exist_ok=True)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    shutil.rmtree(source)
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = (
        f"import lumirlib; print(lumirlib.__file__); model = lumirlib.pretrained({NAME!r}, 'cpu')\n"
        f"from lumirlib.training import weights; print((weights.FOLDER / '{NAME}.md').is_file(), type(model).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "site" / "lumirlib" / "__init__.py"), "True RegistrationNetwork"]


CARRIED = [pytest.param(name, id=name) for name in weights.names()] or [
    pytest.param("", marks=pytest.mark.skip(reason="the package carries no weights yet"), id="none")
]


@pytest.mark.parametrize("name", CARRIED)
def test_packaged_weights_are_whole_small_and_have_their_card(name):
    found = weights.read_packaged(name)
    assert (weights.FOLDER / f"{name}.md").read_text(encoding="utf-8") == model_cards.model_card(found.facts)
    assert sum(path.stat().st_size for path in weights.FOLDER.glob("*.safetensors")) <= weights.MAX_BYTES
    table, measured = results.read_results(ROOT / "results" / "pretrained" / f"{name}.csv")
    assert measured["digest"] == found.digest
    dice = table.loc[table["metric"] == "dice", "value"].mean()
    assert dice == pytest.approx(found.facts["figures"]["dice"]["mean"], abs=1e-12)


@pytest.mark.data
@pytest.mark.skipif("LUMIR_BRAINS" not in os.environ, reason="needs the real brains, in the folder named LUMIR_BRAINS")
@pytest.mark.parametrize("name", CARRIED)
def test_packaged_weights_reach_their_cards_dice_on_the_real_brains(name):
    assert model_cards.check(name, progress=False)


def test_presets_name_their_start_only_where_there_is_one():
    assert not any("start" in words for words in get_preset("demo").differences_from_paper())
