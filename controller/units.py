"""Texts of configurations: sizes and addresses."""

from __future__ import annotations

import ipaddress
import re

BYTE_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
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


def split_address(text: str) -> tuple[str, int] | None:
    """Host and port of "127.0.0.1:8080" or "[::1]:8080"; None for what is no address."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.\-]+):(\d{1,5})", text)
    if match is None or int(match[2]) > 65535:
        return None
    return match[1], int(match[2])
