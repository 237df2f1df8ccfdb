"""Recipes: every clause of the language, resolved against layers that exist only by name, kind and shape."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import cast

import pytest
from layers import found

from convtool.core.tree import Chain, LayerRef, Sum, Tree
from convtool.errors import InputError, UsageError
from convtool.formats.toml import parse_toml
from convtool.fusing.recipe import Known, parse_recipe, resolve
from convtool.fusing.recipe.pattern import Effort, Names, parse_pattern
from convtool.fusing.shipped import shipped
from convtool.kinds.kind import Layer
from convtool.kinds.stated import parse_tables
from convtool.kinds.written import make_written

CONV = found("conv", (8, 4, 3, 5))
POINT = found("conv", (8, 4, 1, 1))
NORM = found("batch_norm")
LINEAR = found("linear", (6, 10))
SCALE = found("scale")


def known(
    base: Mapping[str, Layer],
    fields: Mapping[str, dict[str, object]] | None = None,
    **others: Mapping[str, Layer],
) -> Known:
    """Layers of the checkpoint and of others, and stated fields."""
    return Known({"": base, **others}, lambda name: dict((fields or {}).get(name, {})))


def shown(tree: Tree[LayerRef]) -> str:
    """A resolved tree as 'a + b' for a chain and '(a | b)' for a sum."""
    if isinstance(tree, Chain):
        return " + ".join(shown(part) for part in tree.parts)
    if isinstance(tree, Sum):
        return f"({' | '.join(shown(part) for part in tree.parts)})"
    return f"{tree}~{tree.like}" if tree.like else str(tree)


def fusions(text: str, layers: Known) -> dict[str, str]:
    """What a recipe in TOML makes of the layers, by name."""
    return {one.name: shown(one.tree) for one in resolve(parse_recipe(tomllib.loads(text), "r.toml"), layers)}


def refused(text: str, layers: Known | None = None) -> str:
    """The message of the error that a recipe, or what it makes of the layers, gives."""
    with pytest.raises(UsageError) as caught:
        fusions(text, layers or known({}))
    message = str(caught.value)
    assert message.startswith("r.toml: ")
    assert "\n" not in message
    return message.removeprefix("r.toml: ")


# --- variables


PAIR = 'fuse = [{ name = "{block}.conv", chain = ["{block}.conv", "{block}.bn"] }]'


def test_a_variable_stands_for_whole_components_and_gives_one_fusion_for_each_value() -> None:
    layers = {"stem.conv": CONV, "stem.bn": NORM, "stages.0.1.conv": CONV, "stages.0.1.bn": NORM, "head": LINEAR}
    assert fusions(PAIR, known(layers)) == {
        "stem.conv": "stem.conv + stem.bn",
        "stages.0.1.conv": "stages.0.1.conv + stages.0.1.bn",
    }


def test_a_variable_between_dots_is_not_empty_and_one_before_text_may_be() -> None:
    layers = known({"conv1": CONV, "bn1": NORM, "layer1.0.conv1": CONV, "layer1.0.bn1": NORM})
    assert "fits no layer" in refused(PAIR, known({"conv": CONV, "bn": NORM}))
    text = 'fuse = [{ name = "{path}conv1", chain = ["{path}conv1", "{path}bn1"] }]'
    assert fusions(text, layers) == {"conv1": "conv1 + bn1", "layer1.0.conv1": "layer1.0.conv1 + layer1.0.bn1"}


def test_a_variable_before_text_takes_whole_components_only() -> None:
    text = 'fuse = [{ name = "{path}conv1", chain = ["{path}conv1", "{path}bn1"] }]'
    assert "fits no layer" in refused(text, known({"myconv1": CONV, "mybn1": NORM}))


def test_a_variable_behind_text_stands_for_the_rest_of_the_component() -> None:
    text = 'fuse = [{ name = "{path}conv{i}", chain = ["{path}conv{i}", "{path}bn{i}"] }]'
    layers = {"conv": CONV, "bn": NORM, "a.conv2": CONV, "a.bn2": NORM, "a.conv_x": CONV, "a.bn_x": NORM}
    assert fusions(text, known(layers)) == {
        "conv": "conv + bn",
        "a.conv2": "a.conv2 + a.bn2",
        "a.conv_x": "a.conv_x + a.bn_x",
    }
    assert "fits no layer" in refused(text, known({"a.convs.1": CONV, "a.bns.1": NORM}))


def test_several_variables() -> None:
    text = 'fuse = [{ name = "{a}.x.{b}.c", chain = ["{a}.x.{b}.c", "{b}.y.{a}.n"] }]'
    layers = known({"p.x.q.c": CONV, "q.y.p.n": NORM})
    assert fusions(text, layers) == {"p.x.q.c": "p.x.q.c + q.y.p.n"}


def test_the_next_number() -> None:
    text = 'fuse = [{ name = "{p}{i}", chain = ["{p}{i}@conv", "{p}{i+1}@batch_norm"] }]'
    layers = {"0": CONV, "1": NORM, "f.9": CONV, "f.10": NORM, "f.12.0": CONV, "f.12.1": NORM}
    assert fusions(text, known(layers)) == {
        "0": "0 + 1",
        "f.9": "f.9 + f.10",
        "f.12.0": "f.12.0 + f.12.1",
    }


def test_a_number_before_the_first_is_none() -> None:
    text = 'fuse = [{ name = "{p}{i}", chain = ["{p}{i}@conv", "{p}{i+1}!@batch_norm"] }]'
    assert "fits no layer" in refused(text, known({"f.0": NORM, "f.1": CONV}))


# --- *, ?, ! and @


BRANCHES = """
[[fuse]]
name = "{block}.out"
sum = [
  ["{block}.many.*.conv", "{block}.many.*.bn"],
  ["{block}.one.conv?", "{block}.one.bn?"],
  ["{block}.same?"],
]
"""


def test_a_star_gives_one_branch_for_each_component_in_the_order_of_numbers() -> None:
    names = [f"b.many.{number}.{part}" for number in (10, 9, 0) for part in ("conv", "bn")]
    layers = {name: CONV if name.endswith("conv") else NORM for name in names} | {"b.same": NORM}
    branches = [f"b.many.{number}.conv + b.many.{number}.bn" for number in (0, 9, 10)]
    assert fusions(BRANCHES, known(layers)) == {"b.out": f"({' | '.join([*branches, 'b.same'])})"}


def test_optional_branches_are_there_where_a_block_has_them() -> None:
    def block(name: str, *more: str) -> dict[str, Layer]:
        own = [f"{name}.many.0.conv", f"{name}.many.0.bn", *more]
        return {layer: NORM if layer.endswith(("bn", "same")) else CONV for layer in own}

    layers = block("a") | block("b", "b.one.conv", "b.one.bn") | block("c", "c.same")
    assert fusions(BRANCHES, known(layers)) == {
        "a.out": "(a.many.0.conv + a.many.0.bn)",
        "b.out": "(b.many.0.conv + b.many.0.bn | b.one.conv + b.one.bn)",
        "c.out": "(c.many.0.conv + c.many.0.bn | c.same)",
    }


def test_a_branch_that_is_only_partly_there_is_an_error() -> None:
    layers = {"b.many.0.conv": CONV, "b.many.0.bn": NORM}
    text = BRANCHES.replace("one.bn?", "one.bn")
    message = refused(text, known({**layers, "b.one.conv": CONV}))
    assert message == "[{block}.one.conv?, {block}.one.bn] (block = 'b') is only partly there: {block}.one.bn is not"
    message = refused(BRANCHES, known({**layers, "b.many.1.conv": CONV}))
    assert message.endswith("(block = 'b', * = '1') is only partly there: {block}.many.*.bn is not")


def test_a_branch_without_layers_that_is_not_optional_is_an_error() -> None:
    assert "[{block}.many.*.conv, {block}.many.*.bn] (block = 'b') fits no layer" in refused(
        BRANCHES, known({"b.same": NORM})
    )


def test_an_optional_layer_inside_of_a_chain_is_left_out_alone() -> None:
    text = 'fuse = [{ name = "{b}.a", chain = ["{b}.a", "{b}.mid?", "{b}.z"] }]'
    layers = {"p.a": CONV, "p.z": CONV, "q.a": CONV, "q.mid": CONV, "q.z": CONV}
    assert fusions(text, known(layers)) == {"p.a": "p.a + p.z", "q.a": "q.a + q.mid + q.z"}


def test_a_star_in_a_chain_has_room_for_one_only() -> None:
    text = 'fuse = [{ name = "{b}.out", chain = ["{b}.x.*", "{b}.z"] }]'
    assert fusions(text, known({"p.x.5": CONV, "p.z": NORM})) == {"p.out": "p.x.5 + p.z"}
    message = refused(text, known({"p.x.5": CONV, "p.x.6": CONV, "p.z": NORM}))
    assert "[{b}.x.*, {b}.z]: * fits several layers, which only a sum has room for" in message


def test_a_star_is_one_component() -> None:
    text = 'fuse = [{ name = "out", sum = ["x.*.c"] }]'
    assert fusions(text, known({"x.1.c": CONV, "x.1.2.c": CONV, "x.c": CONV})) == {"out": "(x.1.c)"}


def test_kinds_tell_layers_of_one_name_pattern_apart() -> None:
    text = 'fuse = [{ name = "{p}.out", chain = ["{p}.0@conv", "{p}.1@batch_norm"] }]'
    layers = {"a.0": CONV, "a.1": NORM, "b.0": LINEAR, "b.1": LINEAR, "c.0": SCALE}
    assert fusions(text, known(layers)) == {"a.out": "a.0 + a.1"}
    assert "(p = 'a') is only partly there: {p}.1@batch_norm is not" in refused(
        text, known({"a.0": CONV, "a.1": LINEAR})
    )


def test_an_anchor_says_what_is_asked_for() -> None:
    marked = PAIR.replace("{block}.bn", "{block}.bn!")
    layers = {"a.conv": CONV, "a.bn": NORM, "b.conv": CONV}
    assert fusions(marked, known(layers)) == {"a.conv": "a.conv + a.bn"}
    assert "only partly there" in refused(PAIR, known(layers))
    assert "(block = 'c') is only partly there: {block}.conv is not" in refused(marked, known({"c.bn": NORM}))


def test_conditions_on_the_values_of_variables() -> None:
    text = PAIR.replace("chain", 'where = ["{block}.yes"], unless = ["{block}.*.no@conv"], chain')
    layers = {f"{name}.{part}": CONV if part == "conv" else NORM for name in "abcd" for part in ("conv", "bn")}
    more = {"a.yes": NORM, "b.yes": NORM, "b.x.no": CONV, "c.x.no": CONV, "d.yes": CONV, "d.x.no": NORM}
    assert set(fusions(text, known(layers | more))) == {"a.conv", "d.conv"}


# --- nesting, scale, like, and what layers without tensors ask


def test_sums_inside_of_chains_inside_of_sums() -> None:
    text = """
    [[fuse]]
    name = "{b}.out"
    sum = [
      ["{b}.first", { sum = ["{b}.left", ["{b}.right", "{b}.more"], "identity()"] }, "{b}.last"],
      { chain = ["{b}.scaled"], scale = 0.5 },
      { sum = ["{b}.u", "{b}.v"], scale = -2 },
      "{b}.bare",
    ]
    """
    layers = {f"x.{name}": CONV for name in ("first", "left", "right", "more", "last", "scaled", "u", "v", "bare")}
    assert fusions(text, known(layers)) == {
        "x.out": "(x.first + (x.left | x.right + x.more | identity()) + x.last"
        " | x.scaled + scale(0.5) | (x.u | x.v) + scale(-2.0) | x.bare)"
    }


def test_a_scaled_branch_of_optional_layers_goes_with_them() -> None:
    text = """
    [[fuse]]
    name = "{b}.out"
    sum = ["{b}.a", { chain = ["{b}.c?"], scale = 0.5 }, [{ chain = ["{b}.d?"], scale = 3 }, "{b}.e?"]]
    """
    assert fusions(text, known({"x.a": CONV})) == {"x.out": "(x.a)"}
    assert fusions(text, known({"x.a": CONV, "x.e": CONV})) == {"x.out": "(x.a | x.e)"}


def test_a_whole_rule_may_be_scaled() -> None:
    text = 'fuse = [{ name = "out", sum = ["a", "b"], scale = 0.25 }]'
    assert fusions(text, known({"a": CONV, "b": CONV})) == {"out": "(a | b) + scale(0.25)"}


def test_a_rule_for_blocks_that_keep_their_shape() -> None:
    text = """
    fuse = [
      { name = "{b}", same_shape = true, sum = ["{b}!@conv", "identity()"] },
      { name = "{b}", rest = true, chain = ["{b}!"] },
    ]
    """
    square = found("conv", (8, 8, 3, 3))
    stated: dict[str, object] = {"groups": 1, "stride": 1}
    layers = {"wide": CONV, "kept": square, "halved": square, "flat": LINEAR}
    halved: dict[str, object] = {"groups": 1, "stride": [1, 2]}
    assert fusions(text, known(layers, {"wide": {"groups": 1}, "kept": stated, "halved": halved})) == {
        "wide": "wide",
        "kept": "(kept | identity())",
        "halved": "halved",
        "flat": "flat",
    }
    for field in ("groups", "stride"):
        lacking = {name: value for name, value in stated.items() if name != field}
        assert f"{field} of kept" in refused(text, known({"kept": square}, {"kept": lacking}))


def test_a_layer_like_another_one() -> None:
    text = 'fuse = [{ name = "{b}.o", sum = ["{b}.k", { layer = "{b}.p?", like = "{b}.k" }] }]'
    assert fusions(text, known({"x.k": CONV, "x.p": POINT, "y.k": CONV})) == {
        "x.o": "(x.k | x.p~x.k)",
        "y.o": "(y.k)",
    }
    message = refused(text.replace('"{b}.k" }', '"{b}.z" }'), known({"x.k": CONV, "x.p": POINT}))
    assert "like = '{b}.z' (b = 'x') fits 0 layers, expected one" in message


def test_layers_without_tensors_ask_for_kernels_and_strides() -> None:
    text = """
    [[fuse]]
    name = "{b}.o"
    chain = ["pad(half({b}.c))", "avg_pool(kernel({b}.c); stride=stride({b}.c))", "{b}.c", "{b}.n"]
    """
    layers = {"x.c": CONV, "x.n": NORM}
    assert "stride of x.c. To state it" in refused(text, known(layers))  # nobody knows
    one = fusions(text, known(layers, fields={"x.c": {"stride": 1}}))
    assert one == {"x.o": "pad(1,2) + avg_pool(3,5; stride=1) + x.c + x.n"}
    strided = fusions(text, known(layers, fields={"x.c": {"stride": [2, 3]}}))
    assert strided == {"x.o": "pad(1,2) + avg_pool(3,5; stride=2,3) + x.c + x.n"}
    assert "there is no convolution x.z" in refused(text.replace("half({b}.c)", "half({b}.z)"), known(layers))


# --- whole recipes


def test_fusions_stand_in_the_order_of_the_checkpoint() -> None:
    text = """
    fuse = [
      { name = "late", chain = ["z", "y"] },
      { name = "early", sum = ["lora:a", "b"] },
    ]
    """
    layers = known({"b": CONV, "y": CONV, "z": CONV}, lora={"a": CONV})
    assert list(fusions(text, layers)) == ["early", "late"]


def test_a_recipe_that_fits_nothing_is_an_error() -> None:
    layers = known({"q.conv": CONV, "head": LINEAR})
    assert refused('fuse = [{ name = "x", chain = ["a", "b"] }]', layers) == "[a, b] fits no layer"
    optional = 'fuse = [{ name = "x", chain = ["a", "b"], optional = true }]'
    with pytest.raises(UsageError, match=r"^r\.toml fits no layer$"):
        fusions(optional, layers)


def test_an_optional_rule_may_fit_nothing_beside_one_that_does() -> None:
    text = """
    fuse = [
      { name = "x", chain = ["a", "b"], optional = true },
      { name = "y", chain = ["c", "d"] },
    ]
    """
    assert fusions(text, known({"c": CONV, "d": NORM})) == {"y": "c + d"}


def test_two_fusions_cannot_claim_one_layer() -> None:
    text = """
    fuse = [
      { name = "x", chain = ["a", "b"] },
      { name = "y", chain = ["b", "c"] },
    ]
    """
    message = refused(text, known({"a": CONV, "b": CONV, "c": CONV}))
    assert message == "b is claimed by x and y; a layer can go into one fusion only once"
    twice = refused('fuse = [{ name = "x", chain = ["a", "a"] }]', known({"a": CONV}))
    assert twice == "a is claimed by x, twice; a layer can go into one fusion only once"


def test_a_layer_of_another_checkpoint_is_not_that_of_the_same_name_here() -> None:
    text = 'fuse = [{ name = "a", sum = ["a", "lora:a"] }]'
    assert fusions(text, known({"a": CONV}, lora={"a": CONV})) == {"a": "(a | lora:a)"}


def test_two_fusions_cannot_have_one_name() -> None:
    text = 'fuse = [{ name = "x", chain = ["{p}.a", "{p}.b"] }]'
    layers = known({"p.a": CONV, "p.b": NORM, "q.a": CONV, "q.b": NORM})
    assert refused(text, layers) == "two fusions would both be called x"


def test_a_checkpoint_that_was_not_given() -> None:
    text = 'fuse = [{ name = "a", sum = ["a", "lora:a"] }]'
    assert "lora:a: no checkpoint of that name; give one with --with lora=FILE" in refused(text, known({"a": CONV}))


def test_layers_in_another_order_than_the_models() -> None:
    text = PAIR.replace("chain", "in_order = true, chain")
    backwards = {"a.bn": NORM, "a.conv": CONV}
    message = refused(text, Known({"": backwards}, ordered=True))
    assert message.startswith("a.bn stands before a.conv in the checkpoint or the model's code")
    assert list(fusions(text, Known({"": backwards}))) == ["a.conv"]  # a file that sorts its tensors
    assert list(fusions(PAIR, Known({"": backwards}, ordered=True))) == ["a.conv"]
    assert list(fusions(text, Known({"": dict(reversed(backwards.items()))}, ordered=True))) == ["a.conv"]


def test_geometry_goes_by_pattern() -> None:
    recipe = parse_recipe(tomllib.loads(PAIR + '\n[geometry]\n"*.conv" = { padding = "half", stride = 2 }'), "r.toml")
    assert recipe.geometry.fields("x.y.conv") == {"padding": "half", "stride": 2}
    assert recipe.geometry.fields("x.y.bn") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected at least one [[fuse]] table"),
        ("fuse = []", "expected at least one [[fuse]] table"),
        ("fuse = 3", "expected at least one [[fuse]] table"),
        ("fuse = [3]", "[[fuse]] 1: expected a table"),
        ("extra = 1", "unknown key 'extra'; expected [[fuse]] tables and [geometry]"),
        ('geometry = 1\nfuse = [{ name = "x", chain = ["a"] }]', "geometry: expected a table"),
        ('fuse = [{ name = "x", chain = ["a"] }]\n[geometry]\na = { strid = 2 }', "a: unknown field 'strid'"),
        ('fuse = [{ name = "x", chian = ["a"] }]', "unknown key 'chian'; expected name, chain, sum or stack"),
        ('fuse = [{ chain = ["a"] }]', "[[fuse]] 1: expected name = the fused layer's name"),
        ('fuse = [{ name = 4, chain = ["a"] }]', 'a name that is a number is written in quotes: "4"'),
        ('fuse = [{ name = "n", chain = ["a", 0.1] }]', 'a name that is a number is written in quotes: "0.1"'),
        ('fuse = [{ name = "x" }]', "[[fuse]] 1: expected a table with chain, sum or stack"),
        ('fuse = [{ name = "x", chain = ["a"], sum = ["b"] }]', "expected a table with chain, sum or stack"),
        ('fuse = [{ name = "x", chain = "a" }]', "chain: expected a list of layers or branches"),
        ('fuse = [{ name = "x", sum = [] }]', "sum: expected a list of layers or branches"),
        ('fuse = [{ name = "x", sum = [[]] }]', "expected at least one layer in each chain"),
        ('fuse = [{ name = "x", sum = [3] }]', "expected a layer, a list or a table, got 3"),
        ('fuse = [{ name = "x", sum = [{ scale = 2 }] }]', "expected a table with chain, sum or stack, and perhaps"),
        ('fuse = [{ name = "x", sum = [{ chain = ["a"], weight = 2 }] }]', "expected a table with chain, sum or stack"),
        ('fuse = [{ name = "x", sum = [{ chain = ["a"], scale = "2" }] }]', "scale: expected a finite number, got '2'"),
        ('fuse = [{ name = "x", sum = [{ chain = ["a"], scale = true }] }]', "expected a finite number, got True"),
        ('fuse = [{ name = "x", chain = ["a"], optional = 1 }]', "optional: expected true or false"),
        ('fuse = [{ name = "x", chain = ["a"], in_order = "yes" }]', "in_order: expected true or false"),
        ('fuse = [{ name = "x", chain = ["a"], where = "a" }]', "where: expected a list of patterns"),
        ('fuse = [{ name = "x", chain = [{ layer = "a", liek = "b" }] }]', "expected { layer = PATTERN, like"),
        ('fuse = [{ name = "x", chain = [""] }]', "an empty name"),
        ('fuse = [{ name = "x", chain = ["lora:"] }]', "expected the name of a layer, got 'lora:'"),
        ('fuse = [{ name = "x", chain = ["a@pool"] }]', "a@pool: expected a kind of conv, linear, batch_norm, scale"),
        ('fuse = [{ name = "x", chain = ["a?!"] }]', "a?!: expected one ? or ! at most"),
        ('fuse = [{ name = "x", chain = ["{a.b"] }]', "{a.b: expected variables as {block}"),
        ('fuse = [{ name = "x", chain = ["{a-1}.b"] }]', "{a-1}.b: expected variables as {block}"),
        ('fuse = [{ name = "{y}", chain = ["{x}.b"] }]', "'{y}': {y} is bound by none of the rule's layers"),
        ('fuse = [{ name = "x", chain = ["{a}.b", "{c}.d"] }]', "expected a layer that holds all of a, c"),
        ('fuse = [{ name = "x", chain = ["{a}.{c}", "{c}.d!"] }]', "expected a layer that holds all of a, c"),
        ('fuse = [{ name = "x", chain = ["{a}.b"], unless = ["{z}.b"] }]', "{z} is bound by none of the rule's layers"),
        ('fuse = [{ name = "x", chain = ["identity()"] }]', "expected the name of a layer"),
    ],
)  # fmt: skip
def test_a_malformed_recipe_says_where_and_what_was_expected(text: str, message: str) -> None:
    assert message in refused(text)


def test_a_layer_shared_by_the_branches_of_a_star_is_claimed_twice() -> None:
    text = 'fuse = [{ name = "{b}.o", sum = ["{b}.d!", ["{b}.x.*.c", "{b}.y"]] }]'
    layers = {"p.d": CONV, "p.x.1.c": CONV, "p.x.2.c": CONV, "p.y": NORM}
    assert fusions(text.replace(', "{b}.y"', ""), known(layers)) == {"p.o": "(p.d | p.x.1.c | p.x.2.c)"}
    assert "p.y is claimed by p.o, twice" in refused(text, known(layers))


def test_a_pattern_that_fits_several_layers_is_an_error() -> None:
    text = 'fuse = [{ name = "{b}.o", chain = ["{b}.d!", { layer = "{b}.e", like = "{b}.x.*" }] }]'
    layers = {"p.d": CONV, "p.e": CONV, "p.x.1": CONV, "p.x.2": CONV}
    assert "like = '{b}.x.*' (b = 'p') fits 2 layers, expected one" in refused(text, known(layers))


# --- recipes that nobody means


def pattern(text: str) -> dict[str, object]:
    return {"fuse": [{"name": "x", "chain": [text, "head"]}]}


def nested(depth: int) -> object:
    inner: object = "a"
    for _ in range(depth):
        inner = [inner]
    return {"fuse": [{"name": "x", "chain": [inner]}]}


def scaled(factor: object) -> dict[str, object]:
    return {"fuse": [{"name": "x", "sum": [{"chain": ["head"], "scale": factor}]}]}


def named(name: str) -> dict[str, object]:
    return {"fuse": [{"name": name, "chain": ["{a}.conv0"]}]}


ABSURD: dict[str, tuple[object, str]] = {
    "thousands of stars": (pattern("*" * 5000), "***...: expected at most 1000 characters, got 5000"),
    "nearly as many stars as there may be": (pattern("*" * 997), "fits no layer"),
    "stars and dots": (pattern("*." * 499 + "*"), "fits no layer"),
    "a variable twice": (pattern("{block}{block}"), "fits no layer"),
    "variables in a row": (pattern("".join(f"{{v{i}}}" for i in range(100))), "in too many ways to try"),
    "variables with dots": (pattern(".".join(f"{{{v}}}" for v in "abcdefghijklmnop")), "in too many ways to try"),
    "variables within a component": (pattern("".join(f"c{{v{i}}}" for i in range(30))), "in too many ways to try"),
    "rules without end": (
        {"fuse": [{"name": "x", "chain": ["{p}{i}.x@linear", "b"], "optional": True}] * 3000},
        "in too many ways to try",
    ),
    "lists in lists": (nested(100), "lists and tables more than 32 deep"),
    "more lists than Python can follow": (nested(100_000), "lists and tables more than 32 deep"),
    "a layer without end": ({"fuse": [{"name": "x", "chain": ["a?"] * 10**5}]}, "100000 layers in one fusion"),
    "a huge number": (scaled(10**400), "scale: expected a finite number, got 1000"),
    "a number of thousands of digits": (scaled(10**5000), "got a number of thousands of digits"),
    "nan": (scaled(float("nan")), "scale: expected a finite number, got nan"),
    "infinity": (scaled(float("inf")), "scale: expected a finite number, got inf"),
    "a large shift": (pattern("{i}.{i+99999999999}"), "expected variables as {block} or {i+1}"),
    "a digit as a variable": (pattern("{0}"), "expected variables as {block} or {i+1}"),
    "a variable that is none": (pattern("{_star}.*"), "expected variables as {block} or {i+1}"),
    "an unknown form": (pattern("{a|upper}"), "expected variables as {block} or {i+1}"),
    "a size": (
        {"fuse": [{"name": "x", "chain": ["head"], "input_size": [3, 2**40]}]},
        "input_size: expected sizes from 1 to 2147483647 such as [3, 32, 32], got [3, 1099511627776]",
    ),
    "a NUL": (named("{a}.\0"), "'{a}.\\x00': expected a name without control characters"),
    "an escape": (pattern("a\x1b[31m"), "'a\\x1b[31m': expected a name without control characters"),
    "a line break": (pattern("a\nb"), "'a\\nb': expected a name without control characters"),
    "a star in the name": (named("{a}.*"), "* stands for several; expected a name for one layer"),
    "a function of what is unbound": (
        {"fuse": [{"name": "x", "chain": ["head", "scale({b})"]}]},
        "'scale({b})': {b} is bound by none",
    ),
    "geometry like that of what is unbound": (
        {"fuse": [{"name": "x", "chain": [{"layer": "head", "like": "{b}"}]}]},
        "{b} is bound by none of the rule's layers",
    ),
}


@pytest.fixture(scope="module")
def many() -> Known:
    """Layers of a large network, and some whose names nobody would give."""
    ordinary = {f"stage{i}.{j}.conv{k}": CONV for i in range(10) for j in range(12) for k in range(10)}
    strange = [".".join("a" * 3000), "a" * 9_999, "." * 19_999, "c" * 200, "7" * 5000, "\u00b2.x"]
    return known({**ordinary, **dict.fromkeys(strange, CONV), "head": LINEAR})


@pytest.mark.parametrize("case", ABSURD)
def test_an_absurd_recipe_is_refused_in_a_line(case: str, many: Known) -> None:
    document, message = ABSURD[case]
    with pytest.raises(UsageError) as caught:
        resolve(parse_recipe(cast(dict[str, object], document), "r.toml"), many)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()


def test_how_long_matching_may_take_is_counted_before_it_starts() -> None:
    """With an effort of so many steps, what would take more isn't begun: nothing here depends on a clock."""
    names = Names({".".join("a" * 200): CONV, **{f"b{i}.conv": CONV for i in range(100)}})
    free = parse_pattern("{block}.conv")
    assert len(names.fits(free, {}, (), Effort(1_000_000))) == 100
    for text in ("{a}.{b}.{c}.{d}.{e}.{f}.x", "{a}b{b}", "{block}.conv"):
        effort = Effort(10_000)
        with pytest.raises(UsageError, match="in too many ways"):
            names.fits(parse_pattern(text), {}, (), effort)
    bound = Effort(20_000)
    assert names.fits(parse_pattern("{block}.*"), {"block": "b7"}, (), bound) == [("b7.conv", {"*": "conv"})]
    assert bound.left > 14_000  # names that begin otherwise weren't looked at


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = " + "[" * 100_000 + "]" * 100_000, "too many lists and tables inside of each other"),
        ("x = " + "{a=" * 3000 + "1" + "}" * 3000, "too many lists and tables inside of each other"),
        (".".join("a" * 20_000) + " = 1", "keys of too many parts"),
        ("x = { " + ".".join(["'a'"] * 20_000) + " = 1 }", "keys of too many parts"),
        ("x = " + "9" * 5000, "a number of thousands of digits"),
        ("#" * (5 << 20), "5242880 characters are too many"),
        ('x = "' + '\\"' * 300_000, "is not TOML: "),
        ("x = nothing", "is not TOML: "),
    ],
    ids=["lists", "tables", "dots", "quoted dots", "digits", "size", "an open string", "a word"],
)  # fmt: skip
def test_toml_that_would_take_gigabytes_or_minutes_is_refused_before_it_is_read(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_toml(text, "r.toml")
    assert str(caught.value).startswith("r.toml: ")
    assert message in str(caught.value)


def test_toml_of_many_names_with_dots_is_read() -> None:
    names = [f"layer{i}.block.{i}.conv.weight.and.more" for i in range(300)]
    assert parse_toml(f"a.b.c = {names}  # {'.' * 2000}", "r.toml") == {"a": {"b": {"c": names}}}


@pytest.mark.parametrize("text", ["avg_pool(1000000)", "upsample(100000)", "unflatten(200,200)"])
def test_a_layer_without_tensors_isnt_built_where_it_would_take_gigabytes(text: str) -> None:
    with pytest.raises(UsageError, match="numbers is more than the 268435456 that are built"):
        make_written(text, 200 * 200, 2)


# --- names as wrappers leave them


@pytest.mark.parametrize(
    ("prefix", "inner"),
    [
        ("module.", ""),
        ("_orig_mod.", ""),
        ("module._orig_mod.", ""),
        ("net.", "_fsdp_wrapped_module."),
        ("", "module."),
    ],
)
def test_patterns_see_through_wrappers_and_names_are_written_back(prefix: str, inner: str) -> None:
    network = {"stem.conv": CONV, "stem.bn": NORM, "head.0": LINEAR, "head.1": LINEAR}

    def written(name: str) -> str:
        first, _, rest = name.partition(".")
        return f"{prefix}{first}.{inner}{rest}"

    layers = known({written(name): facts for name, facts in network.items()})
    within = prefix if prefix == "net." else ""
    pair = f"{written('stem.conv')} + {written('stem.bn')}"
    for text, name in (
        (f'{{ name = "{within}stem.rep", chain = ["{within}stem.conv", "{within}stem.bn"] }}', written("stem.rep")),
        ('{ name = "{b}.rep", chain = ["{b}.conv", "{b}.bn"] }', written("stem.rep")),
        ('{ name = "{b}.conv", chain = ["{b}.conv", "{b}.bn"] }', written("stem.conv")),
        (f'{{ name = "{within}all", chain = ["{within}*.conv", "{within}*.bn"] }}', f"{prefix}all"),
        ('{ name = "module.{b}.conv", chain = ["module.{b}.conv", "{b}.module.bn"] }', written("stem.conv")),
    ):
        assert fusions(f"fuse = [{text}]", layers) == {name: pair}, text
    linear = '[[fuse]]\nname = "{b}"\nchain = ["{b}.{i}@linear", "{b}.{i+1}!@linear"]'
    assert fusions(linear, layers) == {f"{prefix}head": f"{written('head.0')} + {written('head.1')}"}


def test_a_layer_that_is_wrapped_by_itself_is_seen_through() -> None:
    layers = known({"a._checkpoint_wrapped_module.conv._orig_mod": CONV, "a._checkpoint_wrapped_module.bn": NORM})
    pair = "a._checkpoint_wrapped_module.conv._orig_mod + a._checkpoint_wrapped_module.bn"
    assert fusions(PAIR, layers) == {"a._checkpoint_wrapped_module.conv._orig_mod": pair}
    other = PAIR.replace('name = "{block}.conv"', 'name = "{block}.rep"')
    assert fusions(other, layers) == {"a._checkpoint_wrapped_module.rep": pair}


def test_names_that_only_wrappers_tell_apart_are_taken_as_they_are_written() -> None:
    both = {"conv": CONV, "module.conv": CONV, "bn": NORM, "module.bn": NORM}
    text = 'fuse = [{ name = "module.conv", chain = ["module.conv", "module.bn"] }]'
    assert "fits several layers" not in str(fusions(text.replace("module.", ""), known(both)))
    assert fusions(text, known(both)) == {"module.conv": "module.conv + module.bn"}
    assert fusions(text.replace("module.", ""), known(both)) == {"conv": "conv + bn"}


def test_kernels_and_geometry_are_found_through_wrappers() -> None:
    text = """
    [[fuse]]
    name = "{b}"
    sum = [
      ["pad(half({b}))", "{b}"],
      [{ layer = "{b}.down!", like = "{b}" }, "{b}.up"],
    ]
    """
    names = {f"module.c{part}": found("conv", (4, 4, 3, 5)) for part in ("", ".down", ".up")}
    assert fusions(text, known(names)) == {"module.c": "(pad(1,2) + module.c | module.c.down~module.c + module.c.up)"}


@pytest.mark.parametrize("name", list(shipped()))
def test_every_shipped_recipe_says_what_it_is_for(name: str) -> None:
    assert len(shipped()[name].about) > 20
    assert shipped()[name].rules


def test_names_with_dots_need_no_quotes_in_toml() -> None:
    text = """
        0.padding = 1
        0.eps = 0.1
        layer1.0.conv1 = { stride = 2 }
        [layer1]
        1.bn1.eps = 0.5
        [layer1.1]
        padding = 3
        2.padding = 4
    """
    assert parse_tables(tomllib.loads(text.replace("[layer1]", "[layer2]")), "x.toml").tables == {
        "0": {"padding": 1, "eps": 0.1},
        "layer1.0.conv1": {"stride": 2},
        "layer1.1": {"padding": 3},
        "layer1.1.2": {"padding": 4},
        "layer2.1.bn1": {"eps": 0.5},
    }
    with pytest.raises(UsageError, match=r"x\.toml: a\.b: unknown field 'strid'"):
        parse_tables({"a": {"b": {"strid": 2}}}, "x.toml")
