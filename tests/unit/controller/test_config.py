"""The configuration: where values come from, and what a refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phalanx.controller.config import (
    DEFAULTS,
    KINDS,
    RULES,
    ClusterConfig,
)
from phalanx.controller.settings import load_config, parse_value
from phalanx.controller.units import is_loopback, parse_bytes
from phalanx.protos.errors import ConfigError

TLS = {"tls_cert": "cert.pem", "tls_key": "key.pem"}


def refusal(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        ClusterConfig(model="smollm2", **fields)
    return str(caught.value)


def test_defaults_hold_and_a_config_never_changes() -> None:
    config = ClusterConfig(model="smollm2")
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    with pytest.raises(AttributeError):
        config.tp = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"tp": 0}, ["tp is 0", "1 to 1024"]),
        ({"tp": True}, ["tp is True", "1 to 1024"]),
        ({"tp": 2.0}, ["tp is 2.0", "1 to 1024"]),
        ({"dtype": "int3"}, ["dtype is 'int3'", "bfloat16", "int8", "fp8", "int4"]),
        ({"kv_dtype": "int4"}, ["kv_dtype is 'int4'", "bfloat16", "int8", "fp8"]),
        ({"device": "cpu", "dtype": "fp8"}, ["dtype is 'fp8'", "CPUs", "device cuda"]),
        ({"device": "cpu", "dtype": "int4"}, ["dtype is 'int4'", "CPUs", "device cuda"]),
        ({"device": "cpu", "kv_dtype": "fp8"}, ["kv_dtype is 'fp8'", "device cuda"]),
        ({"device": "cuda", "dtype": "int8"}, ["dtype is 'int8'", "GPUs", "device cpu"]),
        ({"device": "cuda", "kv_dtype": "int8"}, ["kv_dtype is 'int8'", "device cpu"]),
        ({"port": 65536}, ["port is 65536", "0 to 65535"]),
        ({"memory_per_rank": "2 cakes"}, ["memory_per_rank is '2 cakes'", "2GiB", "or auto"]),
        ({"step_timeout_s": float("nan")}, ["step_timeout_s is nan", "0.1 to 86400"]),
        ({"prefix_caching": "yes"}, ["prefix_caching is 'yes'", "true or false"]),
        ({"page": "8080"}, ["page is '8080'", "HOST:PORT"]),
        ({"page": "127.0.0.1:99999"}, ["page is", "HOST:PORT"]),
        ({"page": "0.0.0.0:8080"}, ["page is '0.0.0.0'", "insecure"]),
        ({"tls_cert": ""}, ["tls_cert is ''", "or off"]),
        ({"max_running": None}, ["max_running is None", "1 to 65536"]),
    ],
)
def test_a_refusal_names_field_value_and_what_is_allowed(
    fields: dict[str, Any], texts: list[str]
) -> None:
    message = refusal(**fields)
    assert [text for text in texts if text not in message] == []


def test_every_wrong_field_is_named_at_once() -> None:
    message = refusal(tp=0, block_size=0, placement="ANY")
    assert all(f"{name} is" in message for name in ("tp", "block_size", "placement"))


def test_every_field_says_what_it_is_for() -> None:
    assert [name for name, rule in RULES.items() if not rule.help.endswith(".")] == []
    assert set(KINDS) == set(RULES) == {"model", *DEFAULTS}


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_a_default_written_out_means_the_default(name: str) -> None:
    """The help shows defaults as texts; typing one of them changes nothing."""
    default = DEFAULTS[name]
    text = RULES[name].unset if default is None else default
    written = text if isinstance(text, bool) else str(text)
    assert parse_value(name, written) == default


def test_file_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('model = "smollm2"\ntp = 3\nkv_tokens = "auto"\nmemory_per_rank = "1.5GiB"\n')
    config = load_config(file, {"tp": "2", "port": None, "metrics_port": "off"})
    assert (config.model, config.tp, config.kv_tokens) == ("smollm2", 2, None)
    assert config.memory_per_rank == 3 * 2**29
    assert (config.port, config.metrics_port) == (DEFAULTS["port"], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor_parallel = 2", "tensor_parallel: no such field; allowed: model, tp"),
        ("tp = ", "not TOML"),
        ("tp = 1", "model is missing"),
        ("model = 5", "model is 5"),
        ("model = 'm'\ntp = 'two'", "tp is 'two', allowed: 1 to 1024"),
        ("model = 'm'\n[tp]\nx = 1", "tp is {'x': 1}"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, {})
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.toml: cannot be read"):
        load_config(tmp_path / "nowhere.toml", {})


@pytest.mark.parametrize(
    ("text", "size"),
    [("1073741824", 2**30), ("2GiB", 2**31), ("512 MB", 512 * 10**6), ("1.5kib", 1536)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "2 cakes", "1e9", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="8GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("host", "inside"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.5", False),
        ("127.0.0.1.example.org", False),
        ("", False),
    ],
)
def test_which_hosts_stay_on_this_machine(host: str, inside: bool) -> None:
    assert is_loopback(host) is inside


@pytest.mark.parametrize(
    "fields",
    [
        {},
        TLS,
        {"token_file": "token.txt"},
        {"tls_cert": "cert.pem", "token_file": "token.txt"},
        {"tls_client_ca": "ca.pem"},
    ],
)
def test_an_open_address_needs_tls_and_a_caller_that_is_known(fields: dict[str, Any]) -> None:
    refusal(host="0.0.0.0", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {**TLS, "token_file": "token.txt"},
        {**TLS, "tls_client_ca": "ca.pem"},
        {"insecure": True},
    ],
)
def test_ways_to_open_an_address(fields: dict[str, Any]) -> None:
    assert ClusterConfig(model="smollm2", host="0.0.0.0", **fields).host == "0.0.0.0"


def test_an_open_second_front_needs_the_same() -> None:
    message = refusal(openai_host="0.0.0.0", openai_port=8000)
    assert "openai_host is '0.0.0.0'" in message and " host is" not in message
    for fields in ({"insecure": True}, {**TLS, "token_file": "token.txt"}):
        config = ClusterConfig(model="m", openai_host="::", openai_port=8000, **fields)
        assert config.openai_port == 8000
    assert ClusterConfig(model="m", openai_host="0.0.0.0").openai_port is None  # not bound at all


def test_open_metrics_need_mutual_tls() -> None:
    assert "metrics_host is '0.0.0.0'" in refusal(metrics_host="0.0.0.0", **TLS)
    open_page = ClusterConfig(
        model="smollm2", metrics_host="0.0.0.0", tls_client_ca="ca.pem", **TLS
    )
    assert open_page.metrics_needs_tls
    assert not ClusterConfig(model="m", metrics_host="0.0.0.0", insecure=True).metrics_needs_tls
    assert not ClusterConfig(model="m", metrics_host="0.0.0.0", metrics_port=None).metrics_needs_tls


def test_tiers_need_what_they_stand_on() -> None:
    assert "disk_kv_path needs host_kv_memory" in refusal(disk_kv_path="/kv")
    assert "needs prefix_caching" in refusal(host_kv_memory=2**20, prefix_caching=False)
