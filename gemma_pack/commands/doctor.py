"""`gemma-pack doctor`: what this machine can do, and what to install."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from gemma_pack.commands.options import with_console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma_pack.console import Console
    from gemma_pack.doctor import Finding
    from gemma_pack.planning.findings import PlanFinding

COLUMNS: Final = 80
MARKS: Final = {"ok": "✓", "limited": "!", "broken": "✗"}


@click.command(
    epilog="""\b
Examples:
  gemma-pack doctor
  gemma-pack doctor --format json | jq '.findings[] | select(.state != "ok")'"""
)
@with_console
def command(*, console: Console) -> None:
    """Say what this machine can do, what it lacks, and the remedy.

    Looks at Python and packages, GPU and bf16, memory and disk, logins and tools; changes nothing and asks no network.

    \b
    Exit codes: 0, or 12 if gemma-pack itself is not installed as it must be.
    """
    import os
    from dataclasses import asdict

    from gemma_pack.doctor import examine
    from gemma_pack.errors import AccessError, MachineError
    from gemma_pack.oci.credentials import stored_hosts

    try:
        registries: list[str] | AccessError = stored_hosts(os.environ)
    except AccessError as error:  # a finding like any other
        registries = error
    findings = examine(Path.cwd(), registries)
    console.result({"findings": [asdict(finding) for finding in findings]}, "\n".join(finding_lines(findings)))
    broken = [finding.subject for finding in findings if finding.state == "broken"]
    if broken:
        raise MachineError(f"gemma-pack cannot work here as it is: {', '.join(broken)}", hint="see the remedies above")


def finding_lines(findings: Sequence[Finding | PlanFinding]) -> list[str]:
    """Return what was found and the remedies, in lines of 80 columns; a longer word, such as a URL, stays whole."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        lines += _wrapped(f"{MARKS[finding.state]} {finding.subject.ljust(width)}  ", finding.text)
        if finding.remedy:
            lines += _wrapped(f"  {' ' * width}  → ", finding.remedy)
    return lines


def _wrapped(head: str, text: str) -> list[str]:
    import textwrap

    rest = " " * len(head)
    return textwrap.wrap(
        text, COLUMNS, initial_indent=head, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
