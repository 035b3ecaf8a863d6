"""Ranks are killed while they compute; in processes of their own, as Ray allows one cluster each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = """
import asyncio, os, sys, traceback
import psutil, ray
from phalanx.controller.app import start_cluster
from phalanx.controller.client import AsyncClient
from phalanx.controller.cluster.ray_fleet import RayFleet
from phalanx.controller.config import ClusterConfig

MODEL, TP, PP, REPLICAS = sys.argv[1], *map(int, sys.argv[2:])
STREAMS, TOKENS = 6, 60
FLEETS = []
reserve = RayFleet.reserve

def watched(fleet):
    nodes = reserve(fleet)
    FLEETS.append(ray.get([
        actor.__ray_call__.remote(lambda self: os.getpid()) for actor in fleet._actors
    ]))
    return nodes

RayFleet.reserve = watched

def ranks():
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.name().startswith("ray::RankActor")]

async def main():
    config = ClusterConfig(
        model=MODEL, tp=TP, pp=PP, replicas=REPLICAS, dtype="float32", port=0, metrics_port=None,
        kv_tokens=8192, log_level="error",
    )
    cluster = await start_cluster(config)
    async with AsyncClient(cluster.address) as client:
        async def read(number, at_token=None, harm=""):
            tokens, places = [], []
            params = {"temperature": 0.9, "seed": number, "n": 1 + number % 2}
            prompt = [5, 17, 300, number]
            async for message in client.generate(
                prompt, max_tokens=TOKENS, ignore_eos=True, **params
            ):
                for sample in message.samples:
                    if sample.index == 0:
                        places.append(sample.first_token_index)
                        assert sample.first_token_index == len(tokens)
                        tokens += sample.token_ids
                if at_token and len(tokens) >= at_token:
                    at_token = None
                    # of the group that was started last: its last rank, or its first one
                    victim = FLEETS[-1][-1 if harm == "kill" else 0]
                    getattr(psutil.Process(victim), harm)()
            return tokens

        expected = [await read(number) for number in range(STREAMS)]
        for groups, (at_token, harm) in enumerate(((1, "kill"), (30, "suspend")), REPLICAS + 1):
            answers = await asyncio.gather(
                *(read(number, at_token if number == 0 else None, harm) for number in range(STREAMS))
            )
            assert answers == expected, (answers, expected)
            while True:
                states = [item.state for item in (await client.cluster_state()).replicas]
                # a stopped rank without streams is noticed later than they end
                if states == ["ready"] * REPLICAS and len(FLEETS) == groups:
                    break
                await asyncio.sleep(0.1)
        assert await client.healthy()
        assert len(FLEETS) == REPLICAS + 2
        for replica in (await client.cluster_state()).replicas:
            assert [rank.stage for rank in replica.ranks] == [r // TP for r in range(TP * PP)]
            assert replica.kv_blocks_free == replica.kv_blocks_total
    await cluster.stop()
    print("ranks left:", len(ranks()))

try:
    asyncio.run(main())
except BaseException:  # Ray's own hook would wait for a minute
    traceback.print_exc()
    os._exit(1)
"""


@pytest.mark.parametrize(
    ("tp", "pp", "replicas"),
    [(2, 1, 1), (1, 1, 2), (1, 2, 1)],
    ids=["alone", "moves", "stages"],
)
def test_streams_outlive_their_ranks_with_the_same_tokens(
    tiny_llama: Callable[..., Path], smollm2_gguf: Path, tp: int, pp: int, replicas: int
) -> None:
    """A rank is killed, later one is stopped (SIGSTOP): each answer equals that of an undisturbed
    run, nothing lost, repeated or changed. Of several stages, a rank of the last one is killed, and
    one of the first one is stopped."""
    model = str(tiny_llama()) if pp == 1 else "smollm2"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, str(tp), str(pp), str(replicas)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ranks left: 0" in done.stdout


@pytest.mark.slow
def test_a_group_that_stands_by_takes_over_with_the_same_tokens(
    tiny_llama: Callable[..., Path],
) -> None:
    """A rank of the computing group is killed, twice; a spare group is there again in between."""
    script = Path(__file__).parents[1] / "bench" / "lost_rank.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_llama()), "--repeats", "2", "--settle", "0"],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "spares 1: median" in done.stdout
