"""The rules of the house as functions: each reads one source file and says what in it breaks the rule."""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.trackers import TRACKERS
from ray_ddpo.learner.algorithms import ALGORITHMS

OURS = ("common", "actors", "learner", "deploy", "train", "ddpo")
MAY_IMPORT = {"common": {"common"}, "actors": {"actors", "common"}, "learner": {"learner", "common"}}
ROOMS = [{path.partition(":")[0] for path in room.values()} for room in (POLICIES, TRACKERS, REWARDS, ALGORITHMS)]
RAY = {
    "train.py",
    "ddpo.py",
    "actors/rollouts/ray_stream.py",
    "actors/rollouts/worker_pool.py",
    "actors/rollouts/sampling_scheduler.py",
    "actors/rollouts/scoring_scheduler.py",
    "actors/rollouts/current_image.py",
    "learner/ray_learner_group.py",
    "common/trackers/ray_metrics.py",
    "deploy/driver/cluster_watch.py",
    "deploy/driver/role_actor.py",
    "deploy/driver/role_output.py",
    "deploy/driver/cluster.py",
    "deploy/cluster/upload_size.py",
    "deploy/driver/workers.py",
    "deploy/commands/doctor/doctor.py",
    "deploy/commands/scale.py",
    "deploy/commands/status.py",
}
RANKS = {"learner/process_group.py", "learner/pretraining/denoiser.py"}
TORCH_FREE = {
    "ray_ddpo.common.recipe.bounds",
    "ray_ddpo.common.user_code.blame",
    "ray_ddpo.common.recipe.recipe",
    "ray_ddpo.common.user_code.frames",
    "ray_ddpo.common.run_storage.filesystems",
    "ray_ddpo.common.recipe.named_files",
    "ray_ddpo.common.recipe.overrides",
    "ray_ddpo.common.recipe.reading",
    "ray_ddpo.common.run_storage.storage",
    "ray_ddpo.common.recipe.tables",
    "ray_ddpo.common.recipe.reward_pools",
    "ray_ddpo.common.recipe.registry",
    "ray_ddpo.common.schedule",
    "ray_ddpo.common.user_code.sources",
    "ray_ddpo.common.prompt_files",
    "ray_ddpo.common.prompts",
}
MAY_CATCH_ALL = {
    *("common/trackers/fan_out.py", "common/recipe/overrides.py", "actors/reward_worker.py"),
    "deploy/commands/doctor/guard.py",
}
MAX_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS, MAX_DRIVER_LINES = 300, 50, 6, 120


@dataclass(frozen=True)
class Source:
    """One file: its path from the root, and its text."""

    path: str
    text: str

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text)))

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @cached_property
    def imports(self) -> list[str]:
        """Everything imported anywhere in the file, also by a "module:name" string or by import_module."""
        found = []
        for node in self.nodes:
            match node:
                case ast.Import(names=names):
                    found += [alias.name for alias in names]
                case ast.ImportFrom(module=str(module), names=names, level=0):
                    found += [f"{module}.{alias.name}" for alias in names]
                case ast.Constant(value=str(text)) if re.fullmatch(r"[a-z_]\w*(\.\w+)*:[A-Za-z_]\w*", text):
                    found.append(text.replace(":", "."))
                case ast.Call(func=function, args=[ast.Constant(value=str(text)), *_]) if "import" in ast.unparse(
                    function
                ):
                    found.append(text)
        return found


def names_module(imported: str, module: str) -> bool:
    """Whether what is imported is `module` or lies in it."""
    return imported == module or imported.startswith(f"{module}.")


def layers(source: Source) -> Iterator[str]:
    """Rule 1: common imports nothing of ours; actors and learner import common, never each other; none deploys."""
    room = source.module.partition(".")[0]
    for imported in source.imports:
        top = imported.partition(".")[0]
        if room in MAY_IMPORT and top in OURS and top not in MAY_IMPORT[room]:
            yield f"imports {imported}"


def composers(source: Source) -> Iterator[str]:
    """Rule 2: nobody imports the driver, the command line or a command, but ddpo.py, and a command its own parts."""
    for imported in source.imports:
        command = names_module(imported, "ray_ddpo.deploy.commands") and not source.path.startswith("deploy/commands/")
        if (command or names_module(imported, "train")) and source.path != "ddpo.py":
            yield f"imports {imported}"
        if names_module(imported, "ddpo"):
            yield f"imports {imported}"


def rooms(source: Source) -> Iterator[str]:
    """Rule 3: a choice in a room imports no other choice of the room."""
    for choices in ROOMS:
        others = choices - {source.module} if source.module in choices else set()
        for imported in source.imports:
            if any(names_module(imported, other) for other in others):
                yield f"imports the choice {imported}"


def ray_where_it_distributes(source: Source) -> Iterator[str]:
    """Rule 4: ray is imported only where distribution is the file's job."""
    if source.path not in RAY and any(names_module(imported, "ray") for imported in source.imports):
        yield "imports ray"


def distributed_where_ranks_are(source: Source) -> Iterator[str]:
    """Rule 4: so is torch.distributed: of a learner, one file knows that it may have several ranks."""
    if source.path not in RANKS and any(names_module(imported, "torch.distributed") for imported in source.imports):
        yield "imports torch.distributed"


def torch_free(source: Source) -> Iterator[str]:
    """Rule 5: a recipe and a schedule are read without torch, so these files import only each other and light things."""
    heavy = ("torch", "jaxtyping", "diffusers", "transformers", "peft")
    for imported in source.imports if source.module in TORCH_FREE else ():
        ours = imported.partition(".")[0] in OURS and not any(names_module(imported, free) for free in TORCH_FREE)
        if ours or any(names_module(imported, module) for module in heavy):
            yield f"imports {imported}"


def absolute_imports(source: Source) -> Iterator[str]:
    """Rule 6: no relative imports."""
    for node in source.nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"line {node.lineno} imports relatively"


def no_utils(source: Source) -> Iterator[str]:
    """Rule 6: a file has a subject."""
    if source.path.rpartition("/")[2] in ("utils.py", "util.py", "helpers.py", "misc.py"):
        yield "is named for nothing"


def algorithms_in_their_room(source: Source) -> Iterator[str]:
    """Rule 6: nobody outside the room of algorithms asks which algorithm it is."""
    if source.path.startswith("learner/algorithms/"):
        return
    for node in source.nodes:
        compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        compared += [node.value] if isinstance(node, ast.MatchValue) else []
        for part in [inner for value in compared for inner in ast.walk(value)]:
            if isinstance(part, ast.Constant) and part.value in ALGORITHMS:
                yield f"line {part.lineno} asks for {part.value!r}"


def short_files(source: Source) -> Iterator[str]:
    """Budget: a file has at most 300 lines, the driver 120."""
    lines, limit = len(source.text.splitlines()), MAX_DRIVER_LINES if source.path == "train.py" else MAX_LINES
    if lines > limit:
        yield f"has {lines} lines, over {limit}"


def _functions(source: Source) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in source.nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def short_functions(source: Source) -> Iterator[str]:
    """Budget: a function has at most 50 lines."""
    for function in _functions(source):
        lines = (function.end_lineno or 0) - function.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield f"{function.name} has {lines} lines"


def few_arguments(source: Source) -> Iterator[str]:
    """Budget: a function has at most 6 arguments beside self."""
    for function in _functions(source):
        given = function.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
        if count > MAX_ARGUMENTS:
            yield f"{function.name} has {count} arguments"


def nothing_swallowed(source: Source) -> Iterator[str]:
    """Habit 8: no handler for every error, but where trackers fail; one that raises again hides nothing."""
    for node in source.nodes if source.path not in MAY_CATCH_ALL else ():
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = ast.unparse(node.type) if node.type else "everything"
        if re.search(r"\b(Base)?Exception\b|^everything$", caught) and not isinstance(node.body[-1], ast.Raise):
            yield f"line {node.lineno} catches {caught}"


def opens_with_a_sentence(source: Source) -> Iterator[str]:
    """Habit 1: a file opens by saying what it is for."""
    if not ast.get_docstring(ast.parse(source.text)):
        yield "has no docstring"


RULES: tuple[Callable[[Source], Iterator[str]], ...] = (
    layers,
    composers,
    rooms,
    ray_where_it_distributes,
    distributed_where_ranks_are,
    torch_free,
    absolute_imports,
    no_utils,
    algorithms_in_their_room,
    short_files,
    short_functions,
    few_arguments,
    nothing_swallowed,
    opens_with_a_sentence,
)
