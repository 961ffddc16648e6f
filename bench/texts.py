"""Texts of several kinds from Debian's packages, for measurements that anyone can repeat.

    python bench/texts.py DIRECTORY

downloads the packages named below (`apt-get download`, nothing is installed), takes the prose out of their HTML and
text files and writes one .txt file a text: `calibrate-*.txt` for quantization, `choose-*.txt` to choose settings by,
`report-*.txt` for the figures that are reported. No package serves two purposes. `mixed.txt` takes the calibration
texts in turn.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

MAX_CHARACTERS = 3_000_000
MIXED_CHARACTERS, MIXED_AT_A_TIME = 300_000, 8_000
"""Characters of each calibration text in the mixed one, and how many come from one text in turn."""


@dataclass(frozen=True, slots=True)
class Text:
    """One text: its name, the package, and which of its files hold the prose."""

    name: str
    package: str
    pattern: str


TEXTS = (
    Text("calibrate-git", "git-doc", "usr/share/doc/git-doc/*.html"),
    Text("calibrate-postgresql", "postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html/*.html"),
    Text("calibrate-history", "debian-history", "usr/share/doc/debian-history/**/*.en.html"),
    Text("calibrate-fortunes", "fortunes", "usr/share/games/fortunes/*"),
    Text("choose-jargon", "dict-jargon", "usr/share/dictd/*.dict.dz"),
    Text("choose-policy", "debian-policy", "usr/share/doc/debian-policy/policy.html/*.html"),
    Text("report-handbook", "debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html"),
    Text("report-essays", "anarchism", "usr/share/doc/anarchism/html/**/*.html"),
    Text("report-apache", "apache2-doc", "usr/share/doc/apache2-doc/manual/en/**/*.html"),
)


class _Prose(HTMLParser):
    """Collects the paragraphs of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.open = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"p", "dd"} or (tag == "div" and ("class", "para") in attrs):  # DocBook's paragraphs are divs
            self.paragraphs.append("")
            self.open = 1

    def handle_endtag(self, tag: str) -> None:
        if tag in {"p", "dd", "div"}:
            self.open = 0

    def handle_data(self, data: str) -> None:
        if self.open:
            self.paragraphs[-1] += data


def prose_of(path: Path) -> str:
    """Return the prose of one file: HTML paragraphs longer than 80 characters, or plain text as it is."""
    data = path.read_bytes()
    if path.suffix in {".gz", ".dz"}:
        data = gzip.decompress(data)
    text = data.decode("utf-8", "replace")
    if path.suffix == ".html":
        parser = _Prose()
        parser.feed(text)
        paragraphs = [re.sub(r"\s+", " ", paragraph).strip() for paragraph in parser.paragraphs]
        return "\n\n".join(paragraph for paragraph in paragraphs if len(paragraph) > 80)
    return "" if "\x00" in text or "�" in text else text


def write_text(text: Text, target: Path) -> str:
    """Write one text below `target`; return a line that says what it is."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        subprocess.run(
            ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", text.package], cwd=directory, check=True
        )
        package = next(directory.glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), "tree"], cwd=directory, check=True)
        files = sorted(
            path for path in (directory / "tree").glob(text.pattern) if path.is_file() and not path.is_symlink()
        )
        prose = "\n\n".join(filter(None, map(prose_of, files)))[:MAX_CHARACTERS]
        version = package.name.removesuffix(".deb")
    path = target / f"{text.name}.txt"
    path.write_text(prose, "utf-8")
    return f"{path.name}  {len(prose)} characters  sha256 {hashlib.sha256(prose.encode()).hexdigest()[:16]}  {version}"


def write_mixed(directory: Path) -> Path:
    """Write mixed.txt, which takes pieces of each calibration text in turn, and return it."""
    texts = [path.read_text("utf-8")[:MIXED_CHARACTERS] for path in sorted(directory.glob("calibrate-*.txt"))]
    turns = range(0, MIXED_CHARACTERS, MIXED_AT_A_TIME)
    path = directory / "mixed.txt"
    path.write_text(
        "\n\n".join(filter(None, (text[n : n + MIXED_AT_A_TIME] for n in turns for text in texts))), "utf-8"
    )
    return path


def main() -> None:
    """Write all texts, and the calibration texts once more mixed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    for text in TEXTS:
        print(write_text(text, directory), flush=True)
    print(write_mixed(directory).name)


if __name__ == "__main__":
    main()
