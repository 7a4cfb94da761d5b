"""The stage `export` as Kubeflow sees it."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components import images


@dsl.component(base_image=images.released("export"), install_kfp_package=False)
def export(
    settings: dict,
    generate: dict,
    encode: dict,
    domain: str,
    history_length: int,
    run: str,
    run_config: str,
    base_model: Input[Model],
    generator: Input[Model],
    metrics: Input[Metrics],
    repository: Output[Model],
    encoder: Input[Model] = None,
    items: Input[Dataset] = None,
    ranker_base: Input[Model] = None,
    ranker_trackrec: Input[Model] = None,
) -> None:
    """Makes a run's models a versioned Triton model repository; the real server must answer with it before it counts.

    Args:
        settings: `trackrec.serving_config.ExportSettings`.
        generate: `trackrec.config.DecodingSettings`: how the run's RecCoTs were written.
        encode: `trackrec.config.EncodeSettings`: how they were encoded.
        domain: Which of Figure 4's templates asks for a RecCoT.
        history_length: How many of a user's items it shows at most.
        run: The run that the models are of.
        run_config: Its settings, as YAML.
        base_model: The base of the generator's adapter.
        generator: The last G: an adapter, or full weights.
        metrics: Of the last evaluation, for the record.
        repository: The model repository, with `version.json` and checksums.
        encoder: The encoder, in Hugging Face layout.
        items: Table `items`, the rankers' catalogue.
        ranker_base: A ranking model without RecCoTs.
        ranker_trackrec: The same with them.
    """
    from pathlib import Path

    from trackrec import config, serving_config, storage
    from trackrec.stages import export as stage

    stage.run(
        serving_config.ExportSettings.model_validate(settings),
        generate=config.DecodingSettings.model_validate(generate),
        encode=config.EncodeSettings.model_validate(encode),
        domain=domain,
        history_length=history_length,
        run=run,
        run_config=run_config,
        base_model=Path(base_model.path),
        generator=Path(generator.path),
        metrics=Path(metrics.path),
        encoder=Path(encoder.path) if encoder else None,
        items=Path(items.path) if items else None,
        ranker_base=Path(ranker_base.path) if ranker_base else None,
        ranker_trackrec=Path(ranker_trackrec.path) if ranker_trackrec else None,
        repository=Path(repository.path),
    )
    repository.metadata.update(storage.numbers(repository.path))
