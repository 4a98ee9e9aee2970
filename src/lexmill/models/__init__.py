"""One transformer, one recurrent trunk, their heads and families; loading, saving and decoding."""

from lexmill.models.backbone import Transformer
from lexmill.models.config import LayerOverride, ModelConfig
from lexmill.models.decoding import Sampling
from lexmill.models.encoder_decoder import EncoderDecoder, Memory
from lexmill.models.generate import Generated, generate, greedy
from lexmill.models.heads import ClassifierHead, ClassifierShape, Head, LanguageShape, LMHead, SpanHead, register_head
from lexmill.models.io import (
    digest,
    head_tensors,
    init,
    init_like,
    load,
    module_names,
    save,
    trunk_prefix,
    weights_digest,
)
from lexmill.models.model import Model
from lexmill.models.recurrent import Recurrent, RecurrentConfig
from lexmill.models.search import Beams, Said, search
from lexmill.models.trunk import Structure, Trunk

__all__ = [
    "Beams",
    "ClassifierHead",
    "ClassifierShape",
    "EncoderDecoder",
    "Generated",
    "Head",
    "LMHead",
    "LanguageShape",
    "LayerOverride",
    "Memory",
    "Model",
    "ModelConfig",
    "Recurrent",
    "RecurrentConfig",
    "Said",
    "Sampling",
    "SpanHead",
    "Structure",
    "Transformer",
    "Trunk",
    "digest",
    "generate",
    "greedy",
    "head_tensors",
    "init",
    "init_like",
    "load",
    "module_names",
    "register_head",
    "save",
    "search",
    "trunk_prefix",
    "weights_digest",
]
