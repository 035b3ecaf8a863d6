"""KV blocks that leave the pool and come back: real ranks on threads, with a pool far too small."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from phalanx.controller.cluster.local_fleet import LocalFleet
from phalanx.controller.kvcache.changes import Tier
from phalanx.controller.kvcache.manager import KVCacheManager
from phalanx.controller.kvcache.opening import open_tiers
from phalanx.controller.kvcache.rates import MoveRates
from phalanx.controller.kvcache.tiers import TierStats
from phalanx.controller.model import resolve_model
from phalanx.controller.replica import Replica
from phalanx.controller.scheduling.request import Request, TokenEvent
from phalanx.controller.scheduling.scheduler import Scheduler, SchedulerConfig
from phalanx.kernels.select import select_backend
from phalanx.protos.errors import ConfigError
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import CacheSpec, DType, TierSpec, WorkerSpec
from phalanx.protos.wire import Hello
from phalanx.workers.engine import Engine
from phalanx.workers.parallel import SingleRank, ThreadRank
from phalanx.workers.pipeline import ThreadStage
from phalanx.workers.serve import serve_rank

BLOCK_SIZE, POOL = 4, 24
TOKENS = 8
PROMPTS = [[(7 * i * i + 3 * i + 11 * number) % 500 for i in range(41)] for number in range(6)]
"""Each takes more than a third of the pool."""


class Eager(MoveRates):
    """Rates by which a load is always worth it."""

    def worthwhile(self, tiers: Sequence[Tier], ahead_s: float = 0.0) -> int:
        return len(tiers)


class Running:
    """A replica of ranks that are threads, and one caller."""

    def __init__(self, spec: WorkerSpec, *, rates: type[MoveRates] = Eager) -> None:
        self._events: queue.SimpleQueue[Sequence[TokenEvent]] = queue.SimpleQueue()
        self._fleet = LocalFleet(_mains(spec))
        facts = self._fleet.start(spec, lambda rank, done, total: None)
        tiers = None if spec.tiers is None else open_tiers(spec.tiers, facts, spec.cache)
        self.cache = KVCacheManager(
            spec.cache.num_blocks,
            spec.cache.block_size,
            tiers=tiers,
            rates=None if tiers is None else rates(BLOCK_SIZE, 4096),
        )
        config = SchedulerConfig(
            max_tokens_per_step=32,
            max_running=4,
            max_queued=64,
            max_context=spec.model.max_context,
            eos_token_ids=(),
            reserve_tokens=0,
        )
        self.scheduler = Scheduler(config, self.cache, spec.epoch)
        self.lost: list[Exception] = []
        self.replica = Replica(
            self.scheduler,
            self._fleet,
            self._events.put,
            max_in_flight=2,
            step_timeout_s=60.0,
            on_lost=self.lost.append,
        )
        self.replica.start()

    def answer(self, *prompts: list[int], tenant: str = "") -> list[list[int]]:
        """Greedy tokens for prompts that come at once."""
        texts: dict[str, list[int]] = {}
        for prompt in prompts:
            name = f"{time.monotonic_ns()}-{len(texts)}"
            texts[name] = []
            params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
            request = Request(
                request_id=name,
                sample_index=0,
                prompt_token_ids=prompt,
                params=params,
                tenant=tenant,
                arrival=time.monotonic(),
            )
            self.replica.add([request])
        left = len(prompts)
        while left:
            for event in self._events.get(timeout=60):
                texts[event.request_id] += [token.token_id for token in event.tokens]
                assert event.error is None
                left -= event.finish is not None
        return list(texts.values())

    @property
    def tiers(self) -> TierStats:
        stats = self.replica.stats().tiers
        assert stats is not None
        return stats

    def settle(self, reached: Callable[[TierStats], bool]) -> None:
        """Wait until what goes on in the background has come so far."""
        deadline = time.monotonic() + 60
        while not reached(self.tiers):
            assert time.monotonic() < deadline, self.tiers
            assert not self.lost
            time.sleep(0.01)

    def stop(self) -> None:
        self.replica.stop()
        self.scheduler.check_integrity()


def _mains(spec: WorkerSpec) -> list[Any]:
    lanes: list[list[Any]] = [[None] for _ in range(spec.tp_size)]
    if spec.pp_size > 1:
        lanes = [list(ThreadStage.pipeline(spec.pp_size)) for _ in range(spec.tp_size)]
    mains = []
    for stage in range(spec.pp_size):
        groups = ThreadRank.group(spec.tp_size) if spec.tp_size > 1 else [SingleRank()]
        for place, group in enumerate(groups):

            def main(
                address: Any, hello: Hello, group: Any = group, lane: Any = lanes[place][stage]
            ) -> None:
                def build(spec: WorkerSpec) -> Engine:
                    return Engine(spec, group, select_backend("cpu")[0], pipeline=lane)

                serve_rank(address, hello, build)

            mains.append(main)
    return mains


@pytest.fixture
def start(tiny_llama: Callable[..., Path]) -> Iterator[Callable[..., Running]]:
    """`start(tiers=None, tp=1, pp=1, **overrides)`: a replica that runs."""
    with ExitStack() as stack:

        def make(
            tiers: TierSpec | None = None,
            *,
            tp: int = 1,
            pp: int = 1,
            dtype: DType = "float32",
            kv_dtype: DType = "float32",
            num_blocks: int = POOL,
            rates: type[MoveRates] = Eager,
            **shape: Any,
        ) -> Running:
            model = resolve_model(str(tiny_llama(**shape)))
            spec = WorkerSpec(
                checkpoint=model.checkpoint,
                model=model.spec,
                dtype=dtype,
                tp_size=tp,
                pp_size=pp,
                cache=CacheSpec(block_size=BLOCK_SIZE, num_blocks=num_blocks, dtype=kv_dtype),
                max_tokens_per_step=32,
                max_running=4,
                eos_token_ids=(),
                device="cpu",
                tiers=tiers,
            )
            running = Running(spec, rates=rates)
            stack.callback(running.stop)
            return running

        yield make


@pytest.mark.parametrize(
    ("tp", "pp", "kv_dtype"),
    [(1, 1, "float32"), (2, 1, "float32"), (3, 1, "float32"), (2, 2, "float32"), (2, 1, "int8")],
)
def test_tokens_are_the_same_whether_blocks_were_moved_or_not(
    start: Callable[..., Running], tp: int, pp: int, kv_dtype: DType
) -> None:
    """Every prompt comes twice, when the others have long taken its blocks."""
    cut: dict[str, Any] = {"tp": tp, "pp": pp, "kv_dtype": kv_dtype}
    plain = start(None, num_blocks=256, **cut)
    expected = [plain.answer(prompt)[0] for prompt in PROMPTS]
    tiered = start(TierSpec(host_slots=200), **cut)
    for turn in range(2):
        assert [tiered.answer(prompt)[0] for prompt in PROMPTS] == expected, turn
    assert tiered.tiers.loaded_host >= 8 * len(PROMPTS)
    assert tiered.tiers.failed == 0


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rank-*/*.kv"))


def test_what_was_on_disk_is_there_again_after_a_restart(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    """Host memory holds far less than the prompts; the second replica begins with nothing else."""
    spec = TierSpec(host_slots=12, disk_slots=400, disk_folder=str(tmp_path / "kv"))
    first = start(spec, tp=2)
    expected = [first.answer(prompt)[0] for prompt in PROMPTS]
    first.settle(lambda tiers: tiers.disk_used >= 50)
    first.stop()
    files = _files(tmp_path / "kv")
    everywhere = set.intersection(
        *(
            {file.name for file in files if file.parent.name == name}
            for name in ("rank-0", "rank-1")
        )
    )
    assert len(everywhere) >= 50
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert {file.parent.stat().st_mode & 0o777 for file in files} == {0o700}
    second = start(spec, tp=2)
    second.settle(lambda tiers: tiers.disk_used == len(everywhere))
    assert [second.answer(prompt)[0] for prompt in PROMPTS] == expected
    assert second.tiers.loaded_disk >= 30
    assert second.tiers.failed == second.tiers.refused == 0
    # a tenant's blocks are his own
    before = second.tiers.loaded_disk + second.tiers.loaded_host
    assert second.answer(PROMPTS[0], tenant="other")[0] == expected[0]
    assert second.tiers.loaded_disk + second.tiers.loaded_host == before


def test_a_damaged_file_of_one_rank_is_recomputed(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    spec = TierSpec(host_slots=12, disk_slots=400, disk_folder=str(tmp_path / "kv"))
    first = start(spec, tp=2)
    expected = first.answer(PROMPTS[0])
    first.settle(lambda tiers: tiers.written == 12)  # every full block
    first.stop()
    for file in sorted((tmp_path / "kv" / "rank-1").glob("*.kv"))[:4]:
        data = bytearray(file.read_bytes())
        data[-7] ^= 16
        file.write_bytes(data)
    second = start(spec, tp=2)
    assert second.answer(PROMPTS[0]) == expected
    assert 1 <= second.tiers.failed <= 4 and second.tiers.loaded_disk >= 6
    second.settle(lambda tiers: tiers.written >= tiers.failed)  # what was recomputed
    assert second.answer(PROMPTS[0]) == expected


def test_files_of_another_model_are_not_used_and_foreign_ones_not_touched(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    spec = TierSpec(host_slots=12, disk_slots=400, disk_folder=str(tmp_path / "kv"))
    first = start(spec)
    first.answer(PROMPTS[0])
    first.settle(lambda tiers: tiers.written >= 10)
    first.stop()
    (tmp_path / "kv/rank-0/notes.txt").write_text("mine")
    (tmp_path / "kv/rank-0" / f"{'0' * 64}.kv.part").write_text("half")
    other = start(spec, seed=7)
    assert other.tiers.disk_used == 0
    assert other.tiers.refused == first.tiers.written + 1
    left = sorted(file.name for file in (tmp_path / "kv/rank-0").iterdir())
    assert left == ["lock", "notes.txt"]
    plain = start(None, num_blocks=256, seed=7)
    assert other.answer(PROMPTS[0]) == plain.answer(PROMPTS[0])


def test_a_folder_that_others_read_is_refused_and_one_in_use_is_left(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    spec = TierSpec(host_slots=12, disk_slots=40, disk_folder=str(tmp_path / "kv"))
    first = start(spec)
    beside = start(spec)
    assert beside.tiers.disk_total == 40
    third = start(spec)  # does without
    assert third.tiers.disk_total == 0 and third.tiers.host_total == 12
    assert third.answer(PROMPTS[0]) == beside.answer(PROMPTS[0]) == first.answer(PROMPTS[0])
    open_folder = tmp_path / "open"
    (open_folder / "rank-0").mkdir(parents=True)
    (open_folder / "rank-0").chmod(0o755)
    with pytest.raises(ConfigError, match="has mode 0755.*allowed: 0700"):
        start(TierSpec(host_slots=12, disk_slots=40, disk_folder=str(open_folder)))


def test_the_disk_holds_no_more_than_it_may(start: Callable[..., Running], tmp_path: Path) -> None:
    running = start(TierSpec(host_slots=9, disk_slots=15, disk_folder=str(tmp_path / "kv")))
    for _ in range(2):
        for prompt in PROMPTS:
            running.answer(prompt)
    running.settle(lambda tiers: tiers.written > 20)
    running.stop()
    assert len(_files(tmp_path / "kv")) <= 15
