"""What prompts are made of, learned from texts alone and through whole runs."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from helium_proxy.workflow import MemoryTemplateStore, Prediction, Rendered
from helium_proxy.workflow.parts import GAP, MAX_MESSAGES, REPLY, SOLE, STRIPPED, Part, Ref, read
from helium_proxy.workflow.recall import Recall
from helium_proxy.workflow.skeleton import MAX_CHARS, MAX_PARTS, Known, Skeleton, Source

from .driver import Driver, assistant, system, tool, user


def text(seed: int, count: int = 12) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(("alpha", "beta", "gamma", "delta", "rho", "tau", "phi")) for _ in range(count)) + (
        f" {seed}"
    )


class Lab:
    """One node `two`, whose prompts follow a call of node `one`."""

    def __init__(self) -> None:
        self.skeleton = Skeleton()
        self.count = 0

    def show(
        self, messages: list[Any], reply: str | None = None, first: list[Any] | None = None, **body: Any
    ) -> None:
        self.count += 1
        texts = read({"messages": messages, **body})
        assert texts is not None
        earlier = read({"messages": first or []})
        known = Known([Source("one", 1, SOLE, earlier, reply)])
        self.skeleton.learn(f"run-{self.count}", texts, known)

    def render(self, reply: str | None = None, first: list[Any] | None = None) -> Rendered | None:
        earlier = read({"messages": first or []})
        assert earlier is not None

        def resolve(ref: Ref) -> str | None:
            if ref.message == REPLY:
                return reply.strip() if reply is not None and ref.slot == STRIPPED else reply
            if ref.message >= len(earlier.frames):
                return None
            return earlier.frames[ref.message] if ref.slot < 0 else earlier.slots[ref.message][ref.slot]

        return self.skeleton.render(resolve)


def said(reply: str) -> list[Any]:
    return [system("You are two."), user(f"One said: {reply}\n\nAnswer now.")]


def test_replies_and_inputs_between_constant_texts() -> None:
    lab = Lab()
    for seed in range(3):
        opening = user(f"About {text(50 + seed)}")
        lab.show([*said(text(seed))[:1], opening, said(text(seed))[1]], text(seed), [system("You are one."), opening])
    opening = user(f"About {text(60)}")
    rendered = lab.render(text(9), [system("You are one."), opening])
    assert rendered is not None
    assert rendered.whole
    assert rendered.messages == [system("You are two."), opening, said(text(9))[1]]


@pytest.mark.parametrize("strips", [False, True], ids=["as it came", "stripped"])
@pytest.mark.parametrize("ends", ["| | ", " |||", "|  |\n"])
def test_replies_with_and_without_white_space_at_their_ends(ends: str, strips: bool) -> None:
    """Engines put it there now and then, and clients leave it or take it off."""
    lab, replies = Lab(), [f"{end}{text(seed)}{end}" for seed, end in enumerate(ends.split("|"))]
    for reply in replies:
        lab.show(said(reply.strip() if strips else reply), reply)
    for end in ("", " ", "\n\n"):
        reply = f"{text(9)}{end}"
        rendered = lab.render(reply)
        assert rendered is not None
        assert rendered.whole
        assert rendered.messages == said(reply.strip() if strips else reply)


def test_nothing_is_known_of_one_run() -> None:
    lab = Lab()
    lab.show(said(text(1)), text(1))
    assert lab.render(text(2)) is None
    assert lab.skeleton.dump() is None


def test_a_paraphrase_is_no_part() -> None:
    lab = Lab()
    for seed in range(3):
        lab.show(said(text(seed).upper()), text(seed))
    rendered = lab.render(text(9))
    assert rendered is not None
    assert rendered.open
    assert not rendered.whole
    assert rendered.messages == [system("You are two."), user("One said:")]


def test_a_short_reply_is_no_part() -> None:
    lab = Lab()
    for seed in range(3):
        lab.show(said(f"yes {seed}"), f"yes {seed}")
    rendered = lab.render("yes 9")
    assert rendered is not None
    assert rendered.messages[1] == user("One said: yes")


def test_a_part_that_was_wrong_once_is_gone_and_learned_anew() -> None:
    lab = Lab()
    for seed in range(3):
        lab.show(said(text(seed)), text(seed))
    assert (made := lab.render(text(9))) is not None
    assert made.whole
    lab.show(said(text(77)), text(3))  # something else in its place
    made = lab.render(text(9))
    assert made is not None
    assert made.messages[1] == user("One said:")
    for seed in range(100, 140):
        lab.show(said(text(seed)), text(seed))
    assert (made := lab.render(text(9))) is not None
    assert made.whole
    assert made.messages == said(text(9))


def test_contents_that_are_lists_of_parts() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}

    def prompt(reply: str) -> list[Any]:
        parts = [{"type": "text", "text": "Look:"}, picture, {"type": "text", "text": f"It says {reply}"}]
        return [{"role": "user", "content": parts}]

    lab = Lab()
    for seed in range(2):
        lab.show(prompt(text(seed)), text(seed))
    rendered = lab.render(text(9))
    assert rendered is not None
    assert rendered.messages == prompt(text(9))
    rendered = lab.render(None)
    assert rendered is not None
    assert rendered.open
    assert rendered.messages[0]["content"] == [
        {"type": "text", "text": "Look:"},
        picture,
        {"type": "text", "text": "It says"},
    ]


def test_tool_messages_of_the_conversation_are_kept_and_new_ones_end_it() -> None:
    lab = Lab()

    def before(seed: int) -> list[Any]:
        return [
            system("You are."),
            user(text(seed)),
            assistant(None, f"id-{seed}"),
            tool(f"id-{seed}", text(seed + 50)),
        ]

    for seed in range(3):
        lab.show(
            [*before(seed), assistant(None, f"new-{seed}"), tool(f"new-{seed}", text(seed + 90))], None, before(seed)
        )
    rendered = lab.render(None, before(9))
    assert rendered is not None
    assert rendered.messages == before(9)
    assert not rendered.open
    assert not rendered.whole


def test_what_changes_within_a_constant_text_is_found_again() -> None:
    """Node one's question stands in a text of its own, node two's in another."""
    one, two = Skeleton(), Skeleton()

    def prompts(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        question = text(seed)
        return (
            {"messages": [user(f"Please answer this: {question} (be brief)")]},
            {"messages": [user(f"Question: {question}\nCriticise the answer.")]},
        )

    for seed in range(6):
        first, second = (read(prompt) for prompt in prompts(seed))
        assert first is not None
        assert second is not None
        one.learn(f"r{seed}", first, Known([]))
        if seed >= 2:
            two.learn(f"r{seed}", second, Known([Source("one", 1, SOLE, first, None, one)]))
    head, tail = one.ends(0, 0) or ("", "")
    asked = prompts(9)
    whole = asked[0]["messages"][0]["content"]
    rendered = two.render(lambda ref: whole[len(head) : len(whole) - len(tail)] if ref.inner else None)
    assert rendered is not None
    assert rendered.messages == asked[1]["messages"]


def test_other_tools_in_another_run_make_it_useless() -> None:
    lab = Lab()
    lab.show(said(text(1)), text(1), tools=[{"type": "function", "function": {"name": "a"}}])
    lab.show(said(text(2)), text(2), tools=[{"type": "function", "function": {"name": "b"}}])
    assert lab.render(text(3)) is None


def test_it_is_bounded() -> None:
    lab = Lab()
    for seed in range(2):
        lab.show([user(f"{index} {text(seed)}") for index in range(2 * MAX_MESSAGES)])
    old = lab.skeleton._old
    assert old is not None
    assert sum(1 + sum(map(len, message.lines)) for message in old.messages) <= MAX_PARTS + 2 * len(old.messages)
    lab = Lab()
    for seed in range(2):
        lab.show([user("x" * 1000)] * 200 + [user(text(seed))])
    old = lab.skeleton._old
    assert old is not None
    kept = sum(len(part.text or "") for message in old.messages for line in message.lines for part in line)
    assert kept <= MAX_CHARS


def test_learning_is_linear_and_quick() -> None:
    """A long prompt of one letter and many sources that never match."""
    sources = [
        Source("one", 1, at, read({"messages": [user(text(at, 40))]}), "a" * 400 + str(at)) for at in range(200)
    ]
    known = Known(sources)
    assert len(known.whole) <= 128
    skeleton = Skeleton()
    texts = read({"messages": [user("a" * 60_000)] * 2})
    assert texts is not None
    skeleton.learn("r", texts, known)
    assert skeleton.seen == 1


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": None},
        {"messages": "x"},
        {"messages": [None, 3, "x"]},
        {"messages": [{"content": {"a": 1}}]},
        {"messages": [{"role": "user", "content": [None, "x", {"text": 3}, {"type": "text", "text": ""}]}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": "x", "big": 1 << 80}]},
        {"messages": [{1: 2}], "tools": "none"},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x" * 20_000}}]}]},
        {"messages": [{"role": "user", "content": "x"}], "tools": [1 << 80]},
    ],
)
def test_odd_requests_raise_nothing(body: Mapping[str, Any]) -> None:
    texts = read(body)
    if texts is None:
        return
    skeleton = Skeleton()
    for run in "abc":
        skeleton.learn(run, texts, Known([Source("n", 1, 0, texts, None)]))
    skeleton.render(lambda ref: None)
    skeleton.render(lambda ref: "null")
    data = skeleton.dump()
    assert data is None or Skeleton.load(orjson.loads(orjson.dumps(data))) is not None


@pytest.mark.parametrize("data", [None, 3, [], [1, 2], [1, 2, True, "{}", [[1, 2]]], [1, 2, True, "{}", [["x", []]]]])
def test_what_cannot_be_loaded_is_none(data: Any) -> None:
    assert Skeleton.load(data) is None


def test_lines_agree_at_both_ends() -> None:
    lab = Lab()
    for seed in range(3):
        lab.show([user(f"Begin {text(seed)} end of it.")])
    old = lab.skeleton._old
    assert old is not None
    line = old.messages[0].lines[0]
    assert line[0].text is not None
    assert line[0].text.startswith("Begin ")
    assert line[1] == GAP
    assert line[2] == Part(" end of it.") or (line[2].text or "").endswith(" end of it.")


# -- through runs


def expected(driver: Driver, call: str, node: str) -> Prediction:
    return next(p for p in driver.workflows.expected_next(call, driver.now) if p.node == node)


def chain(driver: Driver, run: str, seed: int, *, tagged: bool, upto: int = 9) -> tuple[str, list[Any]]:
    """A writer and a critic who reads it; untagged, nodes and edge are found by content."""

    def tags(node: str, **more: Any) -> dict[str, Any]:
        return {"workflow": "w", "node": node, "run": run, **more} if tagged else {}

    draft = f"Draft: {text(seed)} is what I think. {text(seed + 500)}"
    topic = user(f"Topic {text(seed + 300)} {seed}")
    first = driver.call([system("You are the writer of poems."), topic], draft, **tags("writer"))
    second = [system("You are the critic of poems."), topic, user(f"The poem:\n{draft}\n\nCriticise it.")]
    driver.workflows.study(first.call, {"messages": [system("You are the writer of poems."), topic]}, draft)
    if upto > 1:
        call = driver.call(second, text(seed + 900), **tags("critic", parents=["writer"]))
        driver.workflows.study(call.call, {"messages": second}, text(seed + 900))
        driver.workflows.end_run(call.run, "t")
    return first.call, second


@pytest.mark.parametrize("tagged", [True, False])
def test_a_run_s_next_prompt_is_known_when_its_parents_have_ended(tagged: bool) -> None:
    driver = Driver()
    for seed in range(4):
        chain(driver, f"r{seed}", seed, tagged=tagged)
    call, prompt = chain(driver, "now", 40, tagged=tagged, upto=1)
    (prediction,) = driver.workflows.expected_next(call, driver.now + 10)
    rendered = driver.workflows.rendered(call, prediction)
    assert rendered is not None
    assert rendered.whole
    assert rendered.messages == prompt


def test_it_outlives_a_restart_and_older_stores_load() -> None:
    store = MemoryTemplateStore()
    driver = Driver(store=store)
    for seed in range(4):
        chain(driver, f"r{seed}", seed, tagged=True)
    driver.workflows.close()
    again = Driver(store=store)
    call, prompt = chain(again, "now", 40, tagged=True, upto=1)
    rendered = again.workflows.rendered(call, expected(again, call, "critic"))
    assert rendered is not None
    assert rendered.messages == prompt
    for key, blob in store.blobs.items():
        data = orjson.loads(blob)
        for node in data["nodes"]:
            del node["skeleton"]
        store.blobs[key] = orjson.dumps(data)
    older = Driver(store=store)
    call, _ = chain(older, "now", 40, tagged=True, upto=1)
    assert older.workflows.rendered(call, expected(older, call, "critic")) is None


def test_what_is_recalled_is_bounded() -> None:
    driver = Driver()
    recall = driver.workflows._recall = Recall(max_calls=3, max_chars=2_000)
    for seed in range(5):
        chain(driver, f"r{seed}", seed, tagged=True)
    assert len(recall) <= 3
    assert recall._chars <= 2_000
    assert driver.workflows.statistics().failures == 0
