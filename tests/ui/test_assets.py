"""The page's files: served with the right headers, complete, self-contained, unchanged copies of what is vendored."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from helium_proxy.ui import assets, ui_routes

STATIC = Path(__file__).parents[2] / "helium_proxy" / "ui" / "static"
OURS = [path for path in STATIC.iterdir() if path.suffix in (".js", ".css", ".html")]


@pytest.fixture
def client() -> httpx.AsyncClient:
    transport = httpx.ASGITransport(Starlette(routes=ui_routes()))
    return httpx.AsyncClient(transport=transport, base_url="http://proxy", follow_redirects=True)


async def test_page_is_revalidated_and_its_assets_are_kept_for_ever(client: httpx.AsyncClient) -> None:
    page = await client.get("/helium/")
    assert page.status_code == 200
    assert page.headers["cache-control"] == "no-cache"
    links = re.findall(r'(?:href|src)="(assets/[^"]+)"', page.text)
    assert len(links) >= 4
    for link in links:
        asset = await client.get(f"/helium/{link}")
        assert asset.status_code == 200, link
        assert "immutable" in asset.headers["cache-control"]


async def test_an_old_version_gets_the_current_file_but_must_ask_again(client: httpx.AsyncClient) -> None:
    answer = await client.get("/helium/assets/0123456789abcdef/app.js")
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-cache")


@pytest.mark.parametrize("path", ["/helium/", f"/helium/assets/{assets().version}/app.js"])
async def test_equal_content_is_not_sent_twice(client: httpx.AsyncClient, path: str) -> None:
    first = await client.get(path)
    again = await client.get(path, headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]


async def test_nothing_but_our_own_scripts_and_styles_may_run(client: httpx.AsyncClient) -> None:
    policy = (await client.get("/helium/")).headers["content-security-policy"]
    rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == "'none'"


async def test_page_without_its_slash_leads_to_it(client: httpx.AsyncClient) -> None:
    answer = await client.get("/helium", follow_redirects=False)
    assert answer.status_code == 308
    assert client.base_url.join("/helium").join(answer.headers["location"]).path == "/helium/"


@pytest.mark.parametrize("path", ["nothing.js", "../__init__.py", "%2e%2e/__init__.py", "vendor/README.md"])
async def test_only_assets_are_served(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(f"/helium/assets/{assets().version}/{path}")).status_code == 404


def test_every_import_and_asset_exists() -> None:
    files = assets().files
    imported = {name for path in OURS for name in re.findall(r'from "\./([^"]+)"', path.read_text())}
    linked = set(re.findall(r'assets/\{\{version\}\}/([^"]+)"', (STATIC / "index.html").read_text()))
    assert imported | linked <= set(files)
    unused = set(files) - imported - linked - {"index.html"}
    assert not unused, f"served but never loaded: {unused}"


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_own_files_are_small_and_name_no_other_host(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") < 400
    hosts = set(re.findall(r"https?://([\w.-]+)", text)) - {"www.w3.org"}
    assert not hosts, "the page must work offline"


def test_vendored_code_is_what_was_published_and_carries_its_licence() -> None:
    table = (STATIC / "vendor" / "README.md").read_text()
    rows = re.findall(r"\| `([\w.]+)` \|.*?(`LICENSE[^|]*)\| `([0-9a-f]{64})` \|", table)
    scripts = {path.name for path in (STATIC / "vendor").glob("*.js")}
    assert {name for name, *_ in rows} == scripts
    for name, licences, expected in rows:
        assert hashlib.sha256((STATIC / "vendor" / name).read_bytes()).hexdigest() == expected
        for licence in re.findall(r"`(LICENSE[\w.]*)`", licences):
            assert "Permission is hereby granted" in (STATIC / "vendor" / licence).read_text()
