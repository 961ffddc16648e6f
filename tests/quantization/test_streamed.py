"""The data-free path: the bytes are upstream's, whatever interrupts it, and memory stays small."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from gemma_pack.checkpoint import Checkpoint, file_sha256
from gemma_pack.errors import QuantizationError, RecipeError
from gemma_pack.gemma import decoder_linears, linear_shape, norm_shapes
from gemma_pack.quantization import shards, streamed
from gemma_pack.quantization.layout import stored_tensors
from gemma_pack.quantization.packing import unpack
from gemma_pack.quantization.scheme import quantization_scheme
from gemma_pack.quantization.variant import quantize
from gemma_pack.recipe import parse_recipe
from gemma_pack.safetensors_file import write_safetensors
from tests.tiny import write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gemma_pack.console import Reporter
    from gemma_pack.quantization.variant import Job

    MakeJob = Callable[..., Job]

COMPRESSED = ["W4A16", "W8A16", "W8A8", "FP8_DYNAMIC"]
LINEARS = 3 * 7


def recipe_text(scheme: str, *lines: str) -> str:
    observer = [] if scheme.startswith("BNB") else ["observer: memoryless_minmax"]
    fixed = ["name: free", "summary: for tests", f"scheme: {scheme}", "algorithm: nearest", "gate: [{kl_nats: 1}]"]
    return "\n".join([*fixed, *observer, *lines]) + "\n"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def digests(directory: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in directory.iterdir()}


@pytest.mark.parametrize("scheme", COMPRESSED)
def test_scales_are_those_of_llm_compressors_data_free_path_and_codes_no_worse(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter, scheme: str
) -> None:
    """Upstream divides by the scale in bfloat16, which takes some weights to a code that is not the nearest."""
    from llmcompressor import model_free_ptq

    job = make_job(tiny_checkpoint, recipe_text(scheme))
    ours = quantize(job, tmp_path / "ours", reporter)
    ignore = ["lm_head", "re:.*embed_tokens$"]
    model_free_ptq(tiny_checkpoint, tmp_path / "theirs", scheme=scheme, ignore=ignore, device="cpu")
    base, mine, upstream = (tensors(path) for path in (tiny_checkpoint, ours.directory, tmp_path / "theirs"))
    assert mine.keys() == upstream.keys()
    names = [name.removesuffix(".weight_scale") for name in mine if name.endswith(".weight_scale")]
    assert len(names) == LINEARS
    for name in names:
        assert torch.equal(mine[f"{name}.weight_scale"], upstream[f"{name}.weight_scale"])
        weight = base[f"{name}.weight"].float()
        scheme_of = quantization_scheme(job.recipe)
        errors = [(unpack(name, found, scheme_of).float() - weight).square().sum() for found in (mine, upstream)]
        assert errors[0] <= 1.001 * errors[1]  # both are rounded to bfloat16 in the end


def test_pieces_of_any_size_give_the_same_bytes(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scheme in ("W4A16", "BNB_NF4"):
        job = make_job(tiny_checkpoint, recipe_text(scheme))
        whole = quantize(job, tmp_path / f"{scheme}-whole", reporter)
        with monkeypatch.context() as patch:
            patch.setattr(streamed, "_ELEMENTS_A_PIECE", 1)
            pieces = quantize(job, tmp_path / f"{scheme}-pieces", reporter)
        assert digests(whole.directory) == digests(pieces.directory)


def test_blocks_share_a_scale_and_pieces_hold_whole_blocks() -> None:
    recipe = parse_recipe(recipe_text("FP8_BLOCK"), origin="r.yaml")
    rows = streamed.row_format(recipe, torch.device("cpu"))
    assert rows.divisor == 128
    torch.manual_seed(0)
    weight = torch.randn(256, 384).bfloat16()
    made = rows.finish((256, 384), rows.encode(weight))
    blocks = weight.float().reshape(2, 128, 3, 128).transpose(1, 2)
    assert torch.equal(made["weight_scale"], (blocks.abs().amax((2, 3)) / 448).bfloat16())
    scales = made["weight_scale"].float()[:, :, None, None]
    codes = (blocks / scales).clamp(-448, 448).to(torch.float8_e4m3fn).transpose(1, 2).reshape(256, 384)
    assert torch.equal(made["weight"].view(torch.uint8), codes.view(torch.uint8))


def test_rows_that_blocks_do_not_divide_are_refused(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter
) -> None:
    """vLLM refuses a fused matrix of which a part has a broken block (`validate_fp8_block_shape`)."""
    with pytest.raises(RecipeError, match=r"k_proj has 64 rows, which blocks of 128 do not divide"):
        quantize(make_job(tiny_checkpoint, recipe_text("FP8_BLOCK")), tmp_path / "variant", reporter)
    assert not any(tmp_path.iterdir())


def test_layers_that_are_left_alone_and_small_shards(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 100_000)
    job = make_job(tiny_checkpoint, recipe_text("FP8_DYNAMIC", 'ignore: ["re:.*layers.1.mlp.*"]'))
    variant = quantize(job, tmp_path / "variant", reporter)
    opened = Checkpoint.open(variant.directory)
    assert len(variant.record.quantization.untouched.changed) == LINEARS - 3
    assert len([path for path in opened.shards if "quantized" in path.name]) > 2
    assert all(path.stat().st_size < 110_000 for path in opened.shards if "quantized" in path.name)
    ignore = opened.config["quantization_config"]["ignore"]
    assert ignore == ["lm_head", *(f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up"))]


def test_a_base_in_several_shards_gives_the_same_files_as_in_one(
    tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "sharded" / name).write_bytes((tiny_checkpoint / name).read_bytes())
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    made = [
        quantize(make_job(base, recipe_text("FP8_DYNAMIC")), tmp_path / f"from-{base.name}", reporter).directory
        for base in (tiny_checkpoint, tmp_path / "sharded")
    ]
    for path in made[0].glob("*.safetensors"):
        assert path.read_bytes() == (made[1] / path.name).read_bytes()


class TestBitsandbytes:
    """What we write is what bitsandbytes makes of the same weights when transformers quantizes on loading."""

    def loaded(self, directory: Path, **options: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options).eval()

    def test_nf4_is_bit_for_bit_what_transformers_quantizes_to(
        self, tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter
    ) -> None:
        from transformers import BitsAndBytesConfig

        variant = quantize(make_job(tiny_checkpoint, recipe_text("BNB_NF4")), tmp_path / "variant", reporter)
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head"],
        )
        ours, theirs = self.loaded(variant.directory), self.loaded(tiny_checkpoint, quantization_config=config)
        for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert torch.equal(one.data.cpu(), other.data.cpu()), name
            if hasattr(one, "quant_state"):
                mine, upstream = (weight.quant_state.as_dict(packed=False) for weight in (one, other))
                assert mine.keys() == upstream.keys()
                assert all(
                    torch.equal(v, upstream[k]) if isinstance(v, torch.Tensor) else v == upstream[k]
                    for k, v in mine.items()
                ), name
        ids = torch.arange(2, 34)[None]
        with torch.no_grad():
            assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)

    def test_int8_is_the_nearest_code_of_each_row(
        self, tiny_checkpoint: Path, make_job: MakeJob, tmp_path: Path, reporter: Reporter
    ) -> None:
        variant = quantize(make_job(tiny_checkpoint, recipe_text("BNB_INT8")), tmp_path / "variant", reporter)
        base, made = tensors(tiny_checkpoint), tensors(variant.directory)
        name = "model.layers.1.mlp.down_proj"
        weight, codes, largest = base[f"{name}.weight"].float(), made[f"{name}.weight"], made[f"{name}.SCB"]
        assert torch.equal(largest, weight.abs().amax(1))
        steps = weight * 127 / largest[:, None]
        assert float((steps - codes).abs().max()) < 0.501
        model = self.loaded(variant.directory)
        assert type(model.model.layers[1].mlp.down_proj).__name__ == "Linear8bitLt"
        assert type(model.lm_head).__name__ == "Linear"
        assert model.lm_head.weight is model.model.embed_tokens.weight
        ids = torch.arange(2, 34)[None]
        with torch.no_grad():
            p, q = (
                m(input_ids=ids).logits.float().log_softmax(-1)
                for m in (self.loaded(tiny_checkpoint), self.loaded(variant.directory))
            )
        assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < 0.01

    @pytest.mark.parametrize("scheme", ["BNB_INT8", "BNB_NF4"])
    def test_record_and_config_say_what_it_is(
        self, tiny_checkpoints: Callable[[str], Path], make_job: MakeJob, tmp_path: Path, reporter: Reporter,
        scheme: str,
    ) -> None:  # fmt: skip
        from transformers import AutoModelForImageTextToText

        base = tiny_checkpoints("gemma3")
        variant = quantize(make_job(base, recipe_text(scheme)), tmp_path / "variant", reporter)
        made = variant.record.quantization
        assert made.format == "bitsandbytes"
        assert set(made.versions) == {"torch", "bitsandbytes"}
        config = json.loads((variant.directory / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "bitsandbytes"
        assert {"lm_head", "vision_tower", "model.multi_modal_projector"} < set(config["llm_int8_skip_modules"])
        model = AutoModelForImageTextToText.from_pretrained(variant.directory, dtype=torch.bfloat16)
        kinds = {type(module).__name__ for module in model.model.vision_tower.modules()}
        assert "Linear" in kinds
        assert not kinds & {"Linear4bit", "Linear8bitLt"}


def test_a_tensor_that_is_not_what_the_header_says_is_refused(tmp_path: Path) -> None:
    recipe = parse_recipe(recipe_text("FP8_DYNAMIC"), origin="r.yaml")
    growing = shards.GrowingShards(tmp_path, [stored_tensors("a", (4, 8), recipe)])
    with growing.opened():
        growing.put("a.weight", torch.zeros((4, 8), dtype=torch.float8_e4m3fn))
        with pytest.raises(QuantizationError, match=r"a\.weight_scale became torch\.float32 \[4, 1\], where servers"):
            growing.put("a.weight_scale", torch.ones((4, 1)))
        three = torch.zeros((3, 8), dtype=torch.float8_e4m3fn)
        with pytest.raises(QuantizationError, match=r"a\.weight became torch\.int8 \[3, 8\]"):
            growing.put_rows("a.weight", [three.to(torch.int8)])
        with pytest.raises(QuantizationError, match=r"a\.weight became torch\.float8_e4m3fn \[3, 8\]"):
            growing.put_rows("a.weight", [three, three])
        with pytest.raises(QuantizationError, match=r"a\.weight became 8 bytes fewer"):
            growing.put_rows("a.weight", [three])


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "W4A16", "BNB_INT8", "BNB_NF4"])
def test_no_weight_is_held_whole_and_the_number_of_workers_is_bounded(
    tiny_checkpoint: Path,
    make_job: MakeJob,
    tmp_path: Path,
    reporter: Reporter,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    written: list[int] = []
    raw_bytes = shards._raw_bytes

    def seen(tensor: torch.Tensor) -> memoryview:
        written.append(tensor.nbytes)
        return raw_bytes(tensor)

    monkeypatch.setattr(shards, "_raw_bytes", seen)
    monkeypatch.setattr(streamed, "_ELEMENTS_A_PIECE", 1 << 10)
    made = quantize(make_job(tiny_checkpoint, recipe_text(scheme)), tmp_path / "out", reporter)
    whole = load_file(made.directory / shards.shard_name("quantized", 1)).values()
    assert 2 * max(written) <= max(tensor.nbytes for tensor in whole)
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    with streamed._workers() as pool:
        assert pool._max_workers <= 8


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    tiny_checkpoint: Path,
    make_job: MakeJob,
    tmp_path: Path,
    reporter: Reporter,
    monkeypatch: pytest.MonkeyPatch,
    finished: int,
) -> None:
    monkeypatch.setattr(streamed.os, "cpu_count", lambda: 1)  # so that layers finish in order
    job = make_job(tiny_checkpoint, recipe_text("W8A16", "group_size: 32"))
    undisturbed = quantize(job, tmp_path / "whole", reporter)
    original, calls = streamed._quantize, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > 7 * finished + 3:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(streamed, "_quantize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(job, tmp_path / "variant", reporter)
    assert not (tmp_path / "variant").exists()
    [journal] = tmp_path.glob(".variant.journal-*")
    with (journal / "finished.txt").open("a") as log:
        log.write("2")  # a line that was torn before its end
    calls.clear()
    monkeypatch.setattr(streamed, "_quantize", lambda *args: (calls.append(1), original(*args))[1])
    resumed = quantize(job, tmp_path / "variant", reporter)
    assert len(calls) == 7 * (3 - finished)
    assert digests(resumed.directory) == digests(undisturbed.directory)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["variant", "whole"]


KILLING = """
import os, random, signal, sys, time
from pathlib import Path
from gemma_pack.checkpoint import Checkpoint, file_sha256
from gemma_pack.console import Console
from gemma_pack.quantization import nearest, variant
from gemma_pack.recipe import parse_recipe
from gemma_pack.sources.directory import check_directory

base, work, text = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
reporter = Console("quiet")
job = variant.Job(
    base=Checkpoint.open(base), source=check_directory(base, reporter), recipe=parse_recipe(text, origin="r"),
    recipe_text=text, windows=None, device="cpu",
)

def attempt(target):
    child = os.fork()
    if not child:
        variant.quantize(job, target, reporter)
        os._exit(0)
    return child

def digests(directory):
    return {path.name: file_sha256(path) for path in directory.iterdir()}

begin = time.monotonic()
assert os.waitpid(attempt(work / "whole"), 0)[1] == 0
seconds = time.monotonic() - begin
killed = 0
for moment in range(10):
    target = work / str(moment)
    child = attempt(target)
    time.sleep(random.Random(moment).uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    killed += os.waitpid(child, 0)[1] == signal.SIGKILL
    assert os.waitpid(attempt(target), 0)[1] == 0
    assert digests(target) == digests(work / "whole"), moment
print(killed)
"""


def test_a_process_killed_at_ten_random_moments_goes_on_and_ends_with_the_same_bytes(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLING, str(tiny_checkpoint), str(tmp_path), recipe_text("FP8_DYNAMIC")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5, "most were killed before they were done"
    assert [path.name for path in tmp_path.iterdir() if "journal" in path.name] == []


MEASURING = """
import sys
from pathlib import Path
from gemma_pack.commands import run
assert run(["quantize", sys.argv[1], "-r", sys.argv[2], "-o", sys.argv[3], "--device", "cpu"]) == 0
[peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
print(1024 * int(peak.split()[1]))  # getrusage would count what the process that started this one held
"""


def test_memory_is_three_times_the_largest_tensor_and_500_mb_whatever_the_model(tmp_path: Path) -> None:
    base = tmp_path / "wide"
    base.mkdir()
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 14, "head_dim": 256}
    config = {"model_type": "gemma3_text", "dtype": "bfloat16", "num_attention_heads": 4, "num_key_value_heads": 1}
    config |= {**sizes, "vocab_size": 32_768, "tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    write_tokenizer(base)
    shapes = {"model.embed_tokens.weight": (32_768, 1024), **norm_shapes(config, "model.")}
    linears = [name for layer in decoder_linears(config, "model.") for group in layer for name in group]
    shapes |= {f"{name}.weight": linear_shape(config, name) for name in linears}
    pattern = torch.randn(32_768, 1024, generator=torch.Generator().manual_seed(0)).bfloat16().view(torch.uint8)
    data = pattern.numpy().tobytes()
    tensors = [(name, "BF16", shape, lambda size=2 * math.prod(shape): data[:size]) for name, shape in shapes.items()]  # noqa: B008 - each lambda keeps its own size
    write_safetensors(base / "model.safetensors", tensors)
    largest = max(map(math.prod, shapes.values())) * 2
    limit = 3 * largest + 500_000_000
    assert (base / "model.safetensors").stat().st_size > 1.15 * limit
    command = [sys.executable, "-c", MEASURING, str(base), "fp8-dynamic", str(tmp_path / "out")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < limit
