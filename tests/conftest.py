"""Fixtures of all tests: a tiny pipeline, a small recipe on it, and quiet libraries."""

import gc
import logging
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

gc.disable()  # until the tests are collected, because most of what is imported stays
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import boto3  # noqa: E402
import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from moto.server import ThreadedMotoServer  # noqa: E402

from ray_ddpo.common.diffusion.memory.sizes_cache import sizes_cache  # noqa: E402
from ray_ddpo.common.recipe.recipe import Recipe  # noqa: E402
from tests.system.forked_workers import forked_workers, forking_process  # noqa: E402
from tests.tiny_pipeline import save_tiny_pipeline  # noqa: E402

# Ray reads its token once a process: every cluster of this process, and what it starts, uses the same one.
TOKEN_FOLDER = tempfile.TemporaryDirectory(prefix="ray-token-")
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN_PATH"] = str(Path(TOKEN_FOLDER.name) / "token")
Path(os.environ["RAY_AUTH_TOKEN_PATH"]).write_text(secrets.token_hex(32))
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the cache of counted sizes
    os.environ["RAY_DDPO_CACHE"] = str(Path(TOKEN_FOLDER.name) / "cache")
MEMORY = Path("/dev/shm")  # where a file is synced at once: a disk takes 4 ms, of which a run has hundreds
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8e9:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
torch.set_num_threads(1)
# A busy machine is no failure: no test depends on its own speed.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and so it would be in what tests start
SECRET = "never-to-be-shown"
MARK = "of_the_tests"  # a resource of the tests' own cluster
# Files that take minutes: begun first, so that at the end no worker has one to itself.
LONGEST = (
    *("test_documentation", "test_gpu", "test_cluster", "test_lora_start", "test_ranks", "test_shapes"),
    *("test_reward_hacking", "test_failures", "test_role_output", "test_same_bits", "test_ends", "test_trackers"),
    "test_loops",
    *("test_resume", "test_digits", "test_storage_failures", "test_command", "test_api"),
)


# The cases of a test marked `rotated` take turns: a number, of which each commit has another one, or "all" of them.
TURN = os.environ.get("DDPO_TEST_TURN", "0")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if TURN != "all":
        waiting = waiting_cases(items, int(TURN))
        config.hook.pytest_deselected(items=waiting)
        items[:] = [item for item in items if item not in waiting]
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def waiting_cases(items: Iterable[pytest.Item], turn: int) -> set[pytest.Item]:
    """Return the cases of rotated tests that wait for another turn.

    In every turn each test has a case. Tests of one `group` are the cases of one test.
    """
    cases: dict[tuple[str, bool], list[pytest.Item]] = {}
    for item in items:
        if marker := item.get_closest_marker("rotated"):
            test = marker.kwargs.get("group", item.nodeid.partition("[")[0])
            cases.setdefault((test, bool(item.get_closest_marker("thorough"))), []).append(item)
    waiting: set[pytest.Item] = set()
    for each in cases.values():
        marker = each[0].get_closest_marker("rotated")  # a test's own before its file's
        assert marker is not None
        every = min(marker.kwargs["every"], len(each))
        waiting.update(item for place, item in enumerate(each) if place % every != turn % every)
    return waiting


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("model"))


def small_tables(model: Path, folder: Path) -> dict:
    """Return a recipe on a tiny pipeline that runs in seconds: 2 rounds of 2 tasks of 4 images, 4 steps."""
    return {
        "name": "tiny",
        "output_dir": str(folder / "runs"),
        "rounds": 2,
        "policy": {"name": "stable_diffusion", "model": str(model)},
        "prompts": {"name": "animals"},
        "sampling": {"num_steps": 4, "guidance_scale": 3.0, "batch_size": 4, "batches_per_round": 2},
        "reward": {"name": "jpeg_compressibility"},
        "algorithm": {"name": "ddpo_is", "clip_range": 1e-3},
        "learner": {"batch_size": 4, "micro_batch_size": 8, "learning_rate": 1e-3},
    }


@pytest.fixture
def tables(tiny_model: Path, tmp_path: Path) -> dict:
    """Return the small recipe."""
    return small_tables(tiny_model, tmp_path)


@pytest.fixture
def recipe(tables: dict) -> Recipe:
    return Recipe.parse(tables)


@pytest.fixture(scope="session")
def cluster_folder() -> Iterator[str]:
    """Start the process that forks workers and programs. Short, because a socket's path may have 107 bytes."""
    import ray

    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    with forking_process(folder):
        yield folder
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(cluster_folder: str) -> None:
    """One cluster with eight CPUs for all tests, started again if a test has left or replaced it."""
    import ray

    if ray.is_initialized() and ray.cluster_resources().get(MARK):
        return
    ray.shutdown()
    os.environ.pop("RAY_ADDRESS", None)
    # A process that has looked for a GPU cannot be forked for work on one.
    with nullcontext() if torch.cuda.is_available() else forked_workers():
        ray.init(
            address="local",
            num_cpus=8,
            resources={MARK: 1},
            object_store_memory=200_000_000,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=cluster_folder,
        )


@pytest.fixture(scope="module")
def counted_once() -> Iterator[None]:
    """Count each model's sizes once in all workers of a run of the tests: FLUX takes a quarter of a minute."""
    with sizes_cache():
        yield


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Serve S3 on this machine."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URI of a new bucket. The environment holds the server's address."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{secrets.token_hex(6)}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"
