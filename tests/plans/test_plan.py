"""Plans: which matrices, which pattern, and what is said when that cannot be."""

import json
import re

import pytest

from secateur.core.patterns import NM, Unstructured
from secateur.errors import PatternError
from secateur.plans.plan import Plan, matches
from secateur.plans.uniform import uniform

SHAPES = {
    f"model.layers.{layer}.{leaf}.weight": shape
    for layer in (0, 1, 10)
    for leaf, shape in (
        ("self_attn.q_proj", (32, 32)),
        ("self_attn.o_proj", (32, 32)),
        ("mlp.up_proj", (88, 32)),
        ("mlp.down_proj", (32, 88)),
    )
} | {"model.layers.1.mlp.experts.gate_up_proj.3": (16, 30)}
HALF = Unstructured(0.5)


def pinned(message: str) -> str:
    return f"^{re.escape(message)}$"


# Which matrices


def test_without_globs_every_matrix_in_the_order_of_the_model() -> None:
    assert list(uniform(SHAPES, HALF)) == list(SHAPES)


@pytest.mark.parametrize(
    ("only", "skip", "count"),
    [
        (["*"], [], 13),
        (["*.down_proj"], [], 3),
        (["*.down_proj.weight"], [], 3),
        (["*.down_proj", "*.up_proj.weight"], [], 6),
        (["*.down_proj", "*.down_proj*"], [], 3),
        (["model.layers.1.*"], [], 5),
        (["model.layers.1*"], [], 9),
        (["model.layers.[01].*"], [], 9),
        (["model.layers.?.mlp.*"], [], 5),
        (["*.experts.*"], [], 1),
        (["*.gate_up_proj.3"], [], 1),
        (["model.layers.0.mlp.up_proj"], [], 1),
        (["model.layers.0.mlp.up_proj.weight"], [], 1),
        ([], ["*.down_proj"], 10),
        ([], ["*.down_proj.weight"], 10),
        ([], ["*.weight"], 1),
        ([], ["model.layers.0.*", "model.layers.10.*"], 5),
        (["*_proj"], ["model.layers.0.*"], 8),
        (["model.layers.0.*"], ["*_attn.*"], 2),
    ],
)
def test_only_and_skip(only: list[str], skip: list[str], count: int) -> None:
    plan = uniform(SHAPES, HALF, only=only, skip=skip)
    assert len(plan) == count
    assert list(plan) == [name for name in SHAPES if name in plan]
    assert all(any(matches(name, glob) for glob in only) for name in plan if only)
    assert not any(matches(name, glob) for name in plan for glob in skip)


def test_skip_wins_over_only() -> None:
    plan = uniform(SHAPES, HALF, only=["*.mlp.up_proj"], skip=["model.layers.1.mlp.up_proj"])
    assert list(plan) == ["model.layers.0.mlp.up_proj.weight", "model.layers.10.mlp.up_proj.weight"]


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("model.a.weight", True),
        ("model.a", True),
        ("*.a", True),
        ("*a", True),
        ("a", False),
        ("*.A", False),
        ("model", False),
        ("", False),
        ("*.weigh", False),
    ],
)
def test_matches_whole_names_with_case(glob: str, expected: bool) -> None:
    assert matches("model.a.weight", glob) is expected


# Which pattern


def test_an_open_group_becomes_that_of_the_method() -> None:
    assert set(uniform(SHAPES, HALF).values()) == {Unstructured(0.5, "row")}
    for per in ("row", "matrix", "search"):
        assert set(uniform(SHAPES, HALF, per=per).values()) == {Unstructured(0.5, per)}
        assert set(uniform(SHAPES, Unstructured(0.5, "matrix"), per=per).values()) == {Unstructured(0.5, "matrix")}
        assert set(uniform(SHAPES, NM(2, 2), per=per).values()) == {NM(2, 2)}


def test_a_plan_is_a_mapping() -> None:
    plan = Plan({"a": NM(2, 4), "b": HALF})
    assert (plan["a"], len(plan), list(plan), "c" in plan, plan.get("c")) == (NM(2, 4), 2, ["a", "b"], False, None)
    with pytest.raises(KeyError):
        plan["c"]
    with pytest.raises(AttributeError):
        plan.patterns = {}  # type: ignore[misc]


# JSON


def test_json_round_trip_and_equality() -> None:
    plan = Plan({"a": NM(2, 4), "b": Unstructured(0.29), "c": Unstructured(0.5, "matrix")})
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert Plan.from_json(json.loads(str(plan))) == plan
    assert list(Plan.from_json(plan.to_json())) == ["a", "b", "c"]
    assert plan != Plan({"a": NM(2, 4), "b": Unstructured(0.29), "c": Unstructured(0.5, "row")})
    assert plan != Plan({"a": NM(2, 4), "b": Unstructured(0.29)})
    assert uniform(SHAPES, NM(1, 2)) == uniform(dict(reversed(SHAPES.items())), NM(1, 2))


def test_text_of_a_plan() -> None:
    assert str(Plan({"a": NM(2, 4)})) == '{\n  "a": {\n    "n": 2,\n    "m": 4\n  }\n}'


def test_json_that_is_no_plan() -> None:
    message = """a pattern is {"n": 2, "m": 4} or {"sparsity": 0.5, "per": "row"}, got '2:4'."""
    with pytest.raises(PatternError, match=pinned(message)):
        Plan.from_json({"a": "2:4"})


# Messages


@pytest.mark.parametrize("option", ["only", "skip"])
@pytest.mark.parametrize(
    ("glob", "hint"),
    [
        ("*.down_prj", ' Did you mean "*.down_proj"?'),
        ("*.mpl.*", ' Did you mean "*mlp*"?'),
        ("down_proj", ' Did you mean "*.down_proj"?'),
        ("*.layer.*", ' Did you mean "*layers*"?'),
        ("model.layers.2.mlp.up_proj.weight", ' Did you mean "model.layers.1.mlp.up_proj.weight"?'),
        ("model.layers.0.mpl.up_proj", ' Did you mean "model.layers.0.mlp.up_proj.weight"?'),
        ("xyz", ' They have names such as "model.layers.0.self_attn.q_proj.weight".'),
        ("", ' They have names such as "model.layers.0.self_attn.q_proj.weight".'),
    ],
)
def test_a_glob_that_matches_nothing(option: str, glob: str, hint: str) -> None:
    with pytest.raises(PatternError, match=pinned(f'--{option} "{glob}" matches none of 13 matrices.{hint}')):
        uniform(SHAPES, HALF, **{option: ["*.up_proj", glob]})


@pytest.mark.parametrize("glob", ["*.down_prj", "*.mpl.*", "modle", "*.expert.*", "*.layer.0.*", "self_atn", "gate_up"])
def test_what_is_suggested_matches_something(glob: str) -> None:
    with pytest.raises(PatternError) as caught:
        uniform(SHAPES, HALF, skip=[glob])
    (suggestion,) = re.findall(r'Did you mean "(.*)"\?', str(caught.value))
    assert any(matches(name, suggestion) for name in SHAPES)


def test_globs_that_leave_nothing() -> None:
    message = "nothing is left to prune: --only and --skip leave none of 13 matrices."
    with pytest.raises(PatternError, match=pinned(message)):
        uniform(SHAPES, HALF, skip=["*"])
    with pytest.raises(PatternError, match=pinned(message)):
        uniform(SHAPES, HALF, only=["*.up_proj"], skip=["*.mlp.*"])
    with pytest.raises(PatternError, match=pinned(message.replace("13", "0"))):
        uniform({}, HALF)


def test_a_pattern_that_one_matrix_cannot_hold() -> None:
    message = (
        "model.layers.1.mlp.experts.gate_up_proj.3: 2:4 needs in_features divisible by 4, got 30. "
        'Skip it with --skip "model.layers.1.mlp.experts.gate_up_proj.3" or choose an unstructured pattern.'
    )
    with pytest.raises(PatternError, match=pinned(message)):
        uniform(SHAPES, NM(2, 4))
    skip = re.findall(r'--skip "(.*?)"', message)
    assert len(uniform(SHAPES, NM(2, 4), skip=skip)) == 12


def test_check_with_a_name_that_is_not_in_the_model() -> None:
    Plan(dict.fromkeys(SHAPES, HALF)).check(SHAPES)
    message = (
        "model.layers.0.mlp.upp_proj.weight: no prunable matrix of this name in the model. "
        'Did you mean "model.layers.0.mlp.up_proj.weight"?'
    )
    with pytest.raises(PatternError, match=pinned(message)):
        Plan({"model.layers.0.mlp.upp_proj.weight": HALF}).check(SHAPES)


def test_check_asks_each_pattern() -> None:
    plan = Plan({"model.layers.0.mlp.up_proj.weight": NM(2, 4), "model.layers.0.mlp.down_proj.weight": NM(3, 5)})
    with pytest.raises(PatternError, match=r"^model\.layers\.0\.mlp\.down_proj\.weight: 3:5 needs in_features "):
        plan.check(SHAPES)
