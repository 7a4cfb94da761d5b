from trackrec.serving.generator_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
