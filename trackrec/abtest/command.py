"""`trackrec abtest`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel, ValidationError

from trackrec.abtest.bucketing import CONTROL, TREATMENT, Experiment
from trackrec.quantity import to_bytes

if TYPE_CHECKING:
    from trackrec.abtest.log import Reading
    from trackrec.abtest.readout import Analysis, Readout


class _Settings(BaseModel):
    """What the numbers follow from besides the log; it goes into the manifest."""

    control: str
    treatment: str
    salt: str | None
    shares: dict[str, float]
    cvr_per: str | None
    covariates: list[str]
    confidence: float
    bootstrap: int
    halvings: int
    seed: int
    long_tail_items: int | None


def abtest(
    log: Annotated[
        Path,
        typer.Option(
            help="Parquet, a file or a folder. Columns: user_id, bucket, conversions, revenue; if there are any "
            "impressions (else one a row), clicks, item_id, long_tail. Any number of rows a user."
        ),
    ],
    control: Annotated[str, typer.Option(help="The bucket of the base model.")] = CONTROL,
    treatment: Annotated[str, typer.Option(help="The bucket of TrackRec.")] = TREATMENT,
    share: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BUCKET=SHARE",
            help="A bucket's share of all users by design, e.g. treatment=0.1; with --salt in the experiment's order. "
            "Repeatable. By default both buckets have as many users.",
        ),
    ] = None,
    salt: Annotated[
        str | None, typer.Option(help="Compute each user's bucket from the experiment's salt and the shares.")
    ] = None,
    cvr_per: Annotated[
        str | None, typer.Option(help="click or impression; by default click where the log has clicks.")
    ] = None,
    cuped: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN", help="A value of the user from before the test, to narrow intervals. Repeatable."
        ),
    ] = None,
    long_tail_items: Annotated[
        int | None,
        typer.Option(
            min=0, help="The long tail is the items with at most so many impressions; by default column long_tail."
        ),
    ] = None,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="Of the intervals.")] = 0.95,
    bootstrap: Annotated[int, typer.Option(min=0, max=10_000, help="Resamples; 0 leaves the bootstrap out.")] = 1000,
    halvings: Annotated[
        int, typer.Option(min=0, max=10_000, help="Random halvings of the control (A/A); 0 leaves the check out.")
    ] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap and the halvings.")] = 0,
    memory_limit: Annotated[str, typer.Option(help="What summing by user may hold before it spills to disk.")] = "4Gi",
    out: Annotated[
        Path | None, typer.Option(help="A folder for abtest.md, abtest.csv and abtest.json, published whole.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Exit with 0 even where the sample ratio is not as designed.")
    ] = False,
) -> None:
    """Read an A/B test out: lifts in revenue and CVR with intervals, overall and on the long tail (Table 4)."""
    # NumPy and DuckDB, which not every image has.
    import duckdb

    from trackrec import storage
    from trackrec.abtest import report
    from trackrec.abtest.log import LogError, Reading
    from trackrec.abtest.readout import Analysis

    try:
        shares = _shares(share or [], control, treatment)
        if cvr_per not in (None, "click", "impression"):
            raise ValueError(f"--cvr-per is click or impression (got {cvr_per!r})")
        if salt is not None and not share:
            raise ValueError("--salt needs every bucket's share: --share control=0.1 --share treatment=0.1")
        if len(set(cuped or [])) < len(cuped or []):
            raise ValueError("--cuped names a column twice")
        experiment = Experiment(salt=salt, shares=shares) if salt is not None else None
        covariates = tuple(cuped or [])
        reading = Reading(control, treatment, experiment, covariates, long_tail_items, to_bytes(memory_limit))
        asked = Analysis(
            control=control, treatment=treatment, shares=(shares[control], shares[treatment]), covariates=covariates,
            confidence=confidence, resamples=bootstrap, halvings=halvings, seed=seed,
        )  # fmt: skip
        if out is None:
            found = _found(log, reading, asked, cvr_per)
        else:
            settings = _Settings(
                control=control, treatment=treatment, salt=salt, shares=shares, cvr_per=cvr_per,
                covariates=list(covariates), confidence=confidence, bootstrap=bootstrap, halvings=halvings, seed=seed,
                long_tail_items=long_tail_items,
            )  # fmt: skip
            with storage.publish("abtest", settings, inputs={"log": log}, outputs={"readout": out}) as job:
                found = _found(log, reading, asked, cvr_per)
                report.write(job.outputs["readout"], found)
    except ValidationError as error:
        raise _failure("; ".join(one["msg"] for one in error.errors())) from error
    except (OSError, ValueError, LogError) as error:
        raise _failure(str(error)) from error
    except duckdb.Error as error:
        raise _failure(
            f"{log} cannot be summed: {error}; more --memory-limit, or more room in TMPDIR, may help"
        ) from error
    typer.echo(report.markdown(found), nl=False)
    if found.mismatch and not force:
        raise _failure(report.verdict(found))


def _found(log: Path, reading: "Reading", asked: "Analysis", cvr_per: str | None) -> "Readout":
    from trackrec.abtest.log import LogError, summed
    from trackrec.abtest.readout import read_out

    with summed(log, reading) as users:
        if cvr_per == "click" and not users.found.has_clicks:
            raise LogError(f"{log} has no column clicks; leave --cvr-per out, or set it to impression")
        per_click = users.found.has_clicks if cvr_per is None else cvr_per == "click"
        return read_out(users, replace(asked, per_click=per_click))


def _shares(pairs: Sequence[str], control: str, treatment: str) -> dict[str, float]:
    """By bucket, in the order given; without any, both buckets are alike."""
    shares: dict[str, float] = {}
    for pair in pairs:
        name, _, share = pair.rpartition("=")
        try:
            found = float(share)
        except ValueError:
            found = 0.0
        if not name or not 0 < found <= 1:
            raise ValueError(
                f"--share is BUCKET=SHARE with a share above 0 and up to 1, e.g. treatment=0.1 (got {pair!r})"
            )
        if name in shares:
            raise ValueError(f"--share names {name!r} twice")
        shares[name] = found
    if missing := [name for name in (control, treatment) if pairs and name not in shares]:
        raise ValueError(f"--share leaves out {' and '.join(missing)}; give it for both buckets that are compared")
    return shares or {control: 0.5, treatment: 0.5}


def _failure(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(1)
