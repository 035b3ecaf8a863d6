"""The limits table: every bound on what a caller may ask for, in one place.

Each front door checks with these numbers, and the engine checks again. A value past its limit
is refused with the limit named; nothing is clamped.
"""

from __future__ import annotations

MAX_MESSAGE_BYTES = 4 * 1024 * 1024  # one gRPC message, either way
MAX_METADATA_BYTES = 16 * 1024  # request headers
MAX_CONCURRENT_STREAMS = 1024  # of one connection that carries streams of requests
MAX_CONCURRENT_CALLS = 8192  # over all connections, of one front
MAX_UNREAD_BYTES = 4 * 1024 * 1024  # of one answer, waiting for a slow reader
MAX_STALL_S = 60.0  # a message may wait for its reader

MAX_TEXT_BYTES = 1024 * 1024  # a text to tokenise, a conversation, a rendered template
MAX_DETOKENIZE_IDS = 256 * 1024

MAX_REQUEST_ID_CHARS = 128
MAX_CHAT_MESSAGES = 1024
MAX_N = 8  # samples of one request
MAX_LOGPROBS = 20  # alternatives per token
MAX_STOP_STRINGS = 4
MAX_STOP_STRING_BYTES = 64
MAX_STOP_TOKEN_IDS = 64
MAX_BAD_WORDS = 64  # each may be tokenised in two ways
MAX_BAD_WORD_TOKENS = 32
MAX_LOGIT_BIAS = 300  # entries
MAX_NGRAM_SIZE = 64
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_CHOICES = 256
MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 * 1024  # names, descriptions and schemas of one request
MAX_TOOL_NAME_CHARS = 64
MAX_TOOL_DEPTH = 32  # of a schema, or of a call's arguments
MAX_TOOL_CALLS = 256  # of one message

TEMPERATURE_RANGE = (0.0, 10.0)
TOP_P_RANGE = (0.0, 1.0)  # 0 excluded
MIN_P_RANGE = (0.0, 1.0)
PENALTY_RANGE = (-2.0, 2.0)  # presence, frequency
REPETITION_PENALTY_RANGE = (0.01, 10.0)
LOGIT_BIAS_RANGE = (-100.0, 100.0)
SEED_RANGE = (0, 2**63 - 1)
PRIORITY_RANGE = (-100, 100)  # the lower one comes first
MAX_DEADLINE_S = 86_400.0
MAX_STREAM_INTERVAL_S = 10.0

DEFAULT_MAX_QUEUED_REQUESTS = 1024
CANARY_MAX_AGE_S = 30.0
