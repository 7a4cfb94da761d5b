"""Preference utilization (paper 3.6): RecCoTs to vectors, every backbone with and without them, and the report."""

from collections.abc import Sequence
from functools import partial

from kfp.dsl.pipeline_channel import PipelineArtifactChannel

from components.compare.component import compare
from components.encode.component import encode
from components.tabulate_ctr.component import tabulate_ctr
from components.train_ctr.component import train_ctr
from pipelines.placement import given, place, values
from pipelines.preparation import Tables
from pipelines.sharding import written
from trackrec.config import Backbone
from trackrec.evaluation.rankings import Feature
from trackrec.evaluation.report import Variant
from trackrec.run_config import RunConfig


class Ranking:
    """The ranking models of one run; each backbone's base is trained once, whatever it is compared with.

    Args:
        encoder: the BERT-family model.
    """

    def __init__(self, config: RunConfig, encoder: PipelineArtifactChannel, tables: Tables) -> None:
        self.config = config
        self.encoder = encoder
        self.tables = tables
        self.bases: dict[Backbone, PipelineArtifactChannel] = {}

    def compared(
        self,
        recots: PipelineArtifactChannel,
        iteration: int,
        backbones: Sequence[Backbone],
        report: PipelineArtifactChannel | None,
        *,
        controls_of: Sequence[Backbone] = (),
        variant: Variant = "full",
    ) -> PipelineArtifactChannel:
        """The report with these backbones' rankers: without RecCoTs, with these of G at `iteration`, and the controls.

        Args:
            controls_of: of these backbones, also vectors of other users' RecCoTs, of random numbers, and of the raw
                histories: what they gain as well is not the reasoning's.
        """
        name = f"{iteration}" if variant == "full" else f"{iteration}, {variant}"
        vectors = self.encoded(recots, f"encode {name}")
        histories = self.encoded(recots, f"encode {name} (history)", of_history=True) if controls_of else None
        for backbone in backbones:
            if backbone not in self.bases:
                self.bases[backbone] = self.trained(backbone, "none", backbone)
            found = {
                "none": self.bases[backbone],
                "recot": self.trained(backbone, "recot", f"{backbone} {name}", vectors),
            }
            if backbone in controls_of:
                found["shuffled"] = self.trained(backbone, "shuffled", f"{backbone} {name}, shuffled", vectors)
                found["random"] = self.trained(backbone, "random", f"{backbone} {name}, random", vectors)
                found["history"] = self.trained(backbone, "history", f"{backbone} {name}, history", histories)
            task = tabulate_ctr(variant=variant, iteration=iteration, **found, **given(previous=report))
            report = place(task, "tabulate_ctr", self.config, f"tabulate_ctr ({backbone} {name})").outputs["report"]
        assert report is not None  # the config refuses an empty list of backbones
        return report

    def encoded(
        self, recots: PipelineArtifactChannel, title: str, *, of_history: bool = False
    ) -> PipelineArtifactChannel:
        """e^p of each context (eq. 7), or its history under the same encoder."""
        task = partial(
            encode,
            settings=values(self.config.encode),
            of_history=of_history,
            recots=recots,
            contexts=self.tables.contexts,
            encoder=self.encoder,
        )
        return written("encode", self.config, title, task)

    def trained(
        self, backbone: Backbone, feature: Feature, title: str, vectors: PipelineArtifactChannel | None = None
    ) -> PipelineArtifactChannel:
        """The metrics of R(x, M(e^p)) (eq. 8)."""
        task = train_ctr(
            settings=values(self.config.train_ctr),
            backbone=backbone,
            feature=feature,
            seed=self.config.seed,
            **self.tables._asdict(),
            **given(vectors=vectors),
        )
        return place(task, "train_ctr", self.config, f"train_ctr {title}").outputs["metrics"]


def reported(
    config: RunConfig,
    report: PipelineArtifactChannel | None,
    contexts: PipelineArtifactChannel,
    before: PipelineArtifactChannel | None,
    after: PipelineArtifactChannel,
    untuned: PipelineArtifactChannel | None = None,
) -> None:
    """The page: tables, tests, plots, RecCoTs of the first and the last G side by side, and what a RecCoT costs."""
    assert report is not None  # at least one row is evaluated
    task = compare(report=report, contexts=contexts, after=after, **given(before=before, untuned=untuned))
    place(task, "compare", config)
