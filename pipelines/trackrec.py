"""Algorithm 2 as a pipeline: distillation, then T iterations of alternating feedback between G and V.

The loop is unrolled in Python, so each iteration's stages are tasks of their own: cached, retried and re-run singly.
"""

from typing import get_args

from kfp import dsl
from kfp.dsl.graph_component import GraphComponent
from kfp.dsl.pipeline_channel import PipelineArtifactChannel

from components.compare.component import compare
from components.contexts.component import contexts
from components.distill_data.component import distill_data
from components.evaluate.component import evaluate
from components.generate.component import generate
from components.ingest.component import ingest
from components.preferences.component import preferences
from components.rec_tune.component import rec_tune
from components.sample.component import sample
from components.score.component import score
from components.sdpo.component import sdpo
from components.sft_generator.component import sft_generator
from pipelines.placement import imported, place
from trackrec.config import Settings, Split
from trackrec.run_config import RunConfig


def build(config: RunConfig) -> GraphComponent:
    """The pipeline of a run; raw data and base model are parameters, everything else is fixed by the config."""

    @dsl.pipeline(name=config.name, description=__doc__)
    def trackrec(
        raw_data: str = config.raw_data,
        base_model: str = config.base_model,
        raw_data_version: str = config.raw_data_version,
        base_model_version: str = config.base_model_version,
    ) -> None:
        raw = imported(raw_data, raw_data_version, dsl.Dataset, "raw data")
        base = imported(base_model, base_model_version, dsl.Model, "base model")

        ingested = place(ingest(settings=values(config.ingest), raw=raw), "ingest", config)
        prepared = place(
            contexts(
                settings=values(config.contexts),
                seed=config.seed,
                interactions=ingested.outputs["interactions"],
                items=ingested.outputs["items"],
            ),
            "contexts",
            config,
        )
        loop = Loop(config, base, prepared.outputs["contexts"], prepared.outputs["examples"])

        # Initialize: generator G, by distillation (3.5), and validator V, the instruct model itself.
        generator = loop.distilled() if config.loop.distillation else base
        validator = base
        if config.loop.controls:
            loop.evaluated("no RecCoT, zero-shot", 0, "control", validator=base)
        recots = loop.written(generator, 0)
        loop.evaluated("iteration 0", 0, "iteration", validator=validator, recots=recots)

        for t in range(1, config.loop.iterations + 1):
            # Stage 1: generator training, maximising the feedback reward (Algorithm 1, then eq. 4).
            rewards, generator = loop.aligned(generator, validator, t)
            # Stage 2: validator training on the texts of the new G (eq. 6).
            recots = loop.written(generator, t)
            start = validator if config.loop.validator_init == "previous" else base
            validator = loop.tuned(validator=start, iteration=t, recots=recots)
            loop.evaluated(
                f"iteration {t}",
                t,
                "iteration",
                validator=validator,
                recots=recots,
                rewards=rewards,
                generator=generator,
            )

        if config.loop.controls and config.loop.iterations:
            # As often as V, on the same examples: the RecCoTs are all that V had more.
            tuned, last = base, config.loop.iterations
            for t in range(1, last + 1) if config.loop.validator_init == "previous" else [last]:
                tuned = loop.tuned(validator=tuned, iteration=t, title=f"rec_tune {t} (no RecCoT)")
            loop.evaluated("no RecCoT, tuned", config.loop.iterations, "control", validator=tuned)
        if config.loop.controls:
            loop.evaluated(
                "RecCoTs shuffled between users",
                config.loop.iterations,
                "control",
                validator=validator,
                recots=recots,
                shuffled=True,
            )

    return trackrec


class Loop:
    """The steps of one iteration, each a task or a chain of tasks; the report grows by one row an evaluation."""

    def __init__(
        self,
        config: RunConfig,
        base: PipelineArtifactChannel,
        contexts: PipelineArtifactChannel,
        examples: PipelineArtifactChannel,
    ) -> None:
        self.config = config
        self.base = base
        self.contexts = contexts
        self.examples = examples
        self.report: PipelineArtifactChannel | None = None

    def distilled(self) -> PipelineArtifactChannel:
        """G fine-tuned on the teacher's RecCoTs (3.5)."""
        assert self.config.distill_data is not None  # the config refuses distillation without it
        teacher = place(
            distill_data(settings=values(self.config.distill_data), seed=self.config.seed, contexts=self.contexts),
            "distill_data",
            self.config,
        )
        student = place(
            sft_generator(
                settings=values(self.config.sft_generator),
                seed=self.config.seed,
                contexts=self.contexts,
                recots=teacher.outputs["recots"],
                base_model=self.base,
            ),
            "sft_generator",
            self.config,
        )
        return student.outputs["generator"]

    def aligned(
        self, generator: PipelineArtifactChannel, validator: PipelineArtifactChannel, t: int
    ) -> tuple[PipelineArtifactChannel, PipelineArtifactChannel]:
        """Algorithm 1's rewards, and G aligned with them by S-DPO (eq. 4)."""
        sampled = place(
            sample(
                settings=values(self.config.sample),
                seed=self.config.seed,
                iteration=t,
                contexts=self.contexts,
                base_model=self.base,
                generator=generator,
            ),
            "sample",
            self.config,
            f"sample {t}",
        )
        scored = place(
            score(
                settings=values(self.config.score),
                examples=self.examples,
                contexts=self.contexts,
                recots=sampled.outputs["recots"],
                base_model=self.base,
                validator=validator,
            ),
            "score",
            self.config,
            f"score {t}",
        )
        preferred = place(
            preferences(
                settings=values(self.config.preferences),
                recots=sampled.outputs["recots"],
                rewards=scored.outputs["rewards"],
            ),
            "preferences",
            self.config,
            f"preferences {t}",
        )
        optimised = place(
            sdpo(
                settings=values(self.config.sdpo),
                seed=self.config.seed,
                iteration=t,
                contexts=self.contexts,
                preferences=preferred.outputs["preferences"],
                base_model=self.base,
                generator=generator,
            ),
            "sdpo",
            self.config,
            f"sdpo {t}",
        )
        return scored.outputs["rewards"], optimised.outputs["aligned"]

    def written(self, generator: PipelineArtifactChannel, t: int) -> PipelineArtifactChannel:
        """G's greedy RecCoTs."""
        # The first G's train texts would be read by nothing: V is not tuned on them. Valid's are always written, so
        # that another `evaluate.split` runs the evaluations again and nothing else.
        unread = {"train"} if t == 0 and self.config.evaluate.split != "train" else set()
        task = generate(
            settings=values(self.config.generate),
            splits=[split for split in get_args(Split) if split not in unread],
            examples=self.examples,
            contexts=self.contexts,
            base_model=self.base,
            generator=generator,
        )
        return place(task, "generate", self.config, f"generate {t}").outputs["recots"]

    def tuned(
        self,
        *,
        validator: PipelineArtifactChannel,
        iteration: int,
        recots: PipelineArtifactChannel | None = None,
        title: str = "",
    ) -> PipelineArtifactChannel:
        """V after Rec-tuning (eq. 6)."""
        task = rec_tune(
            settings=values(self.config.rec_tune),
            seed=self.config.seed,
            iteration=iteration,
            examples=self.examples,
            contexts=self.contexts,
            base_model=self.base,
            validator=validator,
            **given(recots=recots),
        )
        return place(task, "rec_tune", self.config, title or f"rec_tune {iteration}").outputs["tuned"]

    def evaluated(
        self,
        label: str,
        iteration: int,
        kind: str,
        *,
        validator: PipelineArtifactChannel,
        recots: PipelineArtifactChannel | None = None,
        rewards: PipelineArtifactChannel | None = None,
        generator: PipelineArtifactChannel | None = None,
        shuffled: bool = False,
    ) -> None:
        """Evaluates V and adds a row to the report."""
        evaluation = place(
            evaluate(
                settings=values(self.config.evaluate),
                seed=self.config.seed,
                shuffled=shuffled,
                examples=self.examples,
                contexts=self.contexts,
                base_model=self.base,
                validator=validator,
                **given(recots=recots),
            ),
            "evaluate",
            self.config,
            f"evaluate ({label})",
        )
        row = compare(
            label=label,
            iteration=iteration,
            kind=kind,
            metrics=evaluation.outputs["metrics"],
            **given(previous=self.report, rewards=rewards, generator=generator),
        )
        self.report = place(row, "compare", self.config, f"compare ({label})").outputs["report"]


def values(settings: Settings) -> dict[str, object]:
    """A section as a component's parameter; None travels as "left out"."""
    return settings.model_dump(mode="json", exclude_none=True)


def given(**artifacts: PipelineArtifactChannel | None) -> dict[str, PipelineArtifactChannel]:
    """The optional artifacts that are there: Kubeflow takes no None for one that is not."""
    return {name: artifact for name, artifact in artifacts.items() if artifact is not None}
