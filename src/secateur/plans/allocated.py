"""A plan that an allocation made, with how it came about, and its file."""

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from secateur.errors import PatternError
from secateur.files.reading import read_json
from secateur.plans.plan import Plan
from secateur.shown import Shown

FORMAT = 1


@dataclass(frozen=True, repr=False)
class Allocated(Shown):
    """A plan, and how it came about: what the manifest and the file of a plan say of it.

    `record` holds the name, unit and options of the allocation, the bounds and the extremes of its sparsities, and what
    the held-out windows said: "uniform" and "plan" in nats per token, the "difference" with its standard "error", and
    whether the plan is "used". One that does not beat the uniform one is not: then `plan` is uniform.
    """

    plan: Plan
    record: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What the file of a plan holds."""
        return {"format": FORMAT, "allocation": dict(self.record), "plan": self.plan.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Allocated":
        """What `to_json` wrote. Raises `PatternError`."""
        return cls(Plan.from_json(value["plan"]), value["allocation"])


def told(record: Mapping[str, Any]) -> str:
    """What the record of an allocation says of its held-out windows, in a sentence or two; empty where it is empty."""
    if not record:
        return ""
    judged = record["held_out"]
    error = "" if judged["error"] is None else f" ± {judged['error']:.4f}"
    windows = "1 held-out window" if judged["windows"] == 1 else f"{judged['windows']} held-out windows"
    line = (
        f"Zeros were divided by {record['name']}, by {record['unit']}: {judged['difference']:+.4f}{error} nats per "
        f"token beside a uniform plan on {windows}, both pruned by Wanda."
    )
    return line if record["used"] else f"{line} The plan is not better there, so the uniform one is used."


def read_plan(file: str | PathLike[str]) -> Allocated:
    """The plan in a file of `allocate`, or in one that holds nothing but a plan. Raises `PatternError`."""
    value = read_json(Path(file).expanduser())
    if not isinstance(value, Mapping):
        raise PatternError(f"{file}: holds a {type(value).__name__}, expected the plan that secateur allocate writes.")
    if "plan" not in value:
        value = {"format": FORMAT, "allocation": {}, "plan": value}
    if value.get("format") != FORMAT or not isinstance(value["plan"], Mapping):
        raise PatternError(f"{file}: has the format {value.get('format')!r}, expected {FORMAT}: write it anew.")
    try:
        return Allocated.from_json(value)
    except PatternError as error:
        raise PatternError(f"{file}: {error}") from None
