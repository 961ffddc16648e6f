"""The proof that a variant differs from its source only where the recipe says so.

Every tensor that the recipe does not name must be in the variant, byte for byte, and every tensor that it names must be
gone, replaced by its packed form. Upstream tools rewrite Gemma's norms on every run (1 + w is stored in bf16 and
subtracted again), which no perplexity shows; a digest does.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from gemma_pack.errors import QuantizationError
from gemma_pack.record import UntouchedProof
from gemma_pack.safetensors_file import TensorInfo

if TYPE_CHECKING:
    from collections.abc import Collection

    from gemma_pack.checkpoint import Checkpoint
    from gemma_pack.console import Reporter


def prove_untouched(
    base: Checkpoint, variant: Checkpoint, changed: Collection[str], added: Collection[str], reporter: Reporter
) -> UntouchedProof:
    """Compare every tensor that is not in `changed`, read back from both checkpoints' files.

    Args:
        base: the bf16 source.
        variant: what was written.
        changed: names, in the base, of the tensors that were replaced.
        added: names, in the variant, of what replaced them.
        reporter: shows progress.

    Raises:
        QuantizationError: a tensor is altered, missing, or there without a reason; the message names it.
    """
    kept = sorted(set(base.tensors) - set(changed))
    unexpected = set(variant.tensors) ^ (set(kept) | set(added))
    if unexpected:
        name = min(unexpected)
        problem = "has" if name in variant.tensors else "lacks"
        raise QuantizationError(f"the variant {problem} {name}, against the recipe; nothing was kept")
    lines = []
    total = sum(base.tensors[name].size_bytes for name in kept)
    with reporter.progress("prove the rest untouched", total, "bytes") as task, ThreadPoolExecutor(2) as pool:
        for name in kept:
            source, copy = base.tensors[name], variant.tensors[name]
            digest, copied = pool.map(TensorInfo.digest, (source, copy))
            if (source.dtype, source.shape, digest) != (copy.dtype, copy.shape, copied):
                raise QuantizationError(
                    f"{name} changed, and the recipe does not name it; nothing was kept",
                    hint="this is a defect of gemma-pack or of a library below it: please report it with the versions",
                )
            lines.append(f"{name} {digest}\n")
            task.advance(source.size_bytes)
    return UntouchedProof(
        changed=tuple(sorted(changed)), untouched=len(kept), sha256=hashlib.sha256("".join(lines).encode()).hexdigest()
    )
