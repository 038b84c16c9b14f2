"""List the private names of other libraries that the package uses: imports and attributes.

A name is private if a part of it begins with one underscore. Own names, those that some class or
module of the package defines, are left out, as are the public ones in EXEMPT.

    python scripts/find_private_names.py [--most 12]

Exit code 1 if there are more than `--most`, or one outside a `*_compat.py`.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "cnntrain"

# Public in spite of their underscore: Hydra's keys, IPython's protocol, os._exit, namedtuples.
EXEMPT = {
    *("_target_", "_partial_", "_convert_", "_repr_html_", "_repr_png_", "_exit"),
    *("_replace", "_asdict", "_fields"),
}


def private(name: str) -> bool:
    parts = name.split(".")
    return any(p[:1] == "_" and p[:2] != "__" and p not in EXEMPT for p in parts)


def own_names(tree: ast.AST) -> Iterator[str]:
    """Names that a module defines: functions, classes, variables, attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and (isinstance(node.value, ast.Name) and node.value.id == "self")
        ):
            yield node.attr


def used_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every import, attribute, and name given to getattr and its like as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "setattr", "hasattr", "delattr"):
                texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
                yield from ((node.lineno, text) for text in texts if isinstance(text, str))
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and (
                node.value.count(".") > 1 and " " not in node.value  # the dotted name of a class
            )
        ):
            yield node.lineno, node.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=12)
    most = parser.parse_args().most
    trees = {path: ast.parse(path.read_bytes()) for path in sorted(PACKAGE.rglob("*.py"))}
    own = {name for tree in trees.values() for name in own_names(tree)}
    found = sorted(
        (path, line, name)
        for path, tree in trees.items()
        for line, name in set(used_names(tree))
        if private(name) and name not in own and not name.startswith("cnntrain.")
    )
    for path, line, name in found:
        print(f"{path.relative_to(PACKAGE.parent)}:{line}: {name}")
    outside = [name for path, _, name in found if not path.stem.endswith("_compat")]
    print(f"{len(found)} private names, {len(outside)} outside *_compat.py; at most {most}, 0")
    sys.exit(len(found) > most or bool(outside))


if __name__ == "__main__":
    main()
