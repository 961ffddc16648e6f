"""What vLLM's CPU build can compute on the processor at hand, and a checkpoint that it serves where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from safetensors.torch import load_file, save_file

from gemma_pack.checkpoint import INDEX_NAME, SINGLE_NAME, read_json
from gemma_pack.quantization.packing import unpack
from gemma_pack.quantization.scheme import quantization_scheme
from gemma_pack.recipe import load_recipe

if TYPE_CHECKING:
    from torch import Tensor

FLAGS: Final = set(Path("/proc/cpuinfo").read_text("utf-8").split())
HAS_AMX: Final = "amx_tile" in FLAGS
HAS_INT4: Final = "avx512bw" in FLAGS
"""What vLLM brings for other processors was compiled without its int4 kernel."""
INT8_SATURATES: Final = "avx2" in FLAGS and not FLAGS & {"avx512_vnni", "avx_vnni"}
"""Without VNNI, oneDNN adds two products of int8 in 16 bits, which are too few (its guide, "Nuances of int8
computations")."""


def dequantize(directory: Path) -> None:
    """Write the weights of a quantized checkpoint, in its own place, as the bfloat16 that its kernels multiply by.

    Its record and recipe stay. Files are replaced and never written into: others may be hard links to them.
    """
    scheme = quantization_scheme(load_recipe(str(directory / "recipe.yaml")))
    tensors: dict[str, Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    packed = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    for name in packed:
        parts = {key: tensors.pop(key) for key in [*tensors] if key.startswith(f"{name}.")}
        tensors[f"{name}.weight"] = unpack(name, parts, scheme)
    save_file(tensors, directory / SINGLE_NAME, metadata={"format": "pt"})
    (directory / INDEX_NAME).unlink(missing_ok=True)
    config = {key: value for key, value in read_json(directory / "config.json").items() if key != "quantization_config"}
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
