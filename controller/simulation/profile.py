"""How fast a modelled replica is, and how much it holds."""

from __future__ import annotations

from pathlib import Path

import msgspec

from phalanx.protos.errors import ConfigError


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A replica: a step takes ``base_s + tokens * token_s + streams * stream_s`` seconds.

    The defaults have the shape of an 8-billion-parameter model in bfloat16 on one large GPU; a
    profile of a real replica comes from `tests/bench/step_profile.py`.
    """

    base_s: float = 0.006
    """Seconds of a step that computes almost nothing: the weights are read."""
    token_s: float = 5e-5
    """Per prompt token."""
    stream_s: float = 4e-5
    """Per stream that gets its next token."""
    tokens_per_step: int = 2048
    """Prompt tokens that one step computes at most."""
    places: int = 128
    """Samples that are computed together at most."""
    kv_tokens: int = 400_000
    """Tokens that the KV pool holds."""

    def step_s(self, tokens: int, streams: int) -> float:
        """Seconds of a step with so many prompt tokens and streams."""
        return self.base_s + tokens * self.token_s + streams * self.stream_s


def read_profile(path: Path | None) -> Profile:
    """The profile in a JSON file. Raises `ConfigError` naming what is wrong with it."""
    if path is None:
        return Profile()
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"profile: {path}: {error}") from None
    for name in Profile.__struct_fields__:
        if getattr(profile, name) <= 0:
            raise ConfigError(f"profile: {path}: {name} is {getattr(profile, name)}, must be > 0")
    return profile
