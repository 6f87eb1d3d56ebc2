"""The tree: imports point one way, the package's folders are links, and a wheel would hold all."""

import ast
import fnmatch
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.measure import circles, edges_of, imported_when_run, module_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_kimi"
EMULATOR = ROOT / "tools" / "metal_emulator"
LINKS = ("cli", "convert", "metal_kernels")
# A layer may import itself and what stands to its right.
LAYERS = ("cli", "convert", "mlx_kimi", "metal_kernels")
# Rooms of mlx_kimi, from the top; those of one line do not know each other. A file at the root is
# known to all rooms, and knows none but through the package's public names.
ROOMS = (
    ("server", "ranks"),
    ("evaluation", "chat"),
    ("generation", "loading"),
    ("tuning",),
    ("model", "constraints"),
    ("offload",),
    ("text", "checkpoint"),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
# Rooms of the other layers: each may use the files beside it, and those do not know it.
SIDE_ROOMS = {"cli": {"chat"}, "convert": {"report"}, "metal_kernels": set[str]()}
# Run as scripts or entry points, they belong to the command line.
ENTRY_POINTS = {"__main__.py"}


def sources() -> Iterator[tuple[str, Path]]:
    """Each Python file of the package with its layer."""
    for name in LINKS:
        yield from ((name, path) for path in sorted((ROOT / name).rglob("*.py")))
    for path in sorted([*PACKAGE.glob("*.py"), *(p for r in LEVEL for p in room_files(r))]):
        yield ("cli" if path.name in ENTRY_POINTS else "mlx_kimi"), path


def room_files(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it; a relative import would be `.`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from mlx_kimi import cli` imports a module, too.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer_of(module: str) -> str | None:
    """The layer that a module belongs to; None for what is not ours."""
    first, _, rest = module.partition(".")
    if first != "mlx_kimi":
        return None
    inner = rest.partition(".")[0]
    return inner if inner in LINKS else "mlx_kimi"


FILES = [(layer, path) for layer, path in sources() if path.stat().st_size]
of_every_file = pytest.mark.parametrize(
    "layer, path", FILES, ids=[str(path.relative_to(ROOT)) for _, path in FILES]
)


@of_every_file
def test_imports_point_one_way(layer: str, path: Path) -> None:
    below = LAYERS[LAYERS.index(layer) :]
    wrong = [m for m in imported(path) if layer_of(m) is not None and layer_of(m) not in below]
    assert not wrong


def room_of(module: str) -> str | None:
    """The room of `mlx_kimi` that a module is in; None for one of the root and for all else."""
    first, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return room if first == "mlx_kimi" and room in LEVEL else None


def against_the_direction(room: str | None, path: Path) -> list[str]:
    """What a file of `room`, or of the root, imports and may not."""
    found = []
    for module in imported(path):
        to = room_of(module)
        if to is None or to == room:
            continue
        if room is None or LEVEL[to] <= LEVEL[room]:
            found.append(module)
    return found


def test_every_folder_is_a_room() -> None:
    assert packages_in(PACKAGE) == {*LEVEL, *LINKS}
    assert {layer: packages_in(ROOT / layer) for layer in LINKS} == SIDE_ROOMS


def packages_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if (path / "__init__.py").is_file()}


@pytest.mark.parametrize("room", LEVEL)
def test_imports_between_rooms_point_one_way(room: str) -> None:
    wrong = {path.name: against_the_direction(room, path) for path in room_files(room)}
    assert not {name: modules for name, modules in wrong.items() if modules}


def test_the_root_knows_no_room_but_to_make_names_public() -> None:
    for path in PACKAGE.glob("*.py"):
        if path.name not in {"__init__.py", *ENTRY_POINTS}:
            assert not against_the_direction(None, path), path.name


def of_a_side_room(layer: str, path: Path) -> list[str]:
    """What a file of `layer` imports from the layer's rooms without being in them."""
    inside = path.relative_to(ROOT / layer).parts[0]
    rooms = tuple(f"mlx_kimi.{layer}.{room}." for room in SIDE_ROOMS[layer] - {inside})
    return [module for module in imported(path) if f"{module}.".startswith(rooms)]


@pytest.mark.parametrize("layer", SIDE_ROOMS)
def test_a_layers_files_do_not_know_its_rooms(layer: str) -> None:
    wrong = {path: of_a_side_room(layer, path) for path in (ROOT / layer).rglob("*.py")}
    assert not {path: modules for path, modules in wrong.items() if modules}


def runtime_imports() -> dict[str, set[str]]:
    """Of each module in a room and in the linked folders what it imports."""
    rooms = (path for room in LEVEL for path in room_files(room))
    linked = (path for layer in LINKS for path in (ROOT / layer).rglob("*.py"))
    return {module_name(ROOT, path): imported_when_run(path) for path in (*rooms, *linked)}


def test_no_circle_of_imports() -> None:
    assert not circles(edges_of(runtime_imports()))


def test_a_planted_import_is_found(tmp_path: Path) -> None:
    """Against the direction, at the top of a file or in a function; and a circle likewise."""
    planted = tmp_path / "kda.py"
    planted.write_text("def f():\n    from mlx_kimi.generation.generate import generate\n")
    assert against_the_direction("model", planted) == ["mlx_kimi.generation.generate.generate"]
    assert against_the_direction(None, planted)
    planted.write_text("from mlx_kimi.model.kimi_linear import KimiLinear\n")
    files = runtime_imports()
    files["mlx_kimi.model.kda"] |= imported_when_run(planted)
    (found,) = circles(edges_of(files))
    assert {"mlx_kimi.model.kda", "mlx_kimi.model.kimi_linear"} <= found
    planted.write_text("from mlx_kimi.cli.chat import loop\n")
    files = runtime_imports()
    files["mlx_kimi.cli.chat.input"] |= imported_when_run(planted)
    (found,) = circles(edges_of(files))
    assert {"mlx_kimi.cli.chat.input", "mlx_kimi.cli.chat.loop"} <= found


def test_a_planted_import_of_a_side_room_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "convert" / "report").mkdir(parents=True)
    for planted in (tmp_path / "convert/plan.py", tmp_path / "convert/report/quality.py"):
        planted.write_text("def f():\n    from mlx_kimi.convert.report.slices import read\n")
        from_outside = planted.name == "plan.py"
        found = ["mlx_kimi.convert.report.slices.read"] if from_outside else []
        assert of_a_side_room("convert", planted) == found


@of_every_file
def test_imports_name_the_installed_package(layer: str, path: Path) -> None:
    """`import cli` or `from . import x` would work here and not once installed, or twice."""
    wrong = [m for m in imported(path) if m.startswith(".") or m.partition(".")[0] in LINKS]
    assert not wrong


@pytest.mark.parametrize(
    "path", sorted((ROOT / "metal_kernels").rglob("*.py")), ids=lambda p: p.name
)
def test_operators_know_only_mlx_and_the_standard_library(path: Path) -> None:
    foreign = {m.partition(".")[0] for m in imported(path)} - set(sys.stdlib_module_names)
    assert foreign <= {"mlx", "mlx_kimi", "numpy"}


@pytest.mark.parametrize("path", sorted(EMULATOR.rglob("*.py")), ids=lambda p: p.name)
def test_the_emulator_knows_nothing_of_ours(path: Path) -> None:
    """In `metal_emulator` modules import each other relatively."""
    foreign = {m.partition(".")[0] for m in imported(path)} - set(sys.stdlib_module_names)
    if path.parent.name == "metal_emulator":
        assert foreign <= {"", "mlx", "numpy", "ziglang"}
    assert "mlx_kimi" not in foreign


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "tools"])
def test_no_program_changes_where_imports_are_looked_for(folder: str) -> None:
    changed = re.compile(r"\bsys\.path\.(insert|append|extend)\b")
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files and not [
        path for path in files if changed.search(path.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("name", LINKS)
def test_a_folder_of_the_package_is_a_relative_link(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink() and not link.readlink().is_absolute()
    assert link.resolve() == (ROOT / name).resolve() and (link / "__init__.py").is_file()


def package_data() -> dict[str, list[str]]:
    """pyproject's [tool.setuptools.package-data]: the patterns of each package."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.split("[tool.setuptools.package-data]")[1].split("\n[")[0]
    lines = (line.partition("=") for line in table.splitlines() if "=" in line)
    return {name.strip(' "'): ast.literal_eval(patterns.strip()) for name, _, patterns in lines}


def shipped(package: Path) -> bool:
    """Whether setuptools takes the Python files of this folder."""
    return (package / "__init__.py").is_file() and (package == PACKAGE or shipped(package.parent))


def test_a_wheel_holds_every_file_of_the_package() -> None:
    folders = [PACKAGE, *(PACKAGE / name for name in LINKS)]
    files = [
        (folder, path)
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".pyc"
    ]
    left_out = []
    for folder, path in files:
        dotted = ".".join(folder.relative_to(ROOT).parts)
        inside = path.relative_to(folder).as_posix()
        taken = any(fnmatch.fnmatch(inside, p) for p in package_data().get(dotted, []))
        if path.suffix == ".py" and shipped(path.parent):
            taken = True
        if not taken:
            left_out.append(inside)
    assert len(files) > 20 and not left_out


@pytest.mark.slow
def test_nothing_is_computed_at_import_but_constants() -> None:
    """No module-level state: no name is bound again through `global`."""
    for _, path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not any(isinstance(node, ast.Global) for node in ast.walk(tree)), path


def test_every_promise_names_tests_that_exist() -> None:
    """docs/reliability.md: `file.py`: `part of a test's name`, ..."""
    text = (ROOT / "docs/reliability.md").read_text()
    named = 0
    for file, parts in re.findall(r"`(test_\w+\.py)`(?::((?:\s*`\w+`,?)+))?", text):
        names = re.findall(r"def (test_\w+)", (ROOT / "tests" / file).read_text())
        for part in re.findall(r"`(\w+)`", parts):
            named += 1
            assert any(part in name for name in names), f"{file} has no test of {part}"
    assert named > 25
