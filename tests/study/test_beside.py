import beside
import pytest
import torch


@pytest.mark.parametrize("name", beside.PROGRAMS)
def test_every_program_is_made_with_what_it_takes(name):
    assert callable(beside.method(name, "", beside.PROGRAMS[name][0]))


def test_a_method_is_measured_once_drawn_and_written_with_provenance(tmp_path):
    asked = ["--cohort", "embedded", "--pairs", "1", "--out", str(tmp_path), "--programs", beside.BEFORE, "--networks"]
    assert beside.main(asked) == beside.main(asked) == 0  # the second call has nothing to do
    folder = tmp_path / "benchmarks"
    written = beside.read_json(folder / "beside_embedded.json")
    (row,) = written["pairs"]
    assert row["method"] == beside.BEFORE and 0.5 < row["dice"] < 0.7 and row["threads"] == torch.get_num_threads()
    assert beside.BEFORE in written["provenance"]["command"] and (folder / "beside_embedded.png").is_file()
