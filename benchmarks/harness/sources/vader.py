"""Load human sentiment ratings of four domains from the source package of vaderSentiment.

Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014:
twenty raters a sentence, mean rating from -4 to 4.
"""

from __future__ import annotations

import functools
import io
import random
import tarfile
from pathlib import Path

from benchmarks.harness.base import DataError, derive_seed
from benchmarks.harness.sources.packages import find_package
from emoe.errors import did_you_mean

PACKAGE = "vaderSentiment"

_INNER = (
    "additional_resources/hutto_ICWSM_2014.tar.gz"  # in the folder of the package and its version
)
_FILES = {
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
_NEUTRAL, _STRONG = 0.5, 1.5
_TEST_SHARE, _DEV_SHARE = 0.25, 0.15


def load_vader(
    domain: str, split: str, *, strength: bool = False
) -> tuple[list[str], list[int], int]:
    """Load the sentences of one split, in a fixed shuffled order.

    Near-neutral sentences (absolute rating of at most 0.5) are dropped; the label is the sign
    (negative 0, positive 1). Splits are by document, so that no review or editorial has sentences on
    both sides; they are the same for every seed.

    Args:
        domain: The domain: ``amazon``, ``movie``, ``nyt`` or ``tweets``.
        split: The split: ``train`` (60 % of the documents), ``dev`` (15 %) or ``test`` (25 %).
        strength: True to label by strength instead of sign: weak 0, strong (absolute rating above 1.5) 1.

    Returns:
        Texts, labels, and the number of dropped near-neutral sentences of the split.

    Raises:
        DataError: The domain is unknown, or the archive is missing or damaged.
    """
    if domain not in _FILES:
        raise DataError(f"there is no VADER domain '{domain}'{did_you_mean(domain, _FILES)}")
    documents: dict[str, list[tuple[str, float]]] = {}
    ratings = _unpack(find_package(PACKAGE).check().read_bytes())
    for line in ratings[_FILES[domain]].decode("latin-1").splitlines():
        key, rating, text = line.split("\t", 2)
        # reviews and editorials are numbered "document_sentence", the rest by sentence
        documents.setdefault(key.split("_")[0], []).append((text.strip(), float(rating)))
    names = sorted(documents)
    random.Random(derive_seed("rated split", domain)).shuffle(names)
    test, dev = round(len(names) * _TEST_SHARE), round(len(names) * _DEV_SHARE)
    chosen = {"test": names[:test], "dev": names[test : test + dev], "train": names[test + dev :]}[
        split
    ]
    rows = [row for name in chosen for row in documents[name]]
    random.Random(derive_seed("rated order", domain, split)).shuffle(rows)
    clear = [
        (text, abs(rating) > _STRONG if strength else rating > 0)
        for text, rating in rows
        if abs(rating) > _NEUTRAL
    ]
    return [text for text, _ in clear], [int(label) for _, label in clear], len(rows) - len(clear)


@functools.lru_cache(maxsize=1)
def _unpack(archive: bytes) -> dict[str, bytes]:
    """Unpack all files with ratings at once, because a packed archive can only be read from its start."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        inner = outer.extractfile(f"{PACKAGE}-{find_package(PACKAGE).version}/{_INNER}")
        assert inner is not None  # noqa: S101  the checksum fixes the content
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as nested:
            files = [
                (Path(member.name).name, nested.extractfile(member))
                for member in nested
                if member.isfile()
            ]
            return {name: file.read() for name, file in files if file and name in _FILES.values()}
