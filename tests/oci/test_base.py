"""Bases: the embedded one is what it says, others are read with care, and what a consumer cannot unpack is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.console import Console
from gemma_pack.errors import InvalidUsageError, RegistryError
from gemma_pack.oci import base_registry
from gemma_pack.oci.base import DEFAULT_PLATFORMS, BaseChoice, load_base
from gemma_pack.oci.base_registry import names_registry
from gemma_pack.oci.manifest import GZIP_LAYER_TYPE, LAYER_TYPE, Platform
from gemma_pack.oci.push import push
from tests.oci.faulty import Fault, cut_download
from tests.oci.registry import running_registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemma_pack.oci.manifest import Descriptor
    from tests.oci.faulty import Faulty
    from tests.oci.registry import Registry

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")


def test_the_embedded_base_is_kserves_link_and_wait_for_both_architectures() -> None:
    bases = load_base(BaseChoice("embedded"))
    assert [base.platform for base in bases] == [AMD64, ARM64]
    for base in bases:
        assert base.runtime
        assert base.runtime["Entrypoint"] == ["/bin/link-model-and-wait"]
        assert base.name
        assert base.name.startswith("quay.io/opendatahub/odh-modelcar-base-image:")
        (layer,) = base.layers
        data = b"".join(layer.iter_chunks())
        assert f"sha256:{hashlib.sha256(data).hexdigest()}" == layer.descriptor.digest
        unpacked = gzip.decompress(data)
        assert (f"sha256:{hashlib.sha256(unpacked).hexdigest()}",) == base.diff_ids
        with tarfile.open(fileobj=io.BytesIO(unpacked)) as tar:
            assert "bin/link-model-and-wait" in tar.getnames()
        assert b"".join(layer.iter_chunks(1_300_000)) == data[1_300_000:]


def test_no_base_is_a_platform_and_nothing_else() -> None:
    assert [base.platform for base in load_base(BaseChoice("none"))] == list(DEFAULT_PLATFORMS)
    (base,) = load_base(BaseChoice("none", (Platform("linux", "s390x"),)))
    assert (str(base.platform), base.layers, base.runtime) == ("linux/s390x", (), None)


def test_platforms_come_in_the_order_asked_for() -> None:
    assert [base.platform for base in load_base(BaseChoice("embedded", (ARM64, AMD64)))] == [ARM64, AMD64]
    with pytest.raises(InvalidUsageError, match="has no linux/s390x, only linux/amd64, linux/arm64"):
        load_base(BaseChoice("embedded", (AMD64, Platform("linux", "s390x"))))


@pytest.mark.parametrize(
    ("asked", "found"),
    [("linux/arm64", True), ("linux/arm64/v8", True), ("linux/arm64/v9", False), ("linux/arm", False)],
)
def test_a_variant_counts_only_when_it_is_asked_for(write_base: Callable[..., Path], asked: str, found: bool) -> None:
    layout = str(write_base(platforms=("linux/arm64/v8",)))
    if found:
        (base,) = load_base(BaseChoice(layout, (Platform.parse(asked),)))
        assert base.platform == Platform("linux", "arm64", "v8")
    else:
        with pytest.raises(InvalidUsageError, match="only linux/arm64/v8"):
            load_base(BaseChoice(layout, (Platform.parse(asked),)))


def test_dockers_layers_get_their_oci_name(write_base: Callable[..., Path]) -> None:
    layout = write_base(tar=gzip.compress(b""), media_type="application/vnd.docker.image.rootfs.diff.tar.gzip")
    (base,) = load_base(BaseChoice(str(layout)))
    assert [blob.descriptor.media_type for blob in base.layers] == [GZIP_LAYER_TYPE]


def test_layers_that_kserve_cannot_fetch_are_refused(write_base: Callable[..., Path]) -> None:
    with pytest.raises(InvalidUsageError, match=r"tar\+zstd, which KServe's fetch mode cannot unpack") as caught:
        load_base(BaseChoice(str(write_base(media_type=LAYER_TYPE + "+zstd"))))
    assert caught.value.hint


def test_attestations_beside_the_images_are_no_platform(write_base: Callable[..., Path]) -> None:
    layout = write_base(platforms=("linux/amd64", "unknown/unknown"))
    assert [str(base.platform) for base in load_base(BaseChoice(str(layout)))] == ["linux/amd64"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rootfs": None}, "no configuration of an image"),
        ({"rootfs": {"diff_ids": []}}, "0 diff_ids for 1 layers"),
        ({"config": "x"}, "no configuration of an image"),
        ({"history": ["x"]}, "no configuration of an image"),
        ({"os": None}, "os is missing"),
    ],
)
def test_a_base_with_a_broken_config_is_refused(
    write_base: Callable[..., Path], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(RegistryError, match=message):
        load_base(BaseChoice(str(write_base(config=config))))


def test_a_base_that_lacks_a_layer_is_refused(write_base: Callable[..., Path]) -> None:
    layout = write_base()
    (base,) = load_base(BaseChoice(str(layout)))
    base.layers[0].path.unlink()
    with pytest.raises(RegistryError, match="lacks the blob"):
        load_base(BaseChoice(str(layout)))


@pytest.mark.parametrize("spec", ["ubi9", "", "/does/not/exist", str(Path(__file__).parent)])
def test_anything_else_is_refused_with_what_is_meant(spec: str) -> None:
    with pytest.raises(InvalidUsageError, match="no OCI layout") as caught:
        load_base(BaseChoice(spec))
    assert "embedded" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("spec", "is_reference"),
    [
        ("registry.access.redhat.com/ubi9/ubi-micro:9.8", True),
        ("localhost/base", True),
        ("127.0.0.1:5000/base:1", True),
        ("registry:5000/base", True),
        ("[::1]:5000/base", True),
        ("ubi9", False),
        ("bases/ubi9.oci", False),
        ("./ubi9.oci", False),
        ("../bases/ubi9.oci", False),
        ("/bases/ubi9.oci", False),
        (".hidden/ubi9.oci", False),
    ],
)
def test_a_registry_is_told_from_a_path(spec: str, is_reference: bool) -> None:
    assert names_registry(spec) == is_reference


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_PACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_two_processes_that_bring_one_base_at_once_both_have_it(
    registry: Registry, write_base: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = f"{registry.host}/bases/micro:1"
    push(write_base("base.oci"), reference, reporter=Console("quiet"))
    both, right = threading.Barrier(2), base_registry._copy

    def copy(*arguments: Any, **named: Any) -> Descriptor:
        both.wait(30)  # neither has it in the cache
        return right(*arguments, **named)

    monkeypatch.setattr(base_registry, "_copy", copy)
    with ThreadPoolExecutor(2) as pool:
        brought = list(pool.map(base_registry.keep_base, [reference] * 2))
    assert brought[0] == brought[1]
    assert brought[0].is_relative_to(cache)
    assert brought[0].is_dir()


def test_a_base_in_a_real_registry_is_the_one_in_a_layout_and_named(
    registry: Registry, write_base: Callable[..., Path], cache: Path
) -> None:
    layout = write_base(platforms=("linux/amd64", "linux/arm64"))
    reference = f"{registry.host}/bases/micro:1"
    push(layout, reference, reporter=Console("quiet"))
    there, here = load_base(BaseChoice(reference)), load_base(BaseChoice(str(layout)))
    assert [(one.platform, one.digest, one.diff_ids, one.runtime) for one in there] == [
        (one.platform, one.digest, one.diff_ids, one.runtime) for one in here
    ]
    assert [b"".join(blob.iter_chunks()) for blob in there[0].layers] == [
        b"".join(blob.iter_chunks()) for blob in here[0].layers
    ]
    assert {one.name for one in there} == {reference}
    (only,) = load_base(BaseChoice(reference, (ARM64,)))
    assert only.digest == here[1].digest
    (kept, one_platform) = sorted((cache / "bases").iterdir(), key=lambda path: len(path.name))
    assert one_platform.name.endswith("-linux-arm64.oci")
    registry.stop()
    assert load_base(BaseChoice(f"{registry.host}/bases/micro@sha256:{kept.name.removesuffix('.oci')}")) == there


def test_a_base_behind_a_certificate_of_ones_own_is_trusted_by_ca_file_alone(
    tool: Callable[[str], str], certificate: Callable[[str], Path], write_base: Callable[..., Path], cache: Path
) -> None:
    own, stranger = certificate("own"), certificate("stranger")
    with running_registry(tool("docker-registry"), own, "tls") as registry:
        reference = f"{registry.host}/bases/micro:1"
        layout = write_base()
        push(layout, reference, ca_file=own / "cert.pem", reporter=Console("quiet"))
        with pytest.raises(RegistryError, match="not trusted"):
            load_base(BaseChoice(reference, ca_file=stranger / "cert.pem"))
        assert load_base(BaseChoice(reference, ca_file=own / "cert.pem"))[0].layers
    assert any((cache / "bases").iterdir())


def test_a_base_whose_line_breaks_is_gone_on_with_and_a_damaged_one_is_not_kept(
    faulty: Faulty, write_base: Callable[..., Path], cache: Path
) -> None:
    reference = f"{faulty.host}/bases/micro:1"
    push(write_base(), reference, reporter=Console("quiet"))
    faulty.faults = [Fault("GET", "blobs/sha256", cut_download(100), times=2)]
    (whole,) = load_base(BaseChoice(reference))
    for path in (cache / "bases").rglob("*"):
        if path.is_file():
            path.unlink()
    for path in sorted((cache / "bases").rglob("*"), reverse=True):
        path.rmdir()
    (key,) = [(name, blob.descriptor.digest) for blob in whole.layers for name in ["bases/micro"]]
    faulty.blobs[key] = bytes(reversed(faulty.blobs[key][:-1])) + b"x"
    with pytest.raises(RegistryError, match="another digest"):
        load_base(BaseChoice(reference))
    assert not any((cache / "bases").iterdir())
