"""The templated radix tree (arXiv 2603.16104): all prompts of a plan by common prefix, before their outputs exist.

A node's segment is a run of text, message marks and placeholders (operator ids); a leaf stands for one operator. An
operator's own output is the last element of its path: a later prompt that quotes the reply where it was generated, as
conversations do, finds it there. The dependency edges between leaves are those of the `OperatorGraph`.

Prompts of different models share nothing: each model has its own root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from helium_proxy.errors import InvalidRequest
from helium_proxy.planner.graph import Element, Mark, Operator, OperatorGraph

_MOST_STEPS = 20_000_000
"""Nodes visited while the tree is built: prompts that are prefixes of one another make that quadratic."""

Count = Callable[[str, str], int]
"""(text, model) → tokens."""
Profile = Callable[[str, str], float | None]
"""(workflow, node) → expected output tokens; None: never seen."""


def count_chars(text: str, model: str) -> int:
    """Tokens of `text` when no tokenizer is at hand: a quarter of its characters, rounded up."""
    return (len(text) + 3) // 4


@dataclass(slots=True, eq=False, repr=False)
class TrieNode:
    """`tokens` are the segment's, `depth` those from the root to the segment's end; outputs count as expected."""

    parent: TrieNode | None
    segment: tuple[Element, ...]
    tokens: float = 0.0
    depth: float = 0.0
    index: int = 0
    operator: int | None = None
    """The operator whose output ends here: a leaf, or inner when later prompts quote it."""
    children: dict[Element, TrieNode] = field(default_factory=dict)
    """By first element; text by its first character."""

    def __repr__(self) -> str:
        return f"<TrieNode depth={self.depth:g} children={len(self.children)} operator={self.operator}>"


@dataclass(frozen=True, slots=True)
class TemplatedRadixTree:
    """`paths[o]`: the nodes from the root to operator o's leaf, o's own output included; `prompts[o]`, `lengths[o]`:
    its expected prompt and output tokens."""

    roots: Mapping[str, TrieNode]
    nodes: tuple[TrieNode, ...]
    paths: Mapping[int, tuple[TrieNode, ...]]
    prompts: Mapping[int, float]
    lengths: Mapping[int, float]

    def shared(self, one: int, other: int) -> float:
        """Tokens of `one`'s prompt that it has in common with `other`'s path."""
        depth = 0.0
        for a, b in zip(self.paths[one], self.paths[other], strict=False):
            if a is not b:
                break
            depth = a.depth
        return min(depth, self.prompts[one])

    @property
    def distinct_tokens(self) -> float:
        """Prompt tokens when every distinct prefix is computed once: the fewest any schedule can."""
        return sum(node.tokens for node in self.nodes) - sum(self.lengths.values())

    def walk(self) -> Iterator[tuple[int, TrieNode]]:
        """(level, node) in depth-first order."""
        stack = [(0, root) for root in reversed(list(self.roots.values()))]
        while stack:
            level, node = stack.pop()
            yield level, node
            stack.extend((level + 1, child) for child in reversed(list(node.children.values())))

    def __repr__(self) -> str:
        return f"<TemplatedRadixTree: {len(self.paths)} operators, {len(self.nodes)} nodes>"


def common_prefix(one: str, other: str) -> int:
    """Length of the common prefix, by bisection over slices (compared at memory speed).

    >>> common_prefix("abcd", "abxy"), common_prefix("", "a"), common_prefix("ab", "ab")
    (2, 0, 2)
    """
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low + 1 < high:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low if one[low : low + 1] != other[low : low + 1] else low + 1


def _insert(root: TrieNode, operator: Operator) -> int:
    """Walk down the operator's prompt and its own output, adding what is missing; `at` is how far into the node's
    text the walk has come, since a text may end where another one goes on. Returns the steps it took."""
    node, at = root, 0
    edge = ""
    steps = 0
    for element in (*operator.prompt(), operator.id):
        steps += 1
        if not isinstance(element, str):
            if at < len(edge):
                node = _split(node, edge, at)
            child = node.children.get(element)
            if child is None:
                node.children[element] = child = TrieNode(node, (element,))
            node, edge, at = child, "", 0
            continue
        text = element
        while text:
            steps += 1
            if at == len(edge):
                child = node.children.get(text[0])
                if child is None:
                    node.children[text[0]] = node = TrieNode(node, (text,))
                    edge, at = text, len(text)
                    break
                (edge,) = child.segment  # type: ignore[assignment]
                node, at = child, 0
            if edge.startswith(text, at):
                at += len(text)
                break
            rest = edge[at:] if at else edge
            if text.startswith(rest):
                at, text = len(edge), text[len(rest) :]
                continue
            shared = common_prefix(rest, text)
            node = _split(node, edge, at + shared)
            edge, at, text = "", 0, text[shared:]
    node.operator = operator.id
    return steps


def _split(node: TrieNode, edge: str, at: int) -> TrieNode:
    """Cut `node`, whose segment is the text `edge`, in two; returns the upper one."""
    assert node.parent is not None
    upper = TrieNode(node.parent, (edge[:at],), children={edge[at]: node})
    node.parent.children[edge[0]] = upper
    node.parent, node.segment = upper, (edge[at:],)
    return upper


def _compress(root: TrieNode) -> None:
    """Join every node that neither branches nor ends an operator with its only child."""
    stack = list(root.children.values())
    while stack:
        node = stack.pop()
        chain = [node]
        while node.operator is None and len(node.children) == 1:
            (node,) = node.children.values()
            chain.append(node)
        if len(chain) > 1 and node.operator is not None:
            chain.pop()  # an output stays a node of its own: consumers of the reply branch off behind it
        joined = chain[-1]
        if len(chain) > 1:
            top = chain[0]
            assert top.parent is not None
            joined.segment = tuple(element for link in chain for element in link.segment)
            key = top.segment[0]
            top.parent.children[key[0] if isinstance(key, str) else key] = joined
            joined.parent = top.parent
        stack.extend(joined.children.values())


def expected_lengths(graph: OperatorGraph, default: float, profile: Profile | None) -> dict[int, float]:
    """Operator → expected output tokens: the node's profile, else max_tokens, else `default`; never above max_tokens.
    A CacheFetch generates nothing, but its text, as part of others' prompts, is counted by the tree."""
    by_template: dict[int, float] = {}
    lengths = {}
    for id_, operator in graph.operators.items():
        if operator.fetched is not None:
            continue
        template = operator.template
        expected = by_template.get(id(template))
        if expected is None:
            known = profile(graph.workflow, template.node) if profile is not None else None
            limit = template.max_tokens
            expected = known if known is not None else float(limit or default)
            by_template[id(template)] = expected = max(1.0, min(expected, limit or expected))
        lengths[id_] = expected
    return lengths


def build_trie(
    graph: OperatorGraph, count: Count = count_chars, *, default_output: float = 256.0, profile: Profile | None = None
) -> TemplatedRadixTree:
    """The tree over the operators of `graph` still to be computed. `count` is called once per distinct text."""
    lengths = expected_lengths(graph, default_output, profile)
    roots: dict[str, TrieNode] = {}
    steps = 0
    for id_ in lengths:
        operator = graph.operators[id_]
        root = roots.get(operator.template.model)
        if root is None:
            roots[operator.template.model] = root = TrieNode(None, ())
        steps += _insert(root, operator)
        if steps > _MOST_STEPS:
            raise InvalidRequest("too many prompts that begin with one another", param="nodes")
    counted: dict[tuple[str, str], int] = {}

    def tokens_of(element: Element, model: str) -> float:
        if isinstance(element, Mark):
            return element.tokens
        if isinstance(element, int):
            if element in lengths:
                return lengths[element]
            element = graph.operators[element].fetched or ""
        key = (element, model)
        if key not in counted:
            counted[key] = count(element, model)
        return counted[key]

    nodes: list[TrieNode] = []
    paths: dict[int, tuple[TrieNode, ...]] = {}
    for model, root in roots.items():
        _compress(root)
        stack: list[tuple[TrieNode, tuple[TrieNode, ...]]] = [(root, ())]
        while stack:
            node, above = stack.pop()
            node.index = len(nodes)
            nodes.append(node)
            node.tokens = sum(tokens_of(element, model) for element in node.segment)
            node.depth = node.tokens + (above[-1].depth if above else 0.0)
            path = (*above, node)
            steps += len(path)
            if steps > _MOST_STEPS:
                raise InvalidRequest("too many prompts that begin with one another", param="nodes")
            if node.operator is not None:
                paths[node.operator] = path
            stack.extend((child, path) for child in node.children.values())
    prompts = {id_: paths[id_][-1].depth - lengths[id_] for id_ in lengths}
    return TemplatedRadixTree(roots, tuple(nodes), {id_: paths[id_] for id_ in lengths}, prompts, lengths)
