"""The rules of the house that no linter knows: what the source never contains, and what always stands in it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gemma_pack import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gemma_pack"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60

WITHOUT_TORCH = (
    "build_file", "checkpoint", "cluster", "commands", "console", "deploy", "disk", "errors", "evaluation.gate",
    "evaluation.statistics", "gemma", "machine", "matrix", "oci", "outcome", "publishing", "recipe", "record", "report",
    "reports", "safetensors_file", "sources", "texts", "yaml_file",
)  # fmt: skip
HEAVY = ("torch", "transformers", "llmcompressor", "compressed_tensors", "bitsandbytes", "auto_round")


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@cache
def texts() -> dict[str, str]:
    """Return every text file of the project by its path: what git tracks, or all where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=False, capture_output=True, text=True)
    ours = ("gemma_pack", "tests", "bench", "examples", "recipes", ".ci")
    names = listed.stdout.split("\0")[:-1] or [
        str(path.relative_to(ROOT))
        for path in (*ROOT.glob("*.*"), *(inner for name in ours for inner in (ROOT / name).rglob("*")))
        if path.is_file() and "__pycache__" not in path.parts
    ]
    text = [name for name in names if (ROOT / name).is_file() and not name.endswith(".png")]
    return {name: (ROOT / name).read_text("utf-8") for name in text}


def lines_with(pattern: str, *, but: tuple[str, ...] = ()) -> list[str]:
    """Return `file:line` of each line that `pattern` is found in."""
    wanted = re.compile(pattern)
    return [
        f"{name}:{number}: {line.strip()}"
        for name, text in texts().items()
        if name not in but
        for number, line in enumerate(text.splitlines(), 1)
        if wanted.search(line)
    ]


def called(node: ast.Call) -> str:
    """Return the dotted name of what is called, or an empty string."""
    return ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""


def calls() -> Iterator[tuple[Path, ast.Call]]:
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                yield path, node


def test_every_module_says_what_it_is_for():
    assert [str(path) for path in MODULES if not ast.get_docstring(tree(path))] == []


def test_no_module_is_longer_than_one_reader_holds_in_the_head():
    lengths = {str(path.relative_to(ROOT)): path.read_text("utf-8").count("\n") for path in MODULES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_MODULE_LINES} == {}


def test_no_function_is_longer_than_a_screen():
    long = []
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) and node.body[1:] else node.body
                if (body[-1].end_lineno or 0) - body[0].lineno >= MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert long == []


def test_every_module_has_a_place_in_the_order_of_imports():
    contracts = project()["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    placed = {name.strip().removeprefix("gemma_pack.") for layer in layers for name in layer.split("|")}
    present = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} - {"__init__", "__main__"}
    assert present == placed


def test_what_runs_in_ci_and_on_laptops_works_without_torch():
    names = [name for name in WITHOUT_TORCH if (PACKAGE / name.replace(".", "/")).is_dir() or _module(name).is_file()]
    assert names == list(WITHOUT_TORCH)
    inner = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for name in names
        for path in ((PACKAGE / name).rglob("*.py") if (PACKAGE / name).is_dir() else [_module(name)])
    }
    block = f"import sys, importlib\nfor name in {HEAVY}: sys.modules[name] = None\n"
    code = f"{block}for name in {sorted(inner)}: importlib.import_module(name)"
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


def _module(name: str) -> Path:
    return PACKAGE / f"{name.replace('.', '/')}.py"


def test_only_the_console_prints():
    printing = {
        path.name for path, call in calls() if called(call) in {"print", "sys.stdout.write", "sys.stderr.write"}
    }
    assert printing == {"console.py"}


@pytest.mark.parametrize(
    "name",
    ["eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "joblib.load", "yaml.load",
     "yaml.unsafe_load", "yaml.full_load", "tarfile.extractall", "shutil.unpack_archive", "tempfile.mktemp"],
)  # fmt: skip
def test_what_runs_or_unpacks_a_strangers_code_is_never_called(name: str):
    assert [f"{path.name}:{call.lineno}" for path, call in calls() if called(call) == name] == []


def test_nothing_is_asked_to_trust_or_to_go_through_a_shell():
    wrong = [
        f"{path.name}:{call.lineno}: {keyword.arg}"
        for path, call in calls()
        for keyword in call.keywords
        if keyword.arg in {"trust_remote_code", "shell", "allow_pickle"}
        and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
    ]
    assert wrong == []


def test_nothing_is_unpickled():
    imported = set()
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    assert "json" in imported
    assert not imported & {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}


def test_yaml_is_read_safely():
    loaders = [
        (path.name, ast.unparse(keyword.value))
        for path, call in calls()
        if called(call).startswith("yaml.")
        for keyword in call.keywords
        if keyword.arg == "Loader"
    ]
    assert ("yaml_file.py", "yaml.SafeLoader") in loaders
    assert {loader for _, loader in loaders} == {"yaml.SafeLoader"}


def test_nothing_is_left_to_do():
    words = [
        "TO" + "DO",
        "FIX" + "ME",
        "X" + "XX",
        "NotImplemented" + "Error",
        r"mark\.x" + "fail",
        r"pytest\.x" + "fail",
    ]
    assert lines_with(r"\b(" + "|".join(words) + r")\b") == []


def test_the_project_speaks_of_itself_alone():
    machine = "/" + "work" + "/"
    registries = ["py" + r"pi\.", "python" + "hosted", r"anaconda\." + "(org|com)", r"npm" + r"js\."]
    assert lines_with(rf"(?<![\w.]){machine}") == []
    assert lines_with("|".join(registries)) == []


def test_every_silenced_rule_has_its_reason():
    assert lines_with(r"# noqa(?!: [A-Z0-9, ]+ - \w)", but=("tests/test_house.py",)) == []
    assert lines_with(r"# type: ignore(?!\[)", but=("tests/test_house.py",)) == []


def requirements() -> list[str]:
    described = project()["project"]
    return [
        *described["dependencies"],
        *(name for extra in described["optional-dependencies"].values() for name in extra),
    ]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_what_pyproject_asks_for():
    from packaging.requirements import Requirement

    versions = {canonical(name): version for name, version in pins().items()}
    for requirement in map(Requirement, requirements()):
        assert requirement.specifier.contains(versions[canonical(requirement.name)]), requirement


def test_constraints_are_exact_sorted_and_good_on_any_machine():
    names = list(pins())
    assert names == sorted(names, key=str.lower)
    assert [version for version in pins().values() if not re.fullmatch(r"[0-9][0-9a-z.]*", version)] == []
    assert "+" not in pins()["torch"]


def test_the_changelog_knows_this_version():
    changelog = texts()["CHANGELOG.md"]
    assert changelog.index("## [Unreleased]") > 0
    assert __version__ == "0.1.0" or f"## [{__version__}]" in changelog


def test_the_readme_names_every_command_and_every_exit_code():
    from gemma_pack import errors
    from gemma_pack.commands import VERBS

    rows = [line for line in texts()["README.md"].splitlines() if line.startswith("|")]
    named = {verb for row in rows for verb in re.findall(r"`([a-z]+)[ `]", row.split("|")[1])}
    assert set(VERBS) <= named
    codes = {int(row.split("|")[1]) for row in rows if re.fullmatch(r" *\d+ *", row.split("|")[1])}
    raised = {
        kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert codes == raised | {0, 130}


def test_the_licence_is_whole():
    licence = texts()["LICENSE"]
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert project()["project"]["license"] == "Apache-2.0"
