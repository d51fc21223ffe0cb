import sys
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
import torch

from lumirlib.models import RegistrationNetwork, backbone
from lumirlib.models.memory import freed_memory_kept, return_freed_memory


@pytest.fixture(scope="module")
def memory_kept():
    """These tests say themselves when freed memory is kept."""


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


def test_a_network_that_is_called_keeps_freed_memory_until_its_end(monkeypatch):
    network, seen = RegistrationNetwork(2, 2, levels=2), []

    @contextmanager
    def kept():
        seen.append("kept")
        yield
        seen.append("given back")

    monkeypatch.setattr(backbone, "freed_memory_kept", kept)
    network.encoder.register_forward_hook(lambda *given: seen.append("encoded"))
    network(*torch.rand(2, 1, 1, 8, 8, 8))
    assert seen == ["kept", "encoded", "given back"]


@pytest.mark.parametrize(("antisymmetric", "driven"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("depth", [9, 11, 16])
def test_slabs_of_an_estimator_are_the_whole_of_it(depth, antisymmetric, driven, monkeypatch):
    torch.manual_seed(0)
    estimator, sides = backbone.FlowEstimator(4, 5, antisymmetric, driven), []
    estimator.conv3.register_forward_pre_hook(lambda _, given: sides.append(given[0].shape[2]))
    given = [*torch.randn(2, 1, 4, depth, 7, 6)]
    if driven:
        torch.nn.init.normal_(estimator.of_forces.weight)
        given.append(torch.randn(1, 6, depth, 7, 6))
    monkeypatch.setattr(backbone, "SLAB", 4)
    whole = estimator(*given)
    with torch.no_grad():
        torch.testing.assert_close(estimator(*given), whole, atol=1e-6, rtol=0)
    assert sides == {9: [9, 7, 8, 4], 11: [11, 7, 10, 6], 16: [16, 7, 10, 10, 7]}[depth]
