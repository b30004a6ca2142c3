"""Presets: names for what to do when somebody says what matters, and no more. Nothing heavy is imported."""

from collections.abc import Mapping
from typing import Any

from secateur.errors import PatternError

PRESETS: dict[str, dict[str, str]] = {
    "fast": {"method": "wanda", "within": "site"},
    "exact": {"method": "wanda", "within": "site", "allocation": "sensitivity"},
    "best": {
        "method": "alps",
        "per": "row",
        "within": "site",
        "targets": "residual",
        "allocation": "sensitivity",
    },
}
_UNSTRUCTURED = ("per", "allocation")  # what is said of unstructured sparsity alone


def preset_options(keywords: Mapping[str, Any]) -> dict[str, str]:
    """The options that the preset among these keyword arguments stands for; none where there is no such preset.

    An N:M pattern stays what it is in every matrix: kernels want that. A plan, a pattern for each glob and a comparison
    group that is part of a pattern say already where zeros lie.
    """
    options = dict(PRESETS.get(str(keywords.get("preset")), {}))
    pattern = keywords.get("pattern")
    simple = pattern is None or isinstance(pattern, float) or (isinstance(pattern, str) and ":" not in pattern)
    if keywords.get("plan") is not None or not simple:
        options = {name: value for name, value in options.items() if name not in _UNSTRUCTURED}
    return options


def with_preset(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments with the options that their preset stands for. Raises `PatternError` for one that differs."""
    options = preset_options(keywords)
    for name, value in options.items():
        given = keywords.get(name, value)
        if given not in (value, None):
            raise PatternError(
                f"--{name} {given}: --preset {keywords['preset']} says {value}. Drop one of the two; what a preset "
                f"stands for can be written out: {spelled(options)}"
            )
    return {**keywords, **options}


def spelled(options: Mapping[str, str]) -> str:
    """Options as a command line has them."""
    return " ".join(f"--{name} {value}" for name, value in options.items())
