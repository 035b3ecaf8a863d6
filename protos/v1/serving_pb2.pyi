from phalanx.protos.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExplainPlacementRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainPlacementResponse(_message.Message):
    __slots__ = ("placements", "moves")
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    placements: _containers.RepeatedCompositeFieldContainer[Placement]
    moves: _containers.RepeatedCompositeFieldContainer[Move]
    def __init__(self, placements: _Optional[_Iterable[_Union[Placement, _Mapping]]] = ..., moves: _Optional[_Iterable[_Union[Move, _Mapping]]] = ...) -> None: ...

class Move(_message.Message):
    __slots__ = ("reason", "source_id", "target_id", "moved", "bytes", "seconds", "gap_s", "error")
    REASON_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_ID_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    GAP_S_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    reason: str
    source_id: str
    target_id: str
    moved: bool
    bytes: int
    seconds: float
    gap_s: float
    error: str
    def __init__(self, reason: _Optional[str] = ..., source_id: _Optional[str] = ..., target_id: _Optional[str] = ..., moved: bool = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., gap_s: _Optional[float] = ..., error: _Optional[str] = ...) -> None: ...

class Placement(_message.Message):
    __slots__ = ("replica_id", "tokens", "candidates", "estimates", "source_id")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    ESTIMATES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    tokens: int
    candidates: int
    estimates: _containers.RepeatedCompositeFieldContainer[PlacementEstimate]
    source_id: str
    def __init__(self, replica_id: _Optional[str] = ..., tokens: _Optional[int] = ..., candidates: _Optional[int] = ..., estimates: _Optional[_Iterable[_Union[PlacementEstimate, _Mapping]]] = ..., source_id: _Optional[str] = ...) -> None: ...

class PlacementEstimate(_message.Message):
    __slots__ = ("replica_id", "cached_tokens", "queue_tokens", "streams", "tokens_per_s", "prefill_s", "streams_s", "wait_s", "disturbance_s", "cost_s", "load_s", "copied_tokens", "copy_s")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    STREAMS_S_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    DISTURBANCE_S_FIELD_NUMBER: _ClassVar[int]
    COST_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    COPIED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COPY_S_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    cached_tokens: int
    queue_tokens: int
    streams: int
    tokens_per_s: float
    prefill_s: float
    streams_s: float
    wait_s: float
    disturbance_s: float
    cost_s: float
    load_s: float
    copied_tokens: int
    copy_s: float
    def __init__(self, replica_id: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., queue_tokens: _Optional[int] = ..., streams: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., streams_s: _Optional[float] = ..., wait_s: _Optional[float] = ..., disturbance_s: _Optional[float] = ..., cost_s: _Optional[float] = ..., load_s: _Optional[float] = ..., copied_tokens: _Optional[int] = ..., copy_s: _Optional[float] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "text", "token_ids", "params", "options")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    text: str
    token_ids: TokenIds
    params: _types_pb2.SamplingParams
    options: RequestOptions
    def __init__(self, request_id: _Optional[str] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., params: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., options: _Optional[_Union[RequestOptions, _Mapping]] = ...) -> None: ...

class RequestOptions(_message.Message):
    __slots__ = ("priority", "deadline_s", "stream_interval_s")
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    STREAM_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    priority: int
    deadline_s: float
    stream_interval_s: float
    def __init__(self, priority: _Optional[int] = ..., deadline_s: _Optional[float] = ..., stream_interval_s: _Optional[float] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "samples", "prompt_logprobs", "usage", "seed", "first_prompt_index")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FIRST_PROMPT_INDEX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    samples: _containers.RepeatedCompositeFieldContainer[_types_pb2.SampleDelta]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.PositionLogprobs]
    usage: _types_pb2.Usage
    seed: int
    first_prompt_index: int
    def __init__(self, request_id: _Optional[str] = ..., samples: _Optional[_Iterable[_Union[_types_pb2.SampleDelta, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_types_pb2.PositionLogprobs, _Mapping]]] = ..., usage: _Optional[_Union[_types_pb2.Usage, _Mapping]] = ..., seed: _Optional[int] = ..., first_prompt_index: _Optional[int] = ...) -> None: ...

class ChatRequest(_message.Message):
    __slots__ = ("request_id", "messages", "params", "tools", "tool_use", "tool_name", "single_tool_call", "options")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    TOOLS_FIELD_NUMBER: _ClassVar[int]
    TOOL_USE_FIELD_NUMBER: _ClassVar[int]
    TOOL_NAME_FIELD_NUMBER: _ClassVar[int]
    SINGLE_TOOL_CALL_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    messages: _containers.RepeatedCompositeFieldContainer[_types_pb2.ChatMessage]
    params: _types_pb2.SamplingParams
    tools: _containers.RepeatedCompositeFieldContainer[_types_pb2.Tool]
    tool_use: _types_pb2.ToolUse
    tool_name: str
    single_tool_call: bool
    options: RequestOptions
    def __init__(self, request_id: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[_types_pb2.ChatMessage, _Mapping]]] = ..., params: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., tools: _Optional[_Iterable[_Union[_types_pb2.Tool, _Mapping]]] = ..., tool_use: _Optional[_Union[_types_pb2.ToolUse, str]] = ..., tool_name: _Optional[str] = ..., single_tool_call: bool = ..., options: _Optional[_Union[RequestOptions, _Mapping]] = ...) -> None: ...

class ChatResponse(_message.Message):
    __slots__ = ("request_id", "samples", "prompt_logprobs", "usage", "seed", "first_prompt_index")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FIRST_PROMPT_INDEX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    samples: _containers.RepeatedCompositeFieldContainer[_types_pb2.SampleDelta]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.PositionLogprobs]
    usage: _types_pb2.Usage
    seed: int
    first_prompt_index: int
    def __init__(self, request_id: _Optional[str] = ..., samples: _Optional[_Iterable[_Union[_types_pb2.SampleDelta, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_types_pb2.PositionLogprobs, _Mapping]]] = ..., usage: _Optional[_Union[_types_pb2.Usage, _Mapping]] = ..., seed: _Optional[int] = ..., first_prompt_index: _Optional[int] = ...) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ("request_id", "next_index", "next_prompt_index")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    NEXT_PROMPT_INDEX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    next_index: _containers.RepeatedScalarFieldContainer[int]
    next_prompt_index: int
    def __init__(self, request_id: _Optional[str] = ..., next_index: _Optional[_Iterable[int]] = ..., next_prompt_index: _Optional[int] = ...) -> None: ...

class ResumeResponse(_message.Message):
    __slots__ = ("request_id", "samples", "prompt_logprobs", "usage", "seed", "first_prompt_index")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    FIRST_PROMPT_INDEX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    samples: _containers.RepeatedCompositeFieldContainer[_types_pb2.SampleDelta]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.PositionLogprobs]
    usage: _types_pb2.Usage
    seed: int
    first_prompt_index: int
    def __init__(self, request_id: _Optional[str] = ..., samples: _Optional[_Iterable[_Union[_types_pb2.SampleDelta, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_types_pb2.PositionLogprobs, _Mapping]]] = ..., usage: _Optional[_Union[_types_pb2.Usage, _Mapping]] = ..., seed: _Optional[int] = ..., first_prompt_index: _Optional[int] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("text", "add_special_tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    add_special_tokens: bool
    def __init__(self, text: _Optional[str] = ..., add_special_tokens: bool = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DetokenizeRequest(_message.Message):
    __slots__ = ("token_ids", "skip_special_tokens")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    skip_special_tokens: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., skip_special_tokens: bool = ...) -> None: ...

class DetokenizeResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("name", "family", "vocab_size", "max_context", "dtype", "eos_token_ids", "has_chat_template", "server_version", "tool_parser")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    HAS_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOOL_PARSER_FIELD_NUMBER: _ClassVar[int]
    name: str
    family: str
    vocab_size: int
    max_context: int
    dtype: str
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    has_chat_template: bool
    server_version: str
    tool_parser: str
    def __init__(self, name: _Optional[str] = ..., family: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_context: _Optional[int] = ..., dtype: _Optional[str] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., has_chat_template: bool = ..., server_version: _Optional[str] = ..., tool_parser: _Optional[str] = ...) -> None: ...

class GetClusterStateRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetClusterStateResponse(_message.Message):
    __slots__ = ("replicas", "queued_requests", "listeners")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    LISTENERS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[_types_pb2.ReplicaState]
    queued_requests: int
    listeners: _containers.RepeatedCompositeFieldContainer[_types_pb2.ListenerState]
    def __init__(self, replicas: _Optional[_Iterable[_Union[_types_pb2.ReplicaState, _Mapping]]] = ..., queued_requests: _Optional[int] = ..., listeners: _Optional[_Iterable[_Union[_types_pb2.ListenerState, _Mapping]]] = ...) -> None: ...
