"""How much of a GPU's memory is free for what comes next."""

from __future__ import annotations

import gc

import torch


def free_gpu_bytes(device: torch.device | None = None) -> int:
    """Return the free bytes of a GPU, once what this process no longer uses there is given back.

    The driver counts what torch keeps for later tensors as used (`torch.cuda.mem_get_info` is `cudaMemGetInfo`), and
    a model whose modules refer to each other stays until garbage is collected.
    """
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free
