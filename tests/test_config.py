"""Settings: where they come from, which source wins, and what a typo is told. The documentation names every one."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from helium_proxy.config import ApiKey, Settings, known_keys, load
from helium_proxy.engine import PROFILES
from helium_proxy.errors import ConfigError
from helium_proxy.workers.settings import WorkerSpec

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"


def write(folder: Path, text: str) -> Path:
    file = folder / "proxy.yaml"
    file.write_text(text, "utf-8")
    return file


def test_the_defaults_are_settings() -> None:
    settings = load(environ={})
    assert settings == Settings()
    assert settings.server.port == 8080
    assert not settings.workers


def test_later_sources_win_field_by_field(tmp_path: Path) -> None:
    file = write(tmp_path, "server: {host: 0.0.0.0, port: 1, drain_s: 5}\ndispatch: {window: 7}")
    environ = {"HELIUM_SERVER__PORT": "2", "HELIUM_SERVER__DRAIN_S": "6", "HELIUM_LOG__LEVEL": "debug"}
    settings = load(file, environ=environ, overrides={"server": {"port": 3}})
    assert settings.server.host == "0.0.0.0"
    assert settings.server.port == 3
    assert settings.server.drain_s == 6
    assert settings.dispatch.window == 7
    assert settings.log.level == "debug"
    assert settings.server.max_body_bytes == Settings().server.max_body_bytes


def test_lists_and_sections_in_the_environment_are_json() -> None:
    environ = {
        "HELIUM_WORKERS": '[{"url": "http://a:1/v1"}, {"url": "http://b:2", "api_key": "sk-w"}]',
        "HELIUM_AUTH__KEYS": '[{"key": "sk-a", "tenant": "a"}]',
        "HELIUM_SERVER": '{"port": 9}',
    }
    settings = load(environ=environ)
    assert [w.url for w in settings.workers] == ["http://a:1", "http://b:2"]
    assert settings.workers[1].api_key is not None
    assert settings.workers[1].api_key.get_secret_value() == "sk-w"
    assert settings.auth.keys[0].tenant == "a"
    assert settings.server.port == 9


def test_workers_of_a_later_source_replace_those_of_an_earlier(tmp_path: Path) -> None:
    file = write(tmp_path, "workers: [{url: http://file}]")
    assert [w.url for w in load(file, environ={}).workers] == ["http://file"]
    environ = {"HELIUM_WORKERS": '[{"url": "http://env"}]'}
    assert [w.url for w in load(file, environ=environ).workers] == ["http://env"]
    flags = {"workers": [{"url": "http://flag"}]}
    assert [w.url for w in load(file, environ=environ, overrides=flags).workers] == ["http://flag"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sever: {port: 1}", "sever is no setting; did you mean server?"),
        ("server: {prot: 1}", "server.prot is no setting; did you mean server.port?"),
        ("port: 1", "port is no setting; did you mean"),
        ("dispatch: {kv_shar: 1}", "did you mean dispatch.kv_share?"),
        ("workers: [{ulr: http://a}]", "workers.0.ulr is no setting; did you mean url?"),
        ("server: {port: many}", "server.port: Input should be a valid integer"),
        ("server: {port: 70000}", "server.port: Input should be less than or equal to 65535"),
        ("mode: fulll", "mode: Input should be 'full' or 'passthrough'"),
        ("workers: [{url: 'gpu:8000'}]", "must start with http"),
        ("server: 7", "server: Input should be"),
        ("port: 1", "did you mean server.port?"),
        ("- a", "must be a mapping"),
        ("a: [", "not YAML"),
        ("completely_unknown_thing: 1", "completely_unknown_thing is no setting"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(write(tmp_path, text), environ={})
    assert said in raised.value.message


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HELIUM_SERVER__PROT", "1", "did you mean HELIUM_SERVER__PORT?"),
        ("HELIUM_SEVER__PORT", "1", "did you mean HELIUM_SERVER__PORT?"),
        ("HELIUM_NO__SUCH__THING", "1", "HELIUM_NO__SUCH__THING is no setting"),
        ("HELIUM_SERVER__PORT", "many", "server.port"),
        ("HELIUM_WORKERS", "http://a", "HELIUM_WORKERS: not JSON"),
        ("HELIUM_AUTH__KEYS", "sk-1", "HELIUM_AUTH__KEYS: not JSON"),
        ("HELIUM_PORT", "9000", "did you mean HELIUM_SERVER__PORT?"),
        ("HELIUM_HOST", "0.0.0.0", "did you mean HELIUM_SERVER__HOST?"),
        ("HELIUM_AUTH__KEYS", '[{"key": ""}]', "auth.keys.0.key: Value should have at least 1 item"),
        ("HELIUM_ENGINE__PROFILE", "h100", "engine.profile: Input should be 'cpu-tiny'"),
    ],
)
def test_what_is_wrong_in_the_environment_is_named(name: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(environ={name: value})
    assert said in raised.value.message


def test_other_programs_variables_are_left_alone() -> None:
    environ = {"HELIUM_URL": "x", "HELIUM_API_KEY": "x", "HELIUM_CONFIG": "x", "PATH": "x", "HELIUMX": "x"}
    environ |= {"HELIUM_SERVICE_HOST": "10.0.0.1", "HELIUM_SERVICE_PORT": "80", "HELIUM_SERVICE_PORT_HTTP": "80"}
    environ |= {"HELIUM_PORT": "tcp://10.0.0.1:80", "HELIUM_PORT_80_TCP_ADDR": "10.0.0.1"}  # Kubernetes'
    assert load(environ=environ) == Settings()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load(tmp_path / "none.yaml", environ={})
    assert load(write(tmp_path, ""), environ={}) == Settings()
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not YAML"):
        load(binary, environ={})


def test_errors_quote_no_secret(tmp_path: Path) -> None:
    for text in ("auth: {keys: [{key: sk-secret, tennant: a}]}", "workers: [{url: x, api_key: sk-secret}]"):
        with pytest.raises(ConfigError) as raised:
            load(write(tmp_path, text), environ={})
        assert "sk-secret" not in raised.value.message
    assert "sk-secret" not in repr(load(environ={"HELIUM_AUTH__KEYS": '[{"key": "sk-secret"}]'}))


def test_passthrough_turns_everything_off_but_routing() -> None:
    settings = load(environ={"HELIUM_MODE": "passthrough"})
    assert settings.dispatch.placement == "least-loaded"
    assert settings.dispatch.ordering == "fifo"
    dispatch, pool = settings.dispatch, settings.pool
    assert not any([dispatch.admission, dispatch.keep_places, dispatch.working_sets])
    assert not any([pool.probe, pool.calibrate, pool.kv_events])
    workflow, reuse, directives = settings.workflow, settings.reuse, settings.directives
    switches = [workflow.inference, workflow.templates, workflow.lookahead, reuse.enabled, reuse.coalesce]
    assert not any([*switches, directives.pins, directives.prewarm, directives.lookahead])
    plans = settings.plans
    assert not any([plans.prune, plans.cse, plans.cache_fetch, plans.placement, plans.ordering])


def test_a_worker_may_be_given_by_its_url_alone(tmp_path: Path) -> None:
    settings = load(write(tmp_path, "workers: [http://a:1, {url: http://b:2}]"), environ={})
    assert [worker.url for worker in settings.workers] == ["http://a:1", "http://b:2"]


def test_every_profile_of_the_engine_is_a_setting() -> None:
    for profile in PROFILES:
        assert load(environ={"HELIUM_ENGINE__PROFILE": profile}).engine.profile == profile


def test_the_shipped_files_are_settings() -> None:
    files = list((ROOT / "configs").glob("*.yaml"))
    assert files
    for file in files:
        load(file, environ={})


def test_every_setting_is_described() -> None:
    for key, (_, description) in known_keys().items():
        assert description.endswith("."), key
    for model in (WorkerSpec, ApiKey):
        for name, info in model.model_fields.items():
            assert info.description, f"{model.__name__}.{name}"


def test_every_setting_is_documented() -> None:
    page = PAGE.read_text("utf-8")
    build = runpy.run_path(str(ROOT / "docs" / "build_configuration.py"), run_name="build_configuration")
    assert build["filled"](page) == page, "run python docs/build_configuration.py"
    assert set(re.findall(r"^\| `([a-z_.]+)` \|", page, re.M)) >= set(known_keys())
    assert f"`{build['example']()}=9000`" in page
    for name in re.findall(r"HELIUM_[A-Z_]+__[A-Z_]+", page):
        assert name.removeprefix("HELIUM_").lower().replace("__", ".") in known_keys(), name
