"""deploy/cluster/Dockerfile: pinned, not root, dependencies in a layer before the source, no secrets."""

import re
import subprocess
import sys
from pathlib import Path

from tests.deploy.manifests import PINNED, PYPROJECT, ROOT

DOCKERFILE = ROOT / "deploy" / "cluster" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Each instruction with its arguments, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined]


def copied() -> list[list[str]]:
    """What each COPY takes from the repository."""
    return [
        arguments.removeprefix("--chown=ray:ray ").split()[:-1] for word, arguments in instructions() if word == "COPY"
    ]


def test_the_python_is_the_one_that_was_tested() -> None:
    (base,) = [arguments for word, arguments in instructions() if word == "FROM"]
    assert base == f"python:{PYPROJECT['tool']['pyright']['pythonVersion']}-slim-bookworm"
    assert f"ray-ddpo:{PYPROJECT['project']['version']}" in DOCKERFILE.read_text()


def test_it_is_not_root_and_kubernetes_can_tell() -> None:
    users = [arguments for word, arguments in instructions() if word == "USER"]
    assert users == ["1000:1000"]
    after = instructions()[[word for word, _ in instructions()].index("USER") :]
    assert [word for word, _ in after].count("COPY") == len(copied())  # nothing of ours belongs to root


def test_triton_finds_a_c_compiler_without_which_no_network_is_compiled_on_a_gpu() -> None:
    installed = next(text for word, text in instructions() if word == "RUN" and "apt-get install" in text).split()
    assert {"gcc", "libc6-dev"} <= set(installed)
    assert not any("purge" in text or "autoremove" in text for word, text in instructions() if word == "RUN")


def test_a_login_shell_finds_the_program_too() -> None:
    (path,) = re.findall(r"PATH=(\S+):\$PATH ", next(text for word, text in instructions() if word == "ENV") + " ")
    assert f'"PATH={path}:\\$PATH" > /etc/profile.d/venv.sh' in instructions()[1][1]
    assert f"python -m venv {path.removesuffix('/bin')} " in " ".join(text for _, text in instructions())


def test_the_dependencies_are_a_layer_before_the_source() -> None:
    words = instructions()
    install = next(index for index, (word, text) in enumerate(words) if word == "RUN" and "--constraint" in text)
    before = [text for word, text in words[:install] if word == "COPY"]
    after = [text for word, text in words[install:] if word == "COPY"]
    assert before == ["--chown=ray:ray pyproject.toml constraints.txt ./"]
    assert len(after) >= 5
    installs = [text for word, text in words if word == "RUN" and "pip install" in text]
    assert all("--no-cache-dir" in text for text in installs)
    assert [text for text in installs if "--constraint" not in text and "--no-deps" not in text] == []


def test_the_dependencies_are_the_projects_and_its_extras_and_all_are_pinned() -> None:
    text = next(text for word, text in instructions() if word == "RUN" and "tomllib" in text)
    (code,) = re.findall(r'python -c "(.*?)"', text)
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    listed = output.split()
    extras = PYPROJECT["project"]["optional-dependencies"]
    taken = [requirement for name in ("demo", "tensorboard", "ocr", "geneval", "video") for requirement in extras[name]]
    assert listed == [*PYPROJECT["project"]["dependencies"], *taken, "boto3"]
    pinned = {name.lower().replace("_", "-") for name in PINNED}
    names = {re.split(r"[\[<>=]", requirement)[0].lower().replace("_", "-") for requirement in listed}
    assert names <= pinned


def test_the_image_is_given_the_program_and_nothing_else() -> None:
    taken = [name for names in copied() for name in names]
    assert [name for name in taken if not (ROOT / name).exists()] == []
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert sorted(rule.removeprefix("!") for rule in rules if rule.startswith("!")) == sorted(taken)
    packages = {path.parent.name for path in Path(ROOT).glob("*/__init__.py")} - {"tests"}
    assert packages <= set(taken)


def test_no_secret_is_baked_in_and_a_token_is_asked_for() -> None:
    settings = [text for word, text in instructions() if word in ("ENV", "ARG", "LABEL")]
    names = [name for text in settings for name in re.findall(r"(\w+)=", text)]
    assert "RAY_AUTH_MODE=token" in settings[0].split()
    assert [name for name in names if re.search(r"TOKEN|SECRET|PASSWORD|KEY", name)] == []
