"""Classes by number and name: which class a word means."""

from collections.abc import Sequence

from support.system.files import UserError
from support.system.settings import suggest

LONGEST_LIST = 80  # characters of names in an error


def meanings_of(num_classes: int, names: Sequence[str]) -> dict[str, int]:
    """The class that each word means: its name or its number.

    Names only, if some name is another class's number: with folders 1, 2 and 10, class 0 is called
    1, and nobody should have to guess which 1 is meant.
    """
    numbers = {str(label): label for label in range(num_classes)}
    named = {name: label for label, name in enumerate(names)}
    is_ambiguous = any(numbers.get(name, label) != label for name, label in named.items())
    return named if is_ambiguous else numbers | named


def labels_of(
    words: Sequence[int | str], num_classes: int, names: Sequence[str], place: str
) -> list[int]:
    """The classes that words mean, by number or name; else a UserError that names `place`."""
    meanings = meanings_of(num_classes, names)
    for word in map(str, words):
        if word not in meanings:
            suggestion = suggest(word, [name for name in names if not name.isdecimal()])
            raise UserError(
                f"{place}: {word[:LONGEST_LIST]!r} is not a class; classes are "
                f"{_described(meanings, num_classes, names)}{suggestion}"
            )
    return [meanings[str(word)] for word in words]


def word_of(label: int, names: Sequence[str]) -> int | str:
    """The word for a class: its name if that is not just its number."""
    name = names[label] if names else str(label)
    return int(label) if name == str(label) else name


def _described(meanings: dict[str, int], num_classes: int, names: Sequence[str]) -> str:
    numbers, listed = f"0 to {num_classes - 1}", ", ".join(names)
    if not names or listed == ", ".join(map(str, range(num_classes))):
        return numbers
    listed = listed if len(listed) <= LONGEST_LIST else f"{listed[:LONGEST_LIST]}..."
    if len(meanings) == len(names):
        return f"{listed} (by name only: some names are other classes' numbers)"
    return f"{numbers}, or by name {listed}"
