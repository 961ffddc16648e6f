"""Registry credentials, from the files and helpers that `podman login` and `docker login` write.

The first file that knows the registry wins; inside a file a helper of that registry wins over a stored
login, and a login over the general store. Nothing is asked for before a registry refuses an anonymous request.

Sources: containers-auth.json(5); https://docs.docker.com/reference/cli/docker/login/#credential-stores.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gemma_pack.errors import AccessError, MachineError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gemma_pack.oci.reference import Reference

HELPER_TIMEOUT_S: Final = 30.0
_HUB_KEY: Final = "https://index.docker.io/v1/"
_TOKEN_USER: Final = "<token>"  # noqa: S105 - a helper's mark for "the secret is an identity token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """A login. The secrets are left out of `repr`, so that no log or traceback shows them."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of an Authorization header (RFC 7617)."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


def find_credentials(reference: Reference, environ: Mapping[str, str] | None = None) -> Credentials | None:
    """Return the stored login for the registry of `reference`; None where there is none.

    Raises:
        AccessError: a file is broken, or a helper failed.
        MachineError: a helper that a file names is not installed.
    """
    for path in config_files(os.environ if environ is None else environ):
        found = _from_file(path, reference)
        if found:
            return found
    return None


def stored_hosts(environ: Mapping[str, str]) -> list[str]:
    """Return the registries, or parts of them, that the files know a login or a helper for, sorted.

    Raises:
        AccessError: a file is broken.
    """
    hosts: set[str] = set()
    for path in config_files(environ):
        config = _read(path, "HOST")
        for section in ("auths", "credHelpers"):
            hosts |= {_normalized(key) for key in config[section]}
    return sorted(hosts)


def config_files(environ: Mapping[str, str]) -> list[Path]:
    """Return the files to read, in order, whether or not they exist.

    REGISTRY_AUTH_FILE stands alone, as it does for podman and skopeo; DOCKER_CONFIG, being explicit, comes before
    the places that are searched by default.
    """
    explicit = environ.get("REGISTRY_AUTH_FILE")
    if explicit:
        return [Path(explicit)]
    home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    docker = environ.get("DOCKER_CONFIG")
    runtime = environ.get("XDG_RUNTIME_DIR")
    config_home = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    files = [Path(docker) / "config.json"] if docker else []
    if runtime:
        files.append(Path(runtime) / "containers" / "auth.json")
    files.append(config_home / "containers" / "auth.json")
    return files if docker else [*files, home / ".docker" / "config.json"]


def _read(path: Path, host: str) -> dict[str, Any]:
    """Return a file of logins with both its sections, empty ones where there is no file; `host` is for the hint."""
    anew = f"podman login {host} writes it anew"
    try:
        config = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {"auths": {}, "credHelpers": {}}
    except OSError as error:
        raise AccessError(f"{path} cannot be read: {error.strerror}", hint="give yourself read access to it") from error
    except ValueError as error:
        raise AccessError(f"{path} is not JSON", hint=anew) from error
    if not isinstance(config, dict):
        raise AccessError(f"{path} is no file of logins", hint=anew)
    sections = {name: config.get(name) or {} for name in ("auths", "credHelpers")}
    if not all(isinstance(section, dict) for section in sections.values()):
        raise AccessError(f"{path} is no file of logins", hint=anew)
    return {**config, **sections}


def _from_file(path: Path, reference: Reference) -> Credentials | None:
    config = _read(path, reference.host)
    helper = _lookup(config["credHelpers"], reference)
    if helper:
        return _from_helper(helper, reference, path)
    entry = _lookup(config["auths"], reference)
    if isinstance(entry, dict):
        credentials = _from_entry(entry, path, reference)
        if credentials:
            return credentials
    store = config.get("credsStore")
    return _from_helper(store, reference, path) if store else None


def _lookup(section: Mapping[str, Any], reference: Reference) -> Any:  # noqa: ANN401 - parsed JSON
    """Return the entry of the longest key that covers the repository: `quay.io/team/name` before `quay.io`."""
    by_name = {_normalized(key): value for key, value in section.items()}
    name = f"{reference.host}/{reference.repository}"
    while name:
        if name in by_name:
            return by_name[name]
        name = name.rpartition("/")[0]
    return None


def _normalized(key: str) -> str:
    """Reduce what old clients wrote, such as `https://index.docker.io/v1/`, to `docker.io`."""
    bare = re.sub(r"^https?://", "", key)
    bare = re.sub(r"/(v[12]/?)?$", "", bare)
    return "docker.io" if bare in {"index.docker.io", "registry-1.docker.io"} else bare


def _from_entry(entry: Mapping[str, Any], path: Path, reference: Reference) -> Credentials | None:
    token = entry.get("identitytoken") or ""
    username, password = entry.get("username") or "", entry.get("password") or ""
    if entry.get("auth"):
        try:
            text = base64.b64decode(entry["auth"], validate=True).decode()
        except (binascii.Error, ValueError, TypeError) as error:
            raise AccessError(
                f"{path} has a broken login for {reference.host}", hint=f"podman login {reference.host} writes it anew"
            ) from error
        username, _, password = text.partition(":")
        password = password.rstrip("\0")  # docker pads so
    if not (token or password):
        return None
    return Credentials(username=str(username), password=str(password), identity_token=str(token))


def _from_helper(name: Any, reference: Reference, path: Path) -> Credentials | None:  # noqa: ANN401 - parsed JSON
    """Ask `docker-credential-NAME get`: the registry on stdin, a JSON object on stdout."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise AccessError(f"{path} names no valid credential helper: {name!r}")
    program = shutil.which(f"docker-credential-{name}")
    if program is None:
        raise MachineError(
            f"{path} names the credential helper {name}, and docker-credential-{name} is not installed",
            hint=f"install it, or take {name} out of {path}",
        )
    server = _HUB_KEY if reference.host == "docker.io" else reference.host
    try:
        answer = subprocess.run(  # noqa: S603 - a program found by PATH, named by the user's own file
            [program, "get"], input=server.encode(), capture_output=True, timeout=HELPER_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise AccessError(
            f"docker-credential-{name} gave no answer in {HELPER_TIMEOUT_S:.0f} s",
            hint="run it by hand to see what it waits for",
        ) from error
    if answer.returncode != 0:
        if b"not found" in answer.stdout + answer.stderr:  # the helpers' way to say: no login for this registry
            return None
        raise AccessError(
            f"docker-credential-{name} failed with code {answer.returncode} for {server}",
            hint=f"echo {server} | docker-credential-{name} get shows why",
        )
    try:
        login = json.loads(answer.stdout)
        username, secret = login["Username"], login["Secret"]
    except (ValueError, KeyError, TypeError) as error:
        raise AccessError(f"docker-credential-{name} gave no Username and Secret for {server}") from error
    if username == _TOKEN_USER:
        return Credentials(identity_token=str(secret))
    return Credentials(username=str(username), password=str(secret))
