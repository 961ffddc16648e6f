"""Print what vLLM's int8 kernel makes of rows of 127 times columns of 127, and what it is.

Run by the Python that has vLLM; it imports nothing of gemma-pack.
"""

import torch
from vllm import _custom_ops as ops

TERMS, ROWS, COLUMNS = 128, 8, 64

codes, scales = torch.full((COLUMNS, TERMS), 127, dtype=torch.int8), torch.ones(COLUMNS)
kernel = ops.create_onednn_scaled_mm(codes.t(), scales, torch.float32, True, False)
inputs, input_scales = torch.full((ROWS, TERMS), 127, dtype=torch.int8), torch.ones(ROWS, 1)
made = torch.empty(ROWS, COLUMNS)
ops.onednn_scaled_mm(kernel, inputs, made, input_scales, None, None, None)
print(int(made[0, 0]), 127 * 127 * TERMS)  # noqa: T201 - its answer
