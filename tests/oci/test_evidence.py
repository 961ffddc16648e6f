"""What is attached to a pushed image, and what a reader makes of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from gemma_pack.checkpoint import RECORD_NAME, file_sha256
from gemma_pack.console import Console
from gemma_pack.errors import AccessError, GateFailedError, GateUndecidedError, InvalidUsageError, RegistryError
from gemma_pack.oci import referrers
from gemma_pack.oci.client import RegistryClient
from gemma_pack.oci.contents import file_digests
from gemma_pack.oci.describe import describe
from gemma_pack.oci.evidence import REPORT_TYPE, attach_evidence, attach_report, find_report, require_writable
from gemma_pack.oci.examination import Evidence, examine, require_passing_report, require_signature
from gemma_pack.oci.manifest import INDEX_TYPE
from gemma_pack.oci.package import package
from gemma_pack.oci.push import push
from gemma_pack.oci.reference import parse_reference
from gemma_pack.oci.referrers import Attachment, attach
from gemma_pack.oci.signing import BUNDLE_TYPE, SigningKey
from gemma_pack.oci.statement import SIGNATURE_PREDICATE, about_image
from gemma_pack.report import REPORT_NAME, report_directory
from tests.oci.faulty import Fault, Faulty, say
from tests.reports.reports import make_report, write_validation

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.oci.push import PushResult
    from gemma_pack.report import Report
    from tests.oci.registry import Registry

QUIET = Console("quiet")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(referrers, "SETTLE_S", 0.0)


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return SigningKey(ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def variant(raw_checkpoint: Callable[..., Path]) -> Path:
    """Return the directory of a validated variant; its report lies beside it."""
    directory = raw_checkpoint("gemma", shards=2, files={"notes/a.txt": "", "notes/b.txt": "b" * 3000})
    write_validation(directory)
    return directory


@pytest.fixture
def pushed(variant: Path, registry: Registry) -> PushResult:
    return push(variant, f"{registry.host}/team/gemma:1", reporter=QUIET)


def report_of(directory: Path) -> Report:
    found = find_report(directory, None, QUIET)
    assert found
    return found


def seen(reference: str, key: SigningKey | None = None) -> dict[str, Evidence]:
    found = examine(describe(reference), key=key.public if key else None)
    assert len({one.kind for one in found}) == len(found)
    return {one.kind: one for one in found}


def test_without_a_key_everything_is_signed_by_nobody(pushed: PushResult, variant: Path):
    attached = attach_evidence(pushed.pinned, variant, report=report_of(variant), reporter=QUIET)
    assert [(one.kind, one.signer) for one in attached] == [("sbom", None), ("provenance", None), ("report", None)]
    found = seen(pushed.reference)
    assert {one.kind: one.digest for one in attached} == {one.kind: one.digest for one in found.values()}
    assert {one.signed for one in found.values()} == {"nobody"}
    assert found["report"].data == (report_directory(variant) / REPORT_NAME).read_bytes()
    assert found["report"].verdict == "pass"
    assert json.loads(found["sbom"].data)["metadata"]["component"]["version"] == pushed.digest
    statement = json.loads(found["provenance"].data)
    assert statement["subject"] == [
        {"name": "gemma-2-9b-it-quantized.w4a16", "digest": {"sha256": pushed.digest.removeprefix("sha256:")}}
    ]


def test_with_a_key_all_is_signed_and_so_are_image_and_files(pushed: PushResult, variant: Path, key: SigningKey):
    attach_evidence(pushed.pinned, variant, report=report_of(variant), key=key, reporter=QUIET)
    found = seen(pushed.reference, key)
    assert set(found) == {"sbom", "provenance", "report", "signature", "model signature"}
    assert {(one.signed, one.signer) for one in found.values()} == {("verified", f"key {key.public.key_id}")}
    assert found["report"].report == report_of(variant)
    require_signature(list(found.values()), "gemma")
    assert {one.signed for one in seen(pushed.reference).values()} == {"unverified"}
    stranger = SigningKey(ec.generate_private_key(ec.SECP256R1()))
    others = seen(pushed.reference, stranger)
    assert {(one.signed, one.signer) for one in others.values()} == {("unverified", f"key {key.public.key_id}")}
    with pytest.raises(RegistryError, match="is a signature of this image by that key"):
        require_signature(list(others.values()), "gemma")


def test_the_same_evidence_again_attaches_nothing_new(pushed: PushResult, variant: Path, key: SigningKey):
    for _ in range(2):
        attach_evidence(pushed.pinned, variant, report=report_of(variant), key=key, reporter=QUIET)
        assert len(seen(pushed.reference)) == 5


def test_what_was_never_quantized_here_gets_a_signature_only(
    registry: Registry, raw_checkpoint: Callable[..., Path], key: SigningKey
):
    source = raw_checkpoint("foreign")
    pushed = push(source, f"{registry.host}/team/foreign:1", reporter=QUIET)
    assert attach_evidence(pushed.pinned, source, report=None, reporter=QUIET) == []
    attach_evidence(pushed.pinned, source, report=None, key=key, reporter=QUIET)
    assert set(seen(pushed.reference, key)) == {"signature", "model signature"}


def test_a_signature_of_another_image_is_invalid(pushed: PushResult, key: SigningKey):
    other = key.sign(about_image("sha256:" + "0" * 64, "gemma", SIGNATURE_PREDICATE, {}))
    attach_raw(pushed, BUNDLE_TYPE, other)
    (found,) = examine(describe(pushed.reference), key=key.public)
    assert (found.signed, found.problem) == ("invalid", "its statement is about another image")
    with pytest.raises(RegistryError):
        require_signature([found], "gemma")


def test_a_forged_signature_is_invalid(pushed: PushResult, key: SigningKey):
    bundle = json.loads(key.sign(about_image(pushed.digest, "gemma", SIGNATURE_PREDICATE, {})))
    stranger = SigningKey(ec.generate_private_key(ec.SECP256R1()))
    theirs = json.loads(stranger.sign(about_image(pushed.digest, "gemma", SIGNATURE_PREDICATE, {})))
    bundle["dsseEnvelope"] = theirs["dsseEnvelope"]  # it still names our key
    attach_raw(pushed, BUNDLE_TYPE, json.dumps(bundle).encode())
    (found,) = examine(describe(pushed.reference), key=key.public)
    assert (found.signed, found.problem) == ("invalid", "it names the key, and the signature is not by that key")


@pytest.mark.parametrize(
    ("artifact_type", "data", "signed"),
    [
        (BUNDLE_TYPE, b"{}", "invalid"),
        (REPORT_TYPE, b"[]", "invalid"),
        (REPORT_TYPE, make_report().encode(), "invalid"),  # of another variant
        ("application/vnd.in-toto+json", b'{"_type":"x"}', "invalid"),
        ("application/vnd.cncf.notary.signature", b"{}", "unread"),
        ("application/\x1b[2Jx", b"{}", "unread"),
    ],
)
def test_what_others_attach_hides_nothing(
    pushed: PushResult, variant: Path, artifact_type: str, data: bytes, signed: str
):
    attach_raw(pushed, artifact_type, data)
    attach_evidence(pushed.pinned, variant, report=report_of(variant), reporter=QUIET)
    first, *ours = examine(describe(pushed.reference))
    assert (first.signed, [one.kind for one in ours]) == (signed, ["sbom", "provenance", "report"])
    assert "\x1b" not in first.kind + first.artifact_type


def attach_raw(pushed: PushResult, artifact_type: str, data: bytes) -> None:
    reference = parse_reference(pushed.pinned)
    with RegistryClient(reference, writable=True) as client:
        subject = client.manifest(pushed.digest).descriptor
        assert subject.media_type == INDEX_TYPE
        attach(client, subject, [Attachment(artifact_type=artifact_type, data=data, title="x")])


def test_verdicts_are_weighed(pushed: PushResult, variant: Path, key: SigningKey):
    def weigh(*, signed_by: SigningKey | None = None) -> Evidence:
        found = examine(describe(pushed.reference), key=signed_by.public if signed_by else None)
        return require_passing_report(found, "gemma", by_key=signed_by is not None)

    report, reference = report_of(variant), parse_reference(pushed.pinned)
    with pytest.raises(RegistryError, match="gemma has no validation report") as nothing:
        weigh()
    assert "gemma-pack validate" in str(nothing.value.hint)
    attach_report(reference, report.model_copy(update={"verdict": "undecided"}))
    with pytest.raises(GateUndecidedError):
        weigh()
    attach_report(reference, report)
    assert weigh().verdict == "pass"
    with pytest.raises(RegistryError, match="no validation report that is signed with that key"):
        weigh(signed_by=key)
    attach_report(reference, report, key=key)
    assert weigh(signed_by=key).signed == "verified"
    attach_report(reference, report.model_copy(update={"verdict": "fail"}))
    with pytest.raises(GateFailedError):
        weigh()
    assert weigh(signed_by=key).verdict == "pass"  # nobody signed that it failed


def test_the_report_beside_the_source_is_found(variant: Path, tmp_path: Path):
    report = report_of(variant)
    layout = package(variant, tmp_path / "gemma.oci", reporter=QUIET).layout
    artifact = package(variant, tmp_path / "gemma.artifact.oci", kind="artifact", reporter=QUIET).layout
    assert report_of(layout) == report_of(artifact) == report
    moved = tmp_path / "elsewhere"
    report_directory(variant).rename(moved)
    assert find_report(layout, None, QUIET) is None
    assert find_report(layout, moved, QUIET) == find_report(layout, moved / REPORT_NAME, QUIET) == report


def test_a_newer_report_on_the_same_weights_counts_and_one_on_others_does_not(
    variant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    layout = package(variant, tmp_path / "gemma.oci", reporter=QUIET).layout
    newer = report_of(variant).model_copy(update={"windows_needed": 7})
    place = report_directory(variant) / REPORT_NAME
    place.write_bytes(newer.encode())
    assert report_of(layout) == report_of(variant) == newer
    place.write_bytes(make_report().encode())
    assert find_report(layout, None, Console("human")) is None
    assert "is about other weights" in capsys.readouterr().err
    with pytest.raises(InvalidUsageError, match="another variant"):
        find_report(layout, place, QUIET)


def test_the_files_of_a_directory_and_of_its_images_have_the_same_digests(variant: Path, tmp_path: Path):
    expected = {
        path.relative_to(variant).as_posix(): (file_sha256(path), path.stat().st_size)
        for path in variant.rglob("*")
        if path.is_file()
    }
    assert {RECORD_NAME, "notes/a.txt"} <= set(expected)
    layouts = [
        package(variant, tmp_path / f"{kind}.oci", kind=kind, reporter=QUIET).layout
        for kind in ("modelcar", "artifact")
    ]
    for source in (variant, *layouts):
        files = file_digests(source, QUIET)
        assert {file.path: (file.sha256, file.size_bytes) for file in files} == expected
        assert [file.path for file in files] == sorted(expected)


def test_model_signing_verifies_what_was_pulled(pushed: PushResult, variant: Path, key: SigningKey, tmp_path: Path):
    from gemma_pack.oci.pull import pull
    from tests.oci.test_signing import public_pem, verifier_of

    attach_evidence(pushed.pinned, variant, report=None, key=key, reporter=QUIET)
    (tmp_path / "model.sig").write_bytes(seen(pushed.reference)["model signature"].data)
    (tmp_path / "key.pub").write_bytes(public_pem(key))
    pulled = pull(pushed.pinned, tmp_path / "pulled", reporter=QUIET).directory
    verifier_of(tmp_path / "key.pub").verify(pulled, tmp_path / "model.sig")


def test_who_may_not_push_is_told_before_the_work(faulty: Faulty, registry: Registry):
    require_writable(parse_reference(f"{registry.host}/team/gemma:1"))
    faulty.faults = [Fault("POST", "/uploads/", say(403), times=9)]
    with pytest.raises(AccessError):
        require_writable(parse_reference(f"{faulty.host}/team/gemma:1"))


def test_the_list_says_what_each_bundle_is_as_cosign_does(pushed: PushResult, variant: Path, key: Any):
    attach_evidence(pushed.pinned, variant, report=report_of(variant), key=key, reporter=QUIET)
    with RegistryClient(parse_reference(pushed.pinned)) as client:
        index = json.loads(client.manifest(pushed.digest.replace(":", "-")).data)
    predicates = {one["annotations"]["dev.sigstore.bundle.predicateType"] for one in index["manifests"]}
    assert {"https://sigstore.dev/cosign/sign/v1", "https://slsa.dev/provenance/v1"} <= predicates
    assert {one["artifactType"] for one in index["manifests"]} == {BUNDLE_TYPE}
