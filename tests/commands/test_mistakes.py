"""What a newcomer gets wrong, command by command: one sentence, a remedy, an exit code, and nothing half-made."""

from __future__ import annotations

import json
import shlex
import shutil
from typing import TYPE_CHECKING

from gemma_pack.commands import VERBS, run
from tests.records import quantized_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from tests.oci.registry import Registry

NOT_AN_IMAGE = "lies on this machine, and an image in a registry is wanted"
LINES = """
download nosuch                                        | 2 | neither demo, nor an existing directory, nor a hub id
download ''                                            | 2 | '' is neither demo
download empty                                         | 1 | empty has no config.json
download notgemma                                      | 1 | this is not a Gemma: config.json says model_type 'llama'
download float16                                       | 1 | the checkpoint is float16
download torn                                          | 1 | is truncated
download image.oci                                     | 1 | image.oci is an OCI layout, not a checkpoint
download demo -o taken                                 | 2 | taken is in the way
download demo -o file.txt/x                            | 2 | file.txt is a file
download owner/name --offline                          | 14 | is not on this machine
download whole --format xml                            | 2 | 'xml' is not one of
recipes show w4a17                                     | 2 | there is no recipe named w4a17
recipes check file.txt                                 | 2 | file.txt is a file without .yaml behind its name
recipes check nosuch.yaml                              | 2 | cannot read nosuch.yaml
recipes check broken.yaml                              | 2 | broken.yaml:2: not YAML
recipes check binary.yaml                              | 2 | it is not UTF-8
plan nosuch -r w4a16                                   | 2 | neither demo
plan image.oci -r w4a16                                | 1 | is an OCI layout
plan whole                                             | 2 | Missing option '-r'
plan demo -r nosuch                                    | 2 | there is no recipe named nosuch
plan demo -r w4a16 --push CLOSED/a/b:c                 | 14 | CLOSED cannot be reached
plan demo -r w4a16 --push https://quay.io/a/b          | 2 | is a URL, not an image's name
plan demo -r w4a16 --samples 0                         | 2 | 0 is not in the range
quantize nosuch -r w4a16                               | 2 | neither demo
quantize empty -r w4a16                                | 1 | has no config.json
quantize image.oci -r w4a16                            | 1 | is an OCI layout
quantize whole -r w4a16 -o taken                       | 2 | taken is in the way
quantize whole -r w4a16 -o file.txt/x                  | 2 | file.txt is a file
quantize whole -r w4a16 --calibration nosuch.txt       | 1 | there is no file nosuch.txt
quantize whole -r w4a16 -r w8a8 -o x                   | 2 | there are several recipes
validate nosuch                                        | 1 | nosuch
validate empty                                         | 1 | empty has no config.json
validate file.txt                                      | 1 | file.txt is not a directory
validate whole                                         | 1 | whole has no gemma-pack.json
validate variant --recipe nosuch                       | 2 | there is no recipe named nosuch
validate variant --engine nosuch                       | 2 | there is no engine nosuch
validate variant --task-limit 3                        | 2 | --task-limit is of no use alone
validate HOST/none/none:c                              | 1 | has no image none/none under c
report nosuch nosuch                                   | 1 | there is no nosuch
report file.txt file.txt                               | 1 | file.txt is no valid report
card                                                   | 2 | the variant's directory is missing
card file.txt                                          | 1 | file.txt has no gemma-pack.json
card whole                                             | 1 | whole has no gemma-pack.json
card --check nosuch.md                                 | 2 | cannot read nosuch.md
card --check empty                                     | 2 | is a directory
package nosuch                                         | 1 | nosuch is not a directory
package image.oci                                      | 1 | is an OCI layout
package notokenizer                                    | 1 | has no tokenizer
package whole -o taken                                 | 2 | taken is in the way
package whole -o file.txt/x                            | 2 | file.txt is a file
package whole -o whole/x                               | 2 | lies inside whole
package whole --base empty                             | 2 | empty
package whole --platform garbage                       | 2 | 'garbage' is not os/architecture
push nosuch HOST/a/b                                   | 2 | neither an OCI layout nor a checkpoint
push image.oci CLOSED/a/b                              | 14 | CLOSED cannot be reached
push image.oci a:b:c                                   | 2 | is not a repository
push image.oci HOST/a/b --require-verdict              | 1 | has no validation report, and nothing was sent
push image.oci HOST/a/b --sign-key file.txt            | 2 | file.txt is no private key
push image.oci HOST/a/b --ca-file file.txt             | 2 | file.txt holds no PEM certificates
pull HOST/none/none:c -o x                             | 1 | has no image none/none under c
pull HOST/there/there:none -o x                        | 1 | has no image there/there under none
pull CLOSED/a/b -o x                                   | 14 | CLOSED cannot be reached
pull garbage!! -o x                                    | 2 | is not a repository
pull nosuch.oci -o x                                   | 2 | there is no OCI layout nosuch.oci
pull file.txt -o x                                     | 2 | file.txt is not an OCI layout
pull image.oci -o taken                                | 2 | is in the way
pull image.oci -o file.txt/x                           | 2 | file.txt is a file
inspect whole                                          | 2 | whole is not an OCI layout
generate whole x --messages whole/config.json          | 2 | --messages is a whole conversation
inspect nosuch                                         | 2 | nosuch names no registry
inspect ./nosuch                                       | 2 | there is no OCI layout ./nosuch
inspect HOST/none/none:c                               | 1 | has no image none/none under c
verify file.txt                                        | 2 | file.txt is not an OCI layout
verify CLOSED/a/b                                      | 14 | CLOSED cannot be reached
referrers image.oci                                    | 2 | NOT_AN_IMAGE
referrers garbage!!                                    | 2 | is not a repository
referrers HOST/none/none:c                             | 1 | has no image none/none under c
referrers HOST/there/there:1 --verify-key file.txt     | 2 | file.txt is no public key
deploy image.oci --target vllm                         | 2 | NOT_AN_IMAGE
deploy whole --target vllm                             | 2 | NOT_AN_IMAGE
deploy HOST/there/there:1                              | 2 | Choose from: vllm, rhaiis, rhelai, kserve
deploy HOST/there/there:1 --target vllm                | 1 | has no validation report
deploy HOST/none/none:c --target kserve                | 1 | has no image none/none under c
deploy CLOSED/a/b --target kserve                      | 14 | CLOSED cannot be reached
serve image.oci                                        | 1 | is an OCI layout
serve file.txt                                         | 2 | NOT_AN_IMAGE
serve empty                                            | 1 | has no config.json
serve whole --port 99999                               | 2 | 99999 is not in the range
generate nosuch hello                                  | 2 | neither demo
generate image.oci hello                               | 1 | is an OCI layout
generate float16 hello                                 | 1 | the checkpoint is float16
chat notgemma                                          | 1 | this is not a Gemma
chat torn                                              | 1 | is truncated
build nosuch.yaml                                      | 2 | cannot read nosuch.yaml
build broken.yaml                                      | 2 | broken.yaml:2: not YAML
build demo                                             | 2 | no recipe is said for demo
build demo -r w4a16 --push BAD                         | 2 | is not a repository
build demo -r w4a16 --push CLOSED/a                    | 14 | CLOSED cannot be reached
build demo -r w4a16 -o file.txt                        | 2 | file.txt is a file
doctor extra                                           | 2 | unexpected extra argument
"""


def cases() -> list[tuple[str, int, str]]:
    """Return each line, the exit code that it must end with, and a part of the sentence."""
    rows = [[cell.strip() for cell in line.rsplit("|", 2)] for line in LINES.strip().splitlines()]
    return [(line, int(code), said) for line, code, said in rows]


def furnish(place: Path, raw_checkpoint: Callable[..., Path]) -> None:
    config = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    raw_checkpoint("whole")
    raw_checkpoint("notgemma", files={"config.json": json.dumps({"model_type": "llama"})})
    raw_checkpoint("float16", files={"config.json": json.dumps({**config, "torch_dtype": "float16"})})
    shard = next(raw_checkpoint("torn").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    (raw_checkpoint("notokenizer") / "tokenizer.json").unlink()
    shutil.copytree(place / "whole", place / "variant")
    quantized_record().write(place / "variant")
    for name in ("empty", "taken"):
        (place / name).mkdir()
    (place / "taken/mine").touch()
    (place / "file.txt").write_text("hello\n")
    (place / "broken.yaml").write_text("name: [x\n")
    (place / "binary.yaml").write_bytes(b"\xff\xfe\x00")


def contents(place: Path) -> set[str]:
    return {str(path) for path in place.rglob("*") if not path.is_relative_to(place / "registry")}


def test_every_mistake_is_one_sentence_with_a_remedy_and_leaves_nothing(
    raw_checkpoint: Callable[..., Path],
    registry: Registry,
    free_port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMMA_PACK_CACHE", str(tmp_path / "cache"))
    furnish(tmp_path, raw_checkpoint)
    assert run(["package", "whole", "-o", "image.oci"]) == 0
    assert run(["push", "image.oci", f"{registry.host}/there/there:1"]) == 0
    capsys.readouterr()
    before = contents(tmp_path)
    wrong = []
    for mistake, code, part in cases():
        line, said = mistake, part
        words = {"HOST": registry.host, "CLOSED": f"127.0.0.1:{free_port}", "NOT_AN_IMAGE": NOT_AN_IMAGE}
        for word, meaning in words.items():
            line, said = line.replace(word, meaning), said.replace(word, meaning)
        ended = run(shlex.split(line))
        shown = capsys.readouterr()
        errors = [one for one in shown.err.splitlines() if one.startswith("error: ")]
        hints = [one for one in shown.err.splitlines() if one.startswith("hint: ")]
        tail = shown.err.splitlines()[-2:]
        as_it_must = (
            ended == code
            and said in shown.err
            and len(errors) == len(hints) == 1
            and tail == errors + hints
            and shown.out == ""
            and "GEMMA_PACK_DEBUG" not in shown.err
            and contents(tmp_path) == before
        )
        if not as_it_must:
            wrong.append(f"{line}: {ended}, not {code}: {shown.out}{shown.err}{contents(tmp_path) - before}")
    assert wrong == []


def test_every_command_is_tried() -> None:
    assert {line.split()[0] for line, _, _ in cases()} == set(VERBS)
