"""Name functions and classes of a script or notebook, which Ray pickles by value because no other process can import them."""

import inspect
import sys
from typing import Any

PYTHON = "<python>"  # in a recipe, the module of what only a Python program has


def reference(given: Any) -> str:
    """Return `module:name` of a function or class. The module is PYTHON if no other process can import the object by it."""
    module, name = getattr(given, "__module__", None), getattr(given, "__qualname__", None)
    if not isinstance(name, str):  # an object with `__call__`
        return f"{PYTHON}:{type(given).__name__}"
    if module != "__main__" and getattr(sys.modules.get(str(module)), name, None) is given:
        return f"{module}:{name}"
    return f"{PYTHON}:{name.rpartition('.')[2]}"


def is_by_value(path: str) -> bool:
    """Return whether a recipe's `module:name` stands for an object that no module holds."""
    return path.startswith(f"{PYTHON}:")


def source_of(given: Any) -> str:
    """Return the source of a function or class, for people and fingerprints; of a function without source, its bytecode."""
    if not inspect.isfunction(given):
        given = given if inspect.isclass(given) else type(given)
    try:
        if inspect.isfunction(given) and given.__name__ == "<lambda>":
            return _lambda_source(given)
        return inspect.getsource(given)
    except (OSError, TypeError):  # typed at a prompt, or made by exec
        return _bytecode(given.__code__) if inspect.isfunction(given) else ""


def _lambda_source(function: Any) -> str:
    """Return a lambda's own text: `inspect.getsource` gives the whole statement around it, with other arguments in it."""
    lines = [line.encode() for line in inspect.findsource(function.__code__)[0]]
    spans = [(line, column, end_line, end) for line, end_line, column, end in function.__code__.co_positions() if end]
    (line, column), (end_line, end) = min(span[:2] for span in spans), max(span[2:] for span in spans)
    text = lines[line - 1 : end_line]
    text[-1] = text[-1][:end]
    text[0] = text[0][column:]
    return f"lambda {str(inspect.signature(function))[1:-1]}: {b''.join(text).decode()}"


def _bytecode(code: Any) -> str:
    constants = [_bytecode(each) if inspect.iscode(each) else _sorted(each) for each in code.co_consts]
    return f"{code.co_code.hex()} {constants} {code.co_names}"


def _sorted(constant: Any) -> str:
    """Return a constant's text. A set's own order differs from process to process."""
    return repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
