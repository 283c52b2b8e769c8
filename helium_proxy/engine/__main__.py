"""``python -m helium_proxy.engine``: one embedded engine over HTTP."""

from __future__ import annotations

import os
import signal
import threading

import click

from helium_proxy.errors import ConfigError

from .config import EngineConfig
from .profile import PROFILES
from .server import run_engine


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--host", default="127.0.0.1")
@click.option("--port", default=8100, help="0: the system chooses.")
@click.option("--model", default="demo", help="The model's name.")
@click.option("--profile", default="instant", type=click.Choice(list(PROFILES)), help="How fast it is.")
@click.option("--block-size", type=int, help="Tokens a block. Default: the profile's.")
@click.option("--num-blocks", type=int, help="Blocks of KV cache. Default: the profile's capacity.")
@click.option("--max-model-len", type=int, help="Longest sequence in tokens.")
@click.option("--max-num-seqs", type=int, help="Most sequences in a batch.")
@click.option("--max-num-batched-tokens", type=int, help="Most tokens in a step.")
@click.option("--scheduling-policy", default="fcfs", type=click.Choice(["fcfs", "priority"]))
@click.option("--pin-budget", default=0.3, help="Share of the blocks that pins may hold.")
@click.option("--seed", default=0, help="Another seed, other replies.")
@click.option("--time-scale", default=1.0, help="Engine seconds per real second.")
@click.option("--api-key", envvar="VLLM_API_KEY", help="Required of clients, if given.")
@click.option("--kv-events", help="ZMQ endpoint to publish KV events on.")
@click.option("--kv-events-replay", help="ZMQ endpoint to replay them from.")
@click.option("--until-stdin-ends", is_flag=True, help="End with whoever holds the other end of standard input.")
def main(host: str, port: int, scheduling_policy: str, until_stdin_ends: bool, **settings: object) -> None:
    """Serve an embedded engine with vLLM's HTTP interface."""
    if until_stdin_ends:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        config = EngineConfig(policy=scheduling_policy, **settings)  # type: ignore[arg-type]
        run_engine(config, host, port)
    except ConfigError as error:
        raise click.UsageError(error.message) from None


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
