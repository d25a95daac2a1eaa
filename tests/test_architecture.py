"""Which module may import which: read from the source, and checked once in a fresh interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lib" / "intruder"
HEAVY = {"torch", "accelerate", "peft", "transformers", "datasets", "safetensors", "tokenizers", "huggingface_hub"}
# Modules that may import torch and the training libraries. Every other module of the package is light: the definition,
# the records, the views and the command line. A new module that needs torch is entered here.
WORK = {
    *("spectrum", "checkpoints", "weights", "measure", "count", "language", "lexicon", "tasks", "models", "config"),
    *("data", "pretrain", "base_sizes", "provenance", "train", "run", "sweep"),
    *("krylov", "certificate", "certified", "updated", "margins", "basis", "comparison"),
    *("changes", "adapters", "experts", "loaded"),
    *("audit", "audit_matrix", "edit", "leading", "mitigate", "mitigate_layer", "mitigate_loaded"),
    *("peft_layers", "live"),
}
DEFINITION = {
    "errors": set(),
    "intruders": {"numpy"},
    "synthetic": {"numpy"},
    "schema": set(),
    "records": {"numpy", "pandas", "pyarrow"},
}
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")
)
LIGHT = [name for name in MODULES if name not in WORK]


def statements(tree: ast.AST, nested: bool):
    """The import statements of a module: those that run at import, or all of them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif nested or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            if not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
                yield from statements(node, nested)


def imports(module: str, nested: bool = False) -> tuple[set[str], set[str]]:
    """(modules of this package, top-level names of others) that a module imports."""
    own, foreign = set(), set()
    source = (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    for node in statements(ast.parse(source), nested):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif node.level:
            start = f"intruder.{node.module}" if node.module else "intruder"
            dotted = [start, *(f"{start}.{alias.name}" for alias in node.names)]
        else:
            dotted = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in dotted:
            if name.split(".")[0] == "intruder":
                inner = name.removeprefix("intruder").removeprefix(".") or "__init__"
                own |= {inner} & set(MODULES)
            else:
                foreign.add(name.split(".")[0])
    return own, foreign


def reached(module: str) -> set[str]:
    """Every module of this package that importing `module` imports, itself and the package included."""
    seen, queue = set(), [module, "__init__"]
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue += imports(name)[0]
    return seen


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_reach_no_training_library(module):
    """Definition, records, views and command line import no torch, peft ..., neither directly nor through a module."""
    for name in reached(module):
        assert not imports(name)[1] & HEAVY, f"{module} imports {name}, which imports {imports(name)[1] & HEAVY}"


@pytest.mark.parametrize("module", ["spectrum", "checkpoints", "weights", "loaded", "measure", "count"])
def test_measuring_needs_no_training_library(module):
    """Decomposing and counting import torch and safetensors, but not transformers, peft, accelerate or datasets."""
    allowed = {"torch", "safetensors"}
    for name in reached(module):
        assert imports(name)[1] & HEAVY <= allowed


@pytest.mark.parametrize("module", sorted(DEFINITION))
def test_the_definition_layer_stands_on_numpy(module):
    """The definition imports numpy only, the records pandas and pyarrow besides, also inside functions."""
    own, foreign = imports(module, nested=True)
    assert foreign - set(sys.stdlib_module_names) <= DEFINITION[module]
    assert own <= set(DEFINITION)


def test_nothing_but_the_command_line_imports_the_entry_points():
    """run, sweep and base_sizes are imported by cli (and run by the other two) only, also inside functions."""
    for module in MODULES:
        allowed = {"cli": {"run", "sweep", "base_sizes"}, "sweep": {"run"}, "base_sizes": {"run"}}.get(module, set())
        assert imports(module, nested=True)[0] & {"run", "sweep", "base_sizes"} <= allowed, module


def test_importing_the_light_modules_loads_no_torch():
    """In a fresh interpreter `import intruder` and every light module load none of the training libraries."""
    lines = ["import sys, importlib", "import intruder"]
    lines += [f"importlib.import_module('intruder.{name}')" for name in LIGHT if name not in ("__init__", "__main__")]
    lines += [f"print(sorted(set({sorted(HEAVY)!r}) & set(sys.modules)))"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_walk_sees_imports_wherever_they_hide():
    """The walk finds imports in classes and branches, leaves those in functions aside, and follows relative names."""
    source = "if True:\n  import a.b\nclass C:\n  from d import e\ndef f():\n  import g\nfrom . import h\n"
    names = [ast.unparse(node) for node in statements(ast.parse(source), nested=False)]
    assert names == ["import a.b", "from d import e", "from . import h"]
    assert "import g" in [ast.unparse(node) for node in statements(ast.parse(source), nested=True)]
    assert imports("count")[0] >= {"intruders", "weights", "errors"}
    assert "checkpoints" in reached("count")
