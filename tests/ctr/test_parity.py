"""Our backbones are deepctr-torch's: the same answers from the same weights, and the same AUC from the same data.

Matched for both (`tests.ctr.deepctr`): MovieLens-100k's rows and split; the fields user, item, attributes (mean) and
history (mean, in the item's table, without ratings); the field's size, hidden layers, batch size, Adam's learning rate
and the epochs, the best one by valid AUC; the distribution of the initial weights; no regularisation, dropout or batch
normalisation.

- AutoInt: interacting layers and their residual alone, two heads, no deep network and no linear part.
- DeepFM, FiBiNET: first-order weights of user, item and attributes. deepctr shares FiBiNET's bilinear weights between
  the plain and the SENET-weighed fields, ours have their own.
- DCN: three cross layers by vectors, no linear part.
- DIN: one hidden layer of 36 with ReLU in the attention (deepctr: two with Dice), scores not normalised.
- DIEN: AUGRU, no auxiliary loss. Two differences remain: deepctr scores interests by DIN's attention network where
  the paper's eq. 12, and ours, have a bilinear form, and its GRUs reset the state after its matrix, not before.

FiGNN is not in deepctr-torch.
"""

from itertools import islice

import numpy as np
import pytest
import torch
from deepctr_torch.models.basemodel import BaseModel
from sklearn.metrics import roc_auc_score
from torch import nn

from tests.ctr import deepctr
from trackrec.config import IngestSettings
from trackrec.ctr import ranker
from trackrec.ctr.features import Dataset
from trackrec.ctr.stack import Hyper
from trackrec.ctr.training import train
from trackrec.fetch import fetch
from trackrec.stages import ingest

SIZE = 16
# AutoInt's layers are as wide as its fields in deepctr.
HIDDEN = {name: (16, 16) if name == "autoint" else (64, 32) for name in deepctr.PEERS}
SEEDS = range(3)
LEARNING_RATE = 1e-3
BATCH_SIZE = 256
# Test AUC levels off at the second or third epoch, then DIN's and DIEN's falls.
EPOCHS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("ml-100k")
    ingest.run(IngestSettings(dataset="ml-100k"), raw=fetch("ml-100k"), interactions=out, items=out)
    return deepctr.data_of(out, history_length=10)


@pytest.mark.parametrize("backbone", deepctr.PEERS)
def test_auc_is_deepctrs(backbone: str, data: Dataset) -> None:
    """The mean over the seeds; one seed's test AUC varies by about .001 around it (standard deviation)."""
    shape = {"size": SIZE, "hidden": HIDDEN[backbone]}
    test = data.of_split("test")
    models = train(
        data,
        backbone,
        [Hyper(seed, LEARNING_RATE, dropout=0.0, l2=0.0) for seed in SEEDS],
        **shape,
        batch_size=BATCH_SIZE,
        epochs=EPOCHS,
        patience=EPOCHS,
        score=test,
    )
    ours = [float(roc_auc_score(data.labels[test].numpy(), model.scores)) for model in models]
    theirs = []
    for seed in SEEDS:
        peer = deepctr.build(backbone, data, **shape, seed=seed)
        epochs = islice(deepctr.fit(peer, data, LEARNING_RATE, BATCH_SIZE), EPOCHS)
        # As ours: the epoch with the best valid AUC.
        theirs.append(max((deepctr.auc(peer, data, "valid"), deepctr.auc(peer, data, "test")) for _ in epochs)[1])
    print(f"{backbone}: ours {np.round(ours, 4)}, mean {np.mean(ours):.4f}; ", end="")
    print(f"deepctr's {np.round(theirs, 4)}, mean {np.mean(theirs):.4f}")
    assert np.mean(ours) == pytest.approx(np.mean(theirs), abs=0.003), (ours, theirs)


@pytest.mark.parametrize("backbone", [name for name in deepctr.PEERS if name != "dien"])
def test_the_same_weights_give_the_same_logits(backbone: str, data: Dataset) -> None:
    model = ranker.build(backbone, data.vocabulary, SIZE, HIDDEN[backbone], seed=0)
    torch.manual_seed(0)
    for parameter in model.parameters():  # large enough that every interaction counts
        nn.init.normal_(parameter, std=0.3)
    if backbone == "fibinet":
        model.backbone.weighed.load_state_dict(model.backbone.plain.state_dict())
    peer = deepctr.build(backbone, data, SIZE, HIDDEN[backbone], seed=0)
    copy_weights(model, peer, backbone)
    peer.out.task = "regression"  # logits
    rows = torch.arange(0, len(data.labels), 97)
    given = deepctr.inputs(data, rows)
    found = model(data.batch(rows), data.tables)
    assert found.std() > 0.1
    torch.testing.assert_close(found.double(), torch.from_numpy(peer.predict(given)[:, 0]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def copy_weights(model: ranker.Ranker, peer: BaseModel, backbone: str) -> None:
    ours = model.backbone
    embedding = model.embedding
    tables = {
        "user": (embedding.user, embedding.user_weight),
        "item": (embedding.item, embedding.item_weight),
        "attributes": (embedding.attribute, embedding.attribute_weight),
    }
    for name, (table, weight) in tables.items():
        peer.embedding_dict[name].weight.copy_(table.weight)
        if name in peer.linear_model.embedding_dict:
            peer.linear_model.embedding_dict[name].weight.copy_(weight.weight)
    peer.dnn_linear.weight.copy_(ours.out.weight)
    peer.out.bias.copy_(ours.out.bias)
    if backbone == "autoint":
        for layer, found in zip(peer.int_layers, ours.attention, strict=True):
            pairs = ((layer.W_Query, found.query), (layer.W_key, found.key), (layer.W_Value, found.value))
            for weight, linear in (*pairs, (layer.W_Res, found.residual)):
                weight.copy_(linear.weight.T)
        return
    for linear, found in zip(peer.dnn.linears, ours.deep.linear, strict=True):
        _copy(linear, found)
    if backbone == "dcn":
        peer.crossnet.kernels.copy_(torch.stack(list(ours.cross.weight))[..., None])
        peer.crossnet.bias.copy_(torch.stack(list(ours.cross.bias))[..., None])
    elif backbone == "din":
        [hidden] = peer.attention.local_att.dnn.linears
        _copy(hidden, ours.attention.hidden)
        _copy(peer.attention.local_att.dense, ours.attention.score)
    elif backbone == "fibinet":
        peer.SE.excitation[0].weight.copy_(ours.senet.squeeze.weight)
        peer.SE.excitation[2].weight.copy_(ours.senet.excite.weight)
        for linear, weight in zip(peer.Bilinear.bilinear, ours.plain.weight, strict=True):
            linear.weight.copy_(weight.T)
        # deepctr puts the weighed pairs first.
        plain, weighed = ours.deep.linear[0].weight.chunk(2, dim=1)
        peer.dnn.linears[0].weight.copy_(torch.cat([weighed, plain], dim=1))


def _copy(linear: nn.Linear, found: nn.Linear) -> None:
    linear.weight.copy_(found.weight)
    linear.bias.copy_(found.bias)
