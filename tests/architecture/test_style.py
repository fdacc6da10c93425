"""Rules of the house that a type checker and a linter do not know."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "privrec"
MAX_CODE_LINES = 440  # about 400: beyond, a file has more than one noun

NUMPY_TYPES = {"Generator", "BitGenerator", "PCG64", "PCG64DXSM", "Philox", "SeedSequence"}
TORCH_DRAWS = {
    "bernoulli", "manual_seed", "multinomial", "normal", "poisson", "rand", "rand_like", "randint",
    "randint_like", "randn", "randn_like", "randperm", "seed", "set_rng_state",
}  # fmt: skip
TORCH_IN_PLACE = {
    "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_",
    "uniform_", "xavier_normal_", "xavier_uniform_", "kaiming_normal_", "kaiming_uniform_",
    "trunc_normal_",
}  # fmt: skip
# Layers that draw their first weights, or their masks, from torch's global generator.
TORCH_LAYERS = {"Linear", "Bilinear", "Embedding", "EmbeddingBag", "Dropout", "LSTM", "GRU"}


@cache
def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def dotted(node: ast.expr) -> str:
    """``torch.nn.init`` for the expression that reads so, and the empty string for others."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def global_randomness(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that draws from, or seeds, a global generator."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name == "random")
        elif isinstance(node, ast.ImportFrom):
            yield from imported_randomness(node)
        elif isinstance(node, ast.Attribute):
            name = dotted(node)
            is_numpy = name.startswith(("np.random.", "numpy.random."))
            if is_numpy and name.split(".")[2] not in NUMPY_TYPES:
                yield node.lineno, name
        elif isinstance(node, ast.Call) and draws_from_torch(node):
            yield node.lineno, dotted(node.func) or node.func.__class__.__name__


def imported_randomness(node: ast.ImportFrom) -> Iterator[tuple[int, str]]:
    module = node.module or ""
    for alias in node.names:
        from_torch = module.startswith("torch") and alias.name in (
            TORCH_DRAWS | TORCH_IN_PLACE | TORCH_LAYERS
        )
        from_numpy = module == "numpy.random" and alias.name not in NUMPY_TYPES
        if module == "random" or from_torch or from_numpy:
            yield node.lineno, f"{module}.{alias.name}"


def draws_from_torch(node: ast.Call) -> bool:
    if any(keyword.arg == "generator" for keyword in node.keywords):
        return False
    if not isinstance(node.func, ast.Attribute):
        return False
    base, name = dotted(node.func.value), node.func.attr
    if name in TORCH_IN_PLACE:
        return True
    if base in {"torch", "torch.random", "torch.cuda"}:
        return name in TORCH_DRAWS
    return base in {"nn", "torch.nn"} and name in TORCH_LAYERS


def test_nothing_draws_from_a_global_generator() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path, tree in sources().items()
        for line, name in global_randomness(tree)
    ]
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "import random",
        "from random import choice",
        "np.random.seed(0)",
        "np.random.default_rng()",
        "from numpy.random import default_rng",
        "torch.manual_seed(3)",
        "torch.randn(4)",
        "from torch import rand",
        "weights.normal_(0, 1)",
        "torch.nn.init.xavier_uniform_(weights)",
        "torch.nn.Linear(3, 4)",
    ],
)
def test_a_global_generator_is_found(text: str) -> None:
    assert list(global_randomness(ast.parse(text)))


@pytest.mark.parametrize(
    "text",
    ["np.random.Generator", "rng.normal(size=3)", "torch.randn(4, generator=g)", "torch.zeros(3)"],
)
def test_a_named_generator_is_allowed(text: str) -> None:
    assert not list(global_randomness(ast.parse(text)))


def test_no_assert_stands_in_for_an_error() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert not found


def test_nothing_unpickles_or_evaluates() -> None:
    banned = {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "marshal.loads"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {dotted(node.func)}"
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and dotted(node.func) in banned
    ]
    assert not found


def code_lines(text: str) -> int:
    """Lines that hold code: without blank ones, comments and docstrings."""
    tree = ast.parse(text)
    prose: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if ast.get_docstring(node, clean=False) is not None and first is not None:
                prose.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#") and number not in prose
        for number, line in enumerate(text.splitlines(), start=1)
    )


def test_code_lines_count_code_only() -> None:
    assert code_lines('"""Two\nlines."""\n\n# why\nx = 1\n\n\ndef f():\n    """One."""\n') == 2


def test_no_file_is_too_long_to_read() -> None:
    lengths = {path: code_lines(path.read_text("utf-8")) for path in sources()}
    found = [
        f"{path.relative_to(ROOT)}: {length} lines of code, at most {MAX_CODE_LINES}"
        for path, length in lengths.items()
        if length > MAX_CODE_LINES
    ]
    assert not found


Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_members(node: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    for child in node.body:
        if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
            yield child


def methods() -> Iterator[tuple[Path, ast.ClassDef, Function]]:
    for path, tree in sources().items():
        for owner in public_members(tree):
            if isinstance(owner, ast.ClassDef):
                for method in public_members(owner):
                    if isinstance(method, Function):
                        yield path, owner, method


@cache
def classes() -> dict[str, ast.ClassDef]:
    return {
        node.name: node
        for tree in sources().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def declared(owner: ast.ClassDef) -> set[str]:
    """Methods that a class's documented ancestors in the package say everything about."""
    found, bases = set[str](), [dotted(base).split(".")[-1] for base in bases_of(owner)]
    while bases:
        if base := classes().get(bases.pop()):
            found |= {method.name for method in public_members(base) if ast.get_docstring(method)}
            bases += [dotted(each).split(".")[-1] for each in bases_of(base)]
    return found


def bases_of(owner: ast.ClassDef) -> list[ast.expr]:
    """The bases of a class, generic ones without their arguments."""
    return [base.value if isinstance(base, ast.Subscript) else base for base in owner.bases]


def is_protocol(owner: ast.ClassDef) -> bool:
    return any(dotted(base).split(".")[-1] == "Protocol" for base in owner.bases)


def test_public_functions_and_classes_say_what_they_give() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path, tree in sources().items()
        for node in public_members(tree)
        if not ast.get_docstring(node)
    ]
    assert not found


def test_public_methods_are_documented_unless_a_protocol_or_a_base_class_does() -> None:
    protocols = {method.name for _, owner, method in methods() if is_protocol(owner)}
    found = [
        f"{path.relative_to(ROOT)}:{method.lineno} {owner.name}.{method.name}"
        for path, owner, method in methods()
        if method.name not in protocols | declared(owner) and not ast.get_docstring(method)
    ]
    assert not found


def test_every_module_says_what_it_is() -> None:
    found = [str(path.relative_to(ROOT)) for path, tree in sources().items()
             if tree.body and not ast.get_docstring(tree)]  # fmt: skip
    assert not found
