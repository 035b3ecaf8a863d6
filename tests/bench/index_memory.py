"""What the view of all replicas' cached prefixes costs: bytes a block, and updates a second.

    python tests/bench/index_memory.py --replicas 1000 --blocks 2000

Each replica lists its blocks, an eighth of them held by others as well, a third of them in host
memory or on disk; then some leave and others come. Bytes are what the process has grown by, so
nothing is left out; the last column is what 100,000 blocks on each of 1,000 replicas would take at
that size, whoever shares them.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from array import array

import psutil
from rich.console import Console
from rich.table import Table

from phalanx.controller.kvcache.changes import PrefixUpdate, Tier
from phalanx.controller.routing.index import GlobalPrefixIndex

SHARED = 8
GOAL_BLOCKS = 100_000 * 1_000


def resident() -> int:
    """Bytes of memory that this process has."""
    gc.collect()
    return psutil.Process().memory_info().rss


def main() -> None:
    """Fill an index, change it, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=2000, help="of each replica")
    args = parser.parse_args()
    draw = random.Random(0)
    common = array("Q", (draw.getrandbits(64) for _ in range(args.blocks // SHARED)))
    tiers = bytes(draw.choices((Tier.DEVICE, Tier.HOST, Tier.DISK), (4, 1, 1), k=args.blocks))
    index, before, started = GlobalPrefixIndex(), resident(), time.perf_counter()
    for replica in range(args.replicas):
        own = (draw.getrandbits(64) for _ in range(args.blocks - len(common)))
        keys = common + array("Q", own)
        index.apply(replica, PrefixUpdate(epoch=0, first=0, keys=keys, added=tiers, listing=True))
    listed_s, grown = time.perf_counter() - started, resident() - before
    changes, started = min(200, args.blocks), time.perf_counter()
    for replica in range(args.replicas):
        keys = array("Q", (draw.getrandbits(64) for _ in range(changes)))
        index.apply(replica, PrefixUpdate(epoch=0, first=0, keys=keys, added=tiers[:changes]))
    changed_s = time.perf_counter() - started
    blocks = args.replicas * args.blocks
    table = Table(
        "blocks", "prefixes", "bytes a prefix", "listed a second", "changes a second", "for 10^8"
    )
    table.add_row(
        f"{blocks}",
        f"{len(index) - args.replicas * changes}",
        f"{grown / (len(index) - args.replicas * changes):.1f}",
        f"{blocks / listed_s:.0f}",
        f"{args.replicas * changes / changed_s:.0f}",
        f"{grown / (len(index) - args.replicas * changes) * GOAL_BLOCKS / 2**30:.1f} GiB",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
