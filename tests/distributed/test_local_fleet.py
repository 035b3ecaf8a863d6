"""A group of ranks behind its sockets: rank threads, and ranks that are processes of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from phalanx.controller.cluster.local_fleet import LocalFleet
from phalanx.controller.model import resolve_model
from phalanx.kernels.select import select_backend
from phalanx.protos.errors import GroupLost, ModelError
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import CacheSpec, WorkerSpec
from phalanx.protos.steps import NewSequence, Row, StepPlan
from phalanx.protos.wire import Hello, Stop, encode
from phalanx.workers.engine import Engine
from phalanx.workers.parallel import SingleRank, ThreadRank
from phalanx.workers.serve import serve_rank
from phalanx.workers.shared_memory import supported

Address = tuple[str, int]
PROMPTS = {7: [5, 17, 300, 44, 9, 9, 81], 8: [400, 3, 77]}
NEW_TOKENS = 10


def spec_of(folder: Path, tp_size: int, pp_size: int = 1) -> WorkerSpec:
    model = resolve_model(str(folder))
    return WorkerSpec(
        checkpoint=model.checkpoint,
        model=model.spec,
        dtype="float32",
        tp_size=tp_size,
        pp_size=pp_size,
        cache=CacheSpec(block_size=4, num_blocks=16, dtype="float32"),
        max_tokens_per_step=64,
        max_running=8,
        eos_token_ids=model.eos_token_ids,
        device="cpu",
        epoch=3,
    )


def rank_thread(
    group: Any, change: Callable[[WorkerSpec], WorkerSpec] = lambda spec: spec
) -> Callable[[Address, Hello], None]:
    def build(spec: WorkerSpec) -> Engine:
        return Engine(change(spec), group, select_backend("cpu")[0])

    return lambda address, hello: serve_rank(address, hello, build)


def plans() -> Iterator[StepPlan]:
    """Both prompts at once, then one token of each a step."""
    params = SamplingParams(temperature=0.0)
    new = [NewSequence(seq, tokens, len(tokens), 0, params) for seq, tokens in PROMPTS.items()]
    rows = [
        Row(seq, len(tokens), [5 * index + n for n in range(5)])
        for index, (seq, tokens) in enumerate(PROMPTS.items())
    ]
    yield StepPlan(3, 0, [], new, [], rows)
    for step in range(1, NEW_TOKENS):
        yield StepPlan(3, step, [], [], [], [Row(seq, 1, []) for seq in PROMPTS])


def run(step: Callable[[StepPlan], Any]) -> dict[int, list[int]]:
    """Greedy tokens of both prompts."""
    outputs: dict[int, list[int]] = {seq: [] for seq in PROMPTS}
    for plan in plans():
        for token in step(plan).sampled:
            outputs[token.seq].append(token.token_id)
    return outputs


def over_sockets(fleet: LocalFleet) -> Callable[[StepPlan], Any]:
    def step(plan: StepPlan) -> Any:
        fleet.send(plan)
        return fleet.receive(timeout_s=30)

    return step


def in_process(folder: Path) -> dict[int, list[int]]:
    engine = Engine(spec_of(folder, 1), SingleRank(), select_backend("cpu")[0])
    engine.load()
    return run(engine.step)


@pytest.mark.parametrize(
    "collectives",
    [
        "gloo",
        pytest.param("shm", marks=pytest.mark.skipif(not supported(), reason="needs x86")),
    ],
)
def test_two_processes_give_the_tokens_of_one_engine(
    tiny_llama: Callable[..., Path],
    processes: Callable[[int, str], Any],
    start: Callable[..., LocalFleet],
    collectives: str,
) -> None:
    group = processes(2, collectives)
    fleet = start(spec_of(tiny_llama(), 2), group.mains())
    assert run(over_sockets(fleet)) == in_process(tiny_llama())
    fleet.stop()
    assert [group.ranks[rank].wait(timeout=30) for rank in (0, 1)] == [0, 0]


@pytest.mark.parametrize(
    ("pp_size", "tp_size", "collectives"),
    [
        (3, 1, "gloo"),
        (2, 2, "gloo"),
        pytest.param(2, 2, "shm", marks=pytest.mark.skipif(not supported(), reason="needs x86")),
    ],
)
def test_stages_of_processes_give_the_tokens_of_one_engine(
    tiny_llama: Callable[..., Path],
    processes: Callable[[int, str], Any],
    start: Callable[..., LocalFleet],
    pp_size: int,
    tp_size: int,
    collectives: str,
) -> None:
    """Two plans are always under way, so that the first stage runs ahead of the last one."""
    folder = tiny_llama(num_hidden_layers=3, tie_word_embeddings=True)
    group = processes(pp_size * tp_size, collectives)
    fleet = start(spec_of(folder, tp_size, pp_size), group.mains())
    expected, outputs = in_process(folder), {seq: list[int]() for seq in PROMPTS}
    for plan in plans():
        fleet.send(plan)
        if plan.step > 0:
            take(fleet, outputs)
    take(fleet, outputs)
    assert outputs == expected
    fleet.stop()
    assert [rank.wait(timeout=30) for rank in group.ranks.values()] == [0] * pp_size * tp_size


def take(fleet: LocalFleet, outputs: dict[int, list[int]]) -> None:
    for token in fleet.receive(timeout_s=30).sampled:
        outputs[token.seq].append(token.token_id)


def test_rank_threads_give_the_tokens_of_one_engine(
    tiny_llama: Callable[..., Path], start: Callable[..., LocalFleet]
) -> None:
    fleet = start(spec_of(tiny_llama(), 3), [rank_thread(rank) for rank in ThreadRank.group(3)])
    assert run(over_sockets(fleet)) == in_process(tiny_llama())


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("pp_size", "tp_size"), [(1, 2), (2, 1)])
def test_a_killed_rank_is_named(
    tiny_llama: Callable[..., Path],
    processes: Callable[[int, str], Any],
    start: Callable[..., LocalFleet],
    victim: int,
    pp_size: int,
    tp_size: int,
) -> None:
    """Killed between two steps; the survivor waits for it meanwhile."""
    group = processes(2, "gloo")
    fleet = start(spec_of(tiny_llama(), tp_size, pp_size), group.mains())
    steps = plans()
    over_sockets(fleet)(next(steps))
    group.ranks[victim].send_signal(signal.SIGKILL)
    group.ranks[victim].wait()
    with pytest.raises(GroupLost, match=f"rank {victim}") as lost:
        for plan in steps:
            over_sockets(fleet)(plan)
    assert not lost.value.crashed, "somebody has killed it"


DEATHS = [(signal.SIGSEGV, "Segmentation fault", 0), (signal.SIGABRT, "Aborted", 1)]


@pytest.mark.parametrize(("number", "words", "victim"), DEATHS)
def test_a_rank_that_dies_of_itself_says_so(
    tiny_llama: Any, processes: Any, start: Any, number: signal.Signals, words: str, victim: int
) -> None:
    group, steps = processes(2, "gloo"), plans()
    fleet = start(spec_of(tiny_llama(), 2, 1), group.mains())
    over_sockets(fleet)(next(steps))
    group.ranks[victim].send_signal(number)
    with pytest.raises(GroupLost, match=f"rank {victim}: died: {words}") as lost:
        for plan in steps:
            over_sockets(fleet)(plan)
    assert lost.value.crashed
    assert group.ranks[victim].wait() == -number


def test_a_rank_with_an_error_says_so(tiny_llama: Any, processes: Any, start: Any) -> None:
    fleet = start(spec_of(tiny_llama(), 2, 1), processes(2, "gloo").mains())
    wrong = StepPlan(epoch=3, step=0, finished=[], new=[], copies=[], rows=[Row(99, 1, [0])])
    with pytest.raises(GroupLost, match="sequence 99") as lost:
        over_sockets(fleet)(wrong)
    assert lost.value.crashed


def strangers(hello: Hello) -> dict[str, bytes]:
    """What connects besides the ranks."""
    wrong = msgspec.structs.replace
    return {
        "garbage": os.urandom(200),
        "another protocol": b"GET / HTTP/1.1\r\nHost: phalanx\r\n\r\n",
        "a frame that is too long": (2**31).to_bytes(4, "little"),
        "a frame of no message": b"\x03\x00\x00\x00abc",
        "wrong secret": encode(wrong(hello, secret=bytes(32))),
        "no secret": encode(wrong(hello, secret=b"")),
        "wrong epoch": encode(wrong(hello, epoch=hello.epoch + 1)),
        "no such rank": encode(wrong(hello, rank=1)),
        "a negative rank": encode(wrong(hello, rank=-1)),
        "another message": encode(Stop()),
    }


def test_strangers_are_dropped_and_the_group_starts(
    tiny_llama: Callable[..., Path], start: Callable[..., LocalFleet]
) -> None:
    dropped: dict[str, bool] = {}
    serve = rank_thread(SingleRank())

    def main(address: Address, hello: Hello) -> None:
        for name, words in strangers(hello).items():
            with socket.create_connection(address, timeout=20) as connection:
                connection.sendall(words)
                try:
                    dropped[name] = connection.recv(1) == b""
                except ConnectionResetError:
                    dropped[name] = True
        socket.create_connection(address).close()  # and one that says nothing
        serve(address, hello)

    fleet = start(spec_of(tiny_llama(), 1), [main])
    assert all(dropped.values()) and len(dropped) == 10
    assert run(over_sockets(fleet)) == in_process(tiny_llama())


def test_a_rank_that_dies_while_loading_is_named(
    tiny_llama: Callable[..., Path], start: Callable[..., LocalFleet]
) -> None:
    ranks = ThreadRank.group(2)

    def leaves(address: Address, hello: Hello) -> None:
        with socket.create_connection(address) as connection:
            connection.sendall(encode(hello))

    with pytest.raises(GroupLost, match="rank 1"):
        start(spec_of(tiny_llama(), 2), [rank_thread(ranks[0]), leaves])


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def not_a_header(file: Path) -> None:
    file.write_bytes(b"\xff" * 4096)


def removed(file: Path) -> None:
    file.unlink()


def other_shapes(file: Path) -> None:
    shutil.copy(file.parent / "other.safetensors", file)


@pytest.mark.parametrize("damage", [truncated, not_a_header, removed, other_shapes])
def test_a_corrupt_checkpoint_of_one_rank_is_a_model_error(
    tiny_llama: Callable[..., Path],
    start: Callable[..., LocalFleet],
    tmp_path: Path,
    damage: Callable[[Path], None],
) -> None:
    """Rank 1 reads a copy that was damaged after the controller had looked at it."""
    bad = tmp_path / "copy"
    shutil.copytree(tiny_llama(), bad)
    shutil.copy(tiny_llama(intermediate_size=77) / "model.safetensors", bad / "other.safetensors")
    spec = spec_of(tiny_llama(), 2)
    damage(bad / "model.safetensors")
    if damage is not removed:
        (bad / "other.safetensors").unlink()
    ranks = ThreadRank.group(2)
    mains = [
        rank_thread(ranks[0]),
        rank_thread(ranks[1], lambda spec: msgspec.structs.replace(spec, checkpoint=str(bad))),
    ]
    with pytest.raises(ModelError, match="rank 1: ") as caught:
        start(spec, mains)
    assert str(tmp_path) not in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank-")]
