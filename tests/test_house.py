"""The house as DESIGN's section 4 and the README draw it: who may import whom, who may print, what costs start-up."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import convtool
from convtool.cli.app import COMMANDS
from convtool.kinds import KINDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "convtool"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# errors <- core <- kinds; errors <- formats; {kinds, formats} <- {checkpoint, matrix} <- graph <- fusing <- live <-
# cli: a module imports only what stands lower, and its own part. What stands on one step knows nothing of its
# neighbours.
STEPS = {
    "errors": 0,
    "recipes": 0,  # data alone
    "manual": 0,
    "core": 1,
    "formats": 2,
    "kinds": 2,
    "checkpoint": 3,
    "matrix": 3,
    "graph": 4,
    "fusing": 5,
    "live": 6,
    "cli": 7,
    "__main__": 8,
    "__init__": 8,  # the names of the public API, which it imports on first use
}

CORE_IMPORTS = {
    *("__future__", "collections", "concurrent", "contextlib", "dataclasses", "enum", "fnmatch", "fractions"),
    *("functools", "difflib", "hashlib", "itertools", "json", "math", "operator", "re", "threading", "types", "typing"),
    *("abc", "bisect", "warnings"),
    *("convtool", "numpy", "scipy", "torch"),
}
# Names that, called or looked up, would print, open a file, or run a program.
EFFECTS = {
    *("print", "input", "open", "exec", "eval", "__import__", "breakpoint"),
    *("write_text", "write_bytes", "read_text", "read_bytes", "tofile", "fromfile", "memmap", "from_file"),
    *("stdout", "stderr", "save", "savez", "load", "import_module"),
}

TOP_LEVEL = {
    *("pyproject.toml", "README.md", "convtool", "tests", "sample_models", "Makefile"),
    *(".ci", ".gitignore", ".gitattributes"),
}


def part_of(path: Path) -> str:
    """'core' for convtool/core/taps.py, 'errors' for convtool/errors.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module that is imported anywhere in a file, also inside functions, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            assert node.module is not None
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def wrong_imports(part: str, tree: ast.AST) -> list[str]:
    """Imports that a module of that part must not have, as 'line 7: convtool.cli.run'."""
    found = []
    for name, line in imports(tree):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package != "convtool" or target == "__version__":
            continue
        if target not in STEPS:  # `import convtool`, `from convtool import fuse`: the whole of it
            target = "__init__"
        if target != part and STEPS[target] >= STEPS[part]:
            found.append(f"line {line}: {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    assert part_of(path) in STEPS, "a new part of the package: give it a step"
    assert wrong_imports(part_of(path), parsed(path)) == []


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("errors", "from convtool.core.conv import Conv"),
        ("core", "def f():\n    from convtool.formats.atomic import replacing"),
        ("core", "if TYPE_CHECKING:\n    import convtool.checkpoint"),
        ("core", "import convtool"),
        ("formats", "from convtool import checkpoint"),
        ("checkpoint", "from convtool.matrix import plan_matrix"),
        ("matrix", "from convtool.checkpoint import open_checkpoint"),
        ("kinds", "from convtool.checkpoint import open_checkpoint"),
        ("checkpoint", "from convtool.fusing.lowering import lower_tree"),
        ("fusing", "from convtool.live.load import load_model"),
        ("graph", "from convtool.fusing.fusion import plan_layer"),
        ("graph", "from convtool.live.trace import trace"),
        ("live", "from convtool.cli.run import run"),
        ("cli", "from convtool import fuse"),
    ],
)
def test_an_import_the_other_way_would_be_seen(part: str, line: str) -> None:
    assert wrong_imports(part, ast.parse(line))


def compared_kinds(tree: ast.AST) -> list[str]:
    """Return where a file asks which kind a layer is: by a kind's name, by its module, or by its class."""
    names, modules = {kind.name for kind in KINDS}, {type(kind).__module__ for kind in KINDS}
    found = [f"line {line}: {name}" for name, line in imports(tree) if name.rpartition(".")[0] in modules]
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            words = {str(one.value) for one in ast.walk(node) if isinstance(one, ast.Constant)}
            found += [f"line {node.lineno}: {word}" for word in words & names if "kind" in ast.unparse(node)]
        if isinstance(node, ast.Call) and re.match(r"isinstance\(.*\bkind[,.]", ast.unparse(node)):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_kinds_know_one_kind_from_another(path: Path) -> None:
    if part_of(path) != "kinds":
        assert compared_kinds(parsed(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        "if layer.kind.name == 'conv': pass",
        "chosen = kind in ('linear', 'batch_norm')",
        "from convtool.kinds.scale import SCALE",
        "if isinstance(layer.kind, BatchNorm): pass",
    ],
)
def test_a_comparison_of_kinds_would_be_seen(line: str) -> None:
    assert compared_kinds(ast.parse(line))


def test_no_two_modules_have_one_name() -> None:
    """But for packages, and a command's module, which bears the name of its command."""
    names = Counter(path.stem for path in SOURCES if path.stem != "__init__" and path.stem not in COMMANDS)
    assert [name for name, count in names.items() if count > 1] == []


def test_no_two_modules_import_each_other() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    known: dict[str, set[str]] = {}
    for name, path in names.items():
        # `from a.b import c` is of a.b.c where that is a module, and else of a.b.
        found = {target if target in names else target.rpartition(".")[0] for target, _ in imports(parsed(path))}
        known[name] = found & names.keys() - {name, "convtool"}
    assert [(one, other) for one, others in known.items() for other in others if one in known[other]] == []


def effects(tree: ast.AST) -> list[str]:
    """Names in a file that print, open files or run programs."""
    names = [(node.id, node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Name)]
    names += [(node.attr, node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [f"line {line}: {name}" for name, line in names if name in EFFECTS]


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").rglob("*.py")), ids=lambda path: path.name)
def test_the_core_neither_prints_nor_opens_files(path: Path) -> None:
    tree = parsed(path)
    assert {name.partition(".")[0] for name, _ in imports(tree)} <= CORE_IMPORTS
    assert effects(tree) == []


def test_only_the_command_line_prints() -> None:
    for path in SOURCES:
        if part_of(path) != "cli":
            found = [name for name in effects(parsed(path)) if name.split()[-1] in ("print", "stdout", "stderr")]
            assert found == [], path


def test_only_live_touches_a_users_modules() -> None:
    """Elsewhere no class of torch's modules and nothing that runs or follows one is imported, but to be named."""
    running = re.compile(r"torch\.(nn(?!\.functional)|fx|export|_subclasses|utils\._python_dispatch)")
    for path in SOURCES:
        tree = parsed(path)
        named = {line for node in ast.walk(tree) if _is_for_types(node) for _, line in imports(node)}
        found = [name for name, line in imports(tree) if running.match(name) and line not in named]
        assert part_of(path) == "live" or found == [], path


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_every_module_says_what_it_is_for() -> None:
    for path in SOURCES:
        tree = parsed(path)
        assert isinstance(tree, ast.Module)
        assert ast.get_docstring(tree), path


# Runs command lines in one process, each with what it must not have imported by its end; prints what was found.
STARTUP = """
import contextlib, io, os, sys

def loaded(*names):
    return [name for name in names if name in sys.modules]

found = []

def run(arguments, forbidden, **environment):
    os.environ.update(environment)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = run_app(arguments)
        except SystemExit as stop:
            code = stop.code
    for name in environment:
        del os.environ[name]
    if loaded(*forbidden):
        found.append((arguments, loaded(*forbidden)))
    return code, out.getvalue(), err.getvalue()

from convtool.cli.app import COMMANDS, run_app

TORCH = ("torch", "numpy", "scipy", "safetensors", "rich", "pydantic")  # the last two for the time that they take
assert run(["--help"], TORCH)[0] == 0
assert run(["-h"], TORCH)[0] == 0
assert run(["--version"], TORCH)[0] == 0
for name in COMMANDS:
    code, out, err = run([name, "--help"], TORCH)
    assert code == 0 and name in out and not err, (code, out, err)
for line in ("", "fuze", "--wrong", "inspect", "inspect x --wrong", "verify x y --trials z", "convert x y z"):
    wrong = line.split()
    code, out, err = run(wrong, TORCH)
    assert code == 2 and not out and err, (wrong, code, out, err)
for words in ("convtool ", "convtool fuse --", "convtool inspect sample_models/chains.safetensors "):
    run([], TORCH, _CONVTOOL_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split())))
for arguments in (["--tensors"], ["--json"], ["wid*"], ["--set", "widen.padding=1,2"]):
    code, out, err = run(["inspect", "sample_models/chains.safetensors", *arguments], ("torch", "numpy"))
    assert code == 0 and "widen" in out, (code, out, err)
assert run(["inspect", "sample_models/chains.safetensors", "wide"], ("torch", "numpy"))[0] == 2
assert run(["inspect", "sample_models/missing.safetensors"], ("torch", "numpy"))[0] == 3
assert run(["inspect", "sample_models/chains.pt", "--tensors"], ("torch", "numpy"))[0] == 0
assert run(["verify", "sample_models/chains.pt", "sample_models/conv_bn.safetensors"], ())[0] == 2
assert loaded("torch")  # or none of this would show anything
print(found)
"""


def test_help_usage_errors_completion_and_inspect_import_neither_torch_nor_numpy() -> None:
    done = subprocess.run([sys.executable, "-c", STARTUP], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def files_of_the_repository() -> list[Path]:
    """What git has, and not what a user keeps in the clone; all files but leftovers where there is no git."""
    command = ["git", "ls-files", "--cached", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        hidden = re.compile(r"(^|/)(\.(git|venv|\w+_cache|hypothesis)|__pycache__|build|dist|\w+_output|.*\.egg-info)/")
        listed = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
        listed = [name for name in listed if not hidden.search(name)]
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def test_the_top_level_holds_nothing_without_need() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in files_of_the_repository()} <= TOP_LEVEL


def test_nothing_in_the_repository_knows_where_it_was_made() -> None:
    absolute = re.compile(rb"(?<![\w.~$}])/(?:home|work|root|tmp|Users|mnt|opt|srv)/[\w.]")
    for path in files_of_the_repository():
        found = absolute.search(path.read_bytes())
        assert not found, f"{path.relative_to(ROOT)}: {found[0]!r}"


def test_the_package_ships_all_that_it_reads() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)
    shipped = settings["tool"]["setuptools"]["package-data"]["convtool"]
    data = [path.relative_to(PACKAGE) for path in files_of_the_repository() if path.is_relative_to(PACKAGE)]
    data = [path for path in data if path.suffix != ".py"]
    assert Path("py.typed") in data
    assert [path for path in data if not any(fnmatch(str(path), pattern) for pattern in shipped)] == []
    assert all((PACKAGE / path.parent / "__init__.py").is_file() for path in data)  # setuptools looks in packages only


def test_the_five_dependencies_are_all_that_is_imported_without_an_extra() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    needed = {re.split(r"\W", line)[0] for line in project["dependencies"]}
    assert needed == {"torch", "typer", "rich", "safetensors", "numpy"}
    extras = {re.split(r"\W", line)[0] for name in ("scipy", "plot") for line in project["optional-dependencies"][name]}
    for path in SOURCES:
        found = {name.partition(".")[0] for name, _ in imports(parsed(path))} - sys.stdlib_module_names
        assert found <= needed | extras | {"convtool", "transformers"}, path


# --- the public API


def test_the_public_names_are_documented_and_all_resolve() -> None:
    assert convtool.__all__ == sorted(convtool.__all__, key=lambda name: (name != "__version__", name))
    for name in convtool.__all__:
        value = getattr(convtool, name)
        assert name == "__version__" or inspect.getdoc(value), name
    assert set(convtool.__all__) <= set(dir(convtool))
    with pytest.raises(AttributeError, match="module 'convtool' has no attribute 'fuze'"):
        _ = convtool.fuze


def test_what_type_checkers_are_told_of_the_public_api_is_what_there_is() -> None:
    """The names under `if TYPE_CHECKING` are those that are imported on first use, from the same modules."""
    tree = parsed(PACKAGE / "__init__.py")
    told = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("convtool.")
        for alias in node.names
    }
    assert sorted(told) == sorted(set(convtool.__all__) - {"__version__"})
    assert all(
        getattr(importlib.import_module(str(home)), name) is getattr(convtool, name) for name, home in told.items()
    )


def test_every_public_function_has_its_place_in_the_tour() -> None:
    """The package's docstring shows what each is for; its examples are doctests, which run with the rest."""
    tour = convtool.__doc__ or ""
    functions = [name for name in convtool.__all__ if inspect.isfunction(getattr(convtool, name))]
    assert [name for name in functions if f"convtool.{name}(" not in tour and f"`{name}`" not in tour] == []
    assert len(doctest.DocTestParser().get_examples(tour)) > 10
