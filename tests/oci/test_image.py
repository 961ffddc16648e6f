"""Images: documents that the published schemas accept, shared weights, and the same digest everywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack.checkpoint import Checkpoint
from gemma_pack.errors import CheckpointError, InvalidUsageError
from gemma_pack.oci.base import BaseChoice, load_base
from gemma_pack.oci.image import Image, ImagePlan, plan_image
from gemma_pack.oci.layers import LayerEntry, LayerSource
from gemma_pack.oci.layout import hash_stream
from gemma_pack.oci.manifest import CONFIG_TYPE, INDEX_TYPE, MANIFEST_TYPE, Platform, sha256_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def no_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)


def plan(directory: Path, base: str = "embedded", platforms: tuple[Platform, ...] = ()) -> ImagePlan:
    return plan_image(Checkpoint.open(directory), BaseChoice(base, platforms))


def assemble(planned: ImagePlan) -> Image:
    return planned.assemble([hash_stream(layer.iter_chunks()) for layer in planned.layers])


def documents(image: Image) -> list[Any]:
    return [json.loads(document.data) for document in image.documents]


def test_every_document_is_what_its_schema_says(
    raw_checkpoint: Callable[..., Path], valid_oci: Callable[[str, Any], None]
) -> None:
    image = assemble(plan(raw_checkpoint()))
    schemas = {CONFIG_TYPE: "config", MANIFEST_TYPE: "image-manifest", INDEX_TYPE: "image-index"}
    kinds = [schemas[document.descriptor.media_type] for document in image.documents]
    assert kinds == ["config", "image-manifest", "config", "image-manifest", "image-index"]
    for document, kind in zip(image.documents, kinds, strict=True):
        valid_oci(kind, json.loads(document.data))
        assert document.descriptor.digest == sha256_digest(document.data)


def test_platforms_share_the_weights_and_differ_in_the_base_only(raw_checkpoint: Callable[..., Path]) -> None:
    image = assemble(plan(raw_checkpoint()))
    amd64_config, amd64, arm64_config, arm64, index = documents(image)
    assert [entry["platform"] for entry in index["manifests"]] == [
        {"architecture": "amd64", "os": "linux"},
        {"architecture": "arm64", "os": "linux"},
    ]
    assert amd64["layers"][1:] == arm64["layers"][1:]
    assert amd64["layers"][0] != arm64["layers"][0]
    assert (amd64_config["architecture"], arm64_config["architecture"]) == ("amd64", "arm64")
    assert image.root.digest == image.documents[-1].descriptor.digest
    stored = {entry["digest"]: entry["size"] for manifest in (amd64, arm64) for entry in manifest["layers"]}
    stored |= {document.descriptor.digest: len(document.data) for document in image.documents}
    assert image.size_bytes == sum(stored.values())


def test_the_config_fits_the_layers(raw_checkpoint: Callable[..., Path]) -> None:
    planned = plan(raw_checkpoint())
    config, manifest, *_ = documents(assemble(planned))
    digests = [layer["digest"] for layer in manifest["layers"]]
    assert config["rootfs"]["diff_ids"] == [*planned.bases[0].diff_ids, *digests[1:]]
    steps = [step for step in config["history"] if not step.get("empty_layer")]
    assert len(steps) == len(digests)
    assert config["config"]["Entrypoint"] == ["/bin/link-model-and-wait"]
    assert config["created"] == "1970-01-01T00:00:00Z"
    assert {layer["mediaType"] for layer in manifest["layers"][1:]} == {"application/vnd.oci.image.layer.v1.tar"}
    assert manifest["annotations"]["org.opencontainers.image.base.digest"] == planned.bases[0].digest


def test_the_labels_of_the_base_do_not_name_the_image(
    raw_checkpoint: Callable[..., Path], write_base: Callable[..., Path]
) -> None:
    config, manifest, _ = documents(assemble(plan(raw_checkpoint(), str(write_base()))))
    assert config["config"]["Env"] == ["PATH=/usr/bin"]
    assert config["config"]["Labels"]["name"] == "gemma3_text"
    assert "version" not in config["config"]["Labels"]
    assert "org.opencontainers.image.base.name" not in manifest["annotations"]


def test_no_base_leaves_the_weights_alone(
    raw_checkpoint: Callable[..., Path], valid_oci: Callable[[str, Any], None]
) -> None:
    planned = plan(raw_checkpoint(), "none", (Platform("linux", "s390x"),))
    config, manifest, index = documents(assemble(planned))
    assert len(manifest["layers"]) == len(planned.layers) == len(config["rootfs"]["diff_ids"])
    assert not [key for key in manifest["annotations"] if ".base." in key]
    for kind, document in (("config", config), ("image-manifest", manifest), ("image-index", index)):
        valid_oci(kind, document)


def test_the_base_does_not_change_a_layer(raw_checkpoint: Callable[..., Path], write_base: Callable[..., Path]) -> None:
    directory = raw_checkpoint()
    images = [assemble(plan(directory, base)) for base in ("embedded", "none", str(write_base()))]
    assert images[0].layers == images[1].layers == images[2].layers
    assert len({image.root.digest for image in images}) == 3


def test_a_changed_config_leaves_the_weights_in_place(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint()
    before = assemble(plan(directory)).layers
    (directory / "generation_config.json").write_text('{"temperature": 1}')
    after = assemble(plan(directory)).layers
    changed = [old.title for old, new in zip(before, after, strict=True) if old != new]
    assert changed == ["configuration.tar"]


def test_the_epoch_sets_the_creation_time_and_no_layer(
    raw_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = raw_checkpoint()
    before = assemble(plan(directory))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    after = assemble(plan(directory))
    config, manifest, *_, index = documents(after)
    times = [config["created"], *(d["annotations"]["org.opencontainers.image.created"] for d in (manifest, index))]
    assert times == ["2023-11-14T22:13:20Z"] * 3
    assert after.layers == before.layers
    assert after.root != before.root


@pytest.mark.parametrize("epoch", ["", "yesterday", "1e9", "9" * 30])
def test_an_epoch_that_is_no_number_is_refused(
    raw_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, epoch: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    with pytest.raises(InvalidUsageError, match="SOURCE_DATE_EPOCH"):
        plan(raw_checkpoint())


def test_too_many_layers_are_refused(raw_checkpoint: Callable[..., Path], write_base: Callable[..., Path]) -> None:
    directory = raw_checkpoint(shards=40)
    assert len(plan(directory, "none").layers) == 23
    plan(directory, str(write_base("fits", layers=17)))
    with pytest.raises(InvalidUsageError, match="would have 41 layers"):
        plan(directory, str(write_base("large", layers=18)))


def test_a_checkpoint_without_a_tokenizer_is_refused(raw_checkpoint: Callable[..., Path]) -> None:
    directory = raw_checkpoint()
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        plan(directory)


BUILD = """
import os, sys, time
from pathlib import Path
from gemma_pack.console import Console
from gemma_pack.oci.base import BaseChoice
from gemma_pack.oci.package import package

source, base, umask, clock, user = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5])
package(source, source.parent / "all modules are loaded.oci", base=BaseChoice(base), reporter=Console("quiet"))
if user:  # who may not be allowed to read the interpreter's own files
    os.setgroups([]), os.setgid(user), os.setuid(user)
os.umask(int(umask, 8))
time.time = lambda: clock
print(package(source, source.parent / "image.oci", base=BaseChoice(base), reporter=Console("quiet")).digest)
"""


@pytest.fixture
def public() -> Iterator[Path]:
    """Yield a directory that another user can reach, which pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="public-") as place:
        Path(place).chmod(0o755)
        yield Path(place)


def test_two_builds_on_different_machines_give_the_same_image(
    raw_checkpoint: Callable[..., Path], public: Path
) -> None:
    import modelcar_base_image

    stranger = 4242 if os.geteuid() == 0 else 0
    base = shutil.copytree(Path(modelcar_base_image.__file__).parent / "embedded_oci_layout", public / "base")
    first = raw_checkpoint("here/model")
    second = Path(shutil.copytree(first, public / "somewhere/else/entirely"))
    for number, path in enumerate(sorted(second.rglob("*"), reverse=True)):
        path.chmod(0o640)
        os.utime(path, (1_500_000_000 + number, 1_600_000_000 + number))
    for path in (second.parent, second, *second.rglob("*")) if stranger else ():
        os.chown(path, stranger, stranger)
    environments = (
        (first, "022", "1000000000", 0, {"TZ": "UTC", "LC_ALL": "C", "PYTHONHASHSEED": "1"}),
        (second, "077", "2000000000", stranger, {"TZ": "Asia/Kolkata", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "2"}),
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", BUILD, str(directory), str(base), umask, clock, str(user)],
            env={"PATH": os.environ["PATH"], "HOME": str(directory.parent), **environment},
            cwd=directory.parent,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
        for directory, umask, clock, user, environment in environments
    ]
    assert digests[0] == digests[1]
    files = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (first.parent / "image.oci", second.parent / "image.oci")
    ]
    assert files[0] == files[1]


def test_the_encoding_has_not_changed_since_images_were_first_made() -> None:
    # Golden: a change here gives every published image another digest.
    layer = LayerSource(entries=(LayerEntry(name="models/"),), annotations={"org.opencontainers.image.title": "x.tar"})
    planned = ImagePlan(
        layers=(layer,),
        bases=load_base(BaseChoice("embedded")),
        annotations={"org.opencontainers.image.title": "ü", "org.opencontainers.image.description": "A model."},
        created="1970-01-01T00:00:00Z",
    )
    assert assemble(planned).root.digest == "sha256:065ed670f2132ed445ca208b5697c82916e7d724aae85fc6bda6864498e9bbfe"
