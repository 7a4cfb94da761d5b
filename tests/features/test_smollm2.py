"""End to end with real models: SmolLM2 behind the backend `vllm`, MiniLM behind `encoder`, and the job as a command."""

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from tests.features import made
from trackrec.cli import app
from trackrec.config import DecodingSettings, EncodeSettings
from trackrec.features import partition
from trackrec.features.partition import Place
from trackrec.fetch import fetch
from trackrec.llm.chat import encode_chat
from trackrec.llm.encoder import TextEncoder
from trackrec.prompts.render import cot_prompt
from trackrec.serving import repository, server
from trackrec.serving_config import ExportSettings

NEW_TOKENS = 12


def test_the_table_holds_what_the_models_write_in_process(
    smollm2: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    models, minilm = tmp_path / "repository", fetch("all-minilm-l6-v2")
    models.mkdir()
    generator = repository.write_generator(
        models / "generator",
        ExportSettings(dtype="float32", max_model_len=320),
        DecodingSettings(max_tokens=NEW_TOKENS),
        domain="movies",
        history_length=100,
        base_model=smollm2,
        generator=smollm2,
    )
    encoder = repository.write_encoder(models / "encoder", EncodeSettings(), encoder=minilm)
    # The last one's prompt leaves no room for a RecCoT.
    users = [made.user(number) for number in range(4)] + [made.user(9, items=40), made.user(5, "<|im_end|> (1999)")]
    users.sort(key=lambda user: user["user_id"])
    path = made.write(tmp_path / "users.parquet", users)
    with server.running(
        models, tmp_path / "log", environment={"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    ) as triton:
        command = ["features", f"--users={path}", f"--triton={triton.grpc}", f"--out={tmp_path / 'out'}"]
        result = CliRunner().invoke(app, [*command, "--dt=2026-11-28", "--set=embedding_dtype=float32"])
    assert result.exit_code == 0, result.output
    assert "6 users (5 ok, 1 too_long); 5 RecCoTs generated, 0 copied" in result.output
    manifest = partition.read_manifest(Place(str(tmp_path / "out")), "2026-11-28")
    assert manifest.identity.generator_version == generator.model_version
    rows = pq.ParquetFile(tmp_path / "out/dt=2026-11-28/shard=00000/part.parquet").read().to_pylist()
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    texts = TextEncoder(minilm, pooling=encoder.pooling)
    for user, row in zip(users, rows, strict=True):
        assert row["user_id"] == user["user_id"]
        if row["status"] == "too_long":
            assert len(user["history"]) > 40
            continue
        prompt = cot_prompt("movies", user["history"])
        ids = encode_chat(tokenizer, prompt)
        written = model.generate(
            torch.tensor([ids]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            repetition_penalty=generator.repetition_penalty,
        )[0, len(ids) :].tolist()
        if "im_end" not in prompt:  # which a server that reads text reads as other tokens, none of them special
            assert row["prompt_tokens"] == len(ids)
            assert row["recot"] == tokenizer.decode(written, skip_special_tokens=True)
            assert row["recot_tokens"] == len(written)
        ((_, vector),) = texts.encode(texts.token_ids([row["recot"]]))
        np.testing.assert_allclose(row["embedding"], vector, atol=1e-5)
