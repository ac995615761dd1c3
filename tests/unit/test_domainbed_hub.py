"""Image sets of the hub: the same environments and classes as folders, or a refusal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from benchmarks.domainbed.environments import ImageSet
from benchmarks.domainbed.validation import (
    validate_dataset,
)
from benchmarks.harness.base.errors import DataError
from benchmarks.harness.base.paths import DATA_ROOT
from benchmarks.harness.config.definition import load_benchmark
from tests.image_sets import CLASSES, FOLDERS, PACS, load


def hub_copy(pacs: Path, folder: Path, **renamed: str) -> None:
    """The set as the hub hands it out: rows in any order, one split, an image column."""
    found = load()
    rows = [
        {"image": Image.open(environment.places[row]), "domain": folder_name, "label": environment.labels[row]}
        for row in (5, 2, 8, 1, 0, 3, 4, 7, 6)
        for environment, folder_name in zip(found.environments, FOLDERS, strict=True)
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "domain": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(CLASSES)),
        }
    )
    table = datasets.Dataset.from_list(rows, features=features)
    for old, new in renamed.items():
        table = table.rename_column(old, new)
    folder.mkdir()
    table.to_parquet(str(folder / "train-00000-of-00001.parquet"))


def test_a_hub_set_has_the_same_environments_and_classes(
    pacs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_copy(pacs, tmp_path / "hub")
    local = load()
    monkeypatch.delenv(DATA_ROOT)
    found = load(task={**PACS, "source": {"folder": "PACS", "hub": str(tmp_path / "hub"), "revision": None}})
    assert [environment.name for environment in found.environments] == ["A", "C", "P", "S"]
    assert found.classes == local.classes
    for ours, theirs in zip(found.environments, local.environments, strict=True):
        assert ours.labels == theirs.labels
        assert {ours.open(row)[0].tobytes() for row in range(9)} == {theirs.open(row)[0].tobytes() for row in range(9)}
    assert validate_dataset(found)["environments"]["A"]["rows"] == 9


PLAIN_HUB = {"image": [None] * 8, "domain": [*FOLDERS, *FOLDERS], "label": [0] * 4 + [1] * 4}


def load_hub(monkeypatch: pytest.MonkeyPatch, names: list[str] | None = None, **columns: Any) -> ImageSet:
    """A set of the hub with those columns instead of usual ones."""
    rows = datasets.Dataset.from_dict({**PLAIN_HUB, **columns})
    rows = rows.cast_column("label", datasets.ClassLabel(names=names)) if names else rows
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=rows))
    monkeypatch.delenv(DATA_ROOT, raising=False)
    return load()


@pytest.mark.parametrize(
    ("names", "columns", "message"),
    [
        (["dog", "cat"], {"label": [0] * 4 + [1] * 3 + [-1]}, "row 8: 'label' is -1, which names none"),  # not the last
        (["dog", "cat"], {"label": [0] * 4 + [None] + [1] * 3}, "row 5: 'label' is None, which names none"),
        (None, {"label": [0] * 4 + [-1] + [1] * 3}, "row 5: 'label' is -1"),
        (None, {"label": [0.0] * 4 + [math.nan] + [1.0] * 3}, "row 5: 'label' is nan"),
        (None, {"domain": [*FOLDERS, *FOLDERS[:3], None]}, "row 8: 'domain' is None"),
        (None, {"domain": [*FOLDERS[1:], "zoo"] * 2}, "lacks the environment art_painting.* has zoo, which is no env"),
        (None, {"domain": [*FOLDERS, *FOLDERS[1:], "zoo"]}, "has zoo, which is no environment; it must have art_p"),
        (None, {"domain": [*FOLDERS, *FOLDERS[1:], "Sketch"]}, "has Sketch beside sketch; it must have art_painting"),
    ],
)
def test_rows_of_a_hub_set_without_class_or_environment_are_refused(
    monkeypatch: pytest.MonkeyPatch, names: list[str] | None, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=rf"^flwrlabs/pacs,? {message}"):
        load_hub(monkeypatch, names, **columns)


def test_environments_of_a_hub_set_are_found_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """In DomainBed's order, whatever stands first; quite other names by their own."""
    found = load_hub(monkeypatch, domain=["Sketch", "photo", "Art Painting", "cartoon"] * 2)
    assert [environment.places for environment in found.environments] == [
        [f"flwrlabs/pacs, row {row}" for row in rows] for rows in ((3, 7), (4, 8), (2, 6), (1, 5))
    ]
    found = load_hub(monkeypatch, domain=["d", "b", "c", "a"] * 2)
    assert [environment.places[0][-1] for environment in found.environments] == ["4", "2", "3", "1"]
    with pytest.raises(DataError, match="row 4 has no image"):
        found.environments[0].open(0)


def test_a_hub_set_without_a_column_is_refused(pacs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_copy(pacs, tmp_path / "hub", domain="style")
    monkeypatch.delenv(DATA_ROOT)
    with pytest.raises(DataError, match="has no column 'domain'"):
        load(task={**PACS, "source": {"folder": "PACS", "hub": str(tmp_path / "hub"), "revision": None}})


def test_every_set_has_domainbeds_environments() -> None:
    sets = load_benchmark("domainbed").tasks
    names = {name: list(found.environments) for name, found in sets.items()}
    assert names["pacs"] == ["A", "C", "P", "S"]
    assert names["vlcs"] == ["C", "L", "S", "V"]
    assert names["office_home"] == ["A", "C", "P", "R"]
    assert names["terra_incognita"] == ["L100", "L38", "L43", "L46"]
    assert names["domain_net"] == ["clip", "info", "paint", "quick", "real", "sketch"]
    assert names["rotated_mnist"] == ["0", "15", "30", "45", "60", "75"]
    assert names["colored_mnist"] == ["+90%", "+80%", "-90%"]
    for found in sets.values():
        if found.source.folder:
            folders = list(found.environments.values())
            assert folders == sorted(folders)  # DomainBed's order is that of the folders
