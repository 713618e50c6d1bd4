"""The usual names of splits, as folders, files and arrays have them."""

import re

SPLITS = ("train", "validation", "test")
WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "validate": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def split_called(name: str) -> str | None:
    """Returns the split that a name means, in any case and with or without "set" behind it, or None: Train, val_set, TestSet."""
    return WORDS.get(re.sub(r"[ _.-]?(set|split)$", "", name.lower()))


def words_of(name: str) -> list[str]:
    """Returns the words in a name, in lower case: seg_train, segTrain and "seg train" hold seg and train."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def looks_like_split(name: str) -> bool:
    """True if one of the words in a name is a split's, as in seg_train, train2017 or images-test."""
    return split_called(name) is not None or any(word in WORDS for word in words_of(name))
