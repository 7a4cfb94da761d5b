"""The ranking model R(x, M(e^p)) of eq. 8, and its directory: one architecture, one file of weights a seed."""

from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trackrec.config import Backbone
from trackrec.ctr.backbones import BACKBONES
from trackrec.ctr.embedding import Batch, FieldEmbedding, Tables, Vocabulary
from trackrec.ctr.features import Names

CONFIG = "ranker.json"
# user, item, attributes, history
_FIELDS = 4


class Ranker(nn.Module):
    """ŷ = R(x, M(e^p)) (eq. 8): the fields, then a backbone.

    Args:
        size: D, of a field.
        hidden: the backbone's layers.
    """

    def __init__(self, backbone: Backbone, vocabulary: Vocabulary, size: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(vocabulary, size)
        self.backbone = BACKBONES[backbone](_FIELDS + (vocabulary.vector_width > 0), size, tuple(hidden))

    def forward(self, batch: Batch, tables: Tables) -> Tensor:
        """[B] logits."""
        logits: Tensor = self.backbone(self.embedding(batch, tables))
        return logits


class RankerConfig(BaseModel):
    """`ranker.json`: all that is needed to build the model and to number a row's ids as training did."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: Backbone
    embedding_size: int
    hidden: tuple[int, ...]
    history_length: int
    vocabulary: Vocabulary
    names: Names
    seeds: tuple[int, ...]


def build(backbone: Backbone, vocabulary: Vocabulary, size: int, hidden: Sequence[int], seed: int) -> Ranker:
    """A new model; its initial weights follow from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Ranker(backbone, vocabulary, size, hidden)


def save(directory: Path, config: RankerConfig, weights: Sequence[dict[str, Tensor]]) -> None:
    """Writes `ranker.json` and `seed-N.safetensors`, one of `weights` for each of the config's seeds."""
    (directory / CONFIG).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for seed, state in zip(config.seeds, weights, strict=True):
        save_file({name: weight.contiguous() for name, weight in state.items()}, _weights(directory, seed))


def load(directory: Path, seed: int) -> tuple[RankerConfig, Ranker]:
    """The model of one seed, in eval mode.

    Raises:
        LookupError: the ranker was not trained under that seed.
    """
    config = RankerConfig.model_validate_json((directory / CONFIG).read_text(encoding="utf-8"))
    if seed not in config.seeds:
        raise LookupError(f"{directory} has no model of seed {seed}; it has {', '.join(map(str, config.seeds))}")
    model = Ranker(config.backbone, config.vocabulary, config.embedding_size, config.hidden)
    model.load_state_dict(load_file(_weights(directory, seed)))
    return config, model.eval()


def _weights(directory: Path, seed: int) -> Path:
    return directory / f"seed-{seed}.safetensors"
