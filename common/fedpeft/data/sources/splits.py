"""Names of splits: a train and a test part of one data set are never two clients, two classes, or one data set."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_WORDS = {
    "train": ("train", "training", "trainset", "trainval", "trn"),
    "test": ("test", "testing", "testset", "tst", "eval", "evaluation", "evalset", "holdout", "heldout"),
    "validation": ("val", "valid", "validation", "validating", "valset", "minival", "dev", "devset", "development"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_TWO_WORDS = re.compile(r"(hold|held)[-_ .]?out")


def split_of(name: str) -> str | None:
    """Returns the split that a file's or folder's name begins with: train, test or validation; None if it is none.

    `train`, `Test`, `VAL`, `train-00000-of-00001.parquet`, `test_clean`, `hold-out` and `train2017` are.
    """
    words = _words(name)
    return _SPLIT_OF.get(words[0]) if words else None


def split_called(name: str) -> str | None:
    """Returns the split whose name this is and nothing else, but for figures: `Train`, `test2`; None if it is none."""
    words = _words(name)
    return _SPLIT_OF.get(words[0]) if len(words) == 1 else None


def splits_among(names: Iterable[str]) -> dict[str, str]:
    """Returns those of some names side by side that are named like a split, and the split, in their order.

    A split's word counts anywhere in a name if another name has that of another split: `photos_train`, `photos_test`.
    """
    given = list(names)
    anywhere = {name: found for name in given if (found := _anywhere(name))}
    if len(set(anywhere.values())) > 1:
        return anywhere
    return {name: split for name in given if (split := split_of(name))}


def one_to_train_on(splits: Mapping[str, str]) -> str:
    """Returns the name among those of splits that a person most likely means: that of the training part."""
    return next((name for name, split in splits.items() if split == "train"), next(iter(splits)))


def _anywhere(name: str) -> str | None:
    return next((split for word in _words(name) if (split := _SPLIT_OF.get(word))), None)


def _words(name: str) -> list[str]:
    joined = _TWO_WORDS.sub(r"\1out", name.lower())
    return [word for word in re.split(r"[^a-z]+", joined) if word]
