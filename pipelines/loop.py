"""The steps of Algorithm 2, each a task or a chain of tasks, and the loop itself.

The loop is unrolled in Python, so each iteration's stages are tasks of their own: cached, retried and re-run singly.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, get_args

from kfp.dsl.pipeline_channel import PipelineArtifactChannel
from kfp.dsl.pipeline_task import PipelineTask

from components.distill_data.component import distill_data
from components.evaluate.component import evaluate
from components.generate.component import generate
from components.preferences.component import preferences
from components.rec_tune.component import rec_tune
from components.sample.component import sample
from components.score.component import score
from components.sdpo.component import sdpo
from components.sft_generator.component import sft_generator
from components.tabulate.component import tabulate
from pipelines.placement import given, place, values
from pipelines.preparation import Tables
from pipelines.sharding import Sharded, written
from trackrec.config import Split
from trackrec.evaluation.report import Variant
from trackrec.run_config import RunConfig


class Turns(NamedTuple):
    """What the iterations made: G's greedy RecCoTs by t, from 0 on, and the last V."""

    recots: list[PipelineArtifactChannel]
    validator: PipelineArtifactChannel


class Loop:
    """Algorithm 2 under one config; the report grows by one row an evaluation.

    Args:
        base: the base model.
        variant: what the report calls this loop; all but "full" stand in the tasks' titles, too.
        report: what is grown; none begins with the baseline.
        train_texts_of_first_generator: write them though nothing in the loop itself reads them.
    """

    def __init__(
        self,
        config: RunConfig,
        base: PipelineArtifactChannel,
        tables: Tables,
        *,
        variant: Variant = "full",
        report: PipelineArtifactChannel | None = None,
        train_texts_of_first_generator: bool = False,
    ) -> None:
        self.config = config
        self.base = base
        self.contexts = tables.contexts
        self.examples = tables.examples
        self.variant: Variant = variant
        self.report = report
        self.train_texts_of_first_generator = train_texts_of_first_generator or self._first_train_texts_are_read()

    def alternate(self, generator: PipelineArtifactChannel) -> Turns:
        """Algorithm 2's loop: T iterations from the initial G; V begins as the base model."""
        validator = self.base
        written = [self.written(generator, 0)]
        self.evaluated("iteration 0", 0, "iteration", validator=validator, recots=written[0])
        for t in range(1, self.config.loop.iterations + 1):
            # Stage 1: generator training, maximising the feedback reward (Algorithm 1, then eq. 4).
            rewards, generator = self.aligned(generator, validator, t)
            # Stage 2: validator training on the texts of the new G (eq. 6).
            recots = self.written(generator, t)
            start = validator if self.config.loop.validator_init == "previous" else self.base
            validator = self.tuned(validator=start, iteration=t, recots=recots)
            written.append(recots)
            self.evaluated(
                f"iteration {t}",
                t,
                "iteration",
                validator=validator,
                recots=recots,
                rewards=rewards,
                generator=generator,
            )
        return Turns(written, validator)

    def tuned_without_recots(self) -> PipelineArtifactChannel:
        """V tuned as often as in `alternate`, on the same examples, without RecCoTs."""
        tuned, last = self.base, self.config.loop.iterations
        for t in range(1, last + 1) if self.config.loop.validator_init == "previous" else [last]:
            tuned = self.tuned(validator=tuned, iteration=t, title=f"rec_tune {t} (no RecCoT)")
        return tuned

    def distilled(self) -> PipelineArtifactChannel:
        """G fine-tuned on the teacher's RecCoTs (3.5)."""
        assert self.config.distill_data is not None  # the config refuses distillation without it
        teacher = self._placed(
            distill_data(settings=values(self.config.distill_data), seed=self.config.seed, contexts=self.contexts),
            "distill_data",
            "distill_data",
        )
        student = self._placed(
            sft_generator(
                settings=values(self.config.sft_generator),
                seed=self.config.seed,
                contexts=self.contexts,
                recots=teacher.outputs["recots"],
                base_model=self.base,
            ),
            "sft_generator",
            "sft_generator",
        )
        return student.outputs["generator"]

    def aligned(
        self, generator: PipelineArtifactChannel, validator: PipelineArtifactChannel, t: int
    ) -> tuple[PipelineArtifactChannel, PipelineArtifactChannel]:
        """Algorithm 1's rewards, and G aligned with them by S-DPO (eq. 4)."""
        sampled = self._sharded(
            "sample",
            f"sample {t}",
            partial(
                sample,
                settings=values(self.config.sample),
                seed=self.config.seed,
                iteration=t,
                contexts=self.contexts,
                base_model=self.base,
                generator=generator,
            ),
        )
        scored = self._sharded(
            "score",
            f"score {t}",
            partial(
                score,
                settings=values(self.config.score),
                examples=self.examples,
                contexts=self.contexts,
                recots=sampled,
                base_model=self.base,
                validator=validator,
            ),
        )
        preferred = self._placed(
            preferences(
                settings=values(self.config.preferences),
                recots=sampled,
                rewards=scored,
            ),
            "preferences",
            f"preferences {t}",
        )
        optimised = self._placed(
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
            f"sdpo {t}",
        )
        return scored, optimised.outputs["aligned"]

    def written(self, generator: PipelineArtifactChannel, t: int) -> PipelineArtifactChannel:
        """G's greedy RecCoTs."""
        # V is not tuned on the first G's texts. Valid's are always written, so that another `evaluate.split` runs the
        # evaluations again and nothing else.
        unread = {"train"} if t == 0 and not self.train_texts_of_first_generator else set()
        return self._greedy(generator, [split for split in get_args(Split) if split not in unread], f"generate {t}")

    def untuned(self, turns: Turns) -> PipelineArtifactChannel | None:
        """The base model's greedy RecCoTs, of the contexts that the last G writes for: Table 5a compares both.

        None where no G is aligned, or none of it is asked for.
        """
        if not self.config.loop.untuned or not self.config.loop.iterations:
            return None
        if not self.config.loop.distillation and self.train_texts_of_first_generator:
            return turns.recots[0]  # the first G is the base model
        return self._greedy(self.base, get_args(Split), "generate (untuned)")

    def _greedy(self, generator: PipelineArtifactChannel, splits: Sequence[str], title: str) -> PipelineArtifactChannel:
        task = partial(
            generate,
            settings=values(self.config.generate),
            splits=list(splits),
            examples=self.examples,
            contexts=self.contexts,
            base_model=self.base,
            generator=generator,
        )
        return self._sharded("generate", title, task)

    def _first_train_texts_are_read(self) -> bool:
        ranking = self.config.ranking
        ranked = ranking is not None and (bool(ranking.by_iteration_of) or not self.config.loop.iterations)
        return ranked or self.config.evaluate.split == "train"

    def _placed(self, task: PipelineTask, stage: str, title: str) -> PipelineTask:
        return place(task, stage, self.config, self._titled(title))

    def _sharded(self, stage: Sharded, title: str, task: Callable[..., PipelineTask]) -> PipelineArtifactChannel:
        return written(stage, self.config, self._titled(title), task)

    def _titled(self, title: str) -> str:
        return title if self.variant == "full" else f"{title}, {self.variant}"

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
        return self._placed(task, "rec_tune", title or f"rec_tune {iteration}").outputs["tuned"]

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
        task = evaluate(
            settings=values(self.config.evaluate),
            seed=self.config.seed,
            shuffled=shuffled,
            examples=self.examples,
            contexts=self.contexts,
            base_model=self.base,
            validator=validator,
            **given(recots=recots),
        )
        row = tabulate(
            label=label if self.variant == "full" else f"{label}, {self.variant}",
            iteration=iteration,
            kind=kind,
            variant=self.variant,
            metrics=self._placed(task, "evaluate", f"evaluate ({label})").outputs["metrics"],
            **given(previous=self.report, rewards=rewards, generator=generator),
        )
        self.report = self._placed(row, "tabulate", f"tabulate ({label})").outputs["report"]
