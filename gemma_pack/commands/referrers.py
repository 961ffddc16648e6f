"""`gemma-pack referrers`: what is attached to an image, and who signed it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_pack.commands.options import registry_options, verifying_option, with_console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma_pack.console import Console
    from gemma_pack.oci.examination import Evidence


@click.command(
    epilog="""\b
Examples:
  gemma-pack referrers quay.io/team/gemma-2-9b-it:w4a16
  gemma-pack referrers quay.io/team/gemma-2-9b-it:w4a16 \\
      --verify-key my.pub -o evidence"""
)
@click.argument("reference", metavar="REF")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A directory to write the documents into.")
@verifying_option
@registry_options
@with_console
def command(
    reference: str,
    output: Path | None,
    verify_key: Path | None,
    *,
    plain_http: bool,
    ca_file: Path | None,
    console: Console,
) -> None:
    """Show the reports and signatures attached to an image.

    Of each document it says who signed it. What nobody signed could have been attached by anybody who may push.
    With --verify-key signatures are checked, and the image itself must be signed with that key: if it is not, the exit
    code is 1.
    """
    from gemma_pack.disk import refuse_existing, staged_directory
    from gemma_pack.oci.describe import describe
    from gemma_pack.oci.examination import examine, require_signature
    from gemma_pack.oci.retry import Retry
    from gemma_pack.oci.signing import load_public_key
    from gemma_pack.oci.source import registry_reference

    key = load_public_key(verify_key) if verify_key else None
    if output:
        refuse_existing(output)
    retry = Retry(tell=console.status)
    image = describe(registry_reference(reference), plain_http=plain_http, ca_file=ca_file, retry=retry)
    found = examine(image, key=key, plain_http=plain_http, ca_file=ca_file, retry=retry)
    if output:
        with staged_directory(output) as staging:
            for one in found:
                if one.data:
                    (staging / one.file_name).write_bytes(one.data)
    data = {"reference": image.pinned, "referrers": [one.model_dump() for one in found]}
    console.result(data, f"{_text(found)}\n\n{image.pinned}")
    if key:
        require_signature(found, str(image.pinned))
    elif any(one.signed == "unverified" for one in found):
        console.hint("--verify-key FILE checks signatures")


def _text(found: Sequence[Evidence]) -> str:
    from gemma_pack.console import table

    if not found:
        return "nothing is attached"
    rows = [(one.kind[:32], one.verdict or "", _signer(one), one.digest[7:19]) for one in found]
    problems = [f"{one.digest[7:19]}: {one.problem}" for one in found if one.problem]
    return "\n".join([table(rows, header=("document", "verdict", "signed by", "digest")), *problems])


def _signer(one: Evidence) -> str:
    if one.signed not in {"verified", "unverified"}:
        return {"nobody": "nobody", "unread": "not read here", "invalid": "INVALID"}[one.signed]
    signer = str(one.signer)
    short = signer[:20] if signer.startswith("key ") else signer[:40]
    return short if one.signed == "verified" else f"{short}, not checked"
