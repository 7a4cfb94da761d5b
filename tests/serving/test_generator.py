"""The backend `vllm` in a real Triton server: the contract of Triton's own vLLM backend."""

import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from tests.llm.test_transformers_engine import engine_of
from tests.serving.generators import CONFIG, Stream, generator_repository
from trackrec.llm.chat import encode_chat
from trackrec.llm.models import save_model
from trackrec.prompts.render import cot_prompt
from trackrec.serving.chat import chat_of
from trackrec.serving.prompts import wrap
from trackrec.serving.server import Server, running

ROWS = 4
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
ENDLESS = {"temperature": 0, "max_tokens": None, "ignore_eos": True}
TEXTS = [f"Film number {i} is{' really' * i} good" for i in range(8)]
# A generator whose engine fails at its third decoding step.
FAILING = """
from trackrec.serving.generator_model import TritonPythonModel as Generator

class TritonPythonModel(Generator):
    def initialize(self, args):
        super().initialize(args)
        engine = self._generation._engine
        decode = engine._decode

        def failing():
            if engine.decoding_steps == 2:
                raise MemoryError("no memory left")
            return decode()

        engine._decode = failing
"""


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model, and in `merged` what it makes of it."""
    out = tmp_path_factory.mktemp("adapted")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    save_model(model, tokenizer, tiny_model, out / "adapter")
    model.merge_and_unload().save_pretrained(out / "merged")
    tokenizer.save_pretrained(out / "merged")
    return out


@pytest.fixture(scope="module")
def server(
    tiny_model: Path, smollm2: Path, adapted: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One server for all tests, with a model of each kind."""
    path = tmp_path_factory.mktemp("generators")
    repository = generator_repository(path / "repository", tiny_model, max_num_seqs=ROWS, max_model_len=3000)
    generator_repository(repository, smollm2, name="smollm2")
    generator_repository(repository, tiny_model, name="lora", loras={"recot.v1": adapted / "adapter"}, max_lora_rank=8)
    generator_repository(repository, tiny_model, name="failing")
    (repository / "failing/1/model.py").write_text(FAILING, encoding="utf-8")
    (repository / "failing/config.pbtxt").write_text(CONFIG.replace('"vllm"', '"python"'), encoding="utf-8")
    with running(repository, path / "server.log") as server:
        yield server


@pytest.fixture
def stream(server: Server) -> Iterator[Stream]:
    with Stream(server.grpc) as stream:
        yield stream


def metric(server: Server, name: str, model: str = "generator") -> float:
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    [value] = [line.split()[-1] for line in lines if line.startswith(f'vllm:{name}{{model="{model}"')]
    return float(value)


def test_texts_are_the_engines(server: Server, smollm2: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """SmolLM2's RecCoTs as the evaluation's greedy decoding writes them, from prompts sent as text, all at once."""
    texts = [cot_prompt("movies", [{"title": f"Film {i}", "rating": i, "label": i % 2}]) for i in range(1, 6)]
    prompts = [encode_chat(tokenizer, text) for text in texts]
    expected = dict(engine_of(smollm2).greedy(prompts, max_tokens=16, repetition_penalty=1.05))
    chat = chat_of(tokenizer)
    with Stream(server.grpc, "smollm2") as stream:
        for i, text in enumerate(texts):
            parameters = {"temperature": 0, "max_tokens": 16, "repetition_penalty": 1.05}
            stream.ask(str(i), wrap(chat, text), parameters=parameters, exclude_input_in_output=True)
        found = {}
        for _ in texts:
            name, answer, last = stream.next()
            found[int(name)] = answer.text
            assert last
    assert found == {i: completion.text for i, completion in expected.items()}
    assert metric(server, "decoding_steps_total", "smollm2") < metric(server, "generation_tokens_total", "smollm2") / 2


def test_one_answer_or_a_stream(stream: Stream, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = stream.whole(TEXTS[3], parameters=GREEDY)
    assert (whole.finish_reason, whole.output_tokens) == ("length", 12)
    assert whole.input_tokens == len(tokenizer(TEXTS[3])["input_ids"])
    # By default the answer begins with the prompt, and says nothing else.
    stream.ask("named", TEXTS[3], parameters=GREEDY)
    name, answer, last = stream.next()
    assert (name, answer.text, last) == ("named", TEXTS[3] + whole.text, True)
    assert answer.finish_reason is answer.input_tokens is answer.output_tokens is None
    flags = dict.fromkeys(("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens"), True)
    stream.ask("", TEXTS[3], parameters=GREEDY, stream=True, **flags)
    # `answers` ends at the final flag: it is on the last one with data, and nothing comes after it.
    parts = list(stream.answers())
    assert "".join(part.text for part in parts) == whole.text and len(parts) > 6
    assert [part.finish_reason for part in parts] == ["None"] * (len(parts) - 1) + ["length"]
    assert sum(part.output_tokens or 0 for part in parts) == 12
    assert {part.input_tokens for part in parts} == {whole.input_tokens}
    assert stream.whole(TEXTS[3], parameters=GREEDY) == whole
    stream.ask("", TEXTS[3], stream=True, exclude_input_in_output=False)
    with pytest.raises(InferenceServerException, match="When streaming, `exclude_input_in_output` = False"):
        stream.next()


def test_sampling_parameters(stream: Stream) -> None:
    def text(**parameters: Any) -> str:
        return stream.whole(TEXTS[0], parameters={"max_tokens": 12, **parameters}).text

    greedy = text(temperature=0)
    assert stream.whole(TEXTS[0]).output_tokens == 16
    assert text(temperature=5, seed=1) == text(temperature=5, seed=1) != text(temperature=5, seed=2)
    assert text(temperature=5) != text(temperature=5)
    # The likeliest token alone is left.
    assert text(temperature=5, top_k=1, seed=1) == text(temperature=5, top_p=1e-6, seed=1) == greedy
    assert text(temperature=0, repetition_penalty=0.2) != greedy
    assert greedy.startswith(text(temperature=0, max_tokens=3)) and text(temperature=0, max_tokens=3) != greedy
    middle = greedy[4:7]
    cut = stream.whole(TEXTS[0], parameters={**GREEDY, "stop": ["never", middle]})
    assert (cut.text, cut.finish_reason) == (greedy[: greedy.index(middle)], "stop")
    stopped = {"max_tokens": 100, "temperature": 5, "seed": 3, "stop": list("etaoinsrh")}
    assert stream.whole(TEXTS[0], parameters=stopped).output_tokens < 100
    assert stream.whole(TEXTS[0], parameters={**stopped, "min_tokens": 90}).output_tokens >= 90


def test_end_of_sequence(stream: Stream, tokenizer: PreTrainedTokenizerFast) -> None:
    """A penalty below 1 favours what the prompt has: here the end-of-sequence token, whose logit is then huge."""
    text = "<|im_end|>" * 3 + "x"
    likely = {"temperature": 0, "max_tokens": 12, "repetition_penalty": 0.01}
    ended = stream.whole(text, parameters=likely)
    assert ended.finish_reason == "stop" and 1 <= ended.output_tokens < 12
    assert "<|im_end|>" not in ended.text
    longer = stream.whole(text, parameters={**likely, "ignore_eos": True})
    assert (longer.finish_reason, longer.output_tokens) == ("length", 12)
    assert stream.whole(text, parameters={**likely, "min_tokens": 12}).output_tokens == 12


def test_wrong_requests_fail_alone(stream: Stream) -> None:
    right = stream.whole(TEXTS[1], parameters=GREEDY)
    stream.ask("long", " word" * 4000, parameters=GREEDY)
    stream.ask("unknown", TEXTS[1], parameters={"best_of": 2})
    stream.ask("wrong", TEXTS[1], parameters={"top_p": 3})
    stream.ask("lora", TEXTS[1], parameters={"lora_name": "x"})
    stream.ask("empty", "", parameters=GREEDY)
    stream.ask("right", TEXTS[1], parameters=GREEDY, exclude_input_in_output=True)
    errors, found = [], []
    for _ in range(6):
        try:
            found.append(stream.next())
        except InferenceServerException as error:
            errors.append(str(error))
    assert [(name, answer.text) for name, answer, _ in found] == [("right", right.text)]
    for message in (
        "(length 4000) is longer than the maximum model length of 3000",
        "'best_of' is not supported by this backend, which knows temperature",
        "top_p: Input should be less than or equal to 1",
        "there is no LoRA 'x'; there are: none",
        "the prompt has no token",
    ):
        assert sum(message in error for error in errors) == 1, (message, errors)


def test_concurrent_requests_share_steps(server: Server, stream: Stream) -> None:
    alone = [stream.whole(text, parameters=GREEDY).text for text in TEXTS]
    steps, tokens = metric(server, "decoding_steps_total"), metric(server, "generation_tokens_total")
    for i, text in enumerate(TEXTS):
        stream.ask(str(i), text, parameters={**GREEDY, "max_tokens": 40}, exclude_input_in_output=True)
    found = {int(name): answer.text for name, answer, _ in (stream.next() for _ in TEXTS)}
    assert all(found[i].startswith(alone[i]) for i in range(len(TEXTS)))
    # Four at a time wrote eight texts of 40 tokens; the first may have begun before the others came.
    assert metric(server, "generation_tokens_total") - tokens == 8 * 40
    assert metric(server, "decoding_steps_total") - steps < 3.5 * 40


def test_a_client_that_goes_makes_room(server: Server, stream: Stream) -> None:
    """All places are taken by requests that would write thousands of tokens; a fifth waits until one client goes."""
    gone = Stream(server.grpc)
    others = Stream(server.grpc)
    with others:
        for i in range(ROWS - 1):
            others.ask(str(i), TEXTS[0], parameters=ENDLESS, stream=True)
        for _ in range(3 * ROWS):
            others.next()
        with gone:
            gone.ask("", TEXTS[1], parameters=ENDLESS, stream=True)
            gone.next()
            assert metric(server, "num_requests_running") == ROWS
            stream.ask("fifth", TEXTS[2], parameters=GREEDY)
        name, _, _ = stream.next()
        assert name == "fifth"
        # The others wrote on all the while.
        assert metric(server, "num_requests_running") == ROWS - 1
        assert not others.next()[2]
    assert stream.whole(TEXTS[2], parameters=GREEDY).output_tokens == 12


def test_an_adapter_is_applied_to_those_that_ask_for_it(
    server: Server, tiny_model: Path, adapted: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    with Stream(server.grpc, "lora") as stream:
        asked = {"temperature": 0, "max_tokens": 12, "repetition_penalty": 1.05}
        for i, text in enumerate(TEXTS):
            name = {"lora_name": "recot.v1"} if i % 2 else {}
            stream.ask(str(i), text, parameters={**asked, **name}, exclude_input_in_output=True)
        found = {int(name): answer.text for name, answer, _ in (stream.next() for _ in TEXTS)}
        stream.ask("", TEXTS[0], parameters={"lora_name": "recot"})
        with pytest.raises(InferenceServerException, match=r"no LoRA 'recot'; there are: recot\.v1"):
            stream.next()
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    for parity, model in enumerate((tiny_model, adapted / "merged")):
        expected = dict(engine_of(model).greedy(ids, max_tokens=12, repetition_penalty=1.05))
        assert {i: found[i] for i in found if i % 2 == parity} == {
            i: completion.text for i, completion in expected.items() if i % 2 == parity
        }


def test_parameters_of_a_generate_request(server: Server, stream: Stream) -> None:
    """Triton's HTTP endpoint for language models: sampling parameters are the request's own."""
    expected = stream.whole(TEXTS[4], parameters={"temperature": 0, "max_tokens": 12}).text
    body = {"text_input": TEXTS[4], "exclude_input_in_output": True}
    request = urllib.request.Request(
        f"http://{server.http}/v2/models/generator/generate",
        data=json.dumps({**body, "parameters": {"temperature": 0, "max_tokens": 12}}).encode(),
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert json.load(response)["text_output"] == expected


def test_a_wrong_model_is_not_loaded_until_it_is_mended(server: Server, tiny_model: Path) -> None:
    repository = generator_repository(server.log.parent / "repository", tiny_model, name="wrong", speculative_config={})
    with grpc.InferenceServerClient(server.grpc) as client:
        with pytest.raises(InferenceServerException, match="'speculative_config' is not supported by this backend"):
            client.load_model("wrong")
        assert client.is_model_ready("generator") and not server.ready()
        shutil.rmtree(repository / "wrong")
        generator_repository(repository, tiny_model, name="wrong")
        client.load_model("wrong")
    assert server.ready()


def test_a_failed_engine_answers_and_its_model_is_not_ready(server: Server) -> None:
    with grpc.InferenceServerClient(server.grpc) as client:
        with Stream(server.grpc, "failing") as stream:
            assert client.is_model_ready("failing")
            for i in range(3):
                stream.ask(str(i), TEXTS[i], parameters=GREEDY)
            # What comes only after the failure may find the model gone.
            for failure in ("engine failed with MemoryError", *["engine failed with MemoryError|no available"] * 2):
                with pytest.raises(InferenceServerException, match=failure):
                    stream.next()
            end = time.monotonic() + 60
            while client.is_model_ready("failing"):
                assert time.monotonic() < end
                # Until then it answers, and does not hang.
                stream.ask("late", TEXTS[0], parameters=GREEDY)
                with pytest.raises(InferenceServerException, match=r"unavailable|not ready|not found|no available"):
                    stream.next()
        # Its memory is given back when its clients' streams have ended.
        end = time.monotonic() + 60
        while states(client)["failing"] != "unloaded":
            assert time.monotonic() < end
            time.sleep(0.1)
    # Why the Deployment's probe asks the model: the server calls itself ready.
    asked = ("models/failing", "models/generator", "health")
    assert [is_ready(server, what) for what in asked] == [False, True, True]


def is_ready(server: Server, what: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{server.http}/v2/{what}/ready", timeout=10):
            return True
    except urllib.error.HTTPError:
        return False


def states(client: grpc.InferenceServerClient) -> dict[str, str]:
    """Why models are as they are."""
    return {model.name: model.reason for model in client.get_model_repository_index().models}
