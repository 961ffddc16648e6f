"""What a reader copies from a card: its programs run as they stand, its shell lines are what each tool takes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from gemma_pack.reports.card import render_card
from tests.command_lines import complaints
from tests.records import quantized_record
from tests.reports.test_card import write_variant

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RUNNER = """\
import os, pathlib, sys
for directory in sys.argv[1:]:
    os.chdir(directory)
    print("variant", os.path.basename(directory), flush=True)
    for path in sorted(pathlib.Path().glob("program*.py")):
        variables = {"__name__": "__main__"}
        exec(compile(path.read_text("utf-8"), path, "exec"), variables)
        print(path.stem, flush=True)
# the block about precisions stands for four programs
print("loaded", type(variables["model"]).__name__)
for name, options in variables["PRECISIONS"].items():
    model = variables["AutoModelForCausalLM"].from_pretrained("tiny-gemma3_text", device_map="auto", **options)
    layer = model.model.layers[0].mlp.up_proj
    print(name, type(layer).__name__, str(layer.weight.dtype).removeprefix("torch."))
"""
SCHEMES = ("W4A16", "FP8_DYNAMIC", "BNB_NF4")
"""One of each kind: integers, floats, bitsandbytes. Each scheme is loaded by the tests of quantizing."""
ILAB = {
    "download": {"--repository", "--release"},
    "serve": {"--model-path", "--backend", "--gpus", "--chat-template"},
    "chat": {"--model"},
}
"""Options of `ilab model …` (instructlab, src/instructlab/cli/model/download.py, serve.py, chat.py)."""


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", card, re.DOTALL | re.MULTILINE)


def lines(card: str) -> list[list[str]]:
    """Return the words of each line for a shell."""
    joined = "\n".join(blocks(card, "sh")).replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="session")
def card(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render_card(write_variant(tmp_path_factory.mktemp("variant"), quantized_record()))


def test_the_programs_run_as_they_stand_on_every_kind_of_variant(
    tiny_variants: Callable[[str], Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for scheme in SCHEMES:
        place = tmp_path / scheme
        place.mkdir()
        programs = [
            program for program in blocks(render_card(tiny_variants(scheme)), "python") if "vllm" not in program
        ]
        assert len(programs) == 3
        (place / "tiny-gemma3_text-quantized.tiny").symlink_to(tiny_variants(scheme))
        (place / "tiny-gemma3_text").symlink_to(tiny_checkpoint)
        for number, program in enumerate(programs if scheme == SCHEMES[-1] else programs[:2]):
            (place / f"program{number}.py").write_text(program, "utf-8")
    ran = subprocess.run(
        [sys.executable, "-c", RUNNER, *(str(tmp_path / scheme) for scheme in SCHEMES)],
        check=False, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "torch_dtype" not in ran.stderr  # which transformers 5 says is deprecated
    lines_of_ours = [line for line in ran.stdout.splitlines() if line.startswith(("variant ", "program"))]
    expected = [line for scheme in SCHEMES for line in (f"variant {scheme}", "program0", "program1")]
    assert lines_of_ours == [*expected, "program2"]
    assert ran.stdout.splitlines()[-5:] == [
        "loaded Gemma3ForCausalLM",
        "float32 Linear float32",
        "bfloat16 Linear bfloat16",
        "int8 Linear8bitLt int8",
        "nf4 Linear4bit uint8",
    ]


def test_gemma_packs_own_lines_are_commands_that_there_are(card: str) -> None:
    ours = [words for words in lines(card) if words[0] == "gemma-pack"]
    assert [words[1] for words in ours] == ["pull", "package", "push", "deploy"]
    assert [complaint for words in ours for complaint in complaints(words)] == []


def test_podman_knows_every_option(card: str, tool: Callable[[str], str]) -> None:
    [run] = [words for words in lines(card) if words[:2] == ["podman", "run"]]
    told = subprocess.run([tool("podman"), "run", "--help"], check=True, capture_output=True, text=True, timeout=30)
    known = set(re.findall(r"--[a-z-]+", told.stdout))
    ours = [word for word in run[2 : run.index("--entrypoint")] if word.startswith("--")]
    assert {"--device", "--shm-size", "--volume", "--env", "--publish", "--security-opt"} <= set(ours) <= known
    [volume] = [run[place + 1] for place, word in enumerate(run) if word == "--volume"]
    assert volume.endswith(":ro,Z")  # SELinux lets the container read what is mounted


def test_ilab_knows_every_option(card: str) -> None:
    ours = [words for words in lines(card) if words[:2] == ["ilab", "model"]]
    assert [words[2] for words in ours] == ["download", "serve"]
    for words in ours:
        options = words[3 : words.index("--") if "--" in words else None]
        assert {word for word in options if word.startswith("--")} <= ILAB[words[2]]
    assert "`ilab model chat --model " in card
    [download] = [words for words in ours if words[2] == "download"]
    repository, release = download[4], download[6]
    assert ":" not in repository.removeprefix("docker://")  # the tag goes into --release alone
    assert ["gemma-pack", "push"] in [words[:2] for words in lines(card) if words[-1].endswith(f":{release}")]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not here to be asked for its options")
def test_kubectl_knows_every_option(card: str) -> None:
    """`oc` takes what kubectl takes."""
    ours = [words for words in lines(card) if words[0] == "oc"]
    assert [words[1] for words in ours] == ["apply", "wait", "port-forward"]
    for words in ours:
        told = subprocess.run(["kubectl", words[1], "--help"], check=True, capture_output=True, text=True, timeout=30)
        known = set(re.findall(r"(?<![\w-])--?[a-z-]+", told.stdout))
        assert {word.partition("=")[0] for word in words[2:] if word.startswith("-")} <= known


def test_what_no_server_loads_is_not_said_to_be_served(tmp_path: Path) -> None:
    record = quantized_record()
    assert record.quantization
    changed = record.quantization.model_copy(update={"format": "bitsandbytes", "recipe": "bnb-nf4", "scheme": "nf4"})
    text = render_card(write_variant(tmp_path, record.model_copy(update={"quantization": changed})))
    assert [words[0].partition("=")[0] for words in lines(text)] == ["IMAGE", "gemma-pack"]
    assert "\n- vllm\n" not in text
    assert "vllm" not in "".join(blocks(text, "python"))
    assert not re.search(r"^### ", text.partition("## How to use it in Python")[0], re.MULTILINE)
    assert "cache_implementation" not in text  # what bitsandbytes holds is not compiled
