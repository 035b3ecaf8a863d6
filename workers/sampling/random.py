"""Counter-based random numbers: a pure function of (seed, sample, position, token id).

Nothing is carried from step to step, so that a token does not depend on batch mates, on the
number of ranks or on the process that draws it. The function is SplitMix64 (Steele, Lea, Flood:
"Fast Splittable Pseudorandom Number Generators", OOPSLA 2014): its finaliser mixes the key, and
token id i takes output i of the stream that starts at the key.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 1 << 64
GAMMA = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
UNIFORM_BITS = 52
MARGIN = 3.61  # log(53 log 2) rounded up
CHUNK = 1 << 18  # elements that are worked on at once, to stay in a CPU's cache
DEVICE_CHUNK = 1 << 24  # elsewhere: to bound the temporaries


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit `value`."""
    return value - WORD if value >= WORD >> 1 else value


def rows_at_once(matrix: Tensor) -> int:
    """Rows of [n, m] that elementwise work goes through at a time."""
    most = CHUNK if matrix.device.type == "cpu" else DEVICE_CHUNK
    return max(1, most // max(matrix.shape[1], 1))


def mix64(value: int) -> int:
    """SplitMix64's finaliser, a bijection of [0, 2**64)."""
    value = (value ^ value >> 30) * FIRST % WORD
    value = (value ^ value >> 27) * SECOND % WORD
    return value ^ value >> 31


def sample_key(seed: int, sample_index: int) -> int:
    """Where the keys of one sample's tokens start, as int64: see `mixed`."""
    key = mix64((seed + GAMMA) % WORD)
    return _signed(mix64((key + (sample_index + 1) * GAMMA) % WORD))


def stream_key(seed: int, sample_index: int, position: int) -> int:
    """Where the stream of one token starts, as int64; `position` counts from the prompt's start."""
    key = sample_key(seed, sample_index)
    return _signed(mix64((key + (position + 1) * GAMMA) % WORD))


def mixed(keys: Tensor, counters: Tensor) -> Tensor:
    """Output `counters` of the streams that start at `keys`: int64, shapes broadcast.

    For a sample's key and a position, it is the `stream_key` of the token there.
    """
    bits = (counters + 1) * _signed(GAMMA) + keys  # int64 arithmetic wraps around
    shifted = torch.empty_like(bits)

    def fold(shift: int) -> None:
        # torch shifts int64 arithmetically; the mask makes it a logical shift
        torch.bitwise_right_shift(bits, shift, out=shifted).bitwise_and_((1 << 64 - shift) - 1)
        bits.bitwise_xor_(shifted)

    fold(30)
    bits.mul_(_signed(FIRST))
    fold(27)
    bits.mul_(_signed(SECOND))
    fold(31)
    return bits


def token_bits(keys: Tensor, token_ids: Tensor) -> Tensor:
    """52 random bits (int64 in [0, 2**52)) for each key and token id, shapes broadcast."""
    bits = mixed(keys, token_ids)
    return bits.bitwise_right_shift_(64 - UNIFORM_BITS).bitwise_and_((1 << UNIFORM_BITS) - 1)


def uniform(bits: Tensor) -> Tensor:
    """float64 in the open interval (0, 1): the middles of 2**52 equal cells, all exact."""
    return bits.to(torch.float64).add_(0.5).mul_(2.0**-UNIFORM_BITS)


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise in float64: -log(-log(1 - v)) with v = `uniform(bits)`."""
    return uniform(bits).neg_().log1p_().neg_().log_().neg_()


def first_max(values: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row of [n, m] without NaN, and the lowest column that holds it (int64)."""
    columns = values.argmax(-1)  # documented to be the first of several
    return values.gather(1, columns[:, None])[:, 0], columns


def gumbel_max(
    logits: Tensor, temperatures: Tensor, keys: Tensor, first_id: int
) -> tuple[Tensor, Tensor]:
    """Best logit + temperature * noise of each row, and its column, ties to the lowest.

    logits: float32 [n, m] of the tokens from `first_id` on; temperatures: float64 [n];
    keys: int64 [n]. Scaling the noise instead of dividing the logits draws the same token and
    cannot overflow, however small the temperature. Returns float64 [n] and int64 [n].
    """
    count, width = logits.shape
    ids = torch.arange(first_id, first_id + width, device=logits.device)
    best = torch.empty(count, dtype=torch.float64, device=logits.device)
    column = torch.empty(count, dtype=torch.int64, device=logits.device)
    step = rows_at_once(logits)
    for start in range(0, count, step):
        part = slice(start, start + step)
        bits = token_bits(keys[part, None], ids)
        best[part], column[part] = _race(logits[part], temperatures[part], bits)
    return best, column


def _race(logits: Tensor, temperatures: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Gumbel-max of a chunk: a float32 bound screens, float64 decides among what it leaves.

    With v of 53 bits, v <= -log(1 - v) <= e**MARGIN * v. So the noise is at most -log(v), and at
    most MARGIN less: one float32 logarithm bounds every token from both sides, and only tokens
    within MARGIN * temperature of the best bound can win, some tens of them.
    """
    scale = temperatures.to(torch.float32)[:, None]
    bound = bits.to(torch.float32).add_(0.5).log_()
    bound = torch.addcmul(logits, scale, bound, value=-1.0)
    top = bound.amax(-1).double()
    slack = 4e-6 * (top.abs() + 80.0 * temperatures)  # float32 rounding, amply
    limit = (top - MARGIN * temperatures - slack).to(torch.float32)
    row, column = (bound >= limit[:, None]).nonzero(as_tuple=True)
    exact = logits[row, column].double() + temperatures[row] * gumbel(bits[row, column])
    best = torch.full_like(temperatures, -math.inf).scatter_reduce_(0, row, exact, "amax")
    tied = (exact == best[row]).nonzero()[:, 0]  # ascending in row, then in column
    first = torch.searchsorted(row[tied], torch.arange(len(best), device=row.device))
    return best, column[tied[first]]
