"""Load human sentiment ratings of four domains from the source package of vaderSentiment.

Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text", ICWSM 2014. Twenty people rated each sentence from -4 to 4.
"""

from __future__ import annotations

import functools
import io
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.base import DataError, derive_seed
from benchmarks.harness.sources.packages import find_package
from emoe.errors import did_you_mean

PACKAGE = "vaderSentiment"

# the archive of the ratings, in the source package's folder
_RATINGS_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
# the files of the ratings in that archive, by domain
_FILES = {
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
# Limits of the absolute rating, which is between 0 and 4: near-neutral up to 0.5, weak up to 1.5,
# strong above.
_LARGEST_NEUTRAL = 0.5
_LARGEST_WEAK = 1.5
# shares of the documents; the rest is for training
_TEST_SHARE = 0.25
_DEV_SHARE = 0.15


class _Sentence(NamedTuple):
    """A rated sentence.

    Attributes:
        text: The text.
        rating: The mean rating, from -4 (most negative) to 4 (most positive).
    """

    text: str
    rating: float


class VaderSplit(NamedTuple):
    """The sentences of one split.

    Attributes:
        texts: The texts.
        labels: The label of each text.
        dropped: The number of dropped near-neutral sentences.
    """

    texts: list[str]
    labels: list[int]
    dropped: int


def load_vader(domain: str, split: str, *, strength: bool = False) -> VaderSplit:
    """Load the sentences of one split, in a fixed shuffled order.

    Near-neutral sentences (absolute rating of at most 0.5) are dropped. The label is the sign
    (negative 0, positive 1). Whole documents are assigned to splits, so that no review or editorial
    has sentences in two splits. The splits are the same for every seed.

    Args:
        domain: The domain: ``amazon``, ``movie``, ``nyt`` or ``tweets``.
        split: The split: ``train`` (60 % of the documents), ``dev`` (15 %) or ``test`` (25 %).
        strength: True to label by strength instead of sign. The label of a weak sentence is 0. The
            label of a strong sentence (absolute rating above 1.5) is 1.

    Raises:
        DataError: The domain or split is unknown, or the archive is missing or damaged.
    """
    if domain not in _FILES:
        raise DataError(f"there is no VADER domain '{domain}'{did_you_mean(domain, _FILES)}")
    documents = _read_documents(domain)
    sentences: list[_Sentence] = []
    for name in _names_in_split(documents, domain, split):
        sentences.extend(documents[name])
    random.Random(derive_seed("rated order", domain, split)).shuffle(sentences)

    texts = []
    labels = []
    for sentence in sentences:
        if abs(sentence.rating) <= _LARGEST_NEUTRAL:
            continue
        is_strong = abs(sentence.rating) > _LARGEST_WEAK
        is_positive = sentence.rating > 0
        label = is_strong if strength else is_positive
        texts.append(sentence.text)
        labels.append(int(label))
    return VaderSplit(texts, labels, dropped=len(sentences) - len(texts))


def _read_documents(domain: str) -> dict[str, list[_Sentence]]:
    """Read the rated sentences of a domain. Return a list for each document, by its name."""
    package = find_package(PACKAGE).check()
    ratings = _unpack(package.read_bytes())
    content = ratings[_FILES[domain]].decode("utf-8")
    documents: dict[str, list[_Sentence]] = {}
    for line in content.splitlines():
        number, rating, text = line.split("\t", 2)
        # a sentence of a review or editorial has the number "document_sentence"; any other sentence
        # is a document of its own
        document, _, _ = number.partition("_")
        sentence = _Sentence(text.strip(), float(rating))
        documents.setdefault(document, []).append(sentence)
    return documents


def _names_in_split(documents: Iterable[str], domain: str, split: str) -> list[str]:
    """Shuffle documents with a fixed seed, and return the names of those in a split."""
    names = sorted(documents)
    random.Random(derive_seed("rated split", domain)).shuffle(names)
    end_of_test = round(len(names) * _TEST_SHARE)
    end_of_dev = end_of_test + round(len(names) * _DEV_SHARE)
    names_by_split = {
        "test": names[:end_of_test],
        "dev": names[end_of_test:end_of_dev],
        "train": names[end_of_dev:],
    }
    if split not in names_by_split:
        raise DataError(f"there is no VADER split '{split}'{did_you_mean(split, names_by_split)}")
    return names_by_split[split]


@functools.lru_cache(maxsize=1)
def _unpack(archive: bytes) -> dict[str, bytes]:
    """Unpack the files with ratings from the bytes of the source package, by file name.

    The ratings are in an archive inside the package. Such an archive can only be read from its
    start, so this reads all files at once.
    """
    folder = f"{PACKAGE}-{find_package(PACKAGE).version}"
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        ratings_archive = package.extractfile(f"{folder}/{_RATINGS_ARCHIVE}")
        assert ratings_archive is not None  # noqa: S101  the checksum fixes the content
        packed_ratings = ratings_archive.read()
    contents = {}
    with tarfile.open(fileobj=io.BytesIO(packed_ratings)) as nested:
        for member in nested:
            name = Path(member.name).name
            if not member.isfile() or name not in _FILES.values():
                continue
            file = nested.extractfile(member)
            assert file is not None  # noqa: S101  a member that is a file has content
            contents[name] = file.read()
    return contents
