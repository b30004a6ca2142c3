"""From the strings of a command line to the objects that they name."""

from collections.abc import Sequence

from secateur.core.patterns import Pattern, Unstructured, parse_pattern
from secateur.core.problem import Method
from secateur.errors import PatternError
from secateur.pruning.named import method_of

__all__ = ["listed", "method_of", "methods_of", "pattern_of", "patterns_of"]


def pattern_of(sparsity: float | None, pattern: str | None, per: str | None) -> Pattern:
    """The pattern that --sparsity, --pattern and --per name together."""
    if pattern is not None:
        if sparsity is not None:
            raise PatternError(
                f"--sparsity {sparsity:g} and --pattern {pattern} were both given; "
                "the pattern sets the sparsity. Drop one."
            )
        if per is not None:
            raise PatternError(f"--per {per} has no meaning for --pattern {pattern}: N:M compares within groups of M.")
        return parse_pattern(pattern)
    return Unstructured(0.5 if sparsity is None else sparsity, per)  # type: ignore[arg-type]  # checked there


def patterns_of(sparsities: Sequence[str], patterns: Sequence[str], per: str | None) -> list[Pattern]:
    """The patterns that lists of --sparsity and --pattern name together, in this order; half the weights by default."""
    fractions = []
    for text in listed(sparsities):
        try:
            fractions.append(float(text))
        except ValueError:
            raise PatternError(f'--sparsity: got "{text}", expected numbers such as 0.5,0.6.') from None
    found = [pattern_of(fraction, None, per) for fraction in fractions]
    found += [pattern_of(None, text, None if fractions else per) for text in listed(patterns)]
    return found or [pattern_of(None, None, per)]


def methods_of(names: Sequence[str], settings: Sequence[str]) -> dict[str, Method]:
    """The methods of a list, by label: each what `method_of` takes, or LABEL=METHOD.

    `settings` are options as text, with the label before what `method_of` takes: "gblm.norm=l2".
    """
    chosen: dict[str, str] = {}
    for text in listed(names):
        label, _, name = (part.strip() for part in text.rpartition("="))
        label = label or name.replace("-", "_")
        if label in chosen:
            raise PatternError(f"--methods: {label} is named twice. Give them labels: --methods one={name},two={name}.")
        chosen[label] = name
    own: dict[str, list[str]] = {label: [] for label in chosen}
    for setting in settings:
        labels = [label for label in chosen if setting.replace("-", "_").startswith(f"{label.replace('-', '_')}.")]
        if not labels:
            raise PatternError(
                f"--option {setting}: expected METHOD.NAME=VALUE, of a method among {', '.join(chosen)}."
            )
        label = max(labels, key=len)
        own[label].append(setting[len(label) + 1 :])
    return {label: method_of(name, own[label]) for label, name in chosen.items()}


def listed(texts: Sequence[str]) -> list[str]:
    """The words of options that may be repeated, and hold several words separated by commas."""
    return [word.strip() for text in texts for word in text.split(",") if word.strip()]
