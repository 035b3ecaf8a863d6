"""A rank's life: connect, say hello, load, execute plans until told to stop."""

from __future__ import annotations

import contextlib
import faulthandler
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from phalanx.protos.errors import GroupLost, PhalanxError
from phalanx.protos.specs import WorkerSpec
from phalanx.protos.steps import StepPlan, StepResult
from phalanx.protos.transfers import Offer, Take, Withdraw
from phalanx.protos.wire import (
    BEAT_S,
    Beat,
    Failed,
    FromRank,
    Hello,
    Progress,
    Start,
    Stop,
    encode,
    read_to_rank,
)

from .engine import Engine
from .exchange import BlockExchange
from .machine import settle
from .pending import PendingStep
from .tracing import step_spans

PROGRESS_MESSAGES = 100
"""About how many progress messages a rank sends while loading."""
ORPHAN_S = 2.0
"""For a rank to notice that its step loop is gone, before something is done about it."""
POLL_S = 5e-5
"""How often a rank looks whether its device has finished a step, seconds."""


class Voice:
    """What a rank says to the step loop. Frames of its two threads do not mix."""

    def __init__(self, connection: socket.socket, on_orphaned: Callable[[], None]) -> None:
        """on_orphaned: called on the beating thread when nobody listens any more and the other
        thread does not find out, because it waits for its peers."""
        self._connection, self._lock = connection, threading.Lock()
        self._over, self._on_orphaned = threading.Event(), on_orphaned

    def say(self, message: FromRank) -> None:
        """Send one frame. Raises `GroupLost` when the step loop is gone."""
        try:
            with self._lock:
                self._connection.sendall(encode(message))
        except OSError as error:
            raise GroupLost("the step loop is gone") from error

    def beat(self) -> None:
        """Send beats on a thread of their own until `hush`."""
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def hush(self) -> None:
        """End the beats."""
        self._over.set()

    def _beat(self) -> None:
        try:
            while not self._over.wait(BEAT_S):
                self.say(Beat())
        except GroupLost:
            # the other thread finds that out as well, unless it hangs
            if not self._over.wait(ORPHAN_S):
                self._on_orphaned()


def serve_rank(
    address: tuple[str, int],
    hello: Hello,
    build: Callable[[WorkerSpec], Engine],
    on_orphaned: Callable[[], None] = lambda: None,
    exchange_host: str | None = None,
    *,
    own_process: bool = False,
) -> None:
    """Connect to the step loop at `address` and serve it until it says `Stop`.

    `build` makes the engine from its spec (group, threads and kernels are its business). An
    error is told to the step loop before it is raised here. on_orphaned: see `Voice`.
    exchange_host: address at which ranks of other replicas get KV blocks; None: they do not.
    own_process: this process serves nothing else, so that it may tell the step loop of which
    fatal signal it dies, and keep its garbage collector from what was loaded.
    """
    with (
        socket.create_connection(address) as connection,
        _last_words(connection) if own_process else contextlib.nullcontext(),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        voice = Voice(connection, on_orphaned)
        try:
            voice.say(hello)
            loaded = settle if own_process else lambda: None
            _serve(connection, voice, hello, build, exchange_host, loaded)
        except PhalanxError as error:
            _tell(voice, type(error).__name__, str(error))
            raise
        except Exception as error:
            _tell(voice, "GroupLost", f"{type(error).__name__}: {error}")
            raise
        finally:
            voice.hush()


@contextlib.contextmanager
def _last_words(connection: socket.socket) -> Iterator[None]:
    """Fatal signals of this process are told on the connection, see `wire.LAST_WORDS`, and then
    handled as ever."""
    faulthandler.disable()  # anew: whoever has taken signals since it was enabled comes after us
    faulthandler.enable(connection.fileno(), all_threads=False)
    try:
        yield
    finally:
        faulthandler.disable()


def _tell(voice: Voice, kind: str, message: str) -> None:
    try:
        voice.say(Failed(kind, message))
    except GroupLost:
        return  # the raised error is all that is left to say


def _serve(
    connection: socket.socket,
    voice: Voice,
    hello: Hello,
    build: Callable[[WorkerSpec], Engine],
    exchange_host: str | None,
    loaded: Callable[[], None],
) -> None:
    start = read_to_rank(connection)
    if isinstance(start, Stop):
        return
    if not isinstance(start, Start):
        raise GroupLost(f"{type(start).__name__} came before Start")
    engine = build(start.spec)
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if done * PROGRESS_MESSAGES >= told * total:
            told = done * PROGRESS_MESSAGES // max(total, 1) + 1
            voice.say(Progress(done, total))

    report = engine.load(progress)
    loaded()
    with contextlib.ExitStack() as stack:
        exchange = None
        if exchange_host is not None:
            exchange = engine.open_exchange(hello.rank, hello.secret, exchange_host)
        if exchange is not None:
            stack.callback(exchange.close)
            report = msgspec.structs.replace(report, exchange=exchange.address)
        stack.callback(engine.tiers.close)
        voice.say(engine.tiers.open(report, voice.say))
        voice.beat()
        answers = hello.rank == start.spec.answering_rank
        answer: Callable[[StepResult], None] = voice.say if answers else lambda result: None
        spans = step_spans(start.spec, hello.rank)
        launch = engine.launch if spans is None else spans.watch(engine.launch)
        if spans is not None:
            stack.callback(spans.close)
        _execute(connection, launch, answer, lambda message: _exchange(exchange, voice, message))


def _execute(
    connection: socket.socket,
    launch: Callable[[StepPlan], PendingStep],
    answer: Callable[[StepResult], None],
    exchange: Callable[[Offer | Withdraw | Take], None],
) -> None:
    """Plans until `Stop`. Where the device works on by itself, the next plan is queued before the
    result of the last one is read; what a step computes does not depend on that."""
    pending: deque[PendingStep] = deque()
    while True:
        while pending and not (len(pending) == 1 and _plan_comes_first(connection, pending[0])):
            answer(pending.popleft().result())
        message = read_to_rank(connection)
        if isinstance(message, Offer | Withdraw | Take):
            exchange(message)
        elif isinstance(message, StepPlan):
            pending.append(launch(message))
        else:
            break
    if not isinstance(message, Stop):
        raise GroupLost(f"{type(message).__name__} came instead of a plan")


def _exchange(
    exchange: BlockExchange | None, voice: Voice, message: Offer | Withdraw | Take
) -> None:
    """What is said between plans about blocks of this and other replicas."""
    if exchange is None:
        raise GroupLost(f"{type(message).__name__} came to a rank that exchanges no blocks")
    if isinstance(message, Offer):
        exchange.offer(message)
    elif isinstance(message, Withdraw):
        exchange.withdraw(message)
    else:
        exchange.take(message, voice.say)


def _plan_comes_first(connection: socket.socket, step: PendingStep) -> bool:
    """Wait for the step's end or for a message; whether it is the message."""
    messages = select.poll()
    messages.register(connection, select.POLLIN)
    while not step.is_done:
        if messages.poll(0):
            return True
        time.sleep(POLL_S)
    return False
