"""The command line."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import click

from helium_proxy import __version__
from helium_proxy.errors import ConfigError

_CONFIG = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    envvar="HELIUM_CONFIG",
    help="YAML file of settings.",
)
_SERVER = click.option(
    "--url",
    default="http://127.0.0.1:8080",
    envvar="HELIUM_URL",
    show_default=True,
    help="A running proxy.",
)
_KEY = click.option("--api-key", envvar="HELIUM_API_KEY", help="Its API key, if it asks for one.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="helium-proxy")
def main() -> None:
    """An OpenAI-compatible proxy that schedules agents' calls on vLLM workers.

    Start it in front of your workers, point your agents' base URL at it:

    \b
        helium-proxy serve --worker http://gpu-1:8000 --worker http://gpu-2:8000
        OPENAI_BASE_URL=http://127.0.0.1:8080/v1 python my_agent.py
    """


@main.command()
@_CONFIG
@click.option("--worker", "workers", multiple=True, metavar="URL", help="A vLLM server; may be repeated.")
@click.option("--host", help="Address to listen on [127.0.0.1].")
@click.option("--port", type=int, help="Port to listen on [8080]; 0: any.")
def serve(config_file: Path | None, workers: tuple[str, ...], host: str | None, port: int | None) -> None:
    """Serve the proxy.

    Without any worker (flag, file or HELIUM_WORKERS) it starts embedded engines, which need no GPU: good for a
    look, not for answers.
    """
    from helium_proxy import logs
    from helium_proxy.config import Settings, load
    from helium_proxy.gateway.serve import Server
    from helium_proxy.gateway.serve import serve as run

    overrides: dict[str, Any] = {}
    if workers:
        overrides["workers"] = [{"url": url} for url in workers]
    server = {k: v for k, v in (("host", host), ("port", port)) if v is not None}
    if server:
        overrides["server"] = server

    def read() -> Settings:
        return load(config_file, overrides=overrides)

    settings = _or_fail(read)
    logs.configure(settings.log.level, settings.log.format)

    def started(running: Server) -> None:
        address = running.bound or (settings.server.host, settings.server.port)
        url = f"http://{address[0]}:{address[1]}"
        click.echo(f"helium-proxy {__version__}: {url}/v1, page at {url}/helium/", err=True)

    from helium_proxy.local import embedded_workers

    with embedded_workers(settings) as complete:
        _or_fail(lambda: _run(run(complete, reload=read, started=started)))


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})  # help is its own
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def engine(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Serve an embedded engine.

    It simulates vLLM's scheduling and HTTP interface; its text is made up.
    """
    from helium_proxy.engine.__main__ import main as run

    run.main(args=list(arguments), prog_name="helium-proxy engine", standalone_mode=True)


@main.command()
@click.option("--worker", "workers", multiple=True, metavar="URL", help="Use these workers, not embedded ones.")
@click.option("--once", is_flag=True, help="End after the comparison; otherwise serve on until Ctrl-C.")
@click.option("--port", default=8080, show_default=True, help="The proxy's port; 0: any.")
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1), help="Inputs per workflow.")
@click.option("--model", help="Model to ask for [the first served].")
def demo(workers: tuple[str, ...], once: bool, port: int, batch: int, model: str | None) -> None:
    """Run agent workflows directly and through the proxy, and compare.

    Two embedded engines, the proxy, and the OpenAI client: a map-reduce and a debate over a batch of inputs, first
    round robin straight to the engines, then through the proxy.
    """
    try:
        from helium_proxy.demo import run
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}; install with: pip install '.[demo]'") from None
    sys.exit(_run(run(list(workers), once=once, port=port, batch=batch, model=model)))


@main.command()
@_SERVER
@_KEY
def workers(url: str, api_key: str | None) -> None:
    """List a running proxy's workers."""
    from helium_proxy.terminal import show_workers

    show_workers(url, api_key)


@main.command()
@click.argument("run", required=False)
@_SERVER
@_KEY
@click.option("--limit", default=20, show_default=True, help="How many runs to list.")
@click.option("--workflow", help="Only runs of this workflow.")
def runs(run: str | None, url: str, api_key: str | None, limit: int, workflow: str | None) -> None:
    """List a running proxy's runs, or draw one as a DAG."""
    from helium_proxy.terminal import show_run, show_runs

    if run:
        show_run(url, api_key, run)
    else:
        show_runs(url, api_key, limit=limit, workflow=workflow)


@main.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@_SERVER
@_KEY
@click.option("--analyze", is_flag=True, help="Run the workflow too, and show what happened beside the plan.")
def explain(file: Path, url: str, api_key: str | None, analyze: bool) -> None:
    """Show how a proxy would run a workflow FILE.

    FILE is JSON or YAML, as for POST /v1/workflows.
    """
    from helium_proxy import terminal

    terminal.explain(url, api_key, file, analyze=analyze)


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(f"helium-proxy {__version__} (Python {sys.version.split()[0]})")


def _or_fail(work: Any) -> Any:
    try:
        return work()
    except ConfigError as error:
        raise click.ClickException(error.message) from None


def _run(work: Any) -> Any:
    """Runs a coroutine, on uvloop where there is one."""
    if os.name == "posix":
        import uvloop

        return uvloop.run(work)
    return asyncio.run(work)


if __name__ == "__main__":
    main()
