"""The model `encoder` in the real server, against the encoder in this process."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from trackrec.config import EncodeSettings
from trackrec.fetch import fetch
from trackrec.llm.encoder import TextEncoder
from trackrec.serving import repository, server
from trackrec.serving.contract import EncoderContract

LONG = "quiet films about the sea, " * 200
TEXTS = ["Likes war.", LONG, "Avoids love stories; prefers the sea.", "Ürün — 電影", "", " \n"]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[triton.InferenceServerClient]:
    root = tmp_path_factory.mktemp("encoder")
    repository.write_encoder(
        root / "models/encoder", EncodeSettings(batch_tokens=600), encoder=fetch("all-minilm-l6-v2")
    )
    with (
        server.running(root / "models", root / "log") as running,
        triton.InferenceServerClient(running.grpc) as connected,
    ):
        yield connected


@pytest.fixture(scope="module")
def own() -> TextEncoder:
    return TextEncoder(fetch("all-minilm-l6-v2"), pooling="mean")


def asked(client: triton.InferenceServerClient, texts: list[bytes]) -> tuple[np.ndarray, list[int]]:
    given = triton.InferInput("text", [len(texts), 1], "BYTES")
    given.set_data_from_numpy(np.array([[text] for text in texts], dtype=object))
    answer = client.infer("encoder", [given])
    return answer.as_numpy("embedding"), answer.as_numpy("num_tokens").ravel().tolist()


def executions(client: triton.InferenceServerClient) -> int:
    return int(client.get_inference_statistics("encoder").model_stats[0].execution_count)


def directly(own: TextEncoder, texts: list[str]) -> np.ndarray:
    return np.array([vector for _, vector in sorted(own.encode(own.token_ids(texts)), key=lambda pair: pair[0])])


def test_the_vectors_are_those_of_the_stage_encode(client: triton.InferenceServerClient, own: TextEncoder) -> None:
    """A text longer than the encoder reads is cut as there; its whole length is told. An empty one is no failure."""
    vectors, counts = asked(client, [text.encode() for text in TEXTS])
    np.testing.assert_allclose(vectors, directly(own, TEXTS), atol=1e-5)
    assert counts == [len(ids) for ids in own.token_ids(TEXTS)]
    assert counts[1] > own.limit > max(counts[0], *counts[2:])


def test_its_contract(client: triton.InferenceServerClient, own: TextEncoder) -> None:
    contract = EncoderContract.of(client.get_model_config("encoder"))
    assert contract == EncoderContract.of(client.get_model_config("encoder", as_json=True))
    assert (contract.width, contract.limit, contract.pooling) == (own.width, own.limit, "mean")


def test_a_bad_text_fails_its_own_request_alone(client: triton.InferenceServerClient, own: TextEncoder) -> None:
    """With others under way at once, which the server puts into the same batches."""

    def ask(number: int) -> np.ndarray | InferenceServerException:
        try:
            return asked(client, [b"A fine text.", b"\xff"] if number % 4 == 0 else [TEXTS[0].encode()])[0]
        except InferenceServerException as error:
            return error

    before = executions(client)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(32)))
    assert executions(client) - before < 32
    [expected] = directly(own, TEXTS[:1])
    for number, answer in enumerate(answers):
        if number % 4 == 0:
            assert isinstance(answer, InferenceServerException)
            assert "utf-8" in str(answer)
        else:
            assert isinstance(answer, np.ndarray)
            np.testing.assert_allclose(answer[0], expected, atol=1e-5)
