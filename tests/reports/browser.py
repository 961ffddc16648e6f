"""Looks at a page with Chromium: lays it out at a width, and asks it what is seen."""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def look_at(html: str, question: str, *, chromium: str, work: Path, width: int) -> dict[str, Any]:
    """Return the value of `question`, JavaScript that may use `page`, the root element of `html` when it is loaded.

    A probe added to a copy asks it; the copy lies in a frame `width` pixels wide, because a headless window has a
    least width of its own.
    """
    probe = f"""<script>
    addEventListener("load", () => {{
      const page = document.documentElement;
      const seen = {question};
      document.body.innerHTML = "<pre>" + JSON.stringify(seen) + "</pre>";
    }});
    </script>"""
    framed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html).replace("</head>", probe + "</head>")
    (work / "page.html").write_text(framed, "utf-8")
    (work / "frame.html").write_text(
        f'<iframe src="page.html" width="{width}" height="900" onload="setTimeout(() => document.title = '
        'this.contentDocument.body.innerText)"></iframe>',
        "utf-8",
    )
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            f"--user-data-dir={work / 'profile'}",
            "--virtual-time-budget=3000",
            "--dump-dom",
            (work / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found, done.stdout[-2000:]
    seen: dict[str, Any] = json.loads(found[1])
    return seen
