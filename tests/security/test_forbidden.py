"""The source contains nothing forbidden, and each forbidden construct is shown to be found."""

from pathlib import Path

import pytest

from tests.security.forbidden import forbidden

ROOT = Path(__file__).parents[2]
PROGRAM = ("common", "actors", "learner", "deploy")
TEMPLATES = sorted((ROOT / "deploy").rglob("*.jinja"))


def files() -> list[Path]:
    return [
        *(path for folder in PROGRAM for path in sorted((ROOT / folder).rglob("*.py"))),
        *(ROOT / "ray_ddpo").glob("*.py"),
    ]


def test_the_program_does_nothing_that_is_forbidden() -> None:
    paths = [path.relative_to(ROOT).as_posix() for path in files()]
    assert {
        "common/image_models/weight_file.py",
        "learner/checkpoints/checkpoint.py",
        "deploy/driver/workers.py",
        "ray_ddpo/cli.py",
    } <= set(paths)
    found = {path: list(forbidden(path, (ROOT / path).read_text(encoding="utf-8"))) for path in paths}
    assert {path: faults for path, faults in found.items() if faults} == {}


def test_templates_mark_nothing_as_safe() -> None:
    assert TEMPLATES
    assert [path for path in TEMPLATES if "safe" in path.read_text(encoding="utf-8").replace("|", " ").split()] == []


@pytest.mark.parametrize(
    "text",
    [
        "import dill",
        "import joblib.numpy_pickle as j",
        "from yaml import load",
        "import pickle\npickle.loads(data)",
        "from pickle import loads",
        "eval(text)",
        "exec(text)",
        "builtins.exec(text)",
        "__import__(name)",
        "importlib.import_module(name)",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=wanted)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "jinja2.Environment(loader=loader)",
        "AutoModel.from_pretrained(place, use_safetensors=True)",
        "AutoTokenizer.from_pretrained(place, trust_remote_code=True)",
        "CLIPModel.from_pretrained(place)",
        "CLIPModel.from_pretrained(place, use_safetensors=False)",
        "httpx2.Client(verify=False)",
    ],
)
def test_what_is_forbidden_is_found(text: str) -> None:
    assert list(forbidden("learner/learner.py", text))


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    raise",
        "network.eval()",
        "re.compile(text)",
        "subprocess.run(['npm', 'pack'])",
        "torch.load(path, weights_only=True)",
        "jinja2.Environment(loader=loader, autoescape=True)",
        "AutoModel.from_pretrained(place, weights_only=True, trust_remote_code=False)",
        "CLIPTokenizer.from_pretrained(place)",
    ],
)
def test_what_is_allowed_is_let_pass(text: str) -> None:
    assert list(forbidden("learner/learner.py", text)) == []
