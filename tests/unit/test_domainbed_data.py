"""Image sets on disk and on the hub: order, conversions, and what is wrong with a folder or a file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
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
)
from benchmarks.harness.base.errors import DataError
from benchmarks.harness.base.paths import DATA_ROOT
from tests.image_sets import CLASSES, FOLDERS, PACS, load, validated


def test_rows_are_those_of_image_folder_in_its_order(pacs: Path) -> None:
    found = load()
    assert [environment.name for environment in found.environments] == ["A", "C", "P", "S"]
    assert found.classes == list(CLASSES)
    for environment, folder in zip(found.environments, FOLDERS, strict=True):
        theirs = ImageFolder(str(pacs / "PACS" / folder))
        assert environment.places == [path for path, _ in theirs.samples]
        assert environment.labels == theirs.targets
        assert np.array_equal(np.asarray(environment.open(4)[0]), np.asarray(theirs[4][0]))


def test_the_transforms_are_domainbeds(pacs: Path) -> None:
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


def test_counts_are_shown_by_class_and_environment(pacs: Path) -> None:
    text = counts(load())
    assert text.splitlines()[0].split() == ["class", "A", "C", "P", "S"]
    assert text.splitlines()[-1].split() == ["all", "9", "9", "9", "9"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda found: shutil.rmtree(found / "photo"),
            r"PACS lacks the environment photo; it must have art_painting \(A\), cartoon",
        ),
        (lambda found: (found / "splits").mkdir(), "PACS has splits, which is no environment; it must have"),
        (  # no other folder stands for it
            lambda found: (found / "photo").rename(found / "sketch_old"),
            "lacks the environment photo.* and has sketch_old, which is no environment",
        ),
        (
            lambda found: shutil.copytree(found / "photo", found / "photo_"),
            "PACS has photo beside photo_; it must have art_painting",
        ),
        (lambda found: [path.unlink() for path in (found / "cartoon/dog").iterdir()], "PACS/cartoon/dog has no image"),
        (
            lambda found: (found / "sketch/dog").rename(found / "sketch/dogs"),
            "PACS/art_painting has 'dog', .*PACS/sketch does not.*dogs",
        ),
    ],
)
def test_folders_that_are_not_the_sets_are_named(pacs: Path, change: Callable[[Path], object], message: str) -> None:
    change(pacs / "PACS")
    with pytest.raises(DataError, match=message):
        load()


def test_other_spellings_are_known_and_quite_other_names_are_taken_in_order(pacs: Path) -> None:
    (pacs / "PACS" / "art_painting").rename(pacs / "PACS" / "Art Painting")
    assert "Art Painting" in load().environments[0].places[0]
    for number, folder in enumerate(("Art Painting", "cartoon", "photo", "sketch")):
        (pacs / "PACS" / folder).rename(pacs / "PACS" / f"d{3 - number}")
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
def test_links_to_folders_and_to_images_of_the_set_are_refused(pacs: Path, link: str, target: str, why: str) -> None:
    (pacs / "elsewhere" / "cat").mkdir(parents=True)
    (pacs / "PACS" / link).parent.mkdir(exist_ok=True)
    (pacs / "PACS" / link).symlink_to(target)
    with pytest.raises(DataError, match=rf"PACS/{link} is a link to /.*, {why}; remove it, or put a copy in its place"):
        load()


def test_a_class_that_is_a_broken_link_everywhere_is_not_left_out(pacs: Path) -> None:
    for folder in FOLDERS:
        shutil.rmtree(pacs / "PACS" / folder / "dog")
        (pacs / "PACS" / folder / "dog").symlink_to(f"/nowhere/{folder}/dog")
    with pytest.raises(DataError, match=r"PACS/art_painting/dog is a link to /nowhere/.*, which is not there"):
        load()


def test_two_links_to_one_file_elsewhere_are_refused(pacs: Path) -> None:
    """They would be on both sides of a split, as two links to an image of the set."""
    image = pacs / "PACS/photo/dog/000.jpg"
    image.rename(pacs / "blob.jpg")
    image.symlink_to(pacs / "blob.jpg")
    other = pacs / "PACS/sketch/elephant/more.jpg"
    other.symlink_to("../../../blob.jpg")
    with pytest.raises(DataError, match=f"{other} is a link to .*blob.jpg, as {image} is, and would be there twice"):
        load()


@pytest.mark.parametrize("place", ["PACS/photo/dog", "PACS/photo"])
def test_a_name_that_is_no_text_is_told_in_one_line(pacs: Path, place: str) -> None:
    """A folder as well as an image: such names are in no file that is written in UTF-8."""
    folder = pacs / place
    (folder / ("000.jpg" if folder.name == "dog" else "dog")).rename(folder / os.fsdecode(b"caf\xe9.jpg"))
    with pytest.raises(DataError, match=rf"{place} holds b'caf\\xe9.jpg': the name is not UTF-8; give it another$"):
        load()


def test_folders_that_link_to_each_other_are_refused(pacs: Path) -> None:
    (pacs / "PACS/photo/dog/a").symlink_to("../elephant")
    (pacs / "PACS/photo/elephant/b").symlink_to("../dog")
    with pytest.raises(DataError, match="PACS/photo/dog/a is a link to"):
        load()


def test_a_set_may_be_a_link_and_its_images_links_to_files_elsewhere(pacs: Path) -> None:
    """As content stores (git-annex, the hub's cache) keep them, also inside the set, in a hidden folder."""
    plain_set = load()
    (pacs / "PACS").rename(pacs / "real")
    (pacs / "PACS").symlink_to("real")
    image, other = pacs / "real/photo/dog/000.jpg", pacs / "real/photo/dog/001.jpg"
    (pacs / "real/.store").mkdir()
    image.rename(pacs / "blob")
    image.symlink_to(pacs / "blob")
    other.rename(pacs / "real/.store/blob")
    other.symlink_to("../../.store/blob")
    found = load()
    for ours, theirs in zip(found.environments, plain_set.environments, strict=True):
        assert (ours.places, ours.labels) == (theirs.places, theirs.labels)
    assert validate_dataset(found)["environments"]["P"]["rows"] == 9


def test_hidden_folders_are_no_part_of_a_set(pacs: Path) -> None:
    whole = [environment.places for environment in load().environments]
    for place in ("PACS", "PACS/photo", "PACS/photo/dog"):
        shutil.copytree(pacs / "PACS/sketch/dog", pacs / place / ".ipynb_checkpoints")
        (pacs / place / ".DS_Store").touch()
        (pacs / place / "._000.jpg").write_bytes(b"\0\5\x16\7Mac OS X")
    assert [environment.places for environment in load().environments] == whole
    assert "not read" not in counts(load())


def test_files_that_are_not_read_are_counted_by_their_ending(pacs: Path, tmp_path: Path) -> None:
    """torchvision's ImageFolder, and so DomainBed, reads no GIF."""
    photo = pacs / "PACS/photo"
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


def test_a_folder_that_cannot_be_read_is_named(pacs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked, scan = str(pacs / "PACS/photo/dog"), os.scandir

    def refuse(path: str) -> Any:
        if str(path) == locked:
            raise PermissionError(13, "Permission denied", locked)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"PACS/photo/dog cannot be read: Permission denied"):
        load()


def test_a_set_that_is_not_there_says_where_it_must_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_ROOT, str(tmp_path))
    task = {**PACS, "source": {"folder": "VLCS"}}
    with pytest.raises(DataError, match=r"VLCS does not exist; it must hold <environment>/<class>/<image>"):
        load(task=task)


def damage(pacs: Path) -> tuple[Path, Path, Path]:
    folder = pacs / "PACS" / "photo" / "dog"
    short, text, empty = folder / "000.jpg", folder / "001.jpg", folder / "002.jpg"
    short.write_bytes(short.read_bytes()[:-200])
    text.write_text("not an image")
    empty.write_bytes(b"")
    return short, text, empty


def test_damaged_images_are_all_named_before_anything_is_trained(pacs: Path) -> None:
    short, text, empty = damage(pacs)
    with pytest.raises(DataError) as error:
        validate_dataset(load())
    message = str(error.value)
    assert "3 of 36 images cannot be used" in message
    assert f"{short} cannot be used: image file is truncated" in message
    assert "training.truncated: load" in message
    assert f"{text} is no image" in message
    assert f"{empty} is no image" in message


def test_a_truncated_image_is_filled_where_that_is_asked_for(pacs: Path) -> None:
    _, *others = damage(pacs)
    for path in others:
        path.unlink()
    with pytest.raises(DataError, match="1 of 34"):
        validate_dataset(load())
    assert validate_dataset(load("load"))["environments"]["P"]["rows"] == 7
    image = load("load").environments[2].open(0)[0]
    assert image.size == (40, 40)
    with pytest.raises(DataError, match="truncated"):  # the option is not left behind for others
        load().environments[2].open(0)


def test_other_kinds_of_images_become_rgb_and_are_counted(pacs: Path) -> None:
    folder = pacs / "PACS" / "art_painting" / "dog"
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


def test_a_validation_is_made_once_and_again_when_a_file_changes(pacs: Path, tmp_path: Path) -> None:
    output = validated(tmp_path)
    assert json.loads(output.read_text())["environments"]["S"]["rows"] == 9
    grid = np.asarray(Image.open(output.with_suffix(".png")))
    assert grid.shape == (8 * 34 + 2, 8 * 34 + 2, 3)  # four environments, plain and augmented; eight samples
    damage(pacs)
    with pytest.raises(DataError, match="cannot be used"):
        ensure_validated(load(), [output], "refuse")


def test_a_validation_that_is_current_is_trusted(pacs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = validated(tmp_path)
    monkeypatch.setattr("benchmarks.domainbed.validation.validate_dataset", lambda found: pytest.fail("looked again"))
    ensure_validated(load(), [output], "refuse")
