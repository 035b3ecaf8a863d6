"""What settings are measured in: sizes in bytes, and addresses that only this machine reaches."""

from __future__ import annotations

import ipaddress
import re

MIB = 2**20
BYTE_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": MIB, "GIB": 2**30, "TIB": 2**40}
BYTE_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def parse_bytes(text: str) -> int:
    """Bytes from a text such as "8GiB", "512 MB" or "1073741824". Raises `ValueError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].upper() not in BYTE_UNITS:
        raise ValueError(f"{text!r} is not a number of bytes such as 8GiB")
    return int(float(match[1]) * BYTE_UNITS[match[2].upper()])
