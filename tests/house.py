"""The house: which folder may import which, how long functions are, and what stands in one file only.

python -m tests.house          # prints what is wrong, and ends with 1 if anything is
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "hypergrad"

# From low to high: every folder or module may import those above it in this list, and nothing else.
FLOORS = (
    ("_base",),
    ("exact", "sums", "files", "constraints", "data", "nets", "problems", "schedules"),
    ("bundles", "curvature"),
    ("program",),
    ("optimizers",),
    ("adjoints", "exports"),
    ("training",),
    ("implicit", "bilevel", "check", "smoothing"),
    ("meta",),
    ("distillation",),
    ("plots",),
    ("cli",),
    ("__main__",),
)
ALLOWED_ON_ONE_FLOOR = {("bilevel", "implicit")}  # beside each other, but one may ask the other

LONGEST_FUNCTION = 60  # lines of code, without docstrings and comments
MOST_PARAMETERS = {"adjoints": 6}

# What only one file may do, by what it would have to write for it.
ONLY_IN = {
    "optimization_barrier": ("_base/compiler.py",),
    'precision="highest"': ("_base/trees.py",),
}


def modules() -> dict[str, Path]:
    """The files of the package by the name of their module; faces of folders are not among them."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in paths
        if path.name != "__init__.py"
    }


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(PACKAGE):
            continue
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            inside = (ROOT / Path(*full.split("."))).with_suffix(".py").exists()
            yield full if inside or (ROOT / Path(*full.split("."))).is_dir() else str(node.module)


def room(module: str) -> str:
    """The folder or flat module to which a module belongs."""
    return module.split(".")[1] if "." in module else module


def wrong_arrows() -> Iterator[str]:
    """Imports that run to a higher floor, or to another room on the same one."""
    floor = {name: k for k, names in enumerate(FLOORS) for name in names}
    for module, path in modules().items():
        mine = room(module)
        if mine not in floor:
            yield f"{module}: stands on no floor; put it into FLOORS of tests/house.py"
            continue
        for other in map(room, imported(path)):
            if other == mine or (mine, other) in ALLOWED_ON_ONE_FLOOR:
                continue
            if floor.get(other, len(FLOORS)) >= floor[mine]:
                yield f"{module} imports {other}, which stands no lower"


def circles() -> Iterator[str]:
    """Modules that import each other, directly or through others."""
    graph = {module: list(imported(path)) for module, path in modules().items()}
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> Iterator[str]:
        if module in way:
            yield " -> ".join([*way[way.index(module) :], module])
        elif module not in done:
            for other in graph.get(module, []):
                yield from visit(other, [*way, module])
            done.add(module)

    for module in graph:
        yield from visit(module, [])


def functions(source: str) -> Iterator[tuple[str, int, int]]:
    """Name, lines of code and number of parameters of all functions in a file."""
    tree, code = ast.parse(source), set()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped | {tokenize.ENDMARKER}:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            first = node.body[0]
            code -= set(range(first.lineno, (first.end_lineno or 0) + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = sum(n in code for n in range(node.lineno, (node.end_lineno or 0) + 1))
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            yield node.name, lines, sum(x.arg not in ("self", "cls") for x in parameters)


def long_functions() -> Iterator[str]:
    """Functions of the package and of experiments and benchmarks that do too much at once."""
    for folder in (PACKAGE, "experiments", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name, lines, parameters in functions(path.read_text()):
                where = f"{path.relative_to(ROOT)}: {name}"
                if lines > LONGEST_FUNCTION:
                    yield f"{where} has {lines} lines of code"
                most = MOST_PARAMETERS.get(path.parent.name)
                if folder == PACKAGE and most is not None and parameters > most:
                    yield f"{where} has {parameters} parameters"


def asks_for_the_kind(source: str) -> bool:
    """Whether a file tells one kind of optimizer from another."""
    kinds = {"Optimizer", "GenericOptimizer", "AnyOptimizer"}
    return any(
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "isinstance"
        and kinds & {x.id for x in ast.walk(node.args[1]) if isinstance(x, ast.Name)}
        for node in ast.walk(ast.parse(source))
    )


def twice() -> Iterator[str]:
    """What stands in a file where it should not."""
    for path in modules().values():
        name = str(path.relative_to(ROOT / PACKAGE))
        source = path.read_text()
        if name != "program.py" and asks_for_the_kind(source):
            yield f"{PACKAGE}/{name}: asks by isinstance which kind of optimizer it has"
        for words, allowed in ONLY_IN.items():
            if words in source and name not in allowed:
                yield f"{PACKAGE}/{name}: {words!r} belongs in {', '.join(allowed)}"


def faults() -> list[str]:
    """Everything that is wrong with the house."""
    return [*wrong_arrows(), *circles(), *long_functions(), *twice()]


if __name__ == "__main__":
    found = faults()
    print("\n".join(found) or "the house is in order")
    sys.exit(bool(found))
