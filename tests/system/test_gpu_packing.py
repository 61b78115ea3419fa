"""Ray places the roles of a colocated layout as its shares intend: a rank and a sampler on each GPU."""

import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from ray_ddpo.common.balance import RoundLoad, expected
from ray_ddpo.common.recipe.tables import RoleTable
from ray_ddpo.deploy.driver.gpu_layout import keys_of
from ray_ddpo.deploy.driver.workers import place_options

pytestmark = pytest.mark.system
GPUS = 3


@pytest.fixture
def gpu_cluster() -> Iterator[None]:
    """Start a node that is said to have GPUs; no role computes on them."""
    ray.shutdown()  # the one of other tests, which start it again
    folder = tempfile.mkdtemp(prefix="g", dir="/tmp")
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "_temp_dir": folder}
    ray.init(address="local", num_cpus=2, num_gpus=GPUS, **options)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


class Placed:
    """An actor that tells its GPU."""

    def gpu(self) -> int:
        (found,) = ray.get_gpu_ids()
        return int(found)


def test_every_gpu_has_a_rank_and_a_sampler(gpu_cluster: None) -> None:
    layout = expected(RoundLoad(tasks=6, sample=1.0, learn=6.0, images_per_step=6), GPUS, GPUS, "colocated")
    keys = keys_of(layout, shared=0.2)
    shares = [keys["learner"]["num_gpus"]] * GPUS + [0.1, 0.1] + [keys["samplers"]["num_gpus"]] * GPUS
    actors = []
    for share in shares:  # as the driver starts them: ranks, reward workers, samplers
        options = place_options(RoleTable(num_cpus=0, num_gpus=share))
        actors.append(ray.remote(**options)(Placed).remote())
    gpus = ray.get([actor.gpu.remote() for actor in actors], timeout=120)
    assert sorted(gpus[:GPUS]) == sorted(gpus[-GPUS:]) == list(range(GPUS))
