"""What the server says about itself over the protocol, and to whom."""

from __future__ import annotations

import asyncio
import importlib.metadata
from typing import Any

import pytest

INPUTS = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
    "return_cumulative_logprob": "BOOL",
    "return_logprobs": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
}
OUTPUTS = {
    "text_output": ("BYTES", -1),
    "finish_reason": ("BYTES", -1),
    "cumulative_logprob": ("FP32", -1),
    "logprobs": ("BYTES", -1),
    "num_input_tokens": ("UINT32", 1),
    "num_output_tokens": ("UINT32", -1),
}


@pytest.fixture
def asked(serve: Any, say: Any, triton: Any) -> Any:
    """Run `use(client, served)` against a server."""

    def run(use: Any, **options: Any) -> None:
        async def main() -> None:
            async with (
                serve(say([50]), **options) as served,
                triton.InferenceServerClient(served.address) as client,
            ):
                await use(client, served)

        asyncio.run(main())

    return run


def test_readiness_is_that_of_health_checks(asked: Any) -> None:
    async def use(client: Any, served: Any) -> None:
        for serving in (False, True, False):
            served.host.set_serving(serving)
            assert await client.is_server_live()
            assert await client.is_server_ready() is serving
            assert await client.is_model_ready("tiny") is serving
            assert await client.is_model_ready("tiny", "1") is serving
        served.host.set_serving(True)
        assert not await client.is_model_ready("other")
        assert not await client.is_model_ready("tiny", "2")

    asked(use)


def test_metadata(asked: Any, triton: Any) -> None:
    async def use(client: Any, served: Any) -> None:
        server = await client.get_server_metadata()
        assert (server.name, server.version) == ("phalanx", importlib.metadata.version("phalanx"))
        model = await client.get_model_metadata("tiny")
        assert (model.name, list(model.versions)) == ("tiny", ["1"])
        assert {item.name: item.datatype for item in model.inputs} == INPUTS
        assert {tuple(item.shape) for item in model.inputs} == {(1,)}
        assert {item.name: (item.datatype, *item.shape) for item in model.outputs} == OUTPUTS
        for call in (client.get_model_metadata, client.get_model_config):
            with pytest.raises(triton.InferenceServerException) as caught:
                await call("other")
            assert caught.value.status() == "StatusCode.NOT_FOUND"

    asked(use)


def test_configuration(asked: Any) -> None:
    async def use(client: Any, served: Any) -> None:
        config = (await client.get_model_config("tiny", as_json=True))["config"]
        assert config["model_transaction_policy"] == {"decoupled": True}
        kinds = {"BYTES": "TYPE_STRING", "BOOL": "TYPE_BOOL"}
        assert {item["name"]: item["data_type"] for item in config["input"]} == {
            name: kinds[datatype] for name, datatype in INPUTS.items()
        }
        needed = [item["name"] for item in config["input"] if not item.get("optional")]
        assert needed == ["text_input"]
        assert [item["name"] for item in config["output"]] == list(OUTPUTS)

    asked(use)


def test_calls_that_are_not_offered_say_so(asked: Any, triton: Any) -> None:
    async def use(client: Any, served: Any) -> None:
        for call in (client.get_model_repository_index, client.get_inference_statistics):
            with pytest.raises(triton.InferenceServerException) as caught:
                await call()
            assert caught.value.status() == "StatusCode.UNIMPLEMENTED"

    asked(use)


def test_tokens_are_asked_for_and_name_the_tenant(
    asked: Any, triton: Any, inputs: Any, token_file: str
) -> None:
    async def use(client: Any, served: Any) -> None:
        for headers in (None, {"authorization": "Bearer wrong"}):
            for call in (
                client.is_server_live(headers=headers),
                client.get_model_metadata("tiny", headers=headers),
                client.infer("tiny", inputs("a"), headers=headers),
            ):
                with pytest.raises(triton.InferenceServerException) as caught:
                    await call
                assert caught.value.status() == "StatusCode.UNAUTHENTICATED"
        assert served.engine.submissions == []
        headers = {"authorization": "Bearer b"}
        assert await client.infer("tiny", inputs("a"), headers=headers)

        async def sent() -> Any:
            yield {"model_name": "tiny", "inputs": inputs("a")}

        async for _, error in client.stream_infer(sent(), headers={"authorization": "Bearer r-2"}):
            assert error is None
        assert [item.tenant for item in served.engine.submissions] == ["blue", "red"]

    asked(use, token_file=token_file)


def test_over_tls(
    serve: Any, say: Any, words: list[int], triton: Any, inputs: Any, certificates: Any
) -> None:
    locks = {
        "tls_cert": certificates.path("server.pem"),
        "tls_key": certificates.path("server.key"),
    }
    trusted = {"root_certificates": certificates.read("ca.pem")}
    authority = {"ssl": True, "root_certificates": certificates.path("ca.pem")}

    async def main() -> None:
        async with (
            serve(say(words), client=trusted, **locks) as served,
            triton.InferenceServerClient(served.address, **authority) as client,
        ):
            assert await client.infer("tiny", inputs("a"))

    asyncio.run(main())
