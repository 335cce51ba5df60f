"""A module imports only those above it: the graph of imports inside the package has no cycle."""

import ast
import graphlib
import pathlib

import pytest

import tl_jax

PACKAGE = pathlib.Path(tl_jax.__file__).parent


def modules(folder: pathlib.Path) -> dict[str, ast.Module]:
    """Dotted name → syntax tree of every module under a package's folder."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(parts)] = ast.parse(path.read_text(), str(path))
    return found


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """The package's modules that a module imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports inside the package are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in known else str(node.module))
    return names & known


def graph(folder: pathlib.Path) -> dict[str, set[str]]:
    trees = modules(folder)
    return {name: imports(tree, set(trees)) for name, tree in trees.items()}


def test_the_package_has_no_cycle():
    edges = graph(PACKAGE)
    assert "tl_jax.resampling" in edges["tl_jax.preprocessing"]
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"imports form a cycle: {' → '.join(error.args[1])}")


def test_a_cycle_through_a_function_is_found(tmp_path):
    folder = tmp_path / "sample"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text("from sample import b\n")
    (folder / "b.py").write_text("def f():\n    from sample.a import g\n    return g\n")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph(folder)).prepare()


def test_the_readme_lists_every_module_below_those_it_imports():
    table = (PACKAGE.parent / "README.md").read_text().partition("| module |")[2]
    listed = [
        "tl_jax." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for row in table.splitlines()
        if row.startswith("| `")
        for name in [row.split("`")[1]]
    ]
    edges = graph(PACKAGE)
    assert sorted(listed) == sorted(edges.keys() - {"tl_jax"})
    place = {name: index for index, name in enumerate(listed)}
    for name, imported in edges.items():
        for other in imported - {"tl_jax"} if name != "tl_jax" else ():
            assert place[other] < place[name], f"{name} imports {other}, which stands below it"
