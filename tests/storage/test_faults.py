"""What goes wrong between here and a bucket, and what is said about it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from google.cloud.storage import Client
from werkzeug import Request, Response

from tests.storage.directories import files_of, generations, noise, write
from tests.storage.proxy import Proxy, between
from trackrec import storage
from trackrec.storage import gcs

FILES = {"a": noise(1000), "b": noise(1000, 1)}


@pytest.fixture
def proxy(gcs_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with between(gcs_server, monkeypatch) as between_both:
        yield between_both


def flipped(body: bytes, of: bytes) -> bytes:
    """`body` with one bit of the file `of` in it turned."""
    return body.replace(of, bytes([of[0] ^ 1]) + of[1:])


def test_bytes_that_change_on_the_way_there_are_found(bucket: str, proxy: Proxy, tmp_path: Path) -> None:
    proxy.spoil_request = lambda request, body: flipped(body, FILES["b"])
    with pytest.raises((storage.CorruptError, storage.RemoteError), match=r"/b.*checksum|/b.*[cC]rc32c"):
        storage.upload(write(tmp_path / "in", FILES), f"{bucket}/v")
    assert not storage.published(f"{bucket}/v")
    proxy.spoil_request = lambda request, body: body
    storage.upload(tmp_path / "in", f"{bucket}/v")
    storage.download(f"{bucket}/v", tmp_path / "out")
    assert files_of(tmp_path / "out") == FILES


def test_bytes_that_change_in_a_part_are_found(
    bucket: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gcs, "PART", 100)
    proxy.spoil_request = lambda request, body: flipped(body, FILES["b"][300:400])
    with pytest.raises((storage.CorruptError, storage.RemoteError), match=r"/b/0+300.*([cC]rc32c|checksum)"):
        storage.upload(write(tmp_path / "in", FILES), f"{bucket}/v")
    assert not storage.published(f"{bucket}/v")


def test_bytes_that_change_on_the_way_back_are_found(bucket: str, proxy: Proxy, tmp_path: Path) -> None:
    storage.upload(write(tmp_path / "in", FILES), f"{bucket}/v")
    proxy.spoil_response = lambda request, body: flipped(body, FILES["b"])
    with pytest.raises(storage.CorruptError, match="/b came with another checksum"):
        storage.download(f"{bucket}/v", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    proxy.spoil_response = lambda request, body: body
    del proxy.seen[:]
    storage.download(f"{bucket}/v", tmp_path / "out")
    assert files_of(tmp_path / "out") == FILES
    # What came well the first time is not read again.
    assert [request for request in proxy.seen if "/a?" in request] == []


@pytest.mark.parametrize("now", [noise(1000, 2), b"short", None])
def test_a_file_that_was_changed_in_the_bucket_is_found(now: bytes | None, bucket: str, tmp_path: Path) -> None:
    uri = storage.upload(write(tmp_path / "in", FILES), f"{bucket}/v")
    blob = Client().bucket(bucket.removeprefix("gs://")).blob(f"{uri.removeprefix(f'{bucket}/')}/b")
    if now is None:
        blob.delete()
    else:
        blob.upload_from_string(now)
    with pytest.raises(storage.CorruptError, match=r"/b (is missing|has another size|came with another checksum)"):
        storage.download(f"{bucket}/v", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_marker_that_cannot_be_read_is_refused(bucket: str, tmp_path: Path) -> None:
    blob = Client().bucket(bucket.removeprefix("gs://")).blob("v/published.json")
    for text in ("{", '{"folder": "../elsewhere", "content": "", "published": "", "files": {}}'):
        blob.upload_from_string(text)
        with pytest.raises(storage.CorruptError, match=r"published\.json cannot be read"):
            storage.download(f"{bucket}/v", tmp_path / "out")


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "refuses the credentials"), (403, r"no right to .*grant this account roles/storage\.objectUser")],
)
def test_one_line_says_what_right_is_missing(status: int, said: str, bucket: str, proxy: Proxy, tmp_path: Path) -> None:
    write(tmp_path / "in", FILES)
    proxy.answer = lambda request: Response("no", status)
    attempts: list[Callable[[], object]] = [
        lambda: storage.upload(tmp_path / "in", f"{bucket}/v"),
        lambda: storage.download(f"{bucket}/v", tmp_path / "out"),
        lambda: storage.localize(f"{bucket}/v", tmp_path / "cache"),
        lambda: storage.check_writable(f"{bucket}/v"),
    ]
    for attempt in attempts:
        with pytest.raises(storage.RemoteError, match=said):
            attempt()


def test_without_the_right_to_write_nothing_is_published(bucket: str, proxy: Proxy, tmp_path: Path) -> None:
    proxy.answer = lambda request: Response("no", 403) if request.method == "POST" else None
    with pytest.raises(storage.RemoteError, match="no right to write"):
        storage.upload(write(tmp_path / "in", FILES), f"{bucket}/v")
    assert generations(bucket) == {}


def test_a_missing_bucket_is_named(gcs_server: str, tmp_path: Path) -> None:
    write(tmp_path / "in", FILES)
    attempts: list[Callable[[], object]] = [
        lambda: storage.upload(tmp_path / "in", "gs://nowhere/v"),
        lambda: storage.download("gs://nowhere/v", tmp_path / "out"),
        lambda: storage.localize("gs://nowhere/v", tmp_path / "cache"),
    ]
    for attempt in attempts:
        with pytest.raises(storage.RemoteError, match=r"gs://nowhere/v.*: no such bucket"):
            attempt()


def test_what_fails_for_a_moment_is_tried_again(bucket: str, proxy: Proxy, tmp_path: Path) -> None:
    failed: set[str] = set()

    def once(request: Request) -> Response | None:
        """Refuses the first request of each kind."""
        kind = f"{request.method} {request.path} {request.args.get('uploadType')} {request.args.get('alt')}"
        if kind in failed:
            return None
        failed.add(kind)
        return Response("busy", 503)

    proxy.answer = once
    storage.upload(write(tmp_path / "in", FILES), f"{bucket}/v")
    storage.download(f"{bucket}/v", tmp_path / "out")
    assert files_of(tmp_path / "out") == FILES and len(failed) >= 5


def test_an_answer_that_got_lost_is_no_second_writer(bucket: str, proxy: Proxy, tmp_path: Path) -> None:
    lost: list[str] = []

    def lose(request: Request, body: bytes) -> bytes:
        """The first publishing arrives, and its answer is cut: the client tries again and finds it done."""
        if b"published.json" in request.get_data()[:400] and not lost:
            lost.append(request.path)
            raise RuntimeError("cut")  # the proxy answers 500
        return body

    proxy.spoil_response = lose
    uri = storage.upload(write(tmp_path / "in", FILES), f"{bucket}/v")
    assert lost and storage.resolve(f"{bucket}/v") == uri


def test_a_marker_that_is_replaced_while_it_is_read_is_read_anew(bucket: str, proxy: Proxy, tmp_path: Path) -> None:
    uri = storage.upload(write(tmp_path / "in", FILES), f"{bucket}/v")
    blob = Client().bucket(bucket.removeprefix("gs://")).blob("v/published.json")
    other = blob.download_as_text().replace(uri.rpartition("/")[2], "sha256-" + 32 * "0")
    between_both: list[str] = []

    def replace(request: Request, body: bytes) -> bytes:
        """Once the reader knows the old marker's generation, and before it reads it, comes a new one."""
        if request.method == "GET" and request.path.endswith("/published.json") and not between_both:
            between_both.append(request.path)
            blob.upload_from_string(other)
        return body

    proxy.spoil_response = replace
    assert storage.resolve(f"{bucket}/v").endswith("0000") and between_both


def test_names_that_lead_out_of_the_directory_are_refused(bucket: str, tmp_path: Path) -> None:
    Client().bucket(bucket.removeprefix("gs://")).blob("raw/../../evil").upload_from_string(b"x")
    with pytest.raises(storage.RemoteError, match="has a name that no file here can have"):
        storage.localize(f"{bucket}/raw", tmp_path / "cache")
    assert not list(tmp_path.rglob("evil"))
