"""Equal tuning: four trials of learning rate and lambda1 for every row, at the first stage of `real-2mm`.

    python benchmarks/trials.py --cohort brains

Every row gets the same four settings: its own learning rate, and twice that, each with its own lambda1 and half of it.
A trial is the first stage alone with fewer epochs, with seed 0. It is judged by Dice at the scans' own voxels on all
ordered pairs of the first half of the validation people. The other half chooses nothing.

`results/trials/equal.csv` gets a line for each trial as it ends, so an interrupted call goes on where it stopped,
and two calls with different rows may run at once.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from dataclasses import replace
from functools import partial

import pandas as pd

from lumirlib import provenance
from lumirlib.evaluation import evaluate_method
from lumirlib.files import write_atomically
from lumirlib.methods import parse_row
from lumirlib.methods.presets import get_preset, split_options
from lumirlib.study.paper import rows_of_table
from lumirlib.study.run import Run
from lumirlib.training.pairs import of_first_half

#: Factors of the row's learning rate and of its lambda1: the same four trials for every row.
SETTINGS = tuple(itertools.product((1.0, 2.0), (1.0, 0.5)))
#: Epochs of a trial; the stage itself has three times as many.
EPOCHS = 4
PRESET = "real-2mm"
COLUMNS = ["row", "rate", "smoothness", "learning_rate", "smoothness_weight", "dice", "ndv_percent", "pairs", "commit"]


def trial(name: str, rate: float, smoothness: float, given: argparse.Namespace) -> dict[str, object]:
    """Train the first stage of a row with its learning rate and lambda1 times these factors, and score it."""
    row = parse_row(name)
    preset, _ = split_options(PRESET, row, {}, tuned=False)
    general = get_preset(PRESET)  # the row's own may have finer stages
    stage = replace(general.stages[0], epochs=given.epochs or EPOCHS, steps_per_epoch=given.steps)
    weight = preset.smoothness_weight * smoothness
    options = {
        "stages": [stage.options()],
        "levels": preset.levels - round(math.log2(stage.resolution_mm / general.resolution_mm)),
        "learning_rate": preset.learning_rate * rate,
        "smoothness_weight": weight,
    }
    # what is no run of the study stays out of its results
    run = Run.prepare(name, PRESET, given.cohort, 0, options=options, command="benchmarks/trials.py")
    result = run.train(progress=not given.quiet)
    pairs = of_first_half(run.cohort.validation_pairs)
    table = evaluate_method(result.model, run.cohort, pairs, run.device, progress=not given.quiet)
    means = table.groupby("metric")["value"].mean()
    return {
        "row": name,
        "rate": rate,
        "smoothness": smoothness,
        "learning_rate": run.config.preset.learning_rate,
        "smoothness_weight": weight,
        "dice": means["dice"],
        "ndv_percent": means["ndv_percent"],
        "pairs": len(pairs),
        "commit": run.commit,
    }


def main() -> int:
    """Run the trials that are missing."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--rows", nargs="+", help="all trained rows of both tables if none is given")
    options.add_argument("--cohort", default="brains", help="as for lumirlib run")
    options.add_argument("--epochs", type=int, help=f"of a trial; {EPOCHS} if not given")
    options.add_argument("--steps", type=int, help="most steps of each epoch")
    options.add_argument("--out", default="", help="results folder; `study` for the committed one")
    options.add_argument("--quiet", action="store_true", help="no progress bars")
    given = options.parse_args()
    names = given.rows or [
        name
        for name in dict.fromkeys([*rows_of_table(2), *rows_of_table(1)])
        if parse_row(name).trains_on != "nothing" and parse_row(name).base_row() == parse_row(name)
    ]
    path = provenance.results_folder(given.out) / "trials" / "equal.csv"
    done = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=COLUMNS)
    for name, (rate, smoothness) in itertools.product(names, SETTINGS):
        if ((done["row"] == name) & (done["rate"] == rate) & (done["smoothness"] == smoothness)).any():
            continue
        line = pd.DataFrame([trial(name, rate, smoothness, given)], columns=COLUMNS)
        done = pd.concat([pd.read_csv(path), line], ignore_index=True) if path.is_file() else line
        write_atomically(path, partial(done.to_csv, index=False))
        print(line.to_string(index=False, header=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
