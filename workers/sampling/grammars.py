"""The grammars of a rank's sequences. Every rank follows them by itself, from the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from threading import Thread

from phalanx.protos.errors import PhalanxError, RequestFailed
from phalanx.protos.grammars import GrammarCompiler, GrammarState
from phalanx.protos.sampling import Grammar

CACHED = 64
"""Compiled grammars that are kept; one that is asked for again is copied."""


class Grammars:
    """Compiles on demand. The tokenizer is read while the weights are loaded: that takes seconds in
    which no other thread runs, and a rank that works may not be silent for so long."""

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """See `GrammarCompiler`."""
        self._arguments = (tokenizer, vocab_size, tuple(eos_token_ids))
        self._compiler: Future[GrammarCompiler] = Future()
        self._compiled: dict[Grammar, GrammarState] = {}

    def prepare(self) -> None:
        """Begin to read the tokenizer."""
        Thread(target=self._read, name="grammars", daemon=True).start()

    def settle(self) -> None:
        """Wait until it is read, or cannot be."""
        wait([self._compiler])

    def begin(self, grammar: Grammar) -> GrammarState:
        """The state at the beginning of a text. Raises `RequestFailed` where it does not compile;
        the door has refused such a grammar."""
        try:
            known = self._compiled.pop(grammar, None)
            if known is None:
                known = GrammarState(self._compiler.result().compile(grammar))
                if len(self._compiled) >= CACHED:
                    del self._compiled[next(iter(self._compiled))]
        except PhalanxError as error:
            raise RequestFailed(str(error)) from None
        self._compiled[grammar] = known
        return known.copy()

    def _read(self) -> None:
        try:
            self._compiler.set_result(GrammarCompiler(*self._arguments))
        except PhalanxError as error:
            self._compiler.set_exception(error)
        except Exception as error:  # noqa: BLE001  whoever waits must not wait for ever
            self._compiler.set_exception(RequestFailed(f"grammar: {error!r}"))
