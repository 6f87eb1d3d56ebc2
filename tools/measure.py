"""What a checkout's code is made of: modules, imports, long files and functions, assertions.

    python -m tools.measure                   # this checkout
    python -m tools.measure ../before .       # another one beside it
    python -m tools.measure --cases .         # and the cases that pytest collects

Reads source text alone, so that it measures any commit; `--cases` runs pytest there.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

LINKS = ("cli", "convert", "metal_kernels")
PACKAGES = ("mlx_kimi", *LINKS)
TESTS = ("tests", "tools/metal_emulator")
LONGEST_FILE, LONGEST_FUNCTION = 400, 40  # lines; of a function those of code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path()])
    parser.add_argument("--cases", action="store_true", help="Count pytest's cases, too.")
    options = parser.parse_args()
    for root in options.checkouts:
        print(f"== {root.resolve().name}")
        for name, value in measured(root.resolve(), options.cases).items():
            print(f"{name:<46} {value}")


def measured(root: Path, cases: bool) -> dict[str, object]:
    """Every number of a checkout by its name."""
    files = {module_name(root, path): path for path in package_files(root)}
    edges = edges_of({name: imported_when_run(path) for name, path in files.items()})
    folders = {(folder(a), folder(b)) for a, bs in edges.items() for b in bs}
    folders = {(a, b) for a, b in folders if a != b}
    tests = [path for place in TESTS for path in sorted((root / place).rglob("*.py"))]
    numbers: dict[str, object] = {
        "modules": len(files),
        "modules in a folder, at most": Counter(map(folder, files)).most_common(1)[0],
        "imports between modules": sum(map(len, edges.values())),
        "imports between folders": len(folders),
        "of these, pairs that know each other": sum((b, a) in folders for a, b in folders) // 2,
        "modules in circles of imports": sum(map(len, circles(edges))),
        f"files over {LONGEST_FILE} lines": long_files(files.values()),
        f"functions over {LONGEST_FUNCTION} lines of code": long_functions(files.values()),
        "assertions in tests": sum(map(assertions, tests)),
    }
    if cases:
        numbers["cases that pytest collects"] = collected(root)
    return numbers


def package_files(root: Path) -> Iterator[Path]:
    """The Python files of the package, each once: links are left out."""
    for name in PACKAGES:
        for path in sorted((root / name).rglob("*.py")):
            inside = path.relative_to(root).parts
            linked = inside[0] == "mlx_kimi" and inside[1] in LINKS
            # The package's own names and entry point stand for all of it; other `__init__.py`
            # that hold nothing make a folder a package.
            public = inside in (("mlx_kimi", "__init__.py"), ("mlx_kimi", "__main__.py"))
            if not (linked or public or is_empty(path)):
                yield path


def is_empty(path: Path) -> bool:
    """Whether nothing but a docstring stands in a file."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return all(isinstance(node, ast.Expr) for node in body)


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts if parts[0] == "mlx_kimi" else ("mlx_kimi", *parts))
    return name.removesuffix(".__init__")


def folder(module: str) -> str:
    return module.rpartition(".")[0] or module


def imported_when_run(path: Path) -> set[str]:
    """The names that a file imports when it runs, also within functions; not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def edges_of(imports: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Of each module, which imports these names, those that are among the modules."""
    return {name: (names & set(imports)) - {name} for name, names in imports.items()}


def circles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """Groups of modules that all reach each other by imports."""
    return [group for group in components(edges) if len(group) > 1]


def components(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """Modules that reach each other by imports (strongly connected components)."""
    reached = {name: reachable(name, edges) for name in edges}
    found: list[set[str]] = []
    for name in edges:
        if not any(name in group for group in found):
            found.append({name} | {other for other in reached[name] if name in reached[other]})
    return found


def reachable(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for following in edges[waiting.pop()] - seen:
            seen.add(following)
            waiting.append(following)
    return seen


def long_files(paths: Iterable[Path]) -> list[str]:
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    return [f"{name} {count}" for name, count in lines.items() if count > LONGEST_FILE]


def long_functions(paths: Iterable[Path]) -> list[str]:
    """Functions by their lines of code: docstrings, comments and blank lines do not count."""
    found = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                if not body:
                    continue
                code = lines[body[0].lineno - 1 : body[-1].end_lineno]
                count = sum(bool(re.match(r"\s*[^\s#]", line)) for line in code)
                if count > LONGEST_FUNCTION:
                    found.append(f"{path.name}:{node.name} {count}")
    return found


def assertions(path: Path) -> int:
    """`assert`, `assert_...(...)`, `pytest.raises` and `pytest.warns` in a file."""
    count = 0
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assert):
            count += 1
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            count += name.startswith("assert_") or name in ("raises", "warns", "wait_for", "expect")
    return count


def collected(root: Path) -> int:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    found = re.search(r"(\d+) tests? collected", said)
    assert found, said
    return int(found[1])


if __name__ == "__main__":
    main()
