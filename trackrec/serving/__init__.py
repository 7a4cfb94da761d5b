"""The generator, the encoder and the rankers behind Triton Inference Server."""
