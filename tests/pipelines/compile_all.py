"""`python compile_all.py JOBS OUT`: both documents of the IR of each [pipeline, config, profile], as JSON.

A program of its own: for each setting, kfp looks through the whole call stack, which is deep and slow under pytest.
"""

import json
import sys
from pathlib import Path

from google.protobuf.json_format import MessageToDict

from pipelines.options import PIPELINES
from trackrec import config_file

documents = []
for pipeline, config, profile in json.loads(sys.argv[1]):
    built = PIPELINES[pipeline](config_file.load(Path(config), profile=profile))
    documents.append([MessageToDict(built.pipeline_spec), MessageToDict(built.platform_spec)])
Path(sys.argv[2]).write_text(json.dumps(documents), encoding="utf-8")
