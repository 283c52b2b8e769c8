"""The real-engine harness itself: the model, the two engines and what they report."""

from __future__ import annotations

from typing import Any

import build_env
import pytest
from engines import EngineClient, VllmEngine


def complete(engine: EngineClient, prompt: str) -> dict[str, Any]:
    body = {"model": "demo", "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return engine.post("/v1/completions", body)


def test_a_platform_without_the_build_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_env.sys, "platform", "darwin")
    with pytest.raises(build_env.Unsupported, match="not darwin"):
        build_env.check_platform()


def test_a_failed_build_leaves_nothing(tmp_path: Any) -> None:
    target = tmp_path / "half"

    def build() -> None:
        target.mkdir()
        (target / "part").touch()
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        build_env._once(target, "v1\n", build)
    assert not target.exists()


def test_a_finished_build_is_not_repeated_until_its_recipe_changes(tmp_path: Any) -> None:
    target, built = tmp_path / "whole", []
    for stamp in ("v1\n", "v1\n", "v2\n"):
        build_env._once(target, stamp, lambda: (built.append(1), target.mkdir()))  # type: ignore[arg-type]
    assert len(built) == 2


def test_extra_arguments_override_the_defaults() -> None:
    engine = VllmEngine(1, extra_args=["--max-model-len", "1024"], env={"PYTHONHASHSEED": "7"})
    command = engine.command()
    assert command[len(command) - 2 :] == ["--max-model-len", "1024"]
    assert engine.environment()["PYTHONHASHSEED"] == "7"


@pytest.mark.vllm
def test_both_engines_give_the_same_exact_answer_that_depends_on_the_prompt(vllm_engines: list[EngineClient]) -> None:
    first, second = vllm_engines[:2]
    answers = {prompt: complete(first, prompt)["choices"][0]["text"] for prompt in ("one", "two", "three")}
    assert len(set(answers.values())) == 3
    assert {prompt: complete(second, prompt)["choices"][0]["text"] for prompt in answers} == answers


@pytest.mark.vllm
def test_cached_tokens_are_reported(vllm_engines: list[EngineClient]) -> None:
    prompt = " ".join(str(number) for number in range(400))
    complete(vllm_engines[0], prompt)
    usage = complete(vllm_engines[0], prompt)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 2 * 128
    assert vllm_engines[0].running_count() == 0
