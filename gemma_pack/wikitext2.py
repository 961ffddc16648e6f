"""WikiText-2, raw, as papers measure it: one file of the hub, at one commit, with one sha256.

S. Merity et al., "Pointer Sentinel Mixture Models", 2016. What is at a branch can change, and then perplexities of two
months cannot be compared; what has this digest cannot.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from gemma_pack.errors import OfflineError, TextError

NAME: Final = "wikitext2"
REPOSITORY: Final = "Salesforce/wikitext"
COMMIT: Final = "b08601e04326c79dfdd32d625aee71d232d685c3"
FILE: Final = "wikitext-2-raw-v1/test-00000-of-00001.parquet"
SHA256: Final = "5f1bea067869d04849c0f975a2b29c4ff47d867f484f5010ea5e861eab246d91"
ORIGIN: Final = f"{REPOSITORY}:wikitext-2-raw-v1@{COMMIT}"


def read_wikitext2(*, offline: bool) -> list[str]:
    """Return the lines of the test split; joined by blank lines they are what GPTQ's papers measure.

    Raises:
        OfflineError: the hub is out of reach, and the file is not in its cache.
        TextError: it is there with other bytes.
    """
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from pyarrow import parquet

    instead = "use --text builtin, or a file"
    try:
        found = hf_hub_download(REPOSITORY, FILE, repo_type="dataset", revision=COMMIT, local_files_only=offline)
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, ConnectionError) as error:
        raise OfflineError("WikiText-2 is out of reach and not in the cache", hint=instead) from error
    path = Path(found)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise TextError(
            f"{path} is not WikiText-2 as it is known: sha256 {digest[:16]}…, not {SHA256[:16]}…",
            hint=f"remove it and fetch it again, or {instead}",
        )
    lines: list[str] = parquet.read_table(path)["text"].to_pylist()
    return lines
