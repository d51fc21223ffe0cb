"""Command line of one run, `python -m lumirlib.train`: what notebooks/run_ablation.ipynb does, without pictures."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields

from lumirlib.cli import parse_setting
from lumirlib.evaluation import summarize
from lumirlib.methods.presets import PRESETS
from lumirlib.methods.variants import variant_choices
from lumirlib.study.run import Run
from lumirlib.training.divergence import NonFiniteLossError
from lumirlib.training.engine import CACHES, PRECISIONS, Engine


def add_engine_options(options: argparse.ArgumentParser) -> None:
    """Add those of :class:`lumirlib.training.engine.Engine`."""
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    options.add_argument("--precision", default="auto", help=", ".join(PRECISIONS))
    options.add_argument("--processes", type=int, default=1, help="GPUs of this machine to train on; or call torchrun")
    options.add_argument("--compile", action="store_true", help="compile the network")
    options.add_argument("--checkpointing", action="store_true", help="less memory for more time")
    options.add_argument("--cache", default="auto", help=f"volumes on disk, made once: {', '.join(CACHES)}")
    options.add_argument("--readers", type=int, default=1, help="threads that read ahead")
    options.add_argument("--deterministic", action="store_true", help="the same bits again, as far as the device can")


def engine_options(given: argparse.Namespace) -> dict[str, object]:
    """What :func:`add_engine_options` has read, as arguments of :class:`lumirlib.training.engine.Engine`."""
    return {one.name: getattr(given, one.name) for one in fields(Engine)}


EXAMPLES = """examples:
  lumirlib run --variant LC-2 --preset demo
  lumirlib run --variant CA+BF --preset paper --cohort lumir --data-root FOLDER --set smoothness_weight=5
"""


def parser(prog: str = "python -m lumirlib.train") -> argparse.ArgumentParser:
    """The options of the command line."""
    options = argparse.ArgumentParser(
        prog=prog,
        description=(__doc__ or "").splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--variant", default="backbone", help=f"{', '.join(variant_choices())}, joined by '+'")
    options.add_argument("--preset", default="demo", help=", ".join(PRESETS))
    options.add_argument(
        "--cohort",
        default="embedded",
        help="embedded, lumir, brains, or a Learn2Reg dataset JSON; "
        "joined by '+': trained on all, evaluated on the last",
    )
    options.add_argument("--seed", type=int, default=0, help="of weights and pairs")
    options.add_argument("--data-root", default="", help="folder the JSON's paths are relative to; its own if empty")
    options.add_argument("--out", default="", help="results folder")
    add_engine_options(options)
    options.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="options of variant and preset, such as smoothness_weight=0.1 cascade=compositional",
    )
    options.add_argument(
        "--init",
        default="",
        help="weights to start from: random (if empty), pretrained (packaged "
        "ones that fit), a name of `lumirlib weights list`, the path of a best.pt",
    )
    options.add_argument("--restart", action="store_true", help="start anew where a checkpoint would be resumed")
    options.add_argument("--train-only", action="store_true", help="do not evaluate")
    options.add_argument("--consistency", action="store_true", help="measure inverse consistency of every pair")
    options.add_argument("--quiet", action="store_true", help="no progress bars")
    return options


def main(arguments: list[str] | None = None, prog: str = "python -m lumirlib.train") -> int:
    """Train, evaluate and print a summary; the exit status is 0, 2 for what cannot be used, 130 after Ctrl-C."""
    given = parser(prog).parse_args(arguments)
    try:
        run = Run.prepare(
            given.variant,
            given.preset,
            given.cohort,
            given.seed,
            given.data_root,
            given.out,
            Engine(**engine_options(given)),
            options=dict(parse_setting(text) for text in given.set) | ({"init": given.init} if given.init else {}),
            command="python -m lumirlib.train, as papermill notebooks/run_ablation.ipynb <output>.ipynb",
        )
        if run.engine.is_first:
            print(run.describe())
        result = run.train(resume=not given.restart, progress=not given.quiet)
        if given.train_only or not run.engine.is_first:
            return 0
        table = run.evaluate(result, not given.quiet, given.consistency or None)
    except (ValueError, OSError, NonFiniteLossError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        words = str(interrupt) or "stopped at once; the same call goes on from the last checkpoint"
        print(f"{prog}: {words}", file=sys.stderr)
        return 130
    print(f"\nbest epoch {result.best_epoch}; {run.metrics_path}")
    print(summarize(table).to_string(float_format="%.4f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
