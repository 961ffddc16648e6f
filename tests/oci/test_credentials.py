from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.errors import AccessError, MachineError
from gemma_pack.oci import credentials
from gemma_pack.oci.credentials import Credentials, config_files, find_credentials
from gemma_pack.oci.reference import parse_reference

if TYPE_CHECKING:
    from collections.abc import Callable

QUAY = parse_reference("quay.io/team/gemma:1")


def auth(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


@pytest.fixture
def config(tmp_path: Path) -> Callable[[Any], dict[str, str]]:
    """Return a function that writes a docker config.json and returns the environment that leads to it."""

    def write(content: Any) -> dict[str, str]:
        (tmp_path / "docker").mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "docker" / "config.json").write_text(text)
        return {"DOCKER_CONFIG": str(tmp_path / "docker"), "HOME": str(tmp_path / "home")}

    return write


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that installs docker-credential-test, a shell script, first in PATH."""

    def write(script: str) -> Path:
        path = tmp_path / "bin" / "docker-credential-test"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
        return path

    return write


def test_files_are_searched_from_the_explicit_to_the_default():
    everywhere = {"HOME": "/h", "XDG_RUNTIME_DIR": "/run/u"}
    defaults = [
        Path("/run/u/containers/auth.json"),
        Path("/h/.config/containers/auth.json"),
        Path("/h/.docker/config.json"),
    ]
    assert config_files(everywhere) == defaults
    assert config_files(everywhere | {"DOCKER_CONFIG": "/d"}) == [Path("/d/config.json"), *defaults[:2]]
    assert config_files(everywhere | {"DOCKER_CONFIG": "/d", "REGISTRY_AUTH_FILE": "/a.json"}) == [Path("/a.json")]


def test_a_stored_login_is_found(config: Callable[[Any], dict[str, str]]):
    found = find_credentials(QUAY, config({"auths": {"quay.io": auth("hilbert:open:sesame")}}))
    assert found == Credentials(username="hilbert", password="open:sesame")


def test_no_file_and_no_entry_mean_no_login(config: Callable[[Any], dict[str, str]], tmp_path: Path):
    assert find_credentials(QUAY, {"HOME": str(tmp_path)}) is None
    assert find_credentials(QUAY, config({})) is None
    assert find_credentials(QUAY, config({"auths": {"ghcr.io": auth("a:b"), "quay.io": {}}})) is None


def test_the_longest_matching_name_wins(config: Callable[[Any], dict[str, str]]):
    names = {"quay.io": auth("host:1"), "quay.io/team": auth("team:2"), "quay.io/team/other": auth("other:3")}
    found = find_credentials(QUAY, config({"auths": names}))
    assert found
    assert found.username == "team"


@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "docker.io", "index.docker.io", "registry-1.docker.io"])
def test_docker_hub_is_known_by_its_old_names(config: Callable[[Any], dict[str, str]], key: str):
    found = find_credentials(parse_reference("team/gemma"), config({"auths": {key: auth("hub:x")}}))
    assert found
    assert found.username == "hub"


@pytest.mark.parametrize("key", ["https://quay.io", "http://quay.io/v2/", "quay.io"])
def test_keys_that_are_urls_match_their_host(config: Callable[[Any], dict[str, str]], key: str):
    assert find_credentials(QUAY, config({"auths": {key: auth("u:p")}})) is not None


def test_an_identity_token_is_taken_with_its_user(config: Callable[[Any], dict[str, str]]):
    entry = auth("00000000:") | {"identitytoken": "t0ken"}
    found = find_credentials(QUAY, config({"auths": {"quay.io": entry}}))
    assert found
    assert found.identity_token == "t0ken"


def test_a_helper_is_asked_with_the_host_on_stdin(
    config: Callable[[Any], dict[str, str]], helper: Callable[[str], Path], tmp_path: Path
):
    helper(f'cat > {tmp_path}/asked; test "$1" = get && echo \'{{"Username": "robot", "Secret": "s"}}\'')
    environ = config({"credHelpers": {"quay.io": "test"}, "auths": {"quay.io": auth("other:x")}})
    assert find_credentials(QUAY, environ) == Credentials(username="robot", password="s")
    assert (tmp_path / "asked").read_text() == "quay.io"


def test_the_general_store_answers_for_entries_without_a_secret(
    config: Callable[[Any], dict[str, str]], helper: Callable[[str], Path], tmp_path: Path
):
    helper(f'cat > {tmp_path}/asked; echo \'{{"Username": "<token>", "Secret": "refresh"}}\'')
    environ = config({"credsStore": "test", "auths": {"https://index.docker.io/v1/": {}}})
    assert find_credentials(parse_reference("gemma"), environ) == Credentials(identity_token="refresh")
    assert (tmp_path / "asked").read_text() == "https://index.docker.io/v1/"


def test_a_helper_that_knows_no_login_is_no_error(
    config: Callable[[Any], dict[str, str]], helper: Callable[[str], Path]
):
    helper("echo credentials not found in native keychain; exit 1")
    assert find_credentials(QUAY, config({"credsStore": "test"})) is None


@pytest.mark.parametrize("script", ["echo no bus; exit 7", "echo nonsense", "echo '[]'", "sleep 20"])
def test_a_helper_that_fails_is_an_error_without_its_output(
    config: Callable[[Any], dict[str, str]],
    helper: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    script: str,
):
    monkeypatch.setattr(credentials, "HELPER_TIMEOUT_S", 0.5)
    helper(f"exec {script}" if script.startswith("sleep") else script)
    with pytest.raises(AccessError) as caught:
        find_credentials(QUAY, config({"credsStore": "test"}))
    assert "docker-credential-test" in caught.value.message
    assert "nonsense" not in caught.value.message


def test_a_missing_helper_is_a_missing_tool(config: Callable[[Any], dict[str, str]]):
    with pytest.raises(MachineError, match="docker-credential-absent is not installed") as caught:
        find_credentials(QUAY, config({"credsStore": "absent"}))
    assert caught.value.exit_code == 12


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '"text"',
        {"auths": ["quay.io"]},
        {"auths": {"quay.io": {"auth": "%%%"}}},
        {"auths": {"quay.io": {"auth": 7}}},
        {"credHelpers": {"quay.io": "../../bin/sh"}},
    ],
)
def test_a_broken_file_is_named(config: Callable[[Any], dict[str, str]], content: Any):
    with pytest.raises(AccessError, match=r"config\.json"):
        find_credentials(QUAY, config(content))


def test_secrets_never_show():
    text = repr(Credentials(username="u", password="p4ss", identity_token="t0ken"))
    assert "p4ss" not in text
    assert "t0ken" not in text
