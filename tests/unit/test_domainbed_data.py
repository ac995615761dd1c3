"""Image sets on disk and on the hub: order, conversions, and what is wrong with a folder or a file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.domainbed.definition import RunSet
from benchmarks.domainbed.transforms import DEVIATION, MEAN, augmented, plain
from benchmarks.domainbed.validation import (
    counts,
    ensure_validated,
    list_environments,
    validate_dataset,
    validate_to_file,
)
from benchmarks.harness.base.errors import DataError
from benchmarks.harness.base.paths import DATA_ROOT
from tests.image_sets import CLASSES, FOLDERS, PACS, load, write_pacs


@pytest.fixture
def root(root: Path) -> Path:
    """A data root with a small PACS."""
    write_pacs(root, rows=3)
    return root


def test_rows_are_those_of_image_folder_in_its_order(root: Path) -> None:
    found = load()
    assert [environment.name for environment in found.environments] == ["A", "C", "P", "S"]
    assert found.classes == list(CLASSES)
    for environment, folder in zip(found.environments, FOLDERS, strict=True):
        theirs = ImageFolder(str(root / "PACS" / folder))
        assert environment.places == [path for path, _ in theirs.samples]
        assert environment.labels == theirs.targets
        assert np.array_equal(np.asarray(environment.open(4)[0]), np.asarray(theirs[4][0]))


def test_the_transforms_are_domainbeds(root: Path) -> None:
    image = load().environments[0].open(0)[0]
    normal = [transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    assert torch.equal(plain(32)(image), transforms.Compose([transforms.Resize((32, 32)), *normal])(image))
    theirs = transforms.Compose(
        [
            transforms.RandomResizedCrop(32, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
            *normal,
        ]
    )
    torch.manual_seed(3)
    expected = theirs(image)
    torch.manual_seed(3)
    assert torch.equal(augmented(32)(image), expected)


def test_counts_are_shown_by_class_and_environment(root: Path) -> None:
    text = counts(load())
    assert text.splitlines()[0].split() == ["class", "A", "C", "P", "S"]
    assert text.splitlines()[-1].split() == ["all", "9", "9", "9", "9"]


def test_a_missing_environment_is_named(root: Path) -> None:
    shutil.rmtree(root / "PACS" / "photo")
    with pytest.raises(DataError, match=r"PACS lacks the environment photo; it must have art_painting \(A\), cartoon"):
        load()


def test_a_folder_that_is_no_environment_is_named(root: Path) -> None:
    (root / "PACS" / "splits").mkdir()
    with pytest.raises(DataError, match=r"PACS has splits, which is no environment; it must have"):
        load()


def test_a_missing_environment_is_not_replaced_by_another_folder(root: Path) -> None:
    (root / "PACS" / "photo").rename(root / "PACS" / "sketch_old")
    with pytest.raises(DataError, match=r"lacks the environment photo.* and has sketch_old, which is no environment"):
        load()


def test_an_environment_that_is_there_twice_is_named(root: Path) -> None:
    shutil.copytree(root / "PACS/photo", root / "PACS/photo_")
    with pytest.raises(DataError, match=r"PACS has photo beside photo_; it must have art_painting"):
        load()


def test_other_spellings_are_known_and_quite_other_names_are_taken_in_order(root: Path) -> None:
    (root / "PACS" / "art_painting").rename(root / "PACS" / "Art Painting")
    assert "Art Painting" in load().environments[0].places[0]
    for number, folder in enumerate(("Art Painting", "cartoon", "photo", "sketch")):
        (root / "PACS" / folder).rename(root / "PACS" / f"d{3 - number}")
    assert [Path(environment.places[0]).parts[-3] for environment in load().environments] == ["d0", "d1", "d2", "d3"]


@pytest.mark.parametrize(
    ("link", "target", "why"),
    [
        ("photo/dog/up", "..", "in which it lies itself"),
        ("photo/dog/here", ".", "in which it lies itself"),
        ("loop", ".", "in which it lies itself"),
        ("photo/dog/deep/more", "../../elephant", "which belongs to the set and would be there twice"),
        ("photo/zebra", "../sketch/dog", "which belongs to the set and would be there twice"),
        ("photo/dog/deep/away", "../../../../elsewhere", "which is no folder of the set"),
        ("clipart", "../elsewhere", "which is no folder of the set"),
        ("photo/dog/twice.jpg", "../elephant/000.jpg", "which belongs to the set and would be there twice"),
        ("clipart", "/nowhere/clipart", "which is not there"),
        ("photo/zebra", "/nowhere/zebra", "which is not there"),
        ("photo/dog/more", "/nowhere/more", "which is not there"),
        ("photo/dog/gone.jpg", "gone.jpg", "which is not there"),
    ],
)
def test_links_to_folders_and_to_images_of_the_set_are_refused(root: Path, link: str, target: str, why: str) -> None:
    (root / "elsewhere" / "cat").mkdir(parents=True)
    (root / "PACS" / link).parent.mkdir(exist_ok=True)
    (root / "PACS" / link).symlink_to(target)
    with pytest.raises(DataError, match=rf"PACS/{link} is a link to /.*, {why}; remove it, or put a copy in its place"):
        load()


def test_a_class_that_is_a_broken_link_everywhere_is_not_left_out(root: Path) -> None:
    for folder in FOLDERS:
        shutil.rmtree(root / "PACS" / folder / "dog")
        (root / "PACS" / folder / "dog").symlink_to(f"/nowhere/{folder}/dog")
    with pytest.raises(DataError, match=r"PACS/art_painting/dog is a link to /nowhere/.*, which is not there"):
        load()


def test_two_links_to_one_file_elsewhere_are_refused(root: Path) -> None:
    """They would be on both sides of a split, as two links to an image of the set."""
    image = root / "PACS/photo/dog/000.jpg"
    image.rename(root / "blob.jpg")
    image.symlink_to(root / "blob.jpg")
    other = root / "PACS/sketch/elephant/more.jpg"
    other.symlink_to("../../../blob.jpg")
    with pytest.raises(DataError, match=f"{other} is a link to .*blob.jpg, as {image} is, and would be there twice"):
        load()


@pytest.mark.parametrize("place", ["PACS/photo/dog", "PACS/photo"])
def test_a_name_that_is_no_text_is_told_in_one_line(root: Path, place: str) -> None:
    """A folder as well as an image: such names are in no file that is written in UTF-8."""
    folder = root / place
    (folder / ("000.jpg" if folder.name == "dog" else "dog")).rename(folder / os.fsdecode(b"caf\xe9.jpg"))
    with pytest.raises(DataError, match=rf"{place} holds b'caf\\xe9.jpg': the name is not UTF-8; give it another$"):
        load()


def test_folders_that_link_to_each_other_are_refused(root: Path) -> None:
    (root / "PACS/photo/dog/a").symlink_to("../elephant")
    (root / "PACS/photo/elephant/b").symlink_to("../dog")
    with pytest.raises(DataError, match="PACS/photo/dog/a is a link to"):
        load()


def test_a_set_may_be_a_link_and_its_images_links_to_files_elsewhere(root: Path) -> None:
    """As content stores (git-annex, the hub's cache) keep them, also inside the set, in a hidden folder."""
    plain_set = load()
    (root / "PACS").rename(root / "real")
    (root / "PACS").symlink_to("real")
    image, other = root / "real/photo/dog/000.jpg", root / "real/photo/dog/001.jpg"
    (root / "real/.store").mkdir()
    image.rename(root / "blob")
    image.symlink_to(root / "blob")
    other.rename(root / "real/.store/blob")
    other.symlink_to("../../.store/blob")
    found = load()
    for ours, theirs in zip(found.environments, plain_set.environments, strict=True):
        assert (ours.places, ours.labels) == (theirs.places, theirs.labels)
    assert validate_dataset(found)["environments"]["P"]["rows"] == 9


def test_hidden_folders_are_no_part_of_a_set(root: Path) -> None:
    whole = [environment.places for environment in load().environments]
    for place in ("PACS", "PACS/photo", "PACS/photo/dog"):
        shutil.copytree(root / "PACS/sketch/dog", root / place / ".ipynb_checkpoints")
        (root / place / ".DS_Store").touch()
        (root / place / "._000.jpg").write_bytes(b"\0\5\x16\7Mac OS X")
    assert [environment.places for environment in load().environments] == whole
    assert "not read" not in counts(load())


def test_files_that_are_not_read_are_counted_by_their_ending(root: Path, tmp_path: Path) -> None:
    """torchvision's ImageFolder, and so DomainBed, reads no GIF."""
    photo = root / "PACS/photo"
    for name in ("dog/a.gif", "dog/b.GIF", "elephant/c.gif", "dog/README", "list.txt", "e.jpg"):
        (photo / name).touch()
    found = load()
    assert found.environments[2].ignored == {".gif": 3, ".jpg in no class": 1, ".txt in no class": 1, "README": 1}
    said = "not read: 3 .gif, 1 .jpg in no class, 1 .txt in no class, 1 README"
    assert counts(found).splitlines()[-1] == f"P: {said}"
    assert counts(found).splitlines()[-2].startswith("all")
    assert [labels for _, _, labels, _ in list_environments(RunSet.model_validate(PACS), 0, open_images=False)] == [
        "3 classes, 3 to 3 each" + (f"; {said}" if name == "P" else "") for name in "ACPS"
    ]
    assert validate_dataset(found)["environments"]["P"]["ignored"] == found.environments[2].ignored


def test_a_folder_that_cannot_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked, scan = str(root / "PACS/photo/dog"), os.scandir

    def refuse(path: str) -> Any:
        if str(path) == locked:
            raise PermissionError(13, "Permission denied", locked)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"PACS/photo/dog cannot be read: Permission denied"):
        load()


def test_an_empty_class_is_named(root: Path) -> None:
    for path in (root / "PACS" / "cartoon" / "dog").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"PACS/cartoon/dog has no image"):
        load()


def test_classes_that_differ_are_named_with_both_folders(root: Path) -> None:
    (root / "PACS" / "sketch" / "dog").rename(root / "PACS" / "sketch" / "dogs")
    with pytest.raises(DataError, match=r"PACS/art_painting has 'dog', .*PACS/sketch does not.*dogs"):
        load()


def test_a_set_that_is_not_there_says_where_it_must_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_ROOT, str(tmp_path))
    task = {**PACS, "source": {"folder": "VLCS"}}
    with pytest.raises(DataError, match=r"VLCS does not exist; it must hold <environment>/<class>/<image>"):
        load(task=task)


def damage(root: Path) -> tuple[Path, Path, Path]:
    folder = root / "PACS" / "photo" / "dog"
    short, text, empty = folder / "000.jpg", folder / "001.jpg", folder / "002.jpg"
    short.write_bytes(short.read_bytes()[:-200])
    text.write_text("not an image")
    empty.write_bytes(b"")
    return short, text, empty


def test_damaged_images_are_all_named_before_anything_is_trained(root: Path) -> None:
    short, text, empty = damage(root)
    with pytest.raises(DataError) as error:
        validate_dataset(load())
    message = str(error.value)
    assert "3 of 36 images cannot be used" in message
    assert f"{short} cannot be used: image file is truncated" in message
    assert "training.truncated: load" in message
    assert f"{text} is no image" in message
    assert f"{empty} is no image" in message


def test_a_truncated_image_is_filled_where_that_is_asked_for(root: Path) -> None:
    _, *others = damage(root)
    for path in others:
        path.unlink()
    with pytest.raises(DataError, match="1 of 34"):
        validate_dataset(load())
    assert validate_dataset(load("load"))["environments"]["P"]["rows"] == 7
    image = load("load").environments[2].open(0)[0]
    assert image.size == (40, 40)
    with pytest.raises(DataError, match="truncated"):  # the option is not left behind for others
        load().environments[2].open(0)


def test_other_kinds_of_images_become_rgb_and_are_counted(root: Path) -> None:
    folder = root / "PACS" / "art_painting" / "dog"
    grey = np.arange(1600, dtype=np.uint8).reshape(40, 40)
    Image.fromarray(grey).save(folder / "a.png")
    Image.fromarray(np.dstack([grey] * 4), "CMYK").save(folder / "b.jpg")
    Image.fromarray((grey.astype(np.uint16) << 8) + 77).save(folder / "c.png")
    Image.fromarray(np.dstack([grey] * 4), "RGBA").save(folder / "d.png")
    Image.fromarray(np.dstack([grey] * 3)).convert("P").save(folder / "e.gif")  # not among the endings that are read
    found = load()
    summary = validate_dataset(found)["environments"]["A"]
    assert summary["rows"] == 13
    assert summary["converted"] == {"CMYK": 1, "I;16": 1, "L": 1, "RGBA": 1}
    by_name = {Path(place).name: row for row, place in enumerate(found.environments[0].places)}
    for name in ("a.png", "c.png", "d.png"):
        image, _ = found.environments[0].open(by_name[name])
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image)[..., 1], grey), name


def test_a_validation_is_made_once_and_again_when_a_file_changes(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "images" / "pacs-32px.json"
    validate_to_file(
        {"benchmark": "domainbed", "task": PACS, "data_seed": 0, "image_size": 32, "truncated": "refuse"}, output
    )
    assert json.loads(output.read_text())["environments"]["S"]["rows"] == 9
    grid = np.asarray(Image.open(output.with_suffix(".png")))
    assert grid.shape == (8 * 34 + 2, 8 * 34 + 2, 3)  # four environments, plain and augmented; eight samples
    damage(root)
    with pytest.raises(DataError, match="cannot be used"):
        ensure_validated(load(), [output], "refuse")


def test_a_validation_that_is_current_is_trusted(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "images" / "pacs-32px.json"
    validate_to_file(
        {"benchmark": "domainbed", "task": PACS, "data_seed": 0, "image_size": 32, "truncated": "refuse"}, output
    )
    monkeypatch.setattr("benchmarks.domainbed.validation.validate_dataset", lambda found: pytest.fail("looked again"))
    ensure_validated(load(), [output], "refuse")
