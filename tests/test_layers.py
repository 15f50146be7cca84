"""Who may import whom: only leftward in the order below, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sae_jax"

ORDER = [
    {"errors", "units"},
    {"types", "record", "config", "mesh", "progress", "storage", "figures"},
    {"ops"},
    {"saes", "lm"},
    {"activations"},
    {"training", "testbeds"},
    {"artifact"},
    {"analysis"},
    {"evaluation", "autointerp", "scaling", "planning", "interchange"},
    {"pages", "selftest", "sweeps"},
    {"recipe", "runs", "uses"},
    {"commands"},
]
# Within a level only these know each other; saes and lm do not.
PEERS = {
    *(("config", "types"), ("mesh", "types"), ("progress", "types"), ("record", "types")),
    *(
        ("storage", "progress"),
        ("figures", "storage"),
        ("config", "storage"),
        ("record", "storage"),
        ("planning", "scaling"),
    ),
}
# training is handed a row source, evaluators and a model: it knows the interface of the first, and nothing behind it.
FORBIDDEN = {("training", "lm"), ("training", "activations")}
ALLOWED_MODULES = {"sae_jax.activations.source"}
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def names_of(path: Path) -> set[str]:
    """Dotted names that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports_of(path: Path) -> set[str]:
    """Names of sae_jax's parts that a file imports."""
    names = [name for name in names_of(path) if name.startswith("sae_jax.")]
    if "training" in path.parts:
        names = [name for name in names if name.rpartition(".")[0] not in ALLOWED_MODULES]
    return {name.split(".")[1] for name in names}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_leftward(path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in LEVEL, f"{part} has no place in the order; give it one"
    for other in imports_of(path) - {part}:
        if other in LEVEL:
            leftward = LEVEL[other] < LEVEL[part] or (part, other) in PEERS
            assert leftward, f"{path.relative_to(ROOT)} imports {other}"
            assert (part, other) not in FORBIDDEN, f"{path.relative_to(ROOT)} imports {other}"


def test_oracles_import_numpy_alone():
    for path in (ROOT / "tests" / "oracles").glob("*.py"):
        tree = ast.parse(path.read_text())
        roots = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert roots <= {"numpy", "dataclasses", "math", "typing", "collections"}, f"{path.name}: {roots}"


def test_nothing_imports_an_experiment():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert "experiments" not in {name.split(".")[0] for name in names_of(path)}, path.relative_to(ROOT)


def test_scaling_fit_imports_numpy_and_scipy_alone():
    """Nor does what it is made of, so that it serves points from anywhere."""
    parts = ("fit", "forms", "solve", "chance", "frontier")
    for part in parts:
        names = names_of(PACKAGE / "scaling" / f"{part}.py")
        ours = {name for name in names if name.startswith("sae_jax.scaling.")}
        assert {name.split(".")[2] for name in ours} <= {*parts}, part
        roots = {name.split(".")[0] for name in names - ours}
        assert roots <= {"__future__", "collections", "dataclasses", "typing", "numpy", "scipy"}, part
