"""Image sets on disk, on the hub and of MNIST: order, conversions, and errors that name folder or file."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.domainbed.batches import DEVIATION, MEAN, evaluation_transform, training_transform
from benchmarks.domainbed.definition import RunImageSet
from benchmarks.domainbed.images import Environment
from benchmarks.domainbed.mnist import load_digits
from benchmarks.domainbed.validation import validate_images, validate_once
from benchmarks.harness.base import DATA_ROOT, IMAGES, DataError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.run.data import read_sets
from tests.image_sets import CLASSES, FOLDERS, PACS, load, pacs_run, write_images


def pixels(environment: Environment) -> list[bytes]:
    """Return the bytes of all images, in the order of the rows."""
    return [environment.open(row).tobytes() for row in range(len(environment))]


def test_rows_are_those_of_image_folder_in_its_order(pacs: Path) -> None:
    image_set = load()
    assert [environment.name for environment in image_set.environments] == ["A", "C", "P", "S"]
    assert image_set.classes == list(CLASSES)
    for environment, folder in zip(image_set.environments, FOLDERS, strict=True):
        theirs = ImageFolder(str(pacs / "PACS" / folder))
        assert environment.labels == theirs.targets
        assert pixels(environment) == [image.tobytes() for image, _ in theirs]


def test_the_transforms_are_domainbeds(pacs: Path) -> None:
    image = load().environments[0].open(0)
    normal = [transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    drawn = [transforms.RandomResizedCrop(32, scale=(0.7, 1.0)), transforms.RandomHorizontalFlip()]
    drawn += [transforms.ColorJitter(0.3, 0.3, 0.3, 0.3), transforms.RandomGrayscale()]
    expected = {evaluation_transform: [transforms.Resize((32, 32))], training_transform: drawn}
    for ours, theirs in expected.items():
        images = []
        for transform in (ours(32), transforms.Compose([*theirs, *normal])):
            torch.manual_seed(3)
            images.append(transform(image))
        assert torch.equal(*images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: shutil.rmtree(root / "photo"),
            "the environments art_painting, cartoon, sketch; it must have",
        ),
        (
            lambda root: [path.unlink() for path in (root / "cartoon/dog").iterdir()],
            "PACS/cartoon: .*dog.* images are",
        ),
        (
            lambda root: (root / "sketch/dog").rename(root / "sketch/dogs"),
            "'dog' is only in one of .*/art_painting, ",
        ),
    ],
)
def test_folders_that_are_not_the_sets_are_named(
    pacs: Path, change: Callable[[Path], object], message: str
) -> None:
    change(pacs / "PACS")
    with pytest.raises(DataError, match=message):
        load()


def test_hidden_folders_are_no_part_of_a_set(pacs: Path) -> None:
    whole = list(map(pixels, load().environments))
    for folder in ("PACS", "PACS/photo", "PACS/photo/dog"):
        shutil.copytree(pacs / "PACS/sketch/dog", pacs / folder / ".ipynb_checkpoints")
        (pacs / folder / "._000.jpg").write_bytes(b"\0\5\x16\7Mac OS X")
    assert list(map(pixels, load().environments)) == whole


def test_damaged_images_are_all_named_before_anything_is_trained(pacs: Path) -> None:
    folder = pacs / "PACS" / "photo" / "dog"
    short, text = folder / "000.jpg", folder / "001.jpg"
    short.write_bytes(short.read_bytes()[:-200])
    text.write_text("not an image")
    with pytest.raises(
        DataError, match=f"2 of 36 images cannot be used(.|\n)*{short} cannot(.|\n)*{text} cannot"
    ):
        validate_images(load())
    text.unlink()
    assert validate_images(load("load"))["environments"]["P"]["rows"] == 8
    assert load("load").environments[2].open(0).size == (40, 40)
    with pytest.raises(DataError, match="truncated"):  # the option does not stay for others
        load().environments[2].open(0)


def test_the_check_of_data_treats_truncated_images_as_the_suite_does(pacs: Path) -> None:
    image = pacs / "PACS" / "photo" / "dog" / "000.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    rows = {}
    for truncated in ("load", "refuse"):
        run = pacs_run(truncated=truncated)
        parts = read_sets([run], open_images=True)
        rows[truncated] = {part.part: part.rows for part in parts}
    assert rows["load"] == {"A": 9, "C": 9, "P": 9, "S": 9, "all": 36}
    assert rows["refuse"] == {"all": None}


def markers(here: Path) -> list[Path]:
    """Return the files which say that images were validated."""
    return sorted((here / IMAGES).glob("*.json"))


def test_images_of_another_data_root_are_validated_again(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = RunImageSet.model_validate(PACS)
    for name in ("first", "second"):
        write_images(here / name, "pacs")
    image = here / "second" / "PACS" / "photo" / "dog" / "000.jpg"
    image.write_bytes(image.read_bytes()[:-200])

    monkeypatch.setenv(DATA_ROOT, str(here / "first"))
    for _ in range(2):  # the second time, no image is opened
        validate_once(load(), task, "refuse")
        assert len(markers(here)) == 1
    monkeypatch.setenv(DATA_ROOT, str(here / "second"))
    with pytest.raises(DataError, match=f"1 of 24 images cannot be used(.|\n)*{image} cannot"):
        validate_once(load(), task, "refuse")


def test_changed_images_are_validated_again(
    here: Path, pacs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = RunImageSet.model_validate(PACS)
    validate_once(load(), task, "refuse")
    image = pacs / "PACS" / "photo" / "dog" / "000.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[:-200])
    with pytest.raises(DataError, match=f"1 of 36 images cannot be used(.|\n)*{image} cannot"):
        validate_once(load(), task, "refuse")
    image.unlink()
    image.symlink_to("missing.jpg")  # a broken link
    with pytest.raises(DataError, match=f"1 of 36 images cannot be used(.|\n)*{image} cannot"):
        validate_once(load(), task, "refuse")
    image.unlink()
    image.write_bytes(whole)
    validate_once(load(), task, "refuse")
    assert len(markers(here)) == 1


def test_other_kinds_of_images_become_rgb(pacs: Path) -> None:
    folder = pacs / "PACS" / "art_painting" / "dog"
    grey = np.arange(1600, dtype=np.uint8).reshape(40, 40)
    Image.fromarray(grey).save(folder / "a.png")
    Image.fromarray(np.dstack([grey] * 4), "CMYK").save(folder / "b.jpg")
    Image.fromarray(np.dstack([grey] * 4), "RGBA").save(folder / "c.png")
    environment = load().environments[0]
    assert validate_images(load())["environments"]["A"]["rows"] == 12
    images = [environment.open(row) for row in range(len(environment))]
    assert {image.mode for image in images} == {"RGB"}
    for row in (3, 5):  # a.png and c.png, after the three images of the set
        assert np.array_equal(np.asarray(images[row])[..., 1], grey), row


def test_a_hub_set_has_the_same_environments_and_classes(
    pacs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, hub = load(), tmp_path / "hub"
    rows = [
        {"image": environment.open(row), "domain": folder, "label": environment.labels[row]}
        for row in (5, 2, 8, 1, 0, 3, 4, 7, 6)  # in any order
        for environment, folder in zip(local.environments, FOLDERS, strict=True)
    ]
    features = {"image": datasets.Image(), "domain": datasets.Value("string")}
    features["label"] = datasets.ClassLabel(names=list(CLASSES))
    hub.mkdir()
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.to_parquet(str(hub / "train-00000-of-00001.parquet"))
    monkeypatch.delenv(DATA_ROOT)
    loaded = load(task={**PACS, "source": {"folder": "PACS", "hub": str(hub), "revision": None}})
    assert loaded.classes == local.classes
    for ours, theirs in zip(loaded.environments, local.environments, strict=True):
        assert (ours.name, ours.labels) == (theirs.name, theirs.labels)
        assert {ours.open(row).tobytes() for row in range(9)} == {
            theirs.open(row).tobytes() for row in range(9)
        }


def test_every_set_has_domainbeds_environments() -> None:
    sets = load_benchmark("domainbed").tasks
    names = {name: " ".join(entry.environments) for name, entry in sets.items()}
    assert (names["pacs"], names["vlcs"], names["office_home"]) == ("A C P S", "C L S V", "A C P R")
    assert names["terra_incognita"] == "L100 L38 L43 L46"
    assert names["domain_net"] == "clip info paint quick real sketch"
    assert (names["rotated_mnist"], names["colored_mnist"]) == (
        "0 15 30 45 60 75",
        "+90% +80% -90%",
    )
    for entry in sets.values():
        if entry.source.folder:
            folders = list(entry.environments.values())
            assert folders == sorted(folders)  # DomainBed's order is that of the folders


def test_all_of_mnist_is_read_train_before_test(root: Path) -> None:
    with pytest.raises(DataError, match=r"MNIST/raw lacks MNIST's files"):
        load_digits("all")
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count, value in (("train", 12, 1), ("t10k", 4, 2)):
        pixels, labels = bytes([value]) * count * 28 * 28, bytes([value]) * count
        (folder / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, count, 28, 28) + pixels
        )
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels)
    images, labels, source = load_digits("all")
    assert (images.shape, images.dtype, source) == ((16, 28, 28), torch.uint8, str(root / "MNIST"))
    assert images[:, 0, 0].tolist() == labels.tolist() == [1] * 12 + [2] * 4
    task = {
        "name": "mnist",
        "domainbed": "ColoredMNIST",
        "source": {"mnist": "colored", "digits": "all"},
    }
    task["environments"] = [["+90%", 0.1], ["+80%", 0.2], ["-90%", 0.9]]
    assert [len(environment) for environment in load(task=task).environments] == [6, 5, 5]
