"""`python -m lumirlib`: the command `lumirlib`, as torchrun and jobs of a cluster call it."""

import sys

from lumirlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
