"""What README, docs and help tell people to type is what the command line takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gemma_pack.commands import VERBS, cli
from tests.command_lines import calls, complaints

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_LINES_OF_A_WAY = 6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_call_on_a_page_is_one_that_there_is(page: Path) -> None:
    assert [complaint for words in calls(page.read_text("utf-8")) for complaint in complaints(words)] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_example_of_the_help_is_one_that_there_is(verb: str) -> None:
    command = cli.get_command(None, verb)  # type: ignore[arg-type]  # it asks nothing of the context
    assert command
    assert command.epilog
    found = calls(f"```sh\n{command.epilog}\n```\n")
    assert found
    assert [complaint for words in found for complaint in complaints(words)] == []


def test_the_way_to_each_system_is_short() -> None:
    section = PAGES[0].read_text("utf-8").split("\n## Serve it\n")[1].split("\n## ")[0]
    systems = re.findall(r"^\*\*([^*]+)\*\*", section, re.MULTILINE)
    blocks = re.findall(r"^```\w+\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert systems == [
        *("vLLM", "Red Hat AI Inference Server", "RHEL AI", "OpenShift AI", "transformers 5", "A terminal")
    ]
    assert len(blocks) == len(systems)
    assert max(block.count("\n") for block in blocks) <= MAX_LINES_OF_A_WAY


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("gemma-pack deply REF", "there is no command deply"),
        ("gemma-pack deploy REF --targt vllm", "--targt"),
        ("gemma-pack deploy REF --target openshift", "openshift"),
        ("gemma-pack serve DIR -- --max-model-len=4096", None),
        ('X=1 gemma-pack pull "$IMAGE" -o DIR && sh DIR/x.sh', None),
    ],
)
def test_a_wrong_call_would_be_found(line: str, complaint: str | None) -> None:
    [words] = calls(f"```sh\n{line}\n```\n")
    found = complaints(words)
    assert (complaint in found[0]) if complaint else found == []
