"""The peer: deepctr-torch's models on our rows, with its options set to what ours are.

Ids, fields and first-order terms are ours: user, item, the item's attributes (their mean), the history (its mean, in
the item's table). What an option cannot set is set here: the distribution of the initial weights, the table that item
and history share, and the multi-valued fields that its DIEN leaves out.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat, get_varlen_pooling_list, varlen_embedding_lookup
from deepctr_torch.layers.interaction import BilinearInteraction, CrossNet, InteractingLayer
from deepctr_torch.layers.sequence import AUGRUCell
from deepctr_torch.models import DCN, DIEN, DIN, AutoInt, DeepFM, FiBiNET
from deepctr_torch.models.basemodel import BaseModel
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from trackrec.ctr.embedding import NONE, UNKNOWN
from trackrec.ctr.features import Dataset, dataset
from trackrec.data import schema

PEERS = ("autoint", "deepfm", "fibinet", "dcn", "din", "dien")


class PoolingDIEN(DIEN):
    """deepctr's DIEN, whose deep network takes the multi-valued fields too, pooled as its DIN pools them."""

    def _pooled_columns(self) -> list[VarLenSparseFeat]:
        return [column for column in self.varlen_sparse_feature_columns if column.name != "hist_item"]

    def _compute_dnn_dim(self) -> int:
        return super()._compute_dnn_dim() + sum(column.embedding_dim for column in self._pooled_columns())

    def _get_deep_input_emb(self, X: Tensor) -> Tensor:
        columns = self._pooled_columns()
        found = varlen_embedding_lookup(X, self.embedding_dict, self.feature_index, columns)
        pooled = get_varlen_pooling_list(found, X, self.feature_index, columns, self.device)
        return torch.cat([super()._get_deep_input_emb(X), *(field.squeeze(1) for field in pooled)], dim=1)


def data_of(tables: Path, history_length: int) -> Dataset:
    """An ingest's tables without RecCoTs and the history's ratings, for which deepctr's models have no place."""
    interactions = schema.read(tables, "interactions")
    data = dataset(
        interactions,
        schema.read(tables, "items"),
        history_length=history_length,
        min_rows=1,
        recot=np.full(len(interactions), NONE),
        vectors=torch.zeros(1, 0),
    )
    rows = data.rows._replace(history_rating=torch.zeros_like(data.rows.history_rating))
    return replace(data, rows=rows, vocabulary=replace(data.vocabulary, ratings=UNKNOWN + 1))


def inputs(data: Dataset, rows: Tensor) -> dict[str, np.ndarray]:
    """What deepctr's models are fed for these rows: [R] or [R, n] by feature name."""
    batch, tables = data.batch(rows), data.tables
    history = tables.item[batch.history]
    named = {
        "user": batch.user,
        "item": tables.item[batch.item],
        "attributes": tables.item_attributes[batch.item],
        "history": history,
        "hist_item": history,
        "length": (history != NONE).sum(1),
    }
    return {name: values.numpy() for name, values in named.items()}


def build(backbone: str, data: Dataset, size: int, hidden: Sequence[int], seed: int) -> BaseModel:
    """deepctr's model with our architecture, without its default regularisation."""
    vocabulary, most = data.vocabulary, data.tables.item_attributes.shape[1]
    length = data.rows.history.shape[1]

    def column(name: str, numbers: int, table: str) -> SparseFeat:
        return SparseFeat(name, numbers, embedding_dim=size, embedding_name=table)

    user, item = column("user", vocabulary.users, "user"), column("item", vocabulary.items, "item")
    attributes = VarLenSparseFeat(column("attributes", vocabulary.attributes, "attributes"), most)
    # AutoInt and FiBiNET count tables as fields, so the history gets one of its own name; it is the item's, below.
    history = VarLenSparseFeat(column("history", vocabulary.items, "history"), length)
    behaviour = VarLenSparseFeat(column("hist_item", vocabulary.items, "item"), length, length_name="length")
    fields, linear = [user, item, attributes, history], [user, item, attributes]
    common: dict[str, Any] = {"l2_reg_embedding": 0, "seed": seed}
    match backbone:
        case "autoint":
            model = AutoInt([], fields, len(hidden), att_head_num=2, dnn_hidden_units=(), **common)
        case "deepfm":
            model = DeepFM(linear, fields, dnn_hidden_units=hidden, l2_reg_linear=0, **common)
        case "fibinet":
            model = FiBiNET(linear, fields, "each", dnn_hidden_units=hidden, l2_reg_linear=0, **common)
        case "dcn":
            model = DCN([], fields, 3, dnn_hidden_units=hidden, l2_reg_linear=0, l2_reg_cross=0, **common)
        case "din":
            model = DIN(
                [*fields, behaviour], ["item"], dnn_hidden_units=hidden, att_hidden_size=(36,), att_activation="relu",
                **common,
            )  # fmt: skip
        case "dien":
            model = PoolingDIEN([*fields, behaviour], ["item"], gru_type="AUGRU", dnn_hidden_units=hidden, **common)
    model.embedding_dict["history"] = model.embedding_dict["item"]
    _initialise(model)
    return model


def fit(model: BaseModel, data: Dataset, learning_rate: float, batch_size: int) -> Iterator[None]:
    """Trains through deepctr's own loop and stops after each epoch."""
    rows = data.of_split("train")
    given, labels = inputs(data, rows), data.labels[rows].numpy()
    model.compile(torch.optim.Adam(model.parameters(), lr=learning_rate), "binary_crossentropy")
    while True:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does even where it is not to be verbose
            model.fit(given, labels, batch_size, epochs=1, verbose=0)
        yield


def auc(model: BaseModel, data: Dataset, split: str) -> float:
    """On a split, with the weights of the moment."""
    rows = data.of_split(split)
    return float(roc_auc_score(data.labels[rows].numpy(), model.predict(inputs(data, rows))[:, 0]))


def _initialise(model: BaseModel) -> None:
    """Initial weights drawn as ours are: deepctr draws nearly all from N(0, 1e-4²), and starts to learn later."""
    for module in model.modules():
        match module:
            case nn.Embedding():
                nn.init.normal_(module.weight, std=0.01)
            case nn.Linear() | nn.GRU():
                module.reset_parameters()
            case InteractingLayer() | AUGRUCell():
                for weight in module.parameters():
                    nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
            case CrossNet():
                nn.init.normal_(module.kernels, std=module.kernels.shape[1] ** -0.5)
    for module in model.modules():
        if isinstance(module, BilinearInteraction):
            for linear in module.bilinear:
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
