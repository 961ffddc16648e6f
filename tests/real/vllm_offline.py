"""Load model directories in vLLM, one after the other in one process, and print what it says of a prompt.

    python vllm_offline.py PROMPT.json DIRECTORY...

PROMPT.json is a list of token ids. One line of JSON for each directory on stdout: its text and the prompt's
log-probabilities, or vLLM's error. Run by the Python that has vLLM; it imports nothing of gemma-pack.
"""

import gc
import json
import os
import sys
from pathlib import Path

# the engine in this process, nothing compiled, int4 weights with bf16 activations (by default int8 ones on AMX), and
# little memory: without a number vLLM wants 92 % of the machine's
os.environ |= {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_USE_AOT_COMPILE": "0",
}


def ask(directory: str, prompt: list[int]) -> dict[str, object]:
    """Return the text that follows the prompt, and the log-probability of each of its tokens after the first."""
    from vllm import LLM, SamplingParams

    limits = {"max_model_len": 128, "max_num_seqs": 1, "max_num_batched_tokens": 128}
    model = LLM(model=directory, dtype="bfloat16", enforce_eager=True, **limits)
    settings = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0)
    [answer] = model.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
    found = zip(answer.prompt_logprobs[1:], prompt[1:], strict=True)
    return {"text": answer.outputs[0].text, "logprobs": [of_token[token].logprob for of_token, token in found]}


def main() -> None:
    """Ask each directory's model."""
    prompt = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    for directory in sys.argv[2:]:
        try:
            told = ask(directory, prompt)
        except Exception as error:  # noqa: BLE001 - whatever vLLM says is the answer
            told = {"error": str(error)}
        print(json.dumps({"directory": directory, **told}), flush=True)  # noqa: T201 - its answer
        gc.collect()


if __name__ == "__main__":
    main()
