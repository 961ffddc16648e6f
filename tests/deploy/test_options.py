"""What the user may choose, and what is refused before anything is asked of a registry."""

from __future__ import annotations

import pytest

from gemma_pack.deploy.options import Options
from gemma_pack.errors import InvalidUsageError


@pytest.mark.parametrize(
    "options",
    [
        {"name": ""},
        {"name": "Gemma"},
        {"name": "9b"},
        {"name": "a-"},
        {"name": "a.b"},
        {"name": "a" * 41},
        {"name": 'a"\nkind: Pod'},
        {"pull_secret": "A"},
        {"pull_secret": "a" * 254},
        {"server_image": "a b"},
        {"server_image": "-a"},
    ],
)
def test_names_that_a_server_refuses_are_refused_here(options: dict[str, str]) -> None:
    with pytest.raises(InvalidUsageError, match="is no"):
        Options(**options)  # type: ignore[arg-type]


def test_good_names_are_taken() -> None:
    Options(name="a", pull_secret="0.a-b", server_image="quay.io:443/a/b@sha256:0")


def test_an_option_without_use_for_the_target_is_an_error() -> None:
    Options(name="a").refuse_for("vllm", "server_image", "pull_secret")
    with pytest.raises(InvalidUsageError, match="--target vllm has no use for --pull-secret"):
        Options(pull_secret="a").refuse_for("vllm", "server_image", "pull_secret")
