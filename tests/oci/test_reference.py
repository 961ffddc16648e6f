from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_pack.errors import InvalidUsageError
from gemma_pack.oci.reference import Reference, is_loopback, parse_reference

DIGEST = "sha256:" + "0123456789abcdef" * 4

_alphanumeric = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=8)
_component = st.builds(
    lambda first, rest: first + "".join(separator + word for separator, word in rest),
    _alphanumeric,
    st.lists(st.tuples(st.sampled_from([".", "_", "__", "-", "---"]), _alphanumeric), max_size=2),
)
_repositories = st.lists(_component, min_size=1, max_size=3).map("/".join)
_hosts = st.one_of(
    st.sampled_from(["quay.io", "localhost", "localhost:5000", "127.0.0.1:49152", "[::1]:5000", "Registry"]),
    st.builds(lambda label, port: f"{label}.example.com:{port}", _alphanumeric, st.integers(1, 65535)),
)
_tags = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,30}", fullmatch=True)
_references = st.builds(
    Reference,
    host=_hosts,
    repository=_repositories,
    tag=st.none() | _tags,
    digest=st.none() | st.just(DIGEST),
)


@given(_references)
def test_a_reference_written_out_reads_back_as_itself(reference: Reference):
    assert parse_reference(str(reference)) == reference


@given(st.text(max_size=60) | st.text("aA0.:/@-_[]", max_size=20))
def test_any_text_is_a_reference_or_a_usage_error(text: str):
    try:
        reference = parse_reference(text)
    except InvalidUsageError:
        return
    assert parse_reference(str(reference)) == reference


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("gemma", "docker.io/library/gemma"),
        ("team/gemma:1", "docker.io/team/gemma:1"),
        ("docker.io/gemma", "docker.io/library/gemma"),
        ("index.docker.io/team/gemma", "docker.io/team/gemma"),
        ("localhost/gemma", "localhost/gemma"),
        ("localhost:5000/gemma:a", "localhost:5000/gemma:a"),
        ("Registry/gemma", "Registry/gemma"),
        ("quay.io/a/b/c:v1@" + DIGEST, "quay.io/a/b/c:v1@" + DIGEST),
        ("[::1]:5000/gemma", "[::1]:5000/gemma"),
        ("gemma:5000", "docker.io/library/gemma:5000"),
    ],
)
def test_short_forms_mean_what_they_mean_to_docker(text: str, canonical: str):
    assert str(parse_reference(text)) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "",
        "https://quay.io/team/gemma",
        "quay.io/Team/gemma",
        "quay.io/team//gemma",
        "quay.io/team/gemma:",
        "[::::]/gemma",
        "xn--a.example/gemma",
        f"{'a' * 64}.example/gemma",
        "quay.io/team/gemma:-x",
        "quay.io/team/gemma:" + "t" * 129,
        "quay.io/team/gemma@sha256:abc",
        "quay.io/team/gemma@md5:" + "0" * 32,
        "quay.io/../etc/passwd",
        "quay.io/team/a___b",
        "quay.io/team/gemma@",
        "-bad-.io/team/gemma",
        "quay.io/" + "a" * 256,
        "quay.io/team/gemma\n",
    ],
)
def test_what_the_grammar_forbids_is_refused_with_a_hint(text: str):
    with pytest.raises(InvalidUsageError) as caught:
        parse_reference(text)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_the_digest_wins_over_the_tag_and_latest_is_the_default():
    assert parse_reference("quay.io/a:v1@" + DIGEST).target == DIGEST
    assert parse_reference("quay.io/a:v1").target == "v1"
    assert parse_reference("quay.io/a").target == "latest"


def test_docker_hub_answers_at_its_own_api_host():
    assert parse_reference("gemma").api_host == "registry-1.docker.io"
    assert parse_reference("quay.io/gemma").api_host == "quay.io"


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.9.1", "::1"])
def test_loopback(name: str):
    assert is_loopback(name)


@pytest.mark.parametrize("name", ["localhost.example.com", "10.0.0.1", "0.0.0.0", "::", "127.0.0.1.nip.io"])  # noqa: S104 - read, not bound
def test_not_loopback(name: str):
    assert not is_loopback(name)
