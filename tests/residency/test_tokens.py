"""Prompts as token ids by a model folder's own tokenizer and template, and as text where there is none."""

from __future__ import annotations

import asyncio
import json
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from serving import Seen, Stack, until

from helium_proxy.residency.registry import EngineTokenizer
from helium_proxy.residency.tokens import CannotTokenize, LocalTokenizer, prompt_pieces

CHAT = "/v1/chat/completions"
TEMPLATE = """{%- if tools %}<|im_start|>tools
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{%- endfor %}<|im_end|>
{%- endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}[{{ part.text }}]{% endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }}){%- endfor -%}
<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # noqa: E501


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a small byte-level BPE."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEMPLATE, "the quick brown fox jumps over the lazy dog " * 20], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": {"content": "<|im_end|>"}, "bos_token": None}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def local(folder: Path) -> LocalTokenizer:
    return LocalTokenizer(folder)


@pytest.fixture(scope="module")
def whole(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def decoded(whole: tokenizers.Tokenizer, ids: Any) -> str:
    return str(whole.decode(list(ids), skip_special_tokens=False))


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_the_template_is_the_model_s(local: LocalTokenizer, whole: tokenizers.Tokenizer) -> None:
    ids = local.request(CHAT, {"messages": [{"role": "system", "content": "Be brief."}, user("Hi")]})
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert decoded(whole, ids) == expected
    assert list(ids) == whole.encode(expected, add_special_tokens=False).ids


@given(text=st.text(max_size=60), more=st.text(max_size=60))
def test_pieces_encode_to_the_ids_of_the_whole(
    local: LocalTokenizer, whole: tokenizers.Tokenizer, text: str, more: str
) -> None:
    """Cutting at special tokens, and remembering the pieces, changes no id; nor does text that looks like one."""
    text = text.encode("utf-8", "ignore").decode()
    more = more.encode("utf-8", "ignore").decode()
    for content in (text, f"{text}<|im_end|>{more}"):
        ids = local.request(CHAT, {"messages": [user(content)], "add_generation_prompt": False})
        rendered = f"<|im_start|>user\n{content}<|im_end|>\n"
        if content:
            assert list(ids) == whole.encode(rendered, add_special_tokens=False).ids


def test_parts_are_joined_or_handed_on_as_the_engine_does(folder: Path, whole: tokenizers.Tokenizer) -> None:
    body = {"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]}
    assert "user\na\nb<" in decoded(whole, LocalTokenizer(folder).request(CHAT, body))
    assert "user\n[a][b]<" in decoded(whole, LocalTokenizer(folder, as_parts=True).request(CHAT, body))
    assert "user\n[x]<" in decoded(
        whole, LocalTokenizer(folder, as_parts=True).request(CHAT, {"messages": [user("x")]})
    )


def test_tools_and_their_calls(local: LocalTokenizer, whole: tokenizers.Tokenizer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    broken = {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{"}}
    messages = [
        user("x"),
        {"role": "assistant", "content": None, "tool_calls": [call, broken]},
        {
            "role": "tool",
            "tool_call_id": "1",
            "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
        },
    ]
    tools = [{"type": "function", "function": {"name": "é"}}]
    said = decoded(whole, local.request(CHAT, {"messages": messages, "tools": tools}))
    assert 'f({"a": 1})g({})' in said
    assert "tool\none\ntwo<" in said
    assert '"name": "é"' in said
    assert said == decoded(whole, local.request(CHAT, {"messages": messages, "tools": tools, "tool_choice": "none"}))


def test_tools_are_written_as_the_engine_writes_them(local: LocalTokenizer, whole: tokenizers.Tokenizer) -> None:
    """vLLM 0.32's ChatCompletionToolsParam, read and dumped again."""

    def written(tool: dict[str, Any]) -> Any:
        said = decoded(whole, local.request(CHAT, {"messages": [user("x")], "tools": [tool]}))
        return said.partition("tools\n")[2].partition("<|im_end|>")[0]

    for tool, out in (
        (
            {"function": {"parameters": {"b": 1, "a": 2}, "name": "f", "mine": 1}, "type": "function", "mine": 1},
            '{"type": "function", "function": {"name": "f", "description": null, "parameters": {"b": 1, "a": 2}}}',
        ),
        (
            {
                "function": {
                    "strict": True,
                    "description": "d",
                    "name": "f",
                    "parameters": None,
                    "defer_loading": None,
                }
            },
            '{"type": "function", "function": {"name": "f", "description": "d", "parameters": null, "strict": true}}',
        ),
        (
            {"function": {"name": "f"}, "defer_loading": False},
            '{"type": "function", "function": {"name": "f", "description": null, "parameters": null, '
            '"defer_loading": false}, "defer_loading": false}',
        ),
    ):
        assert written(tool) == out
    bad: Any
    for bad in ({"type": "x", "function": {"name": "f"}}, {"function": {"name": 7}}, {"function": {}}, 7):
        with pytest.raises(CannotTokenize):
            local.request(CHAT, {"messages": [user("x")], "tools": [bad]})


def test_what_the_template_is_told_besides(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    told = "{{ [reasoning_effort is defined and reasoning_effort, enable_thinking is defined and enable_thinking, "
    (tmp_path / "chat_template.jinja").write_text(told + "add_generation_prompt, documents, mine] }}")
    local, reader = LocalTokenizer(tmp_path), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for fields, out in (
        ({}, "[False, False, True, None, Undefined]"),
        ({"reasoning_effort": "low"}, "['low', True, True, None, Undefined]"),
        ({"reasoning_effort": "none"}, "['none', False, True, None, Undefined]"),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "x"}},
            "['low', False, True, None, Undefined]",
        ),
        ({"chat_template_kwargs": {"reasoning_effort": "x", "mine": 1}}, "['x', False, True, None, 1]"),
        (
            {"add_generation_prompt": False, "chat_template_kwargs": {"add_generation_prompt": True}},
            "[False, False, False, None, Undefined]",
        ),
    ):
        assert decoded(reader, local.request(CHAT, {"messages": [user("x")], **fields})) == out


def test_developers(local: LocalTokenizer, whole: tokenizers.Tokenizer) -> None:
    body = {"messages": [{"role": "developer", "content": "d"}, user("x")]}
    assert decoded(whole, local.request(CHAT, body)).startswith("<|im_start|>system\nd<")
    with pytest.raises(CannotTokenize):
        local.request(CHAT, {"messages": [user("x"), {"role": "developer", "content": "d"}]})


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [user([{"type": "image_url", "image_url": {"url": "http://x"}}])]},
        {"messages": [user("x")], "chat_template": "mine"},
        {"messages": [user("x")], "documents": [{}]},
        {"messages": [user("x")], "continue_final_message": True},
        {"messages": [7]},
        {"messages": [{"content": "no role"}]},
        {"messages": None},
        {},
    ],
)
def test_what_cannot_be_known_is_said(local: LocalTokenizer, body: dict[str, Any]) -> None:
    with pytest.raises(CannotTokenize):
        local.request(CHAT, body)


def test_whatever_fails_is_said_as_one_thing(local: LocalTokenizer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    calls = {"messages": [{"role": "assistant", "tool_calls": [call]}]}
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    kwargs = {"messages": [user("x")], "chat_template_kwargs": {"messages": []}}
    body: dict[str, Any]
    for body in (calls, {"messages": [user("\ud800")]}, {"messages": [user(deep)]}, kwargs):
        with pytest.raises(CannotTokenize):
            local.request(CHAT, body)
    for prompt in ([-1], [2**32], "\ud800"):
        with pytest.raises(CannotTokenize):
            local.request("/v1/completions", {"prompt": prompt})
    for body in ({}, {"messages": 7}, {"messages": [user("\ud800")]}):
        with pytest.raises(CannotTokenize):
            EngineTokenizer().request(CHAT, body)


@pytest.mark.parametrize(
    ("tools", "template", "trusted"),
    [
        ("as ours", TEMPLATE, True),
        ("as given", TEMPLATE, False),
        ("refused", TEMPLATE, False),
        ("refused", "{% if tools %}{{ raise_exception('none') }}{% endif %}{{ messages[0].content }}", True),
        ("all refused", "{{ raise_exception('none') }}", False),
    ],
)
async def test_a_tokenizer_is_trusted_that_writes_tools_as_the_worker_does(
    stack: Stack, folder: Path, tmp_path: Path, tools: str, template: str, trusted: bool
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    theirs = LocalTokenizer(tmp_path)
    asked = []

    async def worker_s(seen: Seen) -> None:
        if seen.path != "/tokenize":
            await seen.json({}, 400)
            return
        asked.append(seen)
        if tools == "all refused" or (tools == "refused" and "tools" in seen.body):
            await seen.json({"error": {}}, 400)
            return
        ids = theirs.request(CHAT, seen.body)
        await seen.json({"tokens": [*ids, 1] if tools == "as given" and "tools" in seen.body else list(ids)})

    worker = await stack.fake(always=worker_s)
    worker.card = lambda model: {"id": model, "owned_by": "vllm", "root": str(tmp_path)}  # type: ignore[method-assign]
    proxy = await stack.proxy(worker)
    if trusted:
        await until(lambda: proxy.services.tokenizers.get("demo") is not None)
    else:
        await until(lambda: len(asked) == (1 if tools == "all refused" else 3))
        await asyncio.sleep(0.05)
        assert proxy.services.tokenizers.get("demo") is None


async def test_the_embedded_engine_s_tokens_are_its_own(stack: Stack) -> None:
    proxy = await stack.proxy(await stack.engine())
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for fields in ({}, {"tools": tools}, {"tools": tools, "tool_choice": "none"}):
        body = {"model": "demo", "messages": [user("Hello")], "max_tokens": 2, **fields}
        answer = (await proxy.client.post(CHAT, json=body)).json()
        assert answer["usage"]["prompt_tokens"] == len(EngineTokenizer().request(CHAT, body))


def test_completions(local: LocalTokenizer, whole: tokenizers.Tokenizer) -> None:
    def ask(**body: Any) -> list[int]:
        return list(local.request("/v1/completions", body))

    assert ask(prompt="the fox") == whole.encode("the fox").ids == ask(prompt=["the fox"])
    assert ask(prompt=[1, 2, 3]) == [1, 2, 3]
    for body in ({"prompt": ["a", "b"]}, {"prompt": 7}, {}, {"prompt": "a", "add_special_tokens": False}):
        with pytest.raises(CannotTokenize):
            ask(**body)
    with pytest.raises(CannotTokenize):
        local.request("/v1/responses", {"input": "x"})


def test_the_cache_of_pieces_is_bounded(folder: Path) -> None:
    local = LocalTokenizer(folder, cache_tokens=200)
    for i in range(300):
        local.request(CHAT, {"messages": [user(f"text number {i}")]})
    assert local._cached <= 200
    assert local._cached == sum(map(len, local._cache.values()))


def test_a_folder_without_what_is_needed(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(Exception, match="No such file"):  # the tokenizers package raises no type of its own
        LocalTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="chat template"):
        LocalTokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert len(LocalTokenizer(tmp_path).request(CHAT, {"messages": [user("fox")]}))


def test_a_template_reaches_nothing_outside(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(CannotTokenize):
        LocalTokenizer(tmp_path).request(CHAT, {"messages": [user("x")]})


@pytest.mark.parametrize(
    ("route", "body", "expected"),
    [
        (CHAT, {"messages": [user("a"), {"role": "assistant", "content": "b"}]}, ["user", "a", "assistant", "b"]),
        ("/v1/completions", {"prompt": "a"}, ["a"]),
        ("/v1/completions", {"prompt": [1, 2]}, ["[1, 2]"]),
        ("/v1/responses", {"instructions": "i", "input": "x"}, ["i", "x"]),
        (
            "/v1/responses",
            {"input": [{"type": "function_call_output", "output": "o"}]},
            ["function_call_output", "", "o"],
        ),
        ("/v1/messages", {"system": [{"type": "text", "text": "s"}], "messages": [user("a")]}, ["s", "user", "a"]),
        ("/v1/embeddings", {"input": "x"}, []),
        (CHAT, {"messages": "not a list"}, ["not a list"]),
        (CHAT, {"messages": None}, []),
        (CHAT, {"messages": [7, None]}, ["7", "None"]),
    ],
)
def test_text_pieces(route: str, body: dict[str, Any], expected: list[str]) -> None:
    assert prompt_pieces(route, body) == expected


def test_threads_keep_count_of_what_they_encode_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Siblings of a fan-out are encoded in threads, and all miss the same pieces."""
    local = LocalTokenizer(folder, cache_tokens=10_000)
    encode, together = local.text, Barrier(4)

    def text(piece: str) -> array[int]:
        together.wait(timeout=10)  # nobody has found it before all have missed it
        return encode(piece)

    monkeypatch.setattr(local, "text", text)
    with ThreadPoolExecutor(4) as threads:
        found = list(
            threads.map(lambda _: local.request(CHAT, {"messages": [user("the quick brown fox")]}), range(4))
        )
    assert all(ids == found[0] for ids in found)
    assert local._cached == sum(map(len, local._cache.values()))
