"""From labels, as people write them, to the numbers of a model's classes."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from secateur.calibration.labels import Label
from secateur.errors import CalibrationError

SHOWN = 5  # names of classes that a message has
_SYNSET = re.compile(r"n\d{8}")


def class_numbers(model: Any, labels: Sequence[Label]) -> list[int]:
    """The number of each label's class.

    A label is the name of a class in the model's `id2label`, in any case and with _ for spaces; one of several names
    with commas between them, where no other class has it; or the number of the class. Of ImageNet, folders named by
    synsets (n01440764) are the classes in their order, where all are there.

    Raises `CalibrationError` for other labels.
    """
    names = {int(number): str(name) for number, name in model.config.id2label.items()}
    known = _known(names)
    written = sorted({label.value for label in labels})
    if len(written) == len(names) and all(map(_SYNSET.fullmatch, written)):
        known = {value: number for number, value in enumerate(written)} | known
    found = []
    for label in labels:
        key = _plain(label.value)
        number = known.get(key, int(key) if key.isascii() and key.isdecimal() else None)
        if number not in names:
            raise _unknown(type(model).__name__, label, names)
        found.append(number)
    return found


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _known(names: Mapping[int, str]) -> dict[str, int]:
    """The classes by their names; whole ones before those that are only part of one."""
    whole = {_plain(name): number for number, name in names.items()}
    parts = [(_plain(part), number) for number, name in names.items() for part in name.split(",")]
    count = Counter(part for part, _ in parts)
    return {part: number for part, number in parts if count[part] == 1} | whole


def _unknown(kind: str, label: Label, names: Mapping[int, str]) -> CalibrationError:
    shown = ", ".join(f'"{name}"' for name in list(names.values())[:SHOWN])
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    nearest = get_close_matches(label.value, names.values(), n=1)
    hint = f' Did you mean "{nearest[0]}"?' if nearest else ""
    return CalibrationError(
        f'{label.where}: has the label "{label.value}", and {kind} knows {len(names):,} classes: {shown}{more}.{hint} '
        f"Label it with one of these names, or with a number from {min(names)} to {max(names)}."
    )
