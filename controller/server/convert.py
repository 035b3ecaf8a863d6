"""Between the messages of the service and the values behind it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from phalanx.controller.cluster.snapshot import ClusterSnapshot, RankSnapshot, ReplicaSnapshot
from phalanx.controller.kvcache.tiers import TierStats
from phalanx.controller.movement.mover import Move
from phalanx.controller.routing.router import Decision
from phalanx.protos.errors import FieldViolation, InvalidArgument
from phalanx.protos.limits import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS
from phalanx.protos.sampling import Grammar, SamplingParams
from phalanx.protos.v1 import serving_pb2, types_pb2

Encode = Callable[[str], list[int]]

FLOAT_PARAMETERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_OPTIONAL = (
    "max_tokens",
    "min_tokens",
    "top_k",
    "no_repeat_ngram_size",
    "seed",
    "n",
    "logprobs",
    "prompt_logprobs",
    "skip_special_tokens",
)


def unknown_fields(message: Message, path: str = "") -> list[FieldViolation]:
    """A violation for each field, at any depth, that this version of the service lacks."""
    violations = [
        FieldViolation(path or "request", f"field number {item.field_number} is not known here")
        for item in _unknown(message)
    ]
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        inner = f"{path}.{field.name}" if path else field.name
        if isinstance(value, Message):
            violations += unknown_fields(value, inner)
        else:
            for index, item in enumerate(value):
                violations += unknown_fields(item, f"{inner}[{index}]")
    return violations


def _unknown(message: Message) -> list[Any]:
    fields: Any = UnknownFieldSet(message)
    return list(fields)


def shortest(value: float) -> float:
    """The double with the fewest decimal digits that is this float32: 0.7, not 0.699999988."""
    if not math.isfinite(value) or abs(value) > 1e30:
        return value
    packed = struct.pack("f", value)
    for digits in (6, 7, 8):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("f", candidate) == packed:
            return candidate
    return value


def read_params(
    message: types_pb2.SamplingParams, encode: Encode, violations: list[FieldViolation]
) -> SamplingParams:
    """The message as a value; absent fields take their defaults, `seed` stays 0 when absent.

    encode: text -> token ids, without special tokens. What only the message can have wrong is
    added to `violations`; ranges are left to `SamplingParams.validate`.
    """
    given = {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    given |= {
        name: shortest(getattr(message, name))
        for name in FLOAT_PARAMETERS
        if message.HasField(name)
    }
    if given.get("max_tokens") == 0:
        violations.append(
            FieldViolation("params.max_tokens", "0 is not a positive integer, nor absent")
        )
    return SamplingParams(
        logit_bias={token: shortest(bias) for token, bias in message.logit_bias.items()},
        bad_words_ids=_bad_words(message.bad_words, encode, violations),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        include_stop=message.include_stop,
        grammar=_grammar(message, violations),
        **given,
    )


def _grammar(message: types_pb2.SamplingParams, violations: list[FieldViolation]) -> Grammar | None:
    if not message.HasField("grammar"):
        return None
    kind = message.grammar.WhichOneof("kind")
    if kind is None:
        text = "is empty, one of json_schema, regex, choice, lark is needed"
        violations.append(FieldViolation("params.grammar", text))
        return None
    if kind == "choice":
        return Grammar("choice", json.dumps(list(message.grammar.choice.texts)))
    return Grammar(kind, getattr(message.grammar, kind))


def _bad_words(
    words: Iterable[str], encode: Encode, violations: list[FieldViolation]
) -> tuple[tuple[int, ...], ...]:
    """Each word as it is tokenised at the start of a text and after a space."""
    words = list(words)
    if len(words) > MAX_BAD_WORDS:
        text = f"{len(words)} entries, at most {MAX_BAD_WORDS} allowed"
        violations.append(FieldViolation("params.bad_words", text))
        return ()
    found: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(words):
        field, bare = f"params.bad_words[{index}]", word.lstrip(" ")
        if not bare:
            violations.append(FieldViolation(field, "is empty, a text is allowed"))
            continue
        if len(bare) > 64 * MAX_BAD_WORD_TOKENS:
            violations.append(FieldViolation(field, f"{len(bare)} characters are too many"))
            continue
        ways = [tuple(encode(way)) for way in (bare, " " + bare)]
        longest = max(map(len, ways))
        if longest > MAX_BAD_WORD_TOKENS:
            text = f"{longest} tokens, at most {MAX_BAD_WORD_TOKENS} allowed"
            violations.append(FieldViolation(field, text))
            continue
        found |= dict.fromkeys(way for way in ways if way)
    return tuple(found)


def check_params(params: SamplingParams, vocab_size: int, violations: list[FieldViolation]) -> None:
    """Add what `SamplingParams.validate` finds."""
    try:
        params.validate(vocab_size)
    except InvalidArgument as error:
        known = set(violations)
        violations += [item for item in error.violations if item not in known]


def placement(decision: Decision) -> serving_pb2.Placement:
    """A decision as a message."""
    return serving_pb2.Placement(
        replica_id=f"replica-{decision.replica}",
        tokens=decision.request.tokens,
        candidates=decision.candidates,
        source_id="" if decision.source is None else f"replica-{decision.source}",
        estimates=[
            serving_pb2.PlacementEstimate(
                replica_id=f"replica-{item.replica}",
                cached_tokens=item.cached_tokens,
                queue_tokens=item.work.queue_tokens,
                streams=item.work.streams,
                tokens_per_s=item.tokens_per_s,
                prefill_s=item.prefill_s,
                streams_s=item.streams_s,
                wait_s=item.wait_s,
                disturbance_s=item.disturbance_s,
                cost_s=item.cost_s,
                load_s=item.load_s,
                copied_tokens=item.copied_tokens,
                copy_s=item.copy_s,
            )
            for item in decision.estimates
        ],
    )


def move_message(move: Move) -> serving_pb2.Move:
    """A hand-over as a message."""
    return serving_pb2.Move(
        reason=move.reason,
        source_id=f"replica-{move.source}",
        target_id=f"replica-{move.target}",
        moved=move.outcome == "moved",
        bytes=move.num_bytes,
        seconds=move.seconds,
        gap_s=move.gap_s,
        error=move.error,
    )


def cluster_state(snapshot: ClusterSnapshot) -> serving_pb2.GetClusterStateResponse:
    """The snapshot as a message."""
    return serving_pb2.GetClusterStateResponse(
        replicas=[_replica(item) for item in snapshot.replicas],
        queued_requests=snapshot.queued_requests,
    )


def _replica(item: ReplicaSnapshot) -> types_pb2.ReplicaState:
    tiers = item.tiers or TierStats()
    return types_pb2.ReplicaState(
        replica_id=item.replica_id,
        state=item.state,
        ranks=[_rank(rank) for rank in item.ranks],
        running_requests=item.running_requests,
        waiting_requests=item.waiting_requests,
        kv_blocks_total=item.kv_blocks_total,
        kv_blocks_free=item.kv_blocks_free,
        kv_block_tokens=item.kv_block_tokens,
        prefix_queried_tokens=item.prefix_queried_tokens,
        prefix_hit_tokens=item.prefix_hit_tokens,
        preemptions=item.preemptions,
        steps=item.steps,
        tp=item.tp,
        tp_desired=item.tp_desired,
        condition=item.condition,
        outdated=item.outdated,
        host_blocks_total=tiers.host_total,
        host_blocks_used=tiers.host_used,
        host_hit_tokens=tiers.loaded_host * item.kv_block_tokens,
        disk_blocks_total=tiers.disk_total,
        disk_blocks_used=tiers.disk_used,
        disk_hit_tokens=tiers.loaded_disk * item.kv_block_tokens,
        move_failures=tiers.failed,
    )


def _rank(item: RankSnapshot) -> types_pb2.RankState:
    return types_pb2.RankState(
        rank=item.rank,
        node=item.node,
        device=item.device,
        weight_bytes=item.weight_bytes,
        kv_bytes=item.kv_bytes,
        head_start=item.head_start,
        head_stop=item.head_stop,
        stage=item.stage,
        layer_start=item.layer_start,
        layer_stop=item.layer_stop,
    )
