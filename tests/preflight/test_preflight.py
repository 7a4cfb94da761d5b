"""Each check failing and passing: on real files, a real object store's emulator and a real HTTP server."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.cloud.storage import Client
from pytest_httpserver import HTTPServer
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel

from tests import gcs
from trackrec import config_file, storage
from trackrec.preflight import folders
from trackrec.preflight.findings import PreflightError
from trackrec.stages import preflight

QUICKSTART = Path("pipelines/configs/quickstart.yaml")
ML_1M = Path("pipelines/configs/ml-1m-qwen2.5-7b.yaml")
KEY = "a-key-that-nobody-may-see"
WIDTH = 16


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoder")
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 8}
    BertModel(BertConfig(hidden_size=WIDTH, **shape)).save_pretrained(out)
    (out / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    return out


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A base model that a test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def teacher(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """An endpoint that has the model `gpt` and takes `KEY` alone; TEACHER_API_KEY is set."""
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    listing = {"object": "list", "data": [{"id": "gpt", "object": "model", "created": 1, "owned_by": "us"}]}
    httpserver.expect_request("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).respond_with_json(listing)
    httpserver.expect_request("/v1/models").respond_with_json({"error": {"message": f"bad key {KEY}"}}, status=401)
    yield httpserver


def asking(server: HTTPServer | str, **settings: Any) -> dict[str, Any]:
    """The override for a teacher behind `server`."""
    url = server if isinstance(server, str) else server.url_for("/v1")
    prices = {"max_cost_usd": 1.0, "prompt_usd_per_million": 0.0, "completion_usd_per_million": 0.0}
    return {"distill_data.teacher": {"kind": "openai", "model": "gpt", "base_url": url, **prices, **settings}}


class Run:
    """A preflight on the quick start, whose base model and encoder a test names; all else is right."""

    def __init__(self, folder: Path, encoder: Path) -> None:
        self.folder, self.encoder, self.checks = folder, encoder, folder / "checks.md"

    def __call__(
        self, model: Path | str, overrides: dict[str, Any] | None = None, config: Path = QUICKSTART, **uris: str
    ) -> list[str]:
        """The faults, without their numbers; what is right is in `checks` if there are none."""
        profile = "gke-a100" if config == ML_1M else None
        loaded = config_file.load(config, {"train_ctr.vector_width": WIDTH, **(overrides or {})}, profile=profile)
        given = {"root": str(self.folder), "raw_data": str(QUICKSTART), "encoder": str(self.encoder), **uris}
        self.checks.unlink(missing_ok=True)
        try:
            preflight.run(loaded, base_model=str(model), checks=self.checks, **given)
        except PreflightError as error:
            assert not self.checks.exists()
            lines = str(error).splitlines()[1:]
            return [line.split(". ", 1)[1] for line in lines]
        assert "✘" not in self.checks.read_text()
        return []


@pytest.fixture
def run(tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv(storage.WORK_ENV, str(tmp_path / "work"))
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    return Run(tmp_path, encoder)


@pytest.fixture
def pod(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # After `run`, which takes it away.
    monkeypatch.setenv("KFP_POD_NAME", "run-1")


def test_all_is_well_on_one_machine(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")  # a notebook's pod is one, too
    assert run(model) == []
    checks = run.checks.read_text()
    for expected in (
        f"✔ artifact root {run.folder} can be written",
        "✔ raw_data is there",
        "✔ base_model has a tokenizer with Yes and No as one token each",
        "✔ base_model has its weights",
        f"✔ encoder has vectors of {WIDTH} numbers",
        "recorded RecCoTs",
        "GiB for the work directory (what sft_generator would go on from)",
    ):
        assert expected in checks, checks


def test_everything_that_is_wrong_is_said_at_once(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recorded = {"distill_data.teacher": {"kind": "recorded", "path": "nowhere.jsonl"}}
    found = run(tmp_path / "no-model", recorded, root=str(tmp_path / "file"), raw_data="gone.zip", encoder="gone")
    assert [line.split(":")[0] for line in found] == ["artifact root", "raw_data", "base_model", "encoder", "teacher"]


def test_an_artifact_root_that_cannot_be_written(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    [line] = run(model, root=str(tmp_path / "file" / "runs"))
    assert line.startswith(f"artifact root: {tmp_path}/file/runs: cannot write in {tmp_path}/file")


# --- the base model and the encoder -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "has no config.json; upload the whole model"),
        ("tokenizer.json", "has no tokenizer.json; save the tokenizer with transformers' save_pretrained"),
        ("chat_template.jinja", "has no chat template: give an instruct model"),
        ("model.safetensors", "has neither model.safetensors nor model.safetensors.index.json; upload the weights"),
    ],
)
def test_a_base_model_that_lacks_a_file(run: Run, model: Path, name: str, message: str) -> None:
    (model / name).unlink()
    [line] = run(model)
    assert line.startswith(f"base_model: {model}") and message in line


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "config.json is no JSON"),
        ("config.json", "[]", "config.json is no JSON object"),
        ("config.json", '{"hidden_size": 8}', "config.json lacks intermediate_size"),
        ("tokenizer.json", "{}", "tokenizer.json is no tokenizer"),
    ],
)
def test_a_base_models_broken_file(run: Run, model: Path, name: str, text: str, message: str) -> None:
    (model / name).write_text(text)
    [line] = run(model)
    assert line.startswith("base_model: ") and message in line


def test_a_chat_template_inside_the_tokenizers_config(run: Run, model: Path) -> None:
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    settings = model / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    assert run(model) == []


def test_shards_are_those_that_the_index_names(run: Run, model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00003.safetensors")
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"weight.{name}": name for name in names}}))
    (model / names[2]).write_bytes(b"")  # an upload that was cut off
    [line] = run(model)
    assert f"lacks 2 of 3 files of weights, or has them empty (first: {names[1]}); upload them again" in line
    for name in names[1:]:
        (model / name).write_bytes(b"weights")
    assert run(model) == []
    index.write_text("{}")
    [line] = run(model)
    assert "names no files of weights" in line


def test_a_tokenizer_that_splits_yes_cannot_score(run: Run, model: Path) -> None:
    letters = {letter: number for number, letter in enumerate("?YesNo")}
    Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="?")).save(str(model / "tokenizer.json"))
    [line] = run(model)
    assert "writes 'Yes' as ['Y', 'e', 's'], not as one token of its own; choose a base model" in line


def test_a_tokenizer_that_does_not_know_yes_cannot_score(run: Run, model: Path) -> None:
    Tokenizer(models.WordLevel({"?": 0, "No": 1}, unk_token="?")).save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"unk_token": {"content": "?"}}))
    [line] = run(model)
    assert "writes 'Yes' as ['?']" in line


def test_an_encoder_of_another_width_or_without_weights(run: Run, model: Path, encoder: Path, tmp_path: Path) -> None:
    [line] = run(model, {"train_ctr.vector_width": 768})
    assert line == (
        f"encoder: {encoder} makes vectors of {WIDTH} numbers and `train_ctr.vector_width` is 768; set it to {WIDTH}"
    )
    bare = Path(shutil.copytree(encoder, tmp_path / "bare"))
    (bare / "vocab.txt").unlink()
    (bare / "model.safetensors").unlink()
    lines = run(model, encoder=str(bare))
    assert len(lines) == 2 and "has no tokenizer.json and no vocab.txt" in lines[0] and "has neither" in lines[1]
    # Nothing encodes without `ranking`.
    assert run(model, {"ranking": None}, encoder="gone") == []


# --- in a bucket ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uploaded(tiny_model: Path) -> Iterator[str]:
    """A bucket with the base model under `models/tiny`, its weights a few bytes: nobody reads them."""
    with gcs.server():
        bucket = Client().create_bucket("bucket")
        for path in tiny_model.iterdir():
            data = b"weights" if path.suffix == ".safetensors" else path.read_bytes()
            bucket.blob(f"models/tiny/{path.name}").upload_from_string(data)
        bucket.blob("raw/ml-1m.zip").upload_from_string(b"data")
        yield "gs://bucket"


def test_a_bucket_is_written_and_its_model_looked_at(run: Run, uploaded: str) -> None:
    assert run(f"{uploaded}/models/tiny", root=f"{uploaded}/runs/1", raw_data=f"{uploaded}/raw/ml-1m.zip") == []
    assert run(f"{uploaded}/models/tiny/", root=f"{uploaded}/runs/1", raw_data=f"{uploaded}/raw") == []
    assert not list(Client().list_blobs("bucket", prefix="runs"))  # the probe is gone


def test_a_bucket_that_lacks_what_the_run_reads(run: Run, uploaded: str) -> None:
    found = run(f"{uploaded}/models/tin", root="gs://no-such-bucket/runs", raw_data=f"{uploaded}/raw/ml-1m.z")
    assert [line.split(":")[0] for line in found] == ["artifact root", "raw_data", "base_model"]
    assert "no such bucket" in found[0]
    assert "nothing lies at gs://bucket/raw/ml-1m.z; upload it" in found[1]
    assert "gs://bucket/models/tin: there is no folder with files" in found[2]


def test_raw_data_is_found_beside_a_folder_whose_name_goes_on(
    run: Run, uploaded: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`log-old/` comes before `log/` in a bucket's order, and may hold more than is ever listed."""
    monkeypatch.setattr(folders, "_MOST", 2)
    bucket = Client().bucket("bucket")
    for number in range(3):
        bucket.blob(f"log-old/{number}").upload_from_string(b"old")
    [line] = run(model, raw_data=f"{uploaded}/log")
    assert "nothing lies at gs://bucket/log; upload it" in line
    bucket.blob("log/0.parquet").upload_from_string(b"new")
    assert run(model, raw_data=f"{uploaded}/log") == []


def test_a_published_place_is_no_address_for_a_run(run: Run, uploaded: str, model: Path) -> None:
    """Kubeflow would copy the place and all that was ever published there."""
    files = storage.upload(model, f"{uploaded}/published/tiny")
    assert run(files, raw_data=files) == []
    found = run(f"{uploaded}/published/tiny", raw_data=f"{uploaded}/published/tiny")
    said = f"{uploaded}/published/tiny: the files lie in a folder of it; give {files}, as `trackrec put` prints it"
    assert found == [f"raw_data: {said}", f"base_model: {said}"]


def test_a_bucket_that_nobody_reaches_is_given_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(folders, "_SECONDS", 0.5)
    found = run("gs://bucket/models/tiny", raw_data="gs://bucket/raw")
    assert [line.split(":")[0] for line in found] == ["raw_data", "base_model"]
    assert all("could not list objects" in line for line in found)


def test_another_store_is_said_not_to_be_looked_at(run: Run) -> None:
    assert run("s3://models/tiny", root="minio://runs", raw_data="s3://raw", encoder="s3://bert") == []
    assert run.checks.read_text().count("only a path and gs:// are looked at") == 4


# --- the teacher and the secrets --------------------------------------------------------------------------------------


def test_a_teacher_that_takes_the_key(run: Run, model: Path, teacher: HTTPServer) -> None:
    assert run(model, asking(teacher)) == []
    assert f"teacher at {teacher.url_for('/v1')} takes the key" in run.checks.read_text()
    assert KEY not in run.checks.read_text()


def test_a_refused_key_is_not_shown(
    run: Run, model: Path, teacher: HTTPServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", f"{KEY}-no-more")
    [line] = run(model, asking(teacher))
    assert line.endswith("refuses the key in TEACHER_API_KEY (HTTP 401); give a valid one")
    assert KEY not in line + capsys.readouterr().out


def test_a_teacher_without_the_model(run: Run, model: Path, teacher: HTTPServer) -> None:
    [line] = run(model, asking(teacher, model="gpt-other"))
    assert line.endswith("has no model 'gpt-other'; set `distill_data.teacher.model` to one of: gpt")


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (503, {}, "answers with HTTP 503; look at the server"),
        (200, {"models": 3}, "is no OpenAI-compatible endpoint"),
        (200, "<html>", "is no OpenAI-compatible endpoint"),
        (404, {}, None),
    ],
)
def test_a_teacher_that_answers_otherwise(
    run: Run,
    model: Path,
    httpserver: HTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    body: Any,
    expected: str | None,
) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    text = body if isinstance(body, str) else json.dumps(body)
    kind = "text/html" if isinstance(body, str) else "application/json"
    httpserver.expect_request("/v1/models").respond_with_data(text, status=status, content_type=kind)
    found = run(model, asking(httpserver))
    if expected is None:
        assert found == [] and "answers, but lists no models (HTTP 404)" in run.checks.read_text()
    else:
        assert len(found) == 1 and expected in found[0]


def test_a_teacher_that_nobody_reaches(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    [line] = run(model, asking("http://127.0.0.1:9/v1"))
    assert line.startswith("teacher at http://127.0.0.1:9/v1 cannot be reached (") and "refused" in line
    # Nobody asks it where nothing is distilled.
    assert run(model, {**asking("http://127.0.0.1:9/v1"), "loop.distillation": False}) == []


def test_a_key_that_is_not_set(run: Run, model: Path, teacher: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", "")
    [line] = run(model, asking(teacher))
    assert line.startswith("teacher: the environment variable TEACHER_API_KEY is not set or empty; set it")


@pytest.mark.usefixtures("pod")
def test_every_stages_secrets_are_looked_for(
    run: Run, model: Path, teacher: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {
        "resources.distill_data.secrets": [{"secret": "teacher", "key": "api-key", "env": "TEACHER_API_KEY"}],
        "resources.encode.secrets": [{"secret": "store", "key": "token", "env": "STORE_TOKEN"}],
    }
    monkeypatch.delenv("TEACHER_API_KEY")
    monkeypatch.setenv("STORE_TOKEN", "")
    assert run(model, asking(teacher) | secrets) == [
        # By way of a pipe: the list of processes shows arguments.
        'secret teacher has no key api-key, or it is empty: printf %s "$TEACHER_API_KEY" | kubectl create secret '
        "generic teacher --from-file=api-key=/dev/stdin",
        'secret store has no key token, or it is empty: printf %s "$STORE_TOKEN" | kubectl create secret '
        "generic store --from-file=token=/dev/stdin",
    ]
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    monkeypatch.setenv("STORE_TOKEN", "t")
    assert run(model, asking(teacher) | secrets) == []
    assert "2 secrets are there" in run.checks.read_text()


# --- GPU memory and disk ----------------------------------------------------------------------------------------------


def seven(model: Path) -> None:
    """Gives the model's config the shape of Qwen2.5-7B."""
    shape = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    shape |= {"num_key_value_heads": 4, "vocab_size": 152064}
    (model / "config.json").write_text(json.dumps(shape))


@pytest.mark.usefixtures("pod")
def test_the_base_model_that_the_run_has_must_fit_its_cards_and_disks(
    run: Run, model: Path, teacher: HTTPServer
) -> None:
    own = {"base_model": "gs://bucket/whatever", **asking(teacher), "resources.preflight.work_claim": None}
    without_zero = {f"{stage}.deepspeed": None for stage in ("sft_generator", "sdpo", "rec_tune")}
    # A model of two layers fits.
    assert run(model, own | without_zero, ML_1M) == []
    assert "8 stages fit their GPUs" in run.checks.read_text()
    seven(model)
    assert run(model, own, ML_1M) == []
    found = run(model, own | without_zero | {"resources.sdpo.work_claim": None}, ML_1M)
    assert [line.split(" ")[0] for line in found] == ["sft_generator", "sdpo", "sdpo", "rec_tune"]
    assert "GiB on each GPU and a100-80gb gives 79: lower `sdpo.micro_batch_size`" in found[1]
    assert "GiB in its work directory and `resources.sdpo.ephemeral_storage` is 200Gi" in found[2]


@pytest.mark.usefixtures("pod")
def test_a_card_that_nobody_knows_is_said(run: Run, model: Path, teacher: HTTPServer) -> None:
    own = asking(teacher) | {"resources.sdpo.node_selector": {"pool": "big"}}
    assert run(model, own, ML_1M) == []
    assert "no known card is in `resources.sdpo.node_selector`" in run.checks.read_text()


@pytest.mark.usefixtures("pod")
def test_the_claims_free_space_is_looked_at_where_it_is_mounted(run: Run, model: Path, teacher: HTTPServer) -> None:
    without = {"resources.preflight.work_claim": None}
    assert run(model, asking(teacher) | without, ML_1M) == []
    assert "GiB free" not in run.checks.read_text()
    assert run(model, asking(teacher), ML_1M) == []
    assert "GiB free" in run.checks.read_text()
    seven(model)
    shape = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 28_000_000}))
    found = run(model, asking(teacher), ML_1M)
    assert any(
        "for the work directory" in line and line.endswith("make room, or choose another place") for line in found
    )


def test_one_machine_needs_room_for_all_that_a_run_writes(run: Run, model: Path) -> None:
    seven(model)
    shape = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 28_000_000}))
    work, written = run(model, {"sft_generator.lora": None, "sdpo.lora": None, "rec_tune.lora": None})
    assert "for the work directory" in work and "for the run's models and texts" in written


def test_data_of_unknown_size_are_no_hindrance(run: Run, model: Path) -> None:
    log = {"label": "liked", "valid_from": "2025-01-01", "test_from": "2025-02-01"}
    own = {"ingest.dataset": "impressions", "ingest.log": log, "contexts.domain": "generic"}
    assert run(model, own) == []


def test_a_run_that_ranks_alone_needs_its_encoder_alone(run: Run) -> None:
    assert run("", raw_data="") == []
    [line] = run("", raw_data="", encoder="gone")
    assert line.startswith("encoder: gone")
