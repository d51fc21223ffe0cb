import sys

import numpy as np
import psutil
import pytest

from lumirlib.models.memory import freed_memory_kept, return_freed_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_stays_within_and_goes_back_at_the_end():
    process, size = psutil.Process(), 64 * 2**20
    return_freed_memory()  # or the block might lie in what other tests have freed
    with freed_memory_kept():
        before = process.memory_info().rss
        block = np.ones(size, np.uint8)
        del block
        kept = process.memory_info().rss - before
        again = np.empty(size, np.uint8)
        faults = psutil.Process().memory_info().rss - before
        del again
    assert kept > 0.9 * size
    assert faults < 1.5 * size  # the second block took the first one's place
    assert process.memory_info().rss - before < 0.1 * size
