"""A generator of the same contract as vLLM's backend that writes at once: the text follows from the prompt alone.

What a title in the prompt says, it does: see `_ACTIONS`; of "(silent)" it writes nothing. With `parameters.delay_ms`
it answers after so long, with `parameters.load_ms` it takes so long to load; with `parameters.log` it writes the hash
of each prompt that it is asked for into that file, a line each; and "(broken)" fails as long as there is a file of
that name with `.broken` added.
"""

import collections
import hashlib
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_TOO_LONG = "The decoder prompt (length 9999) is longer than the maximum model length of 4096"
# What fails by what a title says: the status code's name, and the message.
_ACTIONS = {
    b"(too long)": ("INTERNAL", _TOO_LONG),
    b"(invalid)": ("INVALID_ARG", "no such prompt"),
    b"(internal)": ("INTERNAL", "something broke"),
}


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.delay = float(parameters.get("delay_ms", {}).get("string_value", "0")) / 1000
        time.sleep(float(parameters.get("load_ms", {}).get("string_value", "0")) / 1000)
        self.log = parameters.get("log", {}).get("string_value")
        self.waiting = collections.deque()
        self.some = threading.Condition()
        if self.delay:
            threading.Thread(target=self.answer_late, daemon=True).start()

    def execute(self, requests):
        for request in requests:
            prompt = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()[0]
            sampling = pb_utils.get_input_tensor_by_name(request, "sampling_parameters").as_numpy()[0]
            sender = request.get_response_sender()
            if self.log:
                with Path(self.log).open("a", encoding="ascii") as file:
                    file.write(hashlib.sha256(prompt).hexdigest() + "\n")
            if b"(kills)" in prompt:
                os._exit(9)
            if b"(broken)" in prompt and Path(f"{self.log}.broken").exists():
                prompt = b"(internal)"
            if b"(hangs)" in prompt:
                self.hung = sender
                continue
            if self.delay:
                with self.some:
                    self.waiting.append((time.monotonic() + self.delay, sender, prompt, sampling))
                    self.some.notify()
            else:
                answer(sender, prompt, sampling)

    def answer_late(self):
        while True:
            with self.some:
                while not self.waiting:
                    self.some.wait()
                due, *rest = self.waiting.popleft()
            time.sleep(max(0.0, due - time.monotonic()))
            answer(*rest)


def answer(sender, prompt, sampling):
    for marker, (code, message) in _ACTIONS.items():
        if marker in prompt:
            sender.send(
                pb_utils.InferenceResponse(error=pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))),
                flags=_FINAL,
            )
            return
    digest = hashlib.sha256(prompt + b"\0" + sampling).hexdigest()
    words = ["likes", *(digest[at : at + 4] for at in range(0, 4 + int(digest[0], 16) * 2, 4))]
    if b"(silent)" in prompt:
        words = []
    outputs = [
        pb_utils.Tensor("text_output", np.array([" ".join(words).encode()], dtype=np.object_)),
        pb_utils.Tensor("finish_reason", np.array([b"stop"], dtype=np.object_)),
        pb_utils.Tensor("num_input_tokens", np.array([len(prompt.split())], dtype=np.uint32)),
        pb_utils.Tensor("num_output_tokens", np.array([len(words)], dtype=np.uint32)),
    ]
    sender.send(pb_utils.InferenceResponse(output_tensors=outputs), flags=_FINAL)
