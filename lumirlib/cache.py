"""Command line, `python -m lumirlib.cache`: make, check or mend the memory-mapped volumes that training reads."""

from __future__ import annotations

import argparse
import sys
import time

from lumirlib._checks import check_choice
from lumirlib.data import load_cohort
from lumirlib.data.cache import DTYPES
from lumirlib.methods.presets import PRESETS

#: Training scans of LUMIR.
LUMIR_SCANS = 3384

GIGABYTE = 1e9

EXAMPLES = """examples:
  lumirlib cache --cohort lumir --data-root FOLDER --preset paper
  lumirlib cache --cohort brains --resolution 2 --repair
"""


def parser(prog: str = "python -m lumirlib.cache") -> argparse.ArgumentParser:
    """The options of the command line."""
    options = argparse.ArgumentParser(
        prog=prog,
        description=(__doc__ or "").splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument(
        "--cohort",
        default="embedded",
        help="embedded, lumir, brains, or a Learn2Reg dataset JSON; "
        "joined by '+': trained on all, evaluated on the last",
    )
    options.add_argument("--data-root", default="", help="folder the JSON's paths are relative to; its own if empty")
    grid = options.add_mutually_exclusive_group()
    grid.add_argument("--preset", default="demo", help=f"its resolution is taken: {', '.join(PRESETS)}")
    grid.add_argument("--resolution", type=float, help="voxel size in mm, in place of a preset's")
    options.add_argument("--folder", default="", help="folder of caches; the user's cache folder if empty")
    options.add_argument(
        "--dtype", default="auto", help=f"{', '.join(DTYPES)}; auto: integers where exact, else float16"
    )
    options.add_argument("--workers", type=int, help="threads that read scans; one per core, at most 8, if not given")
    options.add_argument("--verify", action="store_true", help="compare the checksum of every volume")
    options.add_argument("--repair", action="store_true", help="verify, and make damaged volumes anew")
    options.add_argument("--quiet", action="store_true", help="no progress bars")
    return options


def main(arguments: list[str] | None = None, prog: str = "python -m lumirlib.cache") -> int:
    """Build a cache and say what it takes; the exit status is 0, or 2 for what cannot be used, read or written."""
    given = parser(prog).parse_args(arguments)
    try:
        check_choice(given.preset, tuple(PRESETS), "preset")
        resolution = PRESETS[given.preset].resolution_mm if given.resolution is None else given.resolution
        cohort = load_cohort(given.cohort, resolution, given.data_root or None)
        started = time.perf_counter()
        cached = cohort.with_cache(
            given.folder or None, given.dtype, given.workers, not given.quiet, given.verify, given.repair
        )
    except (ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    seconds, caches = time.perf_counter() - started, [part.cache for part in cached.parts]
    made = sum(cache.made for cache in caches)
    print(f"{cohort.name}, {resolution:g} mm: {cached.describe_cache()}")
    for cache in caches:
        print(f"{cache.folder}: {cache.nbytes / GIGABYTE:.2f} GB")
    print(f"{made} volumes made in {seconds:.1f} s")
    image = cached.stored_image(next(iter([*cohort.train, *(pair.fixed for pair in cohort.validation_pairs)])))
    size = LUMIR_SCANS * image.values.nbytes / GIGABYTE
    print(f"LUMIR's {LUMIR_SCANS} scans, if like these: {size:.1f} GB of disk, and as much free memory to stay there")
    if made:
        print(f"and {LUMIR_SCANS * seconds / made / 60:.0f} minutes to make")
    return 0


if __name__ == "__main__":
    sys.exit(main())
