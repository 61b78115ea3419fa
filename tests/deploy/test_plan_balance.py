"""`ddpo plan --gpus`: layouts, keys that Ray can place, the recipe that is written, and what does not fit."""

import re
import tomllib
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import pytest

from ray_ddpo.cli import main
from ray_ddpo.common.balance import Layout
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.plan.balance import RATE, balance_rows, work_in_words
from ray_ddpo.deploy.commands.plan.layout import candidates, layout_of, misfit, with_keys
from ray_ddpo.deploy.commands.plan.numbers import plan_of_components
from ray_ddpo.deploy.commands.plan.plan import plan
from ray_ddpo.deploy.driver.components import build_components, components_of
from ray_ddpo.deploy.driver.gpu_layout import gpus_of, keys_of, kind_of, reward_gpus, reward_share, roles_of
from ray_ddpo.deploy.driver.round_work import image_work, round_load

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"
# Of the GPUs' time. Samplers and ranks are whole numbers. The worst proportion for four GPUs is 1 : 2, where 1 + 3 and
# 2 + 2 GPUs both work three quarters of the time. More GPUs, and GPUs in turns at lag 0, can be shared better.
MOST_IDLE = 0.251


def layout(kind: str, samplers: int, ranks: int) -> Layout:
    times = {"seconds": 1.0, "idle_samplers": 0.0, "idle_ranks": 0.0}
    return Layout(kind=kind, samplers=samplers, ranks=ranks, **times)


def placed(asked: list[tuple[str, float]], gpus: int) -> list[list[str]] | None:
    """Return the roles on each GPU if each actor gets the fullest GPU that has room, as Ray does it; None: no room."""
    free, roles = [1.0] * gpus, [[] for _ in range(gpus)]
    for role, share in asked:
        fitting = [gpu for gpu in range(gpus) if free[gpu] + 1e-9 >= share]
        if not fitting:
            return None
        gpu = min(fitting, key=lambda each: free[each])
        free[gpu] -= share
        roles[gpu].append(role)
    return roles


@pytest.mark.parametrize("shares", [[], [0.1], [0.1, 0.1], [0.05] * 4])
@pytest.mark.parametrize(
    ("kind", "samplers", "ranks"),
    [("colocated", 1, 1), ("colocated", 4, 4), ("colocated", 8, 8), ("dedicated", 1, 3), ("dedicated", 5, 3)],
)
def test_ray_finds_room_for_every_role_on_the_layouts_gpus(
    kind: str, samplers: int, ranks: int, shares: list[float]
) -> None:
    keys = keys_of(layout(kind, samplers, ranks), sum(shares))
    order = [("rank", keys["learner"]["num_gpus"])] * ranks  # the order in which the driver starts them
    order += [("reward", share) for share in shares]
    order += [("sampler", keys["samplers"]["num_gpus"])] * samplers
    gpus = ranks if kind == "colocated" else samplers + ranks
    roles = placed(order, gpus)
    assert roles is not None, keys
    assert all(on_gpu.count("rank") <= 1 and on_gpu.count("sampler") <= 1 for on_gpu in roles)
    if kind == "colocated":
        assert all({"rank", "sampler"} <= set(on_gpu) for on_gpu in roles)
    assert keys["learner"]["num_gpus"] > 0.5  # so that ranks may use NCCL


def test_a_plan_without_gpus_tells_the_work_alone(recipe: Recipe) -> None:
    text = plan(recipe)
    assert "work per image" in text and "this layout" not in text


def test_a_plan_for_gpus_prints_lines_that_make_the_layout(recipe: Recipe) -> None:
    text = plan(recipe, 2, 80.0)
    assert "layouts of 2 GPUs of 80 GB, the fastest first:" in text
    keys = tomllib.loads(text[text.index("[samplers]") : text.index("--samplers.count")])
    balanced = with_keys(recipe, keys)
    assert isinstance(balanced, Recipe)
    assert kind_of(balanced) == "colocated" and gpus_of(balanced) == 2
    assert (balanced.samplers.count, balanced.learner.world_size) == (2, 2)
    words = text.splitlines()[-1].split()
    pairs = dict(zip(words[::2], words[1::2], strict=True))
    assert {key: tomllib.loads(f"value = {value}")["value"] for key, value in pairs.items()} == {
        f"--{table}.{key}": value for table, values in keys.items() for key, value in values.items()
    }


def test_the_recipe_is_written_with_the_layout_and_nothing_else_changed(
    recipe: Recipe, tables: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tomli_w

    source, output = tmp_path / "recipe.toml", tmp_path / "on_two.toml"
    source.write_text(tomli_w.dumps(tables))
    command = ["plan", str(source), "--gpus", "2", "--gpu-memory", "24", "--output", str(output), "--rounds", "7"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(output)
    written = Recipe.load(output)
    assert output.read_text().startswith(
        "# For 2 GPUs of 24 GB: 2 GPUs, each with a sampler and a learner rank in turns."
    )
    tables_written = tomllib.loads(output.read_text())
    expected = with_keys(recipe, {table: tables_written[table] for table in ("samplers", "learner")})
    changed = {"rounds", "samplers", "learner"}
    assert isinstance(expected, Recipe) and written.rounds == 7
    assert written.model_dump(exclude=changed) == recipe.model_dump(exclude=changed)
    assert (written.learner, written.samplers) == (expected.learner, expected.samplers)
    assert main(command) == 2 and "which exists" in capsys.readouterr().err


def test_ranks_that_do_not_go_with_the_batches_are_replaced(
    tables: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tomli_w

    source, output = tmp_path / "recipe.toml", tmp_path / "on_three.toml"
    source.write_text(tomli_w.dumps(tables | {"learner": {**tables["learner"], "world_size": 7}}))
    assert main(["plan", str(source)]) == 2
    assert "learner.world_size = 7 does not divide" in capsys.readouterr().err
    assert main(["plan", str(source), "--gpus", "3", "--output", str(output)]) == 0
    captured = capsys.readouterr()
    assert "planned with one learner rank, because the recipe's own layout is refused" in captured.out + captured.err
    images = Recipe.load(output).learner.images_per_step
    assert images % 3 and Recipe.load(output).learner.world_size in (1, 2)
    assert re.search(
        rf"3 GPUs, each with .* would be 1\.\d+ × as fast if learner.batch_size × gradient_accumulation_steps, "
        rf"which is {images}, were a multiple of 3",
        captured.out,
    )


def test_a_limit_of_samplers_goes_with_pairs(tables: dict) -> None:
    recipe = Recipe.parse(tables | {"samplers": {"count": 1, "max": 8}})
    components = build_components(recipe)
    numbers = plan_of_components(components)
    load = round_load(components, numbers.sizes, image_work(components, numbers.sizes))
    first = candidates(components, load, 2, None)[0]
    assert first.keys["learner"]["colocated"] and first.keys["samplers"]["max"] == 2 and first.misfit is None
    assert isinstance(with_keys(recipe, first.keys), Recipe)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus", "0"], "--gpus is 0 and --gpu-memory 80: give one GPU or more, and their gigabytes"),
        (["--gpus", "2", "--gpu-memory", "nan"], "--gpus is 2 and --gpu-memory nan: give one GPU or more"),
        (["--gpus", "2", "--gpu-memory", "0.5"], "no layout of 2 GPUs of 0.5 GB fits: the GPU of a learner needs"),
        (["--output", "x.toml"], "--output is x.toml and --gpus is missing"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    options: list[str], said: str, tables: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tomli_w

    source = tmp_path / "recipe.toml"
    source.write_text(tomli_w.dumps(tables))
    assert main(["plan", str(source), *options]) == 2
    assert said in capsys.readouterr().err


def test_reward_workers_that_need_gpus_of_their_own_leave_the_rest(tables: dict) -> None:
    recipe = Recipe.parse(tables | {"reward_workers": {"count": 2, "num_gpus": 0.5}})
    components = build_components(recipe)
    numbers = plan_of_components(components)
    load = round_load(components, numbers.sizes, image_work(components, numbers.sizes))
    first = candidates(components, load, 3, None)[0]
    assert first.layout.gpus == 2 and first.keys["learner"]["num_gpus"] == 0.55
    alone = Recipe.parse(tables | {"reward_workers": {"num_gpus": 0.35}})
    assert (reward_gpus(alone, 1), reward_gpus(alone, 2)) == (0, 1)  # two samplers of 0.1 would fit beside one rank
    with pytest.raises(ValueError, match="--gpus is 1, and reward workers and scorers ask for 1"):
        candidates(components, load, 1, None)


def test_a_family_that_cannot_be_counted_is_said_to_be(recipe: Recipe) -> None:
    components = build_components(recipe)
    numbers = plan_of_components(components)
    uncounted = replace(numbers, sizes=replace(numbers.sizes, work=None))
    (row,) = balance_rows(components, uncounted)
    assert row[1].startswith(
        "not counted for this family: taken as 1 for a forward pass, 2.13 with the backward pass and "
    )
    assert "3.13 with gradient checkpointing" in row[1] and "sampling is 32% of it" in row[1]
    assert work_in_words(image_work(components, numbers.sizes)).endswith("scoring is not counted")


@pytest.mark.parametrize(
    ("learner", "samplers", "kind", "gpus"),
    [
        ({"num_gpus": 0.5}, {"num_gpus": 0.3}, "colocated", 1),
        ({"num_gpus": 0.8}, {"num_gpus": 1, "count": 3}, "dedicated", 4),
        ({"num_gpus": 1}, {"num_gpus": 0.9}, "dedicated", 2),
        ({"num_gpus": 0.55, "world_size": 2}, {"num_gpus": 0.45, "count": 2}, "colocated", 2),
        ({"num_gpus": 0.7, "world_size": 4, "batch_size": 8}, {"num_gpus": 1}, "dedicated", 5),  # the sum is 3.8
        ({}, {}, "dedicated", 0),
    ],
)
def test_a_recipes_own_layout_follows_from_its_shares(
    tables: dict, learner: dict, samplers: dict, kind: str, gpus: int
) -> None:
    recipe = Recipe.parse(tables | {"learner": {**tables["learner"], **learner}, "samplers": samplers})
    assert (kind_of(recipe), gpus_of(recipe)) == (kind, gpus)
    roles = roles_of(recipe)
    assert (roles.kind, roles.gpus, roles.tasks, roles.micro_batch_size) == (kind, gpus, 2, 8)


def shipped() -> list[str]:
    """Return the shipped recipes that ask for GPUs."""
    names = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.toml"))
    return [name for name in names if gpus_of(Recipe.load(RECIPES / name))]


def test_every_recipe_but_those_for_the_cpu_is_among_the_shipped_ones() -> None:
    assert len(shipped()) > 30


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_states_its_gpus_and_asks_for_as_many(name: str) -> None:
    recipe = Recipe.load(RECIPES / name)
    gpus, _ = stated(name)
    assert gpus_of(recipe) == gpus
    pools = [(share.num_gpus, share.count) for share in (recipe.reward_workers, recipe.evaluation.workers)]
    order = [("rank", recipe.learner.num_gpus)] * recipe.learner.world_size
    order += [
        ("reward", share) for share, count in pools for _ in repeat(None, count) if share and reward_share(recipe)
    ]
    order += [("sampler", recipe.samplers.num_gpus)] * recipe.samplers.count
    assert placed(order, gpus) is not None


def stated(name: str) -> tuple[int, int]:
    """Return the number of GPUs and their gigabytes in the comment at a recipe's head."""
    found = re.findall(r"^# For (\d+) GPUs? of (\d+) GB", (RECIPES / name).read_text(), re.MULTILINE)
    assert len(found) == 1, f"{name} states its GPUs {len(found)} times"
    return int(found[0][0]), int(found[0][1])


@pytest.mark.thorough
@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_is_balanced_and_fits_the_memory_it_states(name: str, counted_once: None) -> None:
    recipe = Recipe.load(RECIPES / name)
    components = components_of(recipe)
    numbers = plan_of_components(components)
    work = image_work(components, numbers.sizes)
    assert work.is_counted
    load = round_load(components, numbers.sizes, work, RATE)
    gpus, gigabytes = stated(name)
    own = layout_of(recipe, load)
    assert misfit(recipe, components, float(gigabytes)) is None
    assert own.idle_gpus < MOST_IDLE, own
    fitting = [each for each in candidates(components, load, gpus, float(gigabytes)) if each.misfit is None]
    assert own.seconds < 1.01 * fitting[0].layout.seconds, (own, fitting[0].layout)


def test_a_recipe_whose_rewards_ask_for_all_of_its_gpus_is_planned(
    tables: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tomli_w

    source = tmp_path / "recipe.toml"
    shares = {"learner": {**tables["learner"], "num_gpus": 0.5}, "samplers": {"num_gpus": 0.25}}
    source.write_text(tomli_w.dumps(tables | shares | {"reward_workers": {"num_gpus": 0.25}}))
    assert main(["plan", str(source), "--reward_workers.num_gpus", "1", "--samplers.num_gpus", "0.5"]) == 0
    assert main(["plan", str(source), "--reward_workers.num_gpus", "0.4"]) == 0
    assert "this layout" in capsys.readouterr().out


def test_a_layout_that_the_recipe_forbids_gets_no_advice_about_memory(tables: dict) -> None:
    few = Recipe.parse({**tables, "samplers": {"count": 4, "min": 4, "num_gpus": 1}})
    with pytest.raises(ValueError, match="rules do not allow it: .*count . must lie between min 4") as found:
        plan(few, 4, 80.0)
    assert "memory" not in str(found.value)
