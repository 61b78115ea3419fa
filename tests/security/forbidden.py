"""Find forbidden constructs in the source: unpickling, running text as code, trusting code beside weights."""

import ast
from collections.abc import Iterator

MODULES = {"dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "telnetlib", "ftplib", "xmlrpc"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"os.system", "os.popen", "tempfile.mktemp", "pickle.load", "pickle.loads", "pickle.Unpickler"}
# A call of the first must have these keywords with these values.
NEEDED = {
    "torch.load": {"weights_only": True},
    "np.load": {"allow_pickle": False},
    "numpy.load": {"allow_pickle": False},
    "jinja2.Environment": {"autoescape": True},
}
NEVER = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False, "verify": False}
# What holds no weights has no safetensors to ask for.
WITHOUT_WEIGHTS = ("tokenizer", "processor", "config")
WRITES_MARKDOWN = ("deploy/commands/model_card/card.py", "jinja2.Environment")  # and escapes it by filters of its own
MAY_IMPORT_BY_NAME = (
    "common/recipe/registry.py",
    "ray_ddpo/__init__.py",
)  # components; lazy names


def forbidden(path: str, text: str) -> Iterator[str]:
    """What in a file's source is forbidden, with its line."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=names):
                yield from (f"line {node.lineno} imports {name.name}" for name in names if _top(name.name) in MODULES)
            case ast.ImportFrom(module=str(module), names=names):
                if _top(module) in MODULES:
                    yield f"line {node.lineno} imports from {module}"
                if module == "pickle":
                    yield from (f"line {node.lineno} imports pickle.{each.name}" for each in names)
            case ast.Call():
                yield from (f"line {node.lineno} {fault}" for fault in _faults(path, node))


def _top(module: str) -> str:
    return module.partition(".")[0]


def _faults(path: str, call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    if name in BUILTINS | CALLS or name.removeprefix("builtins.") in BUILTINS:
        yield f"calls {name}"
    if name.endswith("import_module") and path not in MAY_IMPORT_BY_NAME:
        yield "imports a module by a name that is not in the source"
    for keyword, value in NEVER.items():
        if keyword in given and not _is(given[keyword], not value):
            yield f"calls {name} with {keyword} = {ast.unparse(given[keyword])}"
    for keyword, value in NEEDED.get(name, {}).items() if (path, name) != WRITES_MARKDOWN else ():
        if keyword not in given or not _is(given[keyword], value):
            yield f"calls {name} without {keyword}={value}"
    if name.endswith(".from_pretrained"):
        yield from _of_pretrained(name.removesuffix(".from_pretrained"), given)


def _of_pretrained(cls: str, given: dict[str, ast.expr]) -> Iterator[str]:
    """Weights are safetensors, or where there are none, tensors alone; classes that are found by name run no code."""
    if not any(what in cls.lower() for what in WITHOUT_WEIGHTS) and not any(
        keyword in given and _is(given[keyword], True) for keyword in ("use_safetensors", "weights_only")
    ):
        yield f"reads {cls} and asks for no safetensors"
    if cls.startswith("Auto") and not cls.startswith("Autoencoder") and "trust_remote_code" not in given:
        yield f"reads {cls} and leaves it open whether code beside it is run"


def _is(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value
