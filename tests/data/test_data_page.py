"""What docs/data.md shows is what the readers want."""

import json
import re

import numpy as np
from small_cohorts import smooth_blob

from lumirlib import load_cohort
from lumirlib.data.landmark_files import read_landmarks
from lumirlib.data.nifti import write_nifti
from lumirlib.provenance import project_root

PAGE = (project_root() / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]


def test_the_cohort_of_the_page_is_read(tmp_path):
    (content,) = [block for block in BLOCKS if "training" in block]
    for name in sorted(set(re.findall(r"images\w+/\w+\.nii\.gz", json.dumps(content)))):
        write_nifti(tmp_path / name, smooth_blob(0), np.eye(4))
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    cohort = load_cohort(tmp_path / "dataset.json")
    assert cohort.name == "My scans" and cohort.credit == content["licence"]
    assert [subject.name for subject in cohort.train] == ["A", "B"]
    assert [pair.name for pair in cohort.validation_pairs] == ["C_D", "D_C"]


def test_the_landmarks_of_the_page_are_read_and_each_of_their_keys_is_needed(tmp_path):
    (content,) = [block for block in BLOCKS if "points" in block]
    path = tmp_path / "landmarks.json"
    path.write_text(json.dumps(content))
    found = read_landmarks(path)
    assert found == {name: tuple(map(float, place)) for name, place in zip(*content.values(), strict=True)}
    needed = set()
    for key in content:
        path.write_text(json.dumps({other: value for other, value in content.items() if other != key}))
        try:
            read_landmarks(path)
        except ValueError as error:
            needed.add(key)
            assert f"'{key}'" in str(error)
    assert needed == set(content)
    assert all(f"`{key}`" in PAGE for key in needed)


def test_the_options_of_the_page_are_read(tmp_path):
    (content,) = [block for block in BLOCKS if "training" in block]
    images = {*re.findall(r"images\w+/\w+\.nii\.gz", json.dumps(content))}
    for name in images:
        write_nifti(tmp_path / name, smooth_blob(0) / 100.0, np.eye(4))
    maximum = float(re.search(r'`"intensity_maximum": ([\d.]+)`', PAGE)[1])
    labels = [json.loads(text) for text in re.findall(r"`(\[2, 3, 4\]|\{\"2\".*?\})`", PAGE)]
    assert labels == [[2, 3, 4], {"2": "Left-Cerebral-White-Matter"}]
    for given, expected in zip(labels, [(0, 2, 3, 4), (0, 2)], strict=True):
        whole = content | {"intensity_maximum": maximum + 1, "labels": given}
        (tmp_path / "dataset.json").write_text(json.dumps(whole))
        cohort = load_cohort(tmp_path / "dataset.json")
        assert cohort.labels == expected and cohort.image(cohort.train[0]).max() < 1
