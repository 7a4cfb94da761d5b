"""TrackRec: teach a small language model to write recommendation chain-of-thought (RecCoT).

A generator G writes a RecCoT from a user's history, a validator V answers whether the user will like an item given
the RecCoT; V's probability rewards G's samples, G learns from them by softmax-DPO, V is re-tuned on G's new texts.
"""

__version__ = "0.1.0"
