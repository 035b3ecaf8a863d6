"""The modelled replicas against a model that takes one step at a time; the policies compared."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.controller.simulation.policies import POLICIES, Ours
from phalanx.controller.simulation.profile import Profile, read_profile
from phalanx.controller.simulation.replica import Job, ModelledReplica
from phalanx.controller.simulation.simulation import Setting, Simulation
from phalanx.controller.simulation.traces import BLOCK_TOKENS, TRACES, Session, Turn
from phalanx.protos.errors import ConfigError

SMALL = Profile(
    base_s=1.0, token_s=0.01, stream_s=0.1, tokens_per_step=300, places=3, kv_tokens=10_000
)


def turn(number: int, arrival: float, prompt: int, output: int) -> Turn:
    session = Session(number, "a", [], [(prompt, output, 0.0)])
    return session.ask(arrival)


def one_by_one(turns: list[Turn], profile: Profile) -> dict[int, tuple[float, float]]:
    """First and last token of each, from one step after the other; nothing is cached."""
    now, waiting, prompts, streams = 0.0, list(turns), dict[int, int](), dict[int, int]()
    found: dict[int, tuple[float, float]] = {}
    first: dict[int, float] = {}
    while waiting or prompts or streams:
        if not prompts and not streams:
            now = max(now, waiting[0].arrival_s)
        for item in list(waiting):
            if item.arrival_s > now or len(prompts) + len(streams) >= profile.places:
                break
            waiting.remove(item)
            prompts[item.session.number] = item.prompt_tokens
        room, parts = profile.tokens_per_step, {}
        for number, left in prompts.items():
            parts[number] = min(left, room)
            room -= parts[number]
        now += profile.step_s(profile.tokens_per_step - room, len(streams))
        for number in list(streams):
            streams[number] -= 1
        for number, tokens in parts.items():
            prompts[number] -= tokens
            if not prompts[number]:
                del prompts[number]
                first[number] = now
                streams[number] = turns[number].output_tokens - 1
        for number, left in list(streams.items()):
            if not left:
                del streams[number]
                found[number] = first[number], now
    return found


@given(
    st.lists(
        st.tuples(st.floats(0.001, 10), st.integers(1, 2000), st.integers(1, 9)),
        min_size=1,
        max_size=7,
    )
)
def test_steps_taken_together_are_steps_taken_one_by_one(
    asked: list[tuple[float, int, int]],
) -> None:
    moments = sorted(sum(pause for pause, _, _ in asked[: i + 1]) for i in range(len(asked)))
    turns = [turn(i, moments[i], asked[i][1], asked[i][2]) for i in range(len(asked))]
    replica, coming, found = ModelledReplica(0, SMALL), list(turns), {}
    while coming or replica.due is not None:
        if coming and (replica.due is None or coming[0].arrival_s <= replica.due):
            arrived = coming.pop(0)
            replica.take(arrived.arrival_s, Job(arrived, 0))
            continue
        now = replica.due
        for job in replica.fire()[1]:
            found[job.turn.session.number] = job.first_token_s, now
    expected = one_by_one(turns, SMALL)
    assert found.keys() == expected.keys()
    for number, times in expected.items():
        assert found[number] == pytest.approx(times)
    assert replica.cache.busy == 0


def replace_profile(**changes: Any) -> Profile:
    return msgspec.structs.replace(SMALL, **changes)


def test_a_long_prompt_waits_for_room_and_a_repeated_one_is_cached() -> None:
    replica = ModelledReplica(0, replace_profile(kv_tokens=1280))
    session = Session(0, "a", [], [(640, 2, 0.0), (100, 2, 0.0)])
    first = Job(session.ask(0.0), 0)
    big = Job(turn(1, 0.0, 1000, 100), 0)
    replica.take(0.0, first)
    replica.take(0.0, big)
    ended: list[Job] = []
    while replica.due is not None:
        ended += replica.fire()[1]
        if len(ended) == 1 and first in ended and session.turns:
            again = Job(session.ask(replica.due or 0.0), 0)
            replica.take(replica.due or 0.0, again)
    assert ended == [first, big, again], "the one that did not fit came after, not never"
    assert big.first_token_s > first.first_token_s
    assert again.cached_tokens < 640, "the big one has evicted some of it"


SETTING = Setting(policy="ours", trace="chat", replicas=8, requests=1500, load=0.3)


@pytest.mark.parametrize(("trace", "load"), [("chat", 0.8), ("shared", 0.3), ("documents", 0.4)])
def test_ours_is_sooner_than_each_other_one(trace: str, load: float) -> None:
    found = {}
    for policy in POLICIES:
        setting = Setting(policy, trace, replicas=16, requests=3000, load=load, seed=3)
        found[policy] = Simulation(setting).run().figures()
    ours = found.pop("ours")
    for policy, other in found.items():
        # while caches fill, chance decides between ours and whoever is as aware of them
        chance = 1.1 if policy == "cache-aware" else 1.0
        assert ours["ttft_mean_s"] < chance * other["ttft_mean_s"], policy
        assert ours["good_share"] >= other["good_share"] - 0.01 * (chance > 1.0), policy
        assert other["hit_rate"] <= other["oracle_hit_rate"] + 1e-9
    assert ours["hit_rate"] > 0.98 * max(other["hit_rate"] for other in found.values())


@pytest.mark.parametrize("load", [0.1, 0.4])
def test_a_hot_prefix_is_replicated_before_it_overloads_its_holder(
    load: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All requests begin with the same 5,000 tokens; one replica has not the places for them."""
    hot = list(range(1, 41))

    def trace(seed: int) -> Iterator[Session]:
        random = Random(seed)
        for number in itertools.count(1000):
            yield Session(number, "a", hot, [(random.randint(20, 200), 100, 0.0)])

    monkeypatch.setitem(TRACES, "hot", trace)
    simulation = Simulation(replace(SETTING, trace="hot", load=load, requests=3000))
    figures = simulation.run().figures()
    held = [len(replica.cache.names() & set(hot)) for replica in simulation.replicas]
    assert held.count(len(hot)) > (1 if load < 0.2 else 4)
    assert figures["hit_rate"] > 0.95 and figures["good_share"] > 0.99
    assert figures["ttft_p99_s"] < 2 * 5000 * Profile().token_s, "nobody waits for two such prompts"


@pytest.mark.parametrize("trace", TRACES)
def test_first_tokens_come_when_they_are_predicted(trace: str) -> None:
    simulation = Simulation(Setting("ours", trace, replicas=8, requests=1500, load=0.3, seed=5))
    policy, predicted = simulation._policy, dict[int, float]()
    assert isinstance(policy, Ours)
    place = policy.placed

    def placed(job: Job) -> None:
        place(job)
        decision = policy._placer.placements()[-1].decision
        predicted[id(job)] = decision.estimates[0].predicted_s
        jobs.append(job)

    jobs: list[Job] = []
    policy.placed = placed  # type: ignore[method-assign]
    simulation.run()
    late = jobs[len(jobs) // 3 :]
    actual_s = [job.first_token_s - job.turn.arrival_s for job in late]
    mean = statistics.fmean
    bias = mean(actual_s) / mean(predicted[id(job)] for job in late)
    assert 0.85 < bias < 1.15
    ratios = sorted(s / predicted[id(job)] for s, job in zip(actual_s, late, strict=True))
    assert 0.9 < ratios[len(ratios) // 2] < 1.1


def test_a_simulation_is_deterministic_and_everything_ends() -> None:
    outcomes = [Simulation(SETTING).run() for _ in range(2)]
    assert outcomes[0].first_s == outcomes[1].first_s
    assert outcomes[0].token_s == outcomes[1].token_s


def test_the_index_knows_what_the_replicas_hold() -> None:
    simulation = Simulation(SETTING)
    simulation.run()
    policy = simulation._policy
    assert isinstance(policy, Ours)
    for replica in simulation.replicas:
        held = policy._placer.index.contents(replica.index)
        assert held == replica.cache.names() and len(held) == len(replica.cache) > 0
        assert replica.cache.busy == 0


def test_a_second_turn_repeats_the_first() -> None:
    session = Session(3, "a", [1, 2], [(300, 50, 0.0), (80, 10, 0.0)])
    first, second = session.ask(0.0), session.ask(1.0)
    assert first.prompt_tokens == 2 * BLOCK_TOKENS + 300
    assert second.prompt_tokens == first.prompt_tokens + 50 + 80
    assert second.keys[: len(first.keys)] == first.keys and list(first.keys[:2]) == [1, 2]
    assert second.last and not first.last


def test_a_wrong_profile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    assert read_profile(None) == Profile()
    for text, word in [("{", "truncated"), ('{"speed": 1}', "speed"), ('{"base_s": 0}', "base_s")]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=word):
            read_profile(path)
    path.write_text(json.dumps({"base_s": 0.5}))
    assert read_profile(path).base_s == 0.5
