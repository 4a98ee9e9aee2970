"""The artefact: one directory with a model and all that belongs to it, written atomically, checked on load."""

from lexmill.artifact.card import render_card
from lexmill.artifact.manifest import SCHEMA_VERSION, Environment, FileRecord, Manifest, Metric, TaskRecord, Transform
from lexmill.artifact.read import Artifact, is_huggingface
from lexmill.artifact.safetensors_file import TensorEntry, read_header
from lexmill.artifact.show import describe, summary
from lexmill.artifact.write import Writer, create, refuse_existing

__all__ = [
    "SCHEMA_VERSION",
    "Artifact",
    "Environment",
    "FileRecord",
    "Manifest",
    "Metric",
    "TaskRecord",
    "TensorEntry",
    "Transform",
    "Writer",
    "create",
    "describe",
    "is_huggingface",
    "read_header",
    "refuse_existing",
    "render_card",
    "summary",
]
