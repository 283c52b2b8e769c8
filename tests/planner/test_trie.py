"""The templated radix tree: prefixes shared as an engine would share them, before outputs exist."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helium_proxy.errors import InvalidRequest
from helium_proxy.planner import trie
from helium_proxy.planner.graph import OperatorGraph, expand
from helium_proxy.planner.plan import parse_plan
from helium_proxy.planner.settings import PlanSettings
from helium_proxy.planner.trie import TemplatedRadixTree, build_trie, common_prefix


def graph_of(*nodes: dict[str, Any], **fields: Any) -> OperatorGraph:
    return expand(parse_plan({"model": "m", "nodes": list(nodes), **fields}), PlanSettings())


def chars(text: str, model: str) -> int:
    return len(text)


def tree_of(*nodes: dict[str, Any], **fields: Any) -> TemplatedRadixTree:
    return build_trie(graph_of(*nodes, **fields), chars, default_output=5)


@given(st.text("ab", max_size=12), st.text("ab", max_size=12))
def test_common_prefix(one: str, other: str) -> None:
    expected = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    assert common_prefix(one, other) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.text("ab", max_size=4), max_size=4), min_size=1, max_size=8))
def test_shared_prefixes_are_those_of_the_texts_however_they_are_cut(prompts: list[list[str]]) -> None:
    """Each prompt comes as several pieces, some from inputs; the tree must see only the whole text."""
    nodes, row = [], {}
    for i, pieces in enumerate(prompts):
        for j, piece in enumerate(pieces):
            row[f"p{i}_{j}"] = piece
        text = "".join(piece if j % 2 else f"{{{{inputs.p{i}_{j}}}}}" for j, piece in enumerate(pieces))
        nodes.append({"id": f"n{i}", "prompt": text})
    tree = tree_of(*nodes, inputs=[row])
    whole = ["".join(pieces) for pieces in prompts]
    ids = {f"n{i}": i for i in range(len(prompts))}
    graph = graph_of(*nodes, inputs=[row])
    for one in tree.paths:
        text = whole[ids[graph.operators[one].template.node]]
        assert tree.prompts[one] == len(text)
        for other in tree.paths:
            if one != other:
                against = whole[ids[graph.operators[other].template.node]]
                assert tree.shared(one, other) == common_prefix(text, against)
    prefixes = {text[: i + 1] for text in whole for i in range(len(text))}
    assert tree.distinct_tokens == len(prefixes)


def test_placeholders_share_by_the_operator_they_stand_for() -> None:
    tree = tree_of(
        {"id": "a", "prompt": "aa"},
        {"id": "b", "prompt": "bb"},
        {"id": "c", "prompt": "xx{{nodes.a}}yy"},
        {"id": "d", "prompt": "xx{{nodes.a}}yz"},
        {"id": "e", "prompt": "xx{{nodes.b}}yy"},
    )
    c, d, e = sorted(tree.paths)[2:]
    assert tree.shared(c, d) == 2 + 5 + 1
    assert tree.shared(c, e) == 2
    assert tree.prompts[c] == 2 + 5 + 2


def test_a_reply_quoted_where_it_was_generated_is_shared() -> None:
    first = [{"role": "system", "content": "s" * 8}, {"role": "user", "content": "u" * 6}]
    tree = tree_of(
        {"id": "a", "messages": first},
        {
            "id": "b",
            "messages": [*first, {"role": "assistant", "content": "{{nodes.a}}"}, {"role": "user", "content": "v"}],
        },
        {"id": "c", "messages": [{"role": "user", "content": "{{nodes.a}}"}]},
    )
    a, b, c = sorted(tree.paths)
    assert tree.shared(b, a) == tree.prompts[a] + tree.lengths[a] == (4 + 8 + 4 + 6 + 4) + 5
    assert tree.shared(c, a) == 0
    assert tree.shared(a, b) == tree.prompts[a]


def test_models_share_nothing() -> None:
    tree = tree_of({"id": "a", "prompt": "same"}, {"id": "b", "prompt": "same", "model": "other"})
    assert tree.shared(0, 1) == 0
    assert set(tree.roots) == {"m", "other"}


def test_fetched_operators_are_text_not_leaves() -> None:
    from dataclasses import replace

    graph = graph_of({"id": "a", "prompt": "x"}, {"id": "b", "prompt": "{{nodes.a}}!"})
    operators = [replace(o, fetched="known") if o.template.node == "a" else o for o in graph.operators.values()]
    tree = build_trie(graph.restricted(operators), chars)
    (b,) = tree.paths
    assert tree.prompts[b] == len("known") + 1


def test_lengths_come_from_the_profile_bounded_by_max_tokens() -> None:
    graph = graph_of(
        {"id": "a", "prompt": "x", "params": {"max_tokens": 10}},
        {"id": "b", "prompt": "x", "params": {"max_completion_tokens": 20}},
        {"id": "c", "prompt": "x"},
    )
    known = {"a": 50.0, "b": 7.5}
    tree = build_trie(graph, chars, default_output=99, profile=lambda workflow, node: known.get(node))
    assert list(tree.lengths.values()) == [10, 7.5, 99]
    assert list(build_trie(graph, chars, default_output=99).lengths.values()) == [10, 20, 99]


def test_texts_are_counted_once_each() -> None:
    counted: list[str] = []

    def count(text: str, model: str) -> int:
        counted.append(text)
        return len(text)

    nodes = [{"id": f"n{i}", "prompt": f"{i}{{{{inputs.q}}}}"} for i in range(5)]
    build_trie(graph_of(*nodes, inputs=[{"q": "long"}]), count)
    assert counted.count("long") == 1


def test_long_chains_need_no_recursion() -> None:
    messages = [{"role": "user", "content": f"{i}{{{{inputs.q}}}}"} for i in range(5_000)]
    tree = tree_of({"id": "a", "messages": messages}, inputs=[{"q": "x"}, {"q": "y"}])
    assert len(tree.nodes) == 6


def test_prompts_that_begin_with_one_another_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trie, "_MOST_STEPS", 2_000)
    tree_of(*({"id": f"n{i}", "prompt": f"{i} is a prompt of its own"} for i in range(90)))
    for turn in (1, -1):
        texts = ["a" * i for i in range(1, 91)][::turn]
        with pytest.raises(InvalidRequest, match="begin with one another"):
            tree_of(*({"id": f"n{i}", "prompt": text} for i, text in enumerate(texts)))
