"""ddpo serve-reward: a recipe's reward as a service, so that it can live on a machine and in an environment of its own."""

import ipaddress
import os
from dataclasses import dataclass

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards.http import Http
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RewardTable
from ray_ddpo.common.reward_protocol import SCORE_PATH, read_token
from ray_ddpo.deploy.driver.components import build_reward
from ray_ddpo.deploy.reward_service.server import RewardServer


@dataclass(frozen=True)
class Listening:
    """Where the service listens, and the environment variable that has its token."""

    host: str
    port: int
    token_variable: str | None


def serve_reward(recipe: Recipe, name: str | None, listening: Listening) -> None:
    """Serve until a signal ends it. ValueError: which reward is not clear, it cannot be loaded, or others could ask it."""
    server = reward_server(recipe, name, listening)
    asked = f"the token in {listening.token_variable}" if listening.token_variable else "no token"
    print(f"serving {server.reward} at {server.url}{SCORE_PATH}, asking for {asked}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped", flush=True)
    finally:
        server.server_close()


def reward_server(recipe: Recipe, name: str | None, listening: Listening) -> RewardServer:
    """The service, bound to its port and with the reward loaded."""
    token = read_token(listening.token_variable, os.environ)
    if token is None and not _is_this_machine(listening.host):
        raise ValueError(f"--host {listening.host} can be reached from elsewhere: give --token-variable, too")
    table = _chosen(recipe, name)
    reward = build_reward(table)
    if isinstance(reward, Http):
        raise ValueError("the recipe's reward is itself asked for over HTTP: give a recipe with the reward to serve")
    worker = RewardWorker({table.called: reward}, table.workers or recipe.reward_workers, recipe.runtime)
    try:
        return RewardServer((listening.host, listening.port), worker, token)
    except OSError as error:
        raise ValueError(f"cannot listen at {listening.host}:{listening.port}: {error}") from error


def _chosen(recipe: Recipe, name: str | None) -> RewardTable:
    tables = {table.called: table for table in recipe.all_rewards}
    if name is None and len(tables) == 1:
        return next(iter(tables.values()))
    if name not in tables:
        raise ValueError(f"--reward is {name!r}: the recipe has {sorted(tables)}")
    return tables[name]


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
