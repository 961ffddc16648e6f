"""`gemma-pack serve`: a variant, or an image of one, behind the OpenAI API of a vLLM that is installed here."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from gemma_pack.commands.options import registry_options, with_console
from gemma_pack.errors import GemmaPackError, InvalidUsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gemma_pack.console import Console
    from gemma_pack.vllm import VllmServer


OURS: Final = {
    "--host": "--host ADDRESS",
    "--port": "--port PORT",
    "--served-model-name": "--name NAME",
    "--model": "DIR|REF",
}
"""Options of vLLM's that have one of ours: we ask the server by them."""


@click.command(
    "serve",
    epilog="""\b
Examples:
  gemma-pack serve gemma-2-9b-it-quantized.w4a16
  gemma-pack serve quay.io/team/gemma-2-9b-it:w4a16 --port 8080 -- \\
      --max-model-len=4096""",
)
@click.argument("model", metavar="DIR|REF")
@click.argument("vllm_options", metavar="[-- VLLM-OPTIONS]", nargs=-1, type=click.UNPROCESSED)
@click.option("--name", help="What clients call the model  [default: the directory's or the repository's name]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port to listen on.")
@registry_options
@with_console
def command(
    model: str,
    vllm_options: tuple[str, ...],
    name: str | None,
    host: str,
    port: int,
    *,
    plain_http: bool,
    ca_file: Path | None,
    console: Console,
) -> None:
    """Serve a checkpoint with vLLM until Ctrl-C.

    An image is pulled into gemma-pack's cache first, by its digest, and found there the next time. vLLM is started
    from the Python that GEMMA_PACK_VLLM names, else from this one or the PATH, in bfloat16. When the server is healthy,
    its address and a call that shows that it answers are printed. Options behind -- are vLLM's own.
    """
    from gemma_pack.checkpoint import Checkpoint, read_json
    from gemma_pack.deploy.server import curl_of, require_servable
    from gemma_pack.oci.source import registry_reference
    from gemma_pack.reports.card import has_chat_template
    from gemma_pack.vllm import find_vllm, serving

    ours = [option for option in vllm_options if option.partition("=")[0].replace("_", "-") in OURS]
    if ours:
        name = ours[0].partition("=")[0].replace("_", "-")
        raise InvalidUsageError(f"{name} stands behind --, and is ours to say", hint=f"gemma-pack serve {OURS[name]}")
    directory = Path(model)
    if directory.is_dir():
        Checkpoint.open(directory)  # before a server starts for nothing
    else:
        registry_reference(model)
    python = find_vllm()
    called = name or directory.resolve().name
    if not directory.is_dir():
        directory, repository = _pull(model, plain_http=plain_http, ca_file=ca_file, console=console)
        called = name or repository
    require_servable(read_json(directory / "config.json"), model)
    chat = has_chat_template(directory)
    arguments = ["--dtype=bfloat16", f"--served-model-name={called}", *vllm_options]
    with _kept_after_failure() as private:
        log = private / "vllm.log"
        console.status(f"starting vLLM on {directory}; its log: {log}")
        with serving(python, directory, arguments, host=host, port=port, log=log) as server:
            call = curl_of(called, server.base_url, chat=chat)
            if os.environ.get("VLLM_API_KEY"):  # which vLLM itself reads, and then asks of each call
                call += ' -H "Authorization: Bearer $VLLM_API_KEY"'
            data = {"base_url": f"{server.base_url}/v1", "model": called, "directory": str(directory)}
            try:
                console.result({**data, "call": call, "log": str(log)}, call)
                console.status(f"healthy after {server.start_seconds:.0f} s at {server.base_url}/v1; Ctrl-C stops it")
                _wait(server)
            except KeyboardInterrupt:  # which is how a server is meant to end
                console.status("stopping")


@contextmanager
def _kept_after_failure() -> Iterator[Path]:
    """Yield a private directory that goes at the end, but not with a log in it of a server that failed."""
    directory, kept = Path(tempfile.mkdtemp(prefix="gemma-pack-serve-")), False
    try:
        yield directory
    except GemmaPackError:
        kept = any(directory.iterdir())
        raise
    finally:
        if not kept:
            shutil.rmtree(directory)


def _wait(server: VllmServer) -> None:
    """Wait as long as the server lives.

    Raises:
        GemmaPackError: the server ended by itself.
    """
    from gemma_pack.vllm import last_words

    while server.process.poll() is None:
        time.sleep(0.2)
    raise GemmaPackError(
        f"vLLM ended with exit code {server.process.returncode}:{last_words(server.log)}",
        hint=f"{server.log} says more",
    )


def _pull(reference: str, *, plain_http: bool, ca_file: Path | None, console: Console) -> tuple[Path, str]:
    """Pull an image into the cache, under its digest; return the directory and the last part of the repository."""
    from gemma_pack.oci.describe import describe
    from gemma_pack.oci.pull import pull
    from gemma_pack.oci.retry import Retry
    from gemma_pack.oci.source import registry_reference
    from gemma_pack.sources import cache_directory

    parsed = registry_reference(reference)
    found = describe(parsed, plain_http=plain_http, ca_file=ca_file, retry=Retry(tell=console.status))
    pinned = parsed.pinned(found.digest)
    directory = cache_directory() / "images" / found.digest.replace(":", "-")
    directory.parent.mkdir(parents=True, exist_ok=True)
    pull(pinned, directory, plain_http=plain_http, ca_file=ca_file, reporter=console)
    return directory, parsed.repository.rpartition("/")[2]
