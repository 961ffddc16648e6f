"""Every rule, each by an image that breaks exactly it: the rule finds it, and no other one does."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_pack.console import Console
from gemma_pack.oci.base import BaseChoice
from gemma_pack.oci.finding import EVERYONE, RUNTIMES, TAR_READERS, Finding
from gemma_pack.oci.inspection import inspect
from gemma_pack.oci.layout import create_layout
from gemma_pack.oci.lint import RULES, judge, lint
from gemma_pack.oci.manifest import EMPTY_TYPE, LAYER_TYPE, MANIFEST_TYPE, Manifest, describe
from gemma_pack.oci.package import package
from tests.oci.gemma_images import CONFIG, W4A16, Image, image, member, model, packed, plain, stored

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from gemma_pack.oci.inspection import Inspection

OF_A_MODELCAR = {"titled-files", "model-pack"}
OF_AN_ARTIFACT = {"is-image", "models-directory"}
DOCKER = "application/vnd.docker.image.rootfs.diff.tar"


def at(change: Callable[[tarfile.TarInfo], object], where: str) -> Callable[[], Image]:
    def build() -> Image:
        return image().each(lambda info: change(info) and None, where)

    return build


def put(name: str, value: object) -> Callable[[tarfile.TarInfo], object]:
    return lambda info: setattr(info, name, value)


def gemma(
    tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None, **files: bytes | None
) -> Callable[[], Image]:
    return lambda: image(model(dict(tensors), config, **files))


def without(tensors: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: one for name, one in tensors.items() if name not in names}


def w4a16(**changed: int) -> dict[str, Any]:
    group = W4A16["config_groups"]["group_0"]
    return W4A16 | {"config_groups": {"group_0": group | {"weights": group["weights"] | changed}}}


def swapped(old: str, new: bytes) -> bytes:
    return model()["model.safetensors.index.json"].replace(old.encode(), new)


Q = "model.layers.0.self_attn.q_proj"
QUANTIZED = {"quantization_config": W4A16}
FP8, FP8_CONFIG = stored("F8_E4M3")
INT8, INT8_CONFIG = stored("I8")
SHARD = "model-00001-of-00002.safetensors"

CASES: dict[str, tuple[str, str, tuple[str, ...], Callable[[], Image]]] = {
    # name: the rule, severity, whom it concerns, the image
    "no image": ("is-image", "fails", RUNTIMES, lambda: replace(image(), config_type=EMPTY_TYPE)),
    "unknown layer": (
        "known-layers", "fails", TAR_READERS,
        lambda: image().add(member("x"), kind="application/vnd.in-toto+json"),
    ),
    "docker's plain layer": ("known-layers", "fails", ("fetch",), lambda: image(kind=DOCKER)),
    "dotted names": (
        "models-directory", "fails", ("fetch",), lambda: image().each(dot, "models")
    ),
    "closed file": ("readable-files", "fails", ("modelcar", "native"), at(put("mode", 0o600), "tokenizer.json")),
    "closed directory": (
        "readable-files", "fails", ("modelcar", "native"),
        lambda: image().add(member("models/sub", None, mode=0o700), member("models/sub/x")),
    ),
    "group only": ("readable-files", "warning", ("modelcar", "native"), at(put("mode", 0o640), "tokenizer.json")),
    "absolute link": (
        "links", "fails", ("modelcar", "native", "fetch"), lambda: image().add(member("models/x", link="/etc/passwd"))
    ),
    "link upwards": (
        "links", "fails", ("modelcar", "native", "fetch"),
        lambda: image().add(member("models/a/x", link="../../models/config.json")),
    ),
    "hard link": ("links", "fails", ("fetch",), lambda: image().add(hard_link())),
    "device": ("links", "fails", ("fetch",), lambda: image().add(device())),
    "deleted file": ("deletions", "fails", ("fetch",), lambda: image().add(member("models/.wh.extra.txt"))),
    "two configs": (
        "different-twins", "warning", TAR_READERS,
        lambda: image().add(member("models/config.json", json.dumps(CONFIG | {"torch_dtype": "bfloat16"}).encode())),
    ),
    "no sleep": ("shell", "fails", ("modelcar",), at(put("name", "bin/slip"), "bin/sleep")),
    "ls that does not run": ("shell", "fails", ("modelcar",), at(put("mode", 0o644), "bin/ls")),
    "deleted shell": ("shell", "fails", ("modelcar",), lambda: image().add(member("bin/.wh.sh"))),
    "shell out of reach": (
        "shell", "fails", ("modelcar",), lambda: replace(image(), runtime={"Env": ["A=b", "PATH=/opt:/usr/bin"]})
    ),
    "entry point": ("shell", "unknown", ("modelcar",), lambda: replace(image(), runtime={"Entrypoint": ["/app"]})),
    "too few diff_ids": ("diff-ids", "fails", RUNTIMES, lambda: replace(image(), diff_ids=("sha256:" + "0" * 64,))),
    "wrong diff_id": ("diff-ids", "fails", RUNTIMES, lambda: replace(image(), diff_ids=("sha256:" + "0" * 64,) * 4)),
    "61 layers": ("layer-count", "warning", RUNTIMES, lambda: many(61)),
    "128 layers": ("layer-count", "fails", RUNTIMES, lambda: many(128)),
    "gzipped weights": ("compressed-weights", "warning", TAR_READERS, lambda: image(kind=LAYER_TYPE + "+gzip")),
    "pax size": ("pax-sizes", "warning", (), at(put("pax_headers", {"size": "2"}), "tokenizer.json")),
    "no config": ("configuration", "fails", EVERYONE, gemma(plain(), config_json=None)),
    "broken config": ("configuration", "fails", EVERYONE, gemma(plain(), config_json=b"{,}")),
    "no tokenizer": ("tokenizer", "fails", EVERYONE, gemma(plain(), tokenizer_json=None)),
    "no chat template": ("chat-template", "warning", EVERYONE, gemma(plain(), chat__template_jinja=None)),
    "bytes after the last tensor": (
        "safetensors-headers", "fails", EVERYONE, lambda: image(model() | {SHARD: model()[SHARD] + b"x"})
    ),
    "no index": ("index", "fails", EVERYONE, gemma(plain(), model_safetensors_index_json=None)),
    "empty index": ("index", "fails", EVERYONE, gemma(plain(), model_safetensors_index_json=b"{}")),
    "missing shard": (
        "index", "fails", EVERYONE, lambda: image({name: data for name, data in model().items() if name != SHARD})
    ),
    "tensor in another shard": (
        "index", "fails", EVERYONE,
        lambda: image(model() | {"model.safetensors.index.json": swapped(SHARD, b"model-00002-of-00002.safetensors")}),
    ),
    "two exports": ("index", "fails", EVERYONE, lambda: image(model() | {"model.safetensors": model()[SHARD]})),
    "float16": ("precision", "fails", EVERYONE, gemma(plain(), {"dtype": "float16"})),
    "pickle": ("pickled-weights", "warning", EVERYONE, gemma(plain(), pytorch__model_bin=b"x")),
    "no Gemma": ("known-family", "warning", EVERYONE, gemma(plain(), {"model_type": "llama"})),
    "no embedding": (
        "known-family", "fails", EVERYONE, gemma(without(plain(), "model.embed_tokens.weight"))
    ),
    "more layers than could be counted": (
        "known-family", "fails", EVERYONE, gemma(plain(), {"num_hidden_layers": 10**12})
    ),
    "a pattern that never ends": (
        "quantization", "unknown", EVERYONE,
        gemma(packed(), {"quantization_config": W4A16 | {"ignore": [r"re:(\w|\.|\w)+!"]}}),
    ),
    "patterns without end": (
        "quantization", "unknown", EVERYONE,
        gemma(packed(), {"quantization_config": W4A16 | {"ignore": ["re:.*x"] * 51}}),
    ),
    "another hidden size": ("shapes", "fails", EVERYONE, gemma(plain(), {"hidden_size": 32})),
    "another vocabulary": ("shapes", "fails", EVERYONE, gemma(plain(), {"vocab_size": 101})),
    "a missing layer": (
        "shapes", "fails", EVERYONE, gemma(without(plain(), "model.layers.1.mlp.down_proj.weight"))
    ),
    "a missing decoder layer": ("shapes", "fails", EVERYONE, gemma(plain(), {"num_hidden_layers": 3})),
    "a norm of another size": (
        "shapes", "fails", EVERYONE, gemma(plain() | {"model.layers.0.input_layernorm.weight": ("BF16", (32,))})
    ),
    "int8 of another shape": (
        "shapes", "fails", EVERYONE,
        gemma(INT8 | {f"{Q}.weight": ("I8", (64, 32))}, {"quantization_config": INT8_CONFIG}),
    ),
    "packed, and config does not say so": ("quantization", "fails", EVERYONE, gemma(packed())),
    "plain, and config says packed": ("quantization", "fails", EVERYONE, gemma(plain(), QUANTIZED)),
    "packed for another group size": (
        "quantization", "fails", EVERYONE,
        gemma(packed(), {"quantization_config": w4a16(group_size=64)}),
    ),
    "packed in 8 bits": (
        "quantization", "fails", EVERYONE,
        gemma(packed(), {"quantization_config": w4a16(num_bits=8)}),
    ),
    "FP8, and config says int8": ("quantization", "fails", EVERYONE, gemma(FP8, {"quantization_config": INT8_CONFIG})),
    "no scale": (
        "quantization", "fails", EVERYONE,
        gemma(without(FP8, *(name for name in FP8 if name.endswith("_scale"))), {"quantization_config": FP8_CONFIG}),
    ),
    "ignored, and packed": (
        "quantization", "fails", EVERYONE,
        gemma(packed(), {"quantization_config": W4A16 | {"ignore": ["re:.*down_proj"]}}),
    ),
    "nf4, and weights are plain": (
        "quantization", "fails", EVERYONE,
        gemma(plain(), {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}),
    ),
    "q alone is quantized": (
        "fused-layers", "fails", EVERYONE,
        gemma(
            without(packed(), *(name for name in packed() if name.startswith(Q))) | {f"{Q}.weight": ("BF16", (64, 64))},
            {"quantization_config": W4A16 | {"ignore": [Q]}},
        ),
    ),
    "stored again": (
        "tied-embeddings", "warning", EVERYONE, gemma(plain() | {"lm_head.weight": ("BF16", (100, 64))})
    ),
    "untied without a head": ("tied-embeddings", "fails", EVERYONE, gemma(plain(), {"tie_word_embeddings": False})),
    "quantized embedding": (
        "tied-embeddings", "fails", EVERYONE, gemma(plain() | {"model.embed_tokens.weight": ("F8_E4M3", (100, 64))})
    ),
}  # fmt: skip


def dot(info: tarfile.TarInfo) -> None:
    info.name = f"./{info.name}"


def hard_link() -> tuple[tarfile.TarInfo, bytes]:
    info, data = member("models/again.json", link="models/config.json")
    info.type = tarfile.LNKTYPE
    return info, data


def device() -> tuple[tarfile.TarInfo, bytes]:
    info, data = member("models/null")
    info.type = tarfile.CHRTYPE
    return info, data


def many(count: int) -> Image:
    found = image()
    while len(found.layers) < count:
        found = found.add(member(f"models/note-{len(found.layers)}.txt"))
    return found


def found_in(layout: Path) -> list[Finding]:
    return list(lint(inspect(layout)))


def test_a_right_image_has_nothing_wrong(tmp_path: Path):
    findings = found_in(image().write(tmp_path / "image"))
    assert {finding.rule for finding in findings} == OF_A_MODELCAR
    verdicts = {judgement.consumer: judgement.verdict for judgement in judge(findings)}
    assert verdicts == {**dict.fromkeys(TAR_READERS, "works"), "ilab": "fails", "modelpack": "fails"}


@pytest.mark.parametrize(
    ("tensors", "config"), [(packed(), W4A16), (FP8, FP8_CONFIG), (INT8, INT8_CONFIG)], ids=["w4a16", "fp8", "int8"]
)
def test_a_right_quantized_image_has_nothing_wrong(tmp_path: Path, tensors: Any, config: Any):
    findings = found_in(gemma(tensors, {"quantization_config": config})().write(tmp_path / "image"))
    assert {finding.rule for finding in findings} == OF_A_MODELCAR


def test_a_relative_link_inside_is_nobodys_trouble(tmp_path: Path):
    added = image().add(member("models/sub/x", link="../config.json"), member("models/y", link="sub/x"))
    assert {finding.rule for finding in found_in(added.write(tmp_path / "image"))} == OF_A_MODELCAR


@pytest.mark.parametrize("case", CASES)
def test_what_is_broken_is_found_by_its_rule_and_by_no_other(tmp_path: Path, case: str):
    rule, severity, consumers, build = CASES[case]
    findings = [one for one in found_in(build().write(tmp_path / "image")) if one.rule not in OF_A_MODELCAR]
    assert [finding.rule for finding in findings] == [rule], findings
    assert (findings[0].severity, findings[0].consumers) == (severity, consumers)
    for judgement in judge(findings):
        concerned = judgement.consumer in consumers and severity != "warning"
        assert judgement.verdict == (severity if concerned else "works")
        assert judgement.reasons == ((findings[0].message,) if concerned else ())


def artifact(layers: list[tuple[str | None, bytes, dict[str, str]]], config: dict[str, Any], tmp_path: Path) -> Path:
    kind = "application/vnd.cncf.model.config.v1+json"
    encoded = json.dumps(config).encode()
    with create_layout(tmp_path / "forged.oci") as writer:
        described = []
        for title, data, more in layers:
            writer.write_document(data)
            path = {"org.opencontainers.image.title": title, "org.cncf.model.filepath": title} if title else {}
            annotations = {key: text for key, text in {**path, **more}.items() if text}
            media_type = annotations.pop("type", "application/vnd.cncf.model.weight.v1.raw")
            described.append(describe(data, media_type, annotations=annotations))
        writer.write_document(encoded)
        manifest = Manifest(config=describe(encoded, kind), layers=tuple(described)).encode()
        writer.write_document(manifest)
        writer.add_image(describe(manifest, MANIFEST_TYPE))
    return tmp_path / "forged.oci"


def files_of(found: Mapping[str, bytes]) -> list[tuple[str | None, bytes, dict[str, str]]]:
    return [(name, data, {}) for name, data in found.items()]


RIGHT: dict[str, Any] = {"descriptor": {}, "config": {}, "modelfs": {"type": "layers"}}
ARTIFACTS: dict[str, tuple[str, str, Callable[[], tuple[list[Any], dict[str, Any]]]]] = {
    "twins": ("titled-files", "ilab", lambda: (files_of({**model(), "generation_config.json": b"{}"}), RIGHT)),
    "sub-directory": ("titled-files", "ilab", lambda: (files_of({**model(), "sub/x.json": b"[]"}), RIGHT)),
    "a tar with a title": (
        "titled-files", "ilab",
        lambda: ([*files_of(model()), ("x", b"", {"type": "application/vnd.cncf.model.doc.v1.tar"})], RIGHT),
    ),
    "no path": (
        "model-pack", "modelpack",
        lambda: ([*files_of(model()), ("x", b"x", {"org.cncf.model.filepath": ""})], RIGHT),
    ),
    "another media type": (
        "model-pack", "modelpack", lambda: ([*files_of(model()), ("x", b"x", {"type": "application/x.raw"})], RIGHT)
    ),
    "no modelfs": ("model-pack", "modelpack", lambda: (files_of(model()), {"descriptor": {}, "config": {}})),
}  # fmt: skip


def test_a_right_artifact_works_for_ilab_and_modelpack(tmp_path: Path):
    findings = found_in(artifact(files_of(model()), RIGHT, tmp_path))
    assert {finding.rule for finding in findings} == OF_AN_ARTIFACT
    verdicts = {judgement.consumer: judgement.verdict for judgement in judge(findings)}
    assert verdicts == {**dict.fromkeys(TAR_READERS, "fails"), "ilab": "works", "modelpack": "works"}


@pytest.mark.parametrize("case", ARTIFACTS)
def test_what_is_broken_in_an_artifact_is_found_by_its_rule_and_by_no_other(tmp_path: Path, case: str):
    rule, consumer, build = ARTIFACTS[case]
    layout = artifact(*build(), tmp_path)
    findings = [finding for finding in found_in(layout) if finding.rule not in OF_AN_ARTIFACT]
    assert [(one.rule, one.severity, one.consumers) for one in findings] == [(rule, "fails", (consumer,))], findings


def test_every_rule_has_its_case():
    names = {rule.__name__.replace("_", "-") for rule in RULES}
    assert names == {rule for rule, *_ in (*CASES.values(), *ARTIFACTS.values())}
    assert all(rule.__doc__ for rule in RULES)


def test_what_was_packaged_works_for_whom_it_is(tmp_path: Path):
    directory = tmp_path / "model"
    directory.mkdir()
    for name, data in model(packed(), QUANTIZED, tokenizer__config_json=b'{"a": 1}').items():
        (directory / name).write_bytes(data)
    for kind, works in (("modelcar", set(TAR_READERS)), ("artifact", {"ilab", "modelpack"})):
        layout = package(directory, tmp_path / kind, kind=kind, reporter=Console("quiet")).layout  # type: ignore[arg-type]
        judgements = judge(found_in(layout))
        assert {one.consumer for one in judgements if one.verdict == "works"} == works
    bare = package(directory, tmp_path / "bare", base=BaseChoice("none"), reporter=Console("quiet")).layout
    assert {one.consumer: one.verdict for one in judge(found_in(bare))}["modelcar"] == "fails"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70) | st.just(10**30) | st.floats() | st.text(max_size=3)
    | st.sampled_from(["Linear", "block", "group", "pack-quantized", "re:(", "re:.*", "float-quantized"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["weights", "a"]), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where something stands in a JSON value."""
    found = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, one in found for inner in places(one, (*path, key)))]


def put_at(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copied = value.copy()
    copied[path[0]] = put_at(value[path[0]], path[1:], new)
    return copied


QUANTIZED_CONFIGS = [
    CONFIG | QUANTIZED,
    CONFIG | {"quantization_config": FP8_CONFIG | {"config_groups": {"g": {"targets": ["Linear"], "weights": {
        "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]}}}}},
    CONFIG | {"text_config": CONFIG, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
]  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_config_is_a_traceback(looked_at: Inspection, data: st.DataObject):
    config = data.draw(st.sampled_from(QUANTIZED_CONFIGS))
    for _ in range(data.draw(st.integers(1, 3))):
        config = put_at(config, data.draw(st.sampled_from(places(config))), data.draw(ANYTHING))
    contents = dict(looked_at.contents) | {"config.json": json.dumps(config).encode()}
    for finding in lint(replace(looked_at, contents=contents)):
        assert finding.message


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    return inspect(image(model(packed(), QUANTIZED)).write(tmp_path_factory.mktemp("image") / "image"))
