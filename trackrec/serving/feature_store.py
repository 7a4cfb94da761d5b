"""The newest committed date of the feature table, for a ranker that goes on answering while the next one is read."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from trackrec.features.partition import Place, read_manifest
from trackrec.features.table import SUCCESS, date_folder, date_of
from trackrec.serving import feature_table
from trackrec.serving.contract import RankerContract
from trackrec.serving.feature_table import FeatureTable
from trackrec.serving.scorer import Scorer
from trackrec.serving.server import FEATURES_ENV

# Where the feature table's arrays are kept, and how often a new date is looked for.
CACHE_ENV, SECONDS_ENV = "TRACKREC_FEATURES_CACHE", "TRACKREC_FEATURES_SECONDS"
_SECONDS = 30.0
# A thread of this niceness builds in the time that requests leave.
_NICE = 10


class FeatureStore:
    """`table` is the date to read from, None as long as there is none; a request takes it once and keeps it.

    `reached` says whether the last look found the place, whatever was in it.

    Args:
        root: the feature table's place.
        cache: shared by all processes that read it.
        log: takes a line: which date is served, which is refused and why.
    """

    def __init__(
        self, root: str, scorer: Scorer, contract: RankerContract, *, cache: Path, log: Callable[[str], None]
    ) -> None:
        self.table: FeatureTable | None = None
        self._root, self._scorer, self._contract = Place(root), scorer, contract
        self._cache, self._log = cache, log
        self._served: tuple[str, str] | None = None
        self._refused: set[tuple[str, str]] = set()
        self.reached = False
        self._failed = ""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self) -> None:
        """Takes the newest committed date that can be served; the one before is read from until that moment.

        What is wrong with a date is logged once: it is tried again when it is committed again. What cannot be read
        is tried again at the next look.
        """
        try:
            failed, self.reached = self._look(), True
        except OSError as error:
            failed, self.reached = f"the feature table {self._root} cannot be read: {error}", False
        if failed and failed != self._failed:
            self._log(f"{failed}; {self._instead()}")
        self._failed = failed

    def follow(self, seconds: float, after: Callable[[], None] = lambda: None) -> None:
        """Looks every `seconds` from now on, in a thread, until `close`; `after` is called there after each look."""

        def work() -> None:
            with contextlib.suppress(OSError, AttributeError):  # of this thread alone, on Linux
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
            while not self._ended.wait(seconds):
                try:
                    self.look()
                    after()
                except Exception as error:  # or no later date would ever be served
                    self._log(f"looking for features failed: {error!r}; {self._instead()}")

        self._thread = threading.Thread(target=work, name="features", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _look(self) -> str:
        """Which dates could not be read, and why."""
        failed: list[str] = []
        if self.table is not None:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.table.folder)
        dates = (date_of(name) for name in self._root.folders())
        for dt in sorted((dt for dt in dates if dt), reverse=True):
            date = self._root / date_folder(dt)
            marker = date.read(SUCCESS)
            if marker is None:  # still being written
                continue
            commit = (dt, marker.decode(errors="replace").strip())
            if commit == self._served:
                break
            if commit not in self._refused:
                try:
                    self.table = self._opened(date, dt)
                    self._served = commit
                    self._log(f"serves the features of {date}: {len(self.table)} users")
                    break
                except ValueError as error:
                    self._refused.add(commit)
                    self._log(f"the features of {date} are refused: {error}; {self._instead()}")
                except OSError as error:
                    # Parquet's word for a damaged page, too: an older date may still be whole.
                    failed.append(f"the features of {date} cannot be read: {error}")
            if self._served is not None and dt == self._served[0]:
                break  # committed again and not to be had: the one before of that date is newer than all that follow
        feature_table.remove_unused(self._cache)
        return "; ".join(failed)

    def _opened(self, date: Place, dt: str) -> FeatureTable:
        """
        Raises:
            ValueError: the date is not to be served.
            OSError: it cannot be read.
        """
        manifest = read_manifest(self._root, dt)
        if manifest is None or manifest.identity.dt != dt:
            raise ValueError(f"its manifest is of another date: {manifest and manifest.identity.dt}")
        table = feature_table.open_or_build(
            date,
            manifest,
            self._scorer,
            version=self._contract.model_version,
            encoder_version=self._contract.encoder_version if self._contract.uses_recot else None,
            cache=self._cache,
        )
        trained, found = self._contract.generator_version, manifest.identity.generator_version
        if trained not in (None, found):
            # Served all the same: between a rollout and the next job, older RecCoTs are better than none.
            self._log(
                f"the RecCoTs of {date} are of generator {found}, and this ranker was trained on those of {trained}; "
                "run the batch job on the release that is served"
            )
        return table

    def _instead(self) -> str:
        return f"those of {self.table.dt} are served" if self.table else "no user has features"


def of_environment(scorer: Scorer, contract: RankerContract, log: Callable[[str], None]) -> FeatureStore | None:
    """The store that the environment names, after its first look; None where it names none.

    Raises:
        OSError: its place cannot be reached.
    """
    root = os.environ.get(FEATURES_ENV)
    if not root:
        log(f"{FEATURES_ENV} names no feature table: no user has a history or a RecCoT")
        return None
    # Each of a machine's users has a folder of their own.
    own = f"trackrec-features-{os.getuid()}"
    cache = Path(os.environ.get(CACHE_ENV) or Path(tempfile.gettempdir()) / own)
    cache.mkdir(parents=True, exist_ok=True)
    store = FeatureStore(root, scorer, contract, cache=cache, log=log)
    store.look()
    if not store.reached:
        # Or a pod that starts in such a moment would be ready, and rank as if nobody were known.
        raise OSError(f"the feature table {root} cannot be read; the line above says why")
    return store


def seconds() -> float:
    """How often a new date is looked for.

    Raises:
        ValueError: the environment says something else than a positive number.
    """
    given = os.environ.get(SECONDS_ENV) or str(_SECONDS)
    try:
        found = float(given)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise ValueError(f"{SECONDS_ENV} is the seconds between two looks for a new date, above 0 (got {given!r})")
    return found
