"""The command `phalanx`: help, exit codes, and what each command does with a cluster.

The cluster is a fake here; the service tests run the commands against a real one.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx.controller.config import DEFAULTS
from phalanx.protos.errors import FieldViolation, GroupLost, InvalidArgument, Unavailable

Run = Callable[..., Any]
COMMANDS = [
    "demo",
    "serve",
    "chat",
    "generate",
    "status",
    "explain",
    "token",
    "plan",
    "models",
    "bench",
    "simulate",
]


def test_help_lists_the_commands_and_a_way_to_begin(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert [name for name in COMMANDS if name not in result.stdout] == []
    assert "phalanx demo" in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example(run: Run, name: str) -> None:
    result = run(name, "-h")
    assert result.exit_code == 0
    assert result.stdout.count(f"phalanx {name}") >= 2  # its usage, and an example


def test_serve_has_a_flag_for_every_field(run: Run) -> None:
    text = run("serve", "--help").stdout
    assert [name for name in DEFAULTS if f"--{name.replace('_', '-')}" not in text] == []


@pytest.mark.parametrize(
    "words", [[], ["deploy"], ["serve", "--tensor-parallel", "2"], ["plan"], ["generate"]]
)
def test_wrong_words_exit_with_2(run: Run, words: list[str]) -> None:
    assert run(*words).exit_code == 2


def test_version(run: Run) -> None:
    from importlib.metadata import version

    assert run("--version").stdout == f"phalanx {version('phalanx')}\n"


def test_plan_shows_the_cut(run: Run, tiny_llama: Callable[..., Path]) -> None:
    result = run("plan", str(tiny_llama()), "--tp", "4", "--dtype", "float32")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert sum(int(row[1]) for row in rows) == 6  # query heads
    assert sum(int(row[3]) for row in rows) == 101  # columns of the feed-forward block
    assert "256 tokens" in result.stdout


def test_plan_shows_the_stages(run: Run, tiny_llama: Callable[..., Path]) -> None:
    folder = str(tiny_llama(num_hidden_layers=3))
    result = run("plan", folder, "--tp", "2", "--pp", "2", "--kv-tokens", "512")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert [row[1] for row in rows] == ["0-1", "0-1", "2-2", "2-2"]
    assert "512 tokens" in result.stdout
    refused = run("plan", folder, "--pp", "4")
    assert refused.exit_code == 2
    assert "pp_size is 4, allowed are 1 to 3, the model's layers" in refused.stderr


def test_plan_refuses_what_does_not_fit(run: Run, tiny_llama: Callable[..., Path]) -> None:
    folder = str(tiny_llama())
    result = run("plan", folder, "--memory-per-rank", "100KiB")
    assert result.exit_code == 2 and result.stdout == ""
    assert "error: rank 0 needs" in result.stderr and "has 102400" in result.stderr
    assert run("plan", folder, "--kv-tokens", "255").exit_code == 2
    assert run("plan", folder, "--kv-tokens", "256").exit_code == 0
    assert run("plan", folder, "--kv-tokens", "64", "--max-context", "64").exit_code == 0
    assert run("plan", folder, "--tp", "7").exit_code == 2
    assert run("plan", "no-such-model").exit_code == 2


def test_generate_writes_the_text_and_passes_what_was_set(run: Run, clients: Any) -> None:
    clients.answers += [["Paris", " is", " big"]]
    words = ["--stop", ".", "--stop", "!", "--temperature", "0", "--address", "somewhere:1"]
    result = run("generate", "The capital", *words, "--max-tokens", "5")
    assert (result.exit_code, result.stdout) == (0, "Paris is big\n")
    expected = {"stop": [".", "!"], "temperature": 0.0, "max_tokens": 5}
    assert clients[0].calls == [("The capital", expected)]
    assert clients[0].connection["address"] == "somewhere:1"


def test_generate_reads_standard_input(run: Run, clients: Any) -> None:
    clients.answers += [["x"]]
    run("generate", "-", input="a long\nstory")
    assert clients[0].calls[0][0] == "a long\nstory"


def test_the_token_is_read_from_its_file(run: Run, clients: Any, tmp_path: Path) -> None:
    clients.answers += [["x"]]
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "ca.pem").write_text("CA")
    files = ["--token-file", str(tmp_path / "token"), "--tls-ca", str(tmp_path / "ca.pem")]
    run("generate", "Hi", *files, "--timeout", "3")
    connection = clients[0].connection
    assert (connection["token"], connection["root_certificates"]) == ("secret", b"CA")
    assert connection["timeout"] == 3.0
    result = run("generate", "Hi", "--token-file", str(tmp_path / "none"))
    assert result.exit_code == 2 and "token_file is" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (Unavailable("draining"), 1, "error: draining"),
        (InvalidArgument([FieldViolation("top_p", "2 is too much")]), 2, "top_p: 2 is too much"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_errors_are_one_line_and_a_code(
    error: BaseException, code: int, text: str, run: Run, clients: Any
) -> None:
    clients.answers += [["He", error]]
    result = run("generate", "Hi")
    assert (result.exit_code, result.stdout) == (code, "He\n")
    assert text in result.stderr and "Traceback" not in result.stderr


def test_chat_with_one_message(run: Run, clients: Any) -> None:
    clients.answers += [["Hello", "!"]]
    result = run("chat", "Hi", "--system", "Be brief.")
    assert result.stdout == "Hello!\n"
    assert clients[0].calls[0][0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_a_conversation_remembers_forgets_and_survives_errors(run: Run, clients: Any) -> None:
    clients.answers += [["One"], [Unavailable("busy")], ["Two"], ["Three"]]
    result = run("chat", input="a\n\nb\nc\n/clear\nd\n")
    assert result.exit_code == 0
    asked = [[item["content"] for item in messages] for messages, _ in clients[0].calls]
    assert asked == [["a"], ["a", "One", "b"], ["a", "One", "c"], ["d"]]
    assert "error: busy" in result.stderr


def test_exit_leaves_a_conversation(run: Run, clients: Any) -> None:
    assert run("chat", input="/exit\nnever asked\n").exit_code == 0
    assert clients[0].calls == []


def test_a_terminal_is_safe_from_the_model() -> None:
    from phalanx.controller.commands.terminal import printable

    assert printable("a\x1b[31mb\x07\x9bc\n\td\u00e9") == "a\ufffd[31mb\ufffd\ufffdc\n\td\u00e9"


def test_status_shows_replicas_and_ranks(run: Run, clients: Any) -> None:
    text = run("status").stdout
    for shown in ("tiny", "3 requests queued", "replica-0", "160", "60%", "25%", "beta"):
        assert shown in text
    assert "0-5" in text and "6-8" in text
    assert "stage" not in text


def test_status_shows_stages_where_there_are_several(
    run: Run, clients: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients.kind, "stages", True)
    text = run("status").stdout
    assert "stage" in text and "0-6" in text and "7-13" in text


def test_demo_asks_and_stops(run: Run, clients: Any, cluster: Any) -> None:
    clients.answers += [["The capital", " is Paris."]]
    result = run("demo")
    assert result.exit_code == 0 and "The capital is Paris." in result.stdout
    assert (cluster.config.model, cluster.config.tp) == ("smollm2", 2)
    assert clients[0].connection["address"] == cluster.address
    assert cluster.stopped == 1


def test_a_demo_that_fails_stops_the_cluster_too(run: Run, clients: Any, cluster: Any) -> None:
    clients.answers += [[Unavailable("rank 1 is gone")]]
    result = run("demo", "--tp", "3")
    assert result.exit_code == 1 and "error: rank 1 is gone" in result.stderr
    assert cluster.config.tp == 3 and cluster.stopped == 1


def test_serve_stops_in_order_at_a_signal(run: Run, cluster: Any) -> None:
    cluster.after_start = lambda: os.kill(os.getpid(), signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    try:
        result = run("serve", "smollm2", "--tp", "2")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 0 and cluster.stopped == 1
    assert "ready on 127.0.0.1:1234" in result.stdout.splitlines()
    assert cluster.config.tp == 2


def test_serve_says_where_every_front_is(run: Run, cluster: Any) -> None:
    cluster.lost, cluster.openai_url = GroupLost("over"), "http://127.0.0.1:8000/v1"
    told = run("serve", "smollm2", "--openai-port", "8000").stdout.splitlines()
    assert "OpenAI's API on http://127.0.0.1:8000/v1" in told
    assert (cluster.config.openai_host, cluster.config.openai_port) == ("127.0.0.1", 8000)


def test_serve_says_what_ended_the_cluster(run: Run, cluster: Any) -> None:
    cluster.lost = GroupLost("rank 1 died")
    result = run("serve", "smollm2")
    assert result.exit_code == 1 and "error: rank 1 died" in result.stderr
    assert cluster.stopped == 1


def test_serve_takes_a_file_and_refuses_an_open_address(
    run: Run, cluster: Any, tmp_path: Path
) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('model = "smollm2"\nhost = "0.0.0.0"\n')
    result = run("serve", "--config", str(file))
    assert result.exit_code == 2 and "host is '0.0.0.0'" in result.stderr
    assert cluster.config is None
    cluster.lost = GroupLost("over")
    assert "anyone who reaches" in run("serve", "-c", str(file), "--insecure").stdout
    assert cluster.config.insecure is True


def test_bench_reports_failures_in_file_and_code(run: Run, clients: Any, tmp_path: Path) -> None:
    clients.answers += [["a"], ["b", "c"], [Unavailable("draining")], ["d"]]
    report = tmp_path / "report.json"
    words = ["--requests", "3", "--warmup", "1", "--concurrency", "1", "--output", str(report)]
    result = run("bench", *words, "--output-tokens", "2")
    assert result.exit_code == 1
    assert "2 of 3 requests completed" in result.stdout
    assert "1 failed with UNAVAILABLE" in result.stdout
    assert json.loads(report.read_text())["results"]["statuses"] == {"OK": 2, "UNAVAILABLE": 1}


def test_bench_that_completes_exits_with_0(run: Run, clients: Any) -> None:
    clients.answers += [["a"]] * 3
    result = run("bench", "--requests", "3", "--warmup", "0", "--output-tokens", "1")
    assert result.exit_code == 0 and "3 of 3 requests completed" in result.stdout


def test_bench_asks_something_new_each_time_unless_told(run: Run, clients: Any) -> None:
    clients.answers += [["a"]] * 8
    words = ["bench", "--requests", "2", "--warmup", "0", "--output-tokens", "1"]
    for seed in ([], [], ["--seed", "5"], ["--seed", "5"]):
        assert run(*words, *seed).exit_code == 0
    prompts = [[prompt for prompt, _ in client.calls] for client in clients]
    assert prompts[0] != prompts[1] and prompts[2] == prompts[3]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--tp", "2"], "tp: allowed with --serve"),
        (["--requests", "0"], "requests is 0"),
        (["--rate", "-1"], "rate is -1"),
        (["--output", "/no/such/folder/report.json"], "output is"),
        (["--plot", "/"], "plot is"),
    ],
)
def test_bench_refuses_before_it_connects(
    run: Run, clients: Any, words: list[str], text: str
) -> None:
    result = run("bench", *words)
    assert result.exit_code == 2 and text in result.stderr and clients == []


def test_models_lists_every_family_with_its_formats(run: Run) -> None:
    text = run("models").stdout
    assert "llama: Llama 1 to 3.3" in text
    assert "(safetensors, gguf)" in text
    for name in ("qwen3", "gemma3", "bloom", "falcon", "mixtral", "chatglm"):
        assert f"{name}: " in text
    lines = text.splitlines()
    assert "at TP 1 2 3 4: " in lines[lines.index("gpt2: GPT-2 (safetensors)") + 1]
    assert run("models", "--markdown").stdout.startswith("# Families of models\n")
