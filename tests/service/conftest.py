"""A real gRPC server over loopback, in front of an engine that follows a script."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from phalanx.controller.client import AsyncClient
from phalanx.controller.cluster.snapshot import ClusterSnapshot, RankSnapshot, ReplicaSnapshot
from phalanx.controller.model import ServedModel
from phalanx.controller.routing.placer import Placement
from phalanx.controller.scheduling.request import FinishReason, TokenEvent
from phalanx.controller.server.host import GrpcHost
from phalanx.controller.server.service import InferenceService
from phalanx.protos.errors import AlreadyExists, PhalanxError
from phalanx.protos.sampling import SamplingParams
from phalanx.protos.specs import DecoderSpec, RopeSpec
from phalanx.protos.steps import SampledToken

SPECIAL = ["<|end|>", "<|start|>"]
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
WORDS = "the quick brown fox jumps over the lazy dog while forty-two geese say hello to the world"
MAX_CONTEXT = 64


def make_tokenizer() -> Tokenizer:
    """Byte-level, with a start token before every prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 2, trainer)
    start = ("<|start|>", tokenizer.token_to_id("<|start|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", pair=None, special_tokens=[start]
    )
    return tokenizer


@dataclass
class Submission:
    """One call of `submit`, and what became of it."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    tenant: str
    deadline: float | None
    known: dict[int, tuple[int, ...]] | None = None
    """Tokens of samples that an earlier process has begun."""
    priority: int = 0
    stopped: list[int] = field(default_factory=list)
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    exhausted: bool = False
    """Whether the script ran to its end."""

    def event(self, tokens: Sequence[int] = (), first: int = 0, **fields: Any) -> TokenEvent:
        fields.setdefault("sample_index", 0)
        sampled = tuple(
            token if isinstance(token, SampledToken) else SampledToken(seq=0, token_id=token)
            for token in tokens
        )
        return TokenEvent(request_id=self.request_id, first_index=first, tokens=sampled, **fields)


Script = Callable[[Submission], AsyncIterator[list[TokenEvent]]]


class FakeEngine:
    """`Engine` over a script: what the replicas would say, said by the test."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.submissions: list[Submission] = []
        self.live: dict[tuple[str, str], Submission] = {}
        self.decisions: list[Placement] = []
        self.full: PhalanxError | None = None
        """What new requests are refused with."""

    async def submit(self, **given: Any) -> AsyncIterator[list[TokenEvent]]:
        given["prompt_token_ids"] = list(given["prompt_token_ids"])
        submission = Submission(**given)
        key = submission.tenant, submission.request_id
        if key in self.live:
            raise AlreadyExists(f"request_id {submission.request_id!r} is taken")
        self.submissions.append(submission)
        self.live[key] = submission
        try:
            async for batch in self.script(submission):
                yield batch
            submission.exhausted = True
        finally:
            del self.live[key]
            submission.closed.set()

    def divert(self, request_id: str, tenant: str, take: Callable[[TokenEvent], None]) -> None:
        """Events go to the iterator all the same."""

    def check_room(self, tenant: str) -> None:
        if self.full is not None:
            raise self.full

    def stop_sample(self, request_id: str, sample_index: int, tenant: str) -> None:
        self.live[tenant, request_id].stopped.append(sample_index)

    def abort(self, request_id: str, tenant: str) -> bool:
        submission = self.live.get((tenant, request_id))
        if submission is not None:
            submission.aborted.set()
        return submission is not None

    def moves(self) -> list[Any]:
        return []

    def placements(self) -> list[Placement]:
        return self.decisions

    def snapshot(self) -> ClusterSnapshot:
        rank = RankSnapshot(
            rank=0,
            node="here",
            device="cpu",
            weight_bytes=7,
            kv_bytes=9,
            head_start=0,
            head_stop=3,
            stage=1,
            layer_start=4,
            layer_stop=6,
        )
        replica = ReplicaSnapshot(
            replica_id="replica-0", state="ready", ranks=(rank,), kv_blocks_total=5, steps=11
        )
        return ClusterSnapshot(replicas=(replica,), queued_requests=2)

    async def wait_ready(self) -> None:
        return None


class Books:
    """An observer that writes everything down."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.first_tokens: list[float] = []
        self.tokens: list[int] = []
        self.ended: list[tuple[str, int, int]] = []

    def on_start(self, method: str) -> None:
        self.started.append(method)

    def on_first_token(self, seconds: float) -> None:
        self.first_tokens.append(seconds)

    def on_tokens(self, count: int, gap_seconds: float) -> None:
        self.tokens.append(count)

    def on_end(self, outcome: str, prompt_tokens: int, completion_tokens: int, _: float) -> None:
        self.ended.append((outcome, prompt_tokens, completion_tokens))


@dataclass
class Served:
    """A running server with a client of it."""

    engine: FakeEngine
    books: Books
    host: GrpcHost
    service: InferenceService
    client: AsyncClient
    recovered: int = 0

    @property
    def address(self) -> str:
        return self.host.address


@pytest.fixture(scope="session")
def served_model() -> ServedModel:
    tokenizer = make_tokenizer()
    spec = DecoderSpec(
        family="llama",
        num_layers=1,
        hidden_size=8,
        intermediate_size=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        vocab_size=tokenizer.get_vocab_size() + 8,
        max_context=MAX_CONTEXT,
        norm_eps=1e-5,
        rope=RopeSpec(rotary_dim=8),
    )
    return ServedModel(
        name="tiny",
        checkpoint="/nowhere/secret-path",
        spec=spec,
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
        special_tokens={"bos_token": "<|start|>", "eos_token": "<|end|>"},
        eos_token_ids=(0,),
        max_context=MAX_CONTEXT,
    )


@pytest.fixture(scope="session")
def words(served_model: ServedModel) -> list[int]:
    """Tokens that an engine may say; decoded they are `WORDS`."""
    return list(served_model.tokenizer.encode(WORDS, add_special_tokens=False).ids)


@pytest.fixture
def say() -> Callable[..., Script]:
    """Factory of scripts: say these tokens to every request, `step` at a time, to every sample."""

    def make(
        tokens: Sequence[Any],
        *,
        step: int = 1,
        finish: FinishReason | None = FinishReason.LENGTH,
        pause: Callable[[], Awaitable[Any]] = lambda: asyncio.sleep(0),
        **last: Any,
    ) -> Script:
        async def script(submission: Submission) -> AsyncIterator[list[TokenEvent]]:
            said = list(tokens)[: submission.params.max_tokens or None]
            for first in range(0, len(said), step):
                await pause()
                part = said[first : first + step]
                ends = {"finish": finish, **last} if first + step >= len(said) else {}
                yield [
                    submission.event(part, first, sample_index=index, **ends)
                    for index in range(submission.params.n)
                ]
                if submission.aborted.is_set():
                    count = first + len(part)
                    yield [submission.event((), count, finish=FinishReason.ABORT)]
                    return

        return script

    return make


@pytest.fixture
def serve(served_model: ServedModel) -> Callable[..., Any]:
    """Factory: `async with serve(script, **host_options) as served`."""

    @contextlib.asynccontextmanager
    async def start(
        script: Script,
        *,
        model: ServedModel = served_model,
        token: str | None = None,
        client: dict[str, Any] | None = None,
        service: dict[str, Any] | None = None,
        **options: Any,
    ) -> AsyncIterator[Served]:
        engine, books = FakeEngine(script), Books()
        made = InferenceService(engine, model, books, dtype="float32", **(service or {}))
        host = GrpcHost(made, **options)
        await host.start()
        try:
            async with AsyncClient(
                host.address, token=token, timeout=30, **({"reconnect_s": 0.0} | (client or {}))
            ) as connected:
                yield Served(engine, books, host, made, connected)
        finally:
            await host.stop(0.0)

    return start


@pytest.fixture
def eventually() -> Callable[..., Awaitable[None]]:
    """Wait until a condition holds; fail after ten seconds."""

    async def wait(condition: Callable[[], object]) -> None:
        ends = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < ends, "the condition never held"
            await asyncio.sleep(0.01)

    return wait


def token_line(tenant: str, token: str) -> str:
    return f"{tenant}:{hashlib.sha256(token.encode()).hexdigest()}\n"


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "tokens"
    path.write_text(
        "# who may call\n\n"
        + token_line("red", "r-1")
        + token_line("red", "r-2")
        + token_line("blue", "b")
    )
    return str(path)


@dataclass(frozen=True)
class Certificates:
    """PEM files of an authority, and of a server and a client that it vouches for."""

    folder: Path

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for name in ("ca", "other"):
        openssl(
            *("req", "-x509", *curve, "-days", "1", "-subj", f"/CN={name}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.pem"),
        )
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name, authority in (("server", "ca"), ("alice", "ca"), ("mallory", "other")):
        openssl("req", *curve, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", "request")
        openssl(
            *("x509", "-req", "-in", "request", "-days", "1", "-extfile", "names"),
            *("-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial"),
            *("-out", f"{name}.pem"),
        )
    return Certificates(folder)
