"""Node identity of untagged calls."""

from __future__ import annotations

from typing import Any

from .driver import Driver, system, user

LONG = "Answer in the house style. Never give advice on taxes. Quote your sources in full. Keep it under a page."


def tools(*names: str) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": name, "parameters": {}}} for name in names]}


def node(driver: Driver, *messages: dict[str, Any], **body: Any) -> str:
    return driver.arrive(list(messages), body=body).node.partition("#")[0]


def test_equal_prompts_and_tools_are_one_node() -> None:
    driver = Driver()
    first = node(driver, system("You are the bull researcher."), user("a"), **tools("search"))
    assert first == "bull-researcher"
    assert node(driver, system("You are the bull researcher."), user("b"), **tools("search")) == first


def test_roles_with_shared_boilerplate_are_different_nodes() -> None:
    driver = Driver()
    names = {node(driver, system(f"You are the {role}. {LONG}"), user("x")) for role in ("bull", "bear", "judge")}
    assert names == {"bull", "bear", "judge"}


def test_roles_named_at_the_end_are_different_nodes() -> None:
    driver = Driver()
    names = {node(driver, system(f"{LONG} Your objective: be the {role}."), user("x")) for role in ("bull", "bear")}
    assert len(names) == 2


def test_numbered_roles_are_different_nodes_and_dates_are_not() -> None:
    driver = Driver()
    assert node(driver, system("You are expert 3."), user("x")) != node(
        driver, system("You are expert 4."), user("x")
    )
    dated = [system(f"You are a planner for long projects. {LONG} Today is 2025-03-{day}.") for day in (11, 12)]
    assert node(driver, dated[0], user("x")) == node(driver, dated[1], user("x"))


def test_a_variable_middle_is_the_same_node() -> None:
    driver = Driver()
    texts = [
        f"You are the support agent of a large and friendly shop.\nThe customer is {name}.\n{LONG}"
        for name in ("Ms Miller from Graz", "Mr Osei from Accra")
    ]
    assert len({node(driver, system(text), user("x")) for text in texts}) == 1


def test_prompts_that_never_recur_are_data() -> None:
    driver = Driver()
    names = [
        node(
            driver, system(f"You are the support agent of a large and friendly shop. {LONG} {LONG} User: {who} Smith")
        )
        for who in ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Lee", "Max", "Ned")
    ]
    assert len(set(names)) == 12
    assert names[-2:] == [names[0]] * 2


def test_tools_tell_agents_with_a_generic_prompt_apart() -> None:
    driver = Driver()
    generic = system("You are a helpful assistant.")
    assert node(driver, generic, user("x"), **tools("search")) != node(driver, generic, user("x"), **tools("send"))


def test_an_agent_without_its_tools_is_the_same_agent() -> None:
    driver = Driver()
    who = system("You are the Researcher. Use your tool.")
    with_tools = node(driver, who, user("x"), **tools("search"))
    assert node(driver, who, user("x")) == with_tools
    other = Driver()
    without = node(other, who, user("x"))
    assert node(other, who, user("x"), **tools("search")) == without


def test_output_schemas_tell_nodes_apart() -> None:
    driver = Driver()
    forms = [
        {"type": "json_schema", "json_schema": {"name": name, "schema": {"type": "object"}}}
        for name in ("Plan", "View")
    ]
    names = {node(driver, system("You are a helpful assistant."), user("x"), response_format=form) for form in forms}
    assert len(names) == 2


def test_without_a_system_prompt_the_first_words_count() -> None:
    driver = Driver()
    one = node(driver, user("Write a summary of the following text:\nApples are red."))
    assert node(driver, user("Write a summary of the following text:\nPears are green.")) == one
    assert node(driver, user("Translate into French:\nPears are green.")) != one


def test_tenants_learn_apart() -> None:
    driver = Driver()
    a = driver.arrive([system("You are the Writer."), user("x")], tenant="a")
    b = driver.arrive([system("You are the Writer."), user("x")], tenant="b")
    assert a.node == b.node == "writer"
    assert a.template != b.template
