"""The seven backbones of the paper's Table 2: each maps `trackrec.ctr.embedding.Embedded` to logits."""

from trackrec.ctr.backbones.autoint import AutoInt
from trackrec.ctr.backbones.dcn import DCN
from trackrec.ctr.backbones.deepfm import DeepFM
from trackrec.ctr.backbones.dien import DIEN
from trackrec.ctr.backbones.din import DIN
from trackrec.ctr.backbones.fibinet import FiBiNET
from trackrec.ctr.backbones.fignn import FiGNN

BACKBONES = {
    "autoint": AutoInt,
    "deepfm": DeepFM,
    "fignn": FiGNN,
    "fibinet": FiBiNET,
    "dcn": DCN,
    "din": DIN,
    "dien": DIEN,
}
