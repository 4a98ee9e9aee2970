"""ONNX files answer as their source, for every structure that can be written; the others are refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.small_classifier import LABELS, small_classifier, small_tokenizer, write_artifact

from lexmill import models
from lexmill.artifact import Artifact
from lexmill.engine import Loaded, OnnxEngine, Request, TorchEngine, open_engine, probes
from lexmill.engine.graph_model import MOST_POSITIONS, grouped
from lexmill.errors import Failure, UserError
from lexmill.export import Onnx, export, find
from lexmill.export.parity import measure
from lexmill.models import ModelConfig
from lexmill.models.config import LayerOverride
from lexmill.models.recurrent import RecurrentConfig
from lexmill.nn.embedding import Int8Embedding
from lexmill.nn.int8 import Grid, Int8Linear
from lexmill.nn.low_rank import LowRankLinear
from lexmill.tasks import Task
from lexmill.tasks.classify import Classify, ClassifyOptions
from lexmill.tasks.embed import Embed, EmbedOptions
from lexmill.tasks.rank import Rank, RankOptions
from lexmill.tasks.tag import Tag, TagOptions

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "onnx_consumer.py"
BASE = ModelConfig(
    vocab_size=1500, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8, intermediate_size=64,
    max_positions=512, type_vocab_size=2, initializer_range=0.3,
)  # fmt: skip
ROTARY = {"positions": "rotary", "type_vocab_size": 0, "embedding_norm": False, "final_norm": True, "norm_place": "pre"}
LLAMA = {**ROTARY, "norm": "rms", "gated": True, "activation": "silu", "attention_bias": False, "mlp_bias": False,
         "num_kv_heads": 2, "causal": True, "norm_eps": 1e-5}  # fmt: skip
GPT2 = {"causal": True, "norm_place": "pre", "final_norm": True, "embedding_norm": False, "type_vocab_size": 0,
        "activation": "gelu_tanh", "norm_eps": 1e-5}  # fmt: skip
MODERN = {**ROTARY, "embedding_norm": True, "first_norm": False, "norm_bias": False, "attention_bias": False,
          "mlp_bias": False, "gated": True, "norm_eps": 1e-5, "rope_theta": 160_000.0,
          "layers": (LayerOverride(), LayerOverride(window=9, rope_theta=10_000.0))}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"position_offset": 2, "max_positions": 512, "type_vocab_size": 1},
    "xlm-roberta": {"position_offset": 2, "type_vocab_size": 1},
    "distilbert": {"type_vocab_size": 0},
    "albert": {"embedding_size": 16, "num_groups": 1, "activation": "gelu_tanh"},
    "ernie": {"task_type_vocab_size": 3},
    "modernbert": MODERN,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": {**LLAMA, "window": 9},
    "qwen3": {**LLAMA, "qk_norm": True},
    "glm4": {**LLAMA, "norm_place": "around", "rope_dim": 4, "rope_interleaved": True},
}


def classifier(model: models.Model, **options: Any) -> Loaded:
    records = [{"question": "x", "intent": label} for label in LABELS]
    task = Classify.from_records(records, {"text": "question", "label": "intent"}, ClassifyOptions(**options))
    return with_task(task, model)


def with_task(task: Task, model: models.Model) -> Loaded:
    torch.manual_seed(0)
    task.attach(model)
    return Loaded(task, model.eval(), small_tokenizer(), "small")


def bert() -> models.Model:
    return models.init(BASE, "bert", 0)


def parity(subject: Loaded, folder: Path, count: int = 12) -> float:
    """The largest error of what is written, against one text at a time in torch."""
    form, options = find("onnx"), find("onnx").Options()
    [name] = form.write(subject, folder, options)
    records = probes.probe_records(subject.task)
    records = records[:: max(len(records) // count, 1)]
    got = form.evidence(subject, folder / name, records)
    found = measure(probes.evidence(subject, records), got, form.tolerance(subject, options), labelled=True)
    assert found.holds, found
    return found.max_error


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_in_torch(family: str, tmp_path: Path) -> None:
    model = models.init(replace(BASE, **FAMILIES[family]), family, 0)
    assert parity(classifier(model), tmp_path) <= 1e-5


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("both_ways", [True, False])
def test_recurrent_models_answer_as_in_torch(cell: Any, both_ways: bool, tmp_path: Path) -> None:
    config = RecurrentConfig(1500, cell, 16, 12, num_layers=2, bidirectional=both_ways)
    assert parity(classifier(models.init(config, cell, 0)), tmp_path) <= 1e-5


TASKS: dict[str, Callable[[], Loaded]] = {
    "several labels": lambda: with_task(
        Classify.from_records(
            [{"t": "x", "l": "a|b"}, {"t": "y", "l": "c"}],
            {"text": "t", "label": "l"},
            ClassifyOptions(multi_label=True),
        ),
        bert(),
    ),
    "pairs": lambda: small_classifier(pair=True),
    "tag": lambda: with_task(
        Tag.from_records(
            [{"tokens": ["Ann", "ran"], "tags": ["B-PER", "O"]}],
            {"text": "tokens", "tags": "tags"},
            TagOptions(max_length=48, stride=8),
        ),
        bert(),
    ),
    "embed": lambda: with_task(
        Embed({"text": "t", "text_pair": "p"}, EmbedOptions(pooling="mean", query_prefix="q: ")), bert()
    ),
    "embed last": lambda: with_task(Embed({"text": "t", "text_pair": "p"}, EmbedOptions(pooling="last")), bert()),
    "rank": lambda: with_task(
        Rank({"text": "t", "text_pair": "p", "label": "l"}, 0.0, 5.0, graded=True, options=RankOptions()), bert()
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_answers_as_in_torch(task: str, tmp_path: Path) -> None:
    assert parity(TASKS[task](), tmp_path) <= 1e-5


def in_int8(subject: Loaded, grid: Grid | None, *, smooth: bool) -> None:
    for block in subject.model.trunk.layers:
        for holder, names in ((block.attention, ("query", "key", "value", "output")), (block.mlp, ("up", "down"))):
            for name in names:
                dense = getattr(holder, name)
                divisor = torch.linspace(0.5, 2, dense.in_features) if smooth and name != "down" else None
                setattr(holder, name, Int8Linear.of(dense, grid, divisor))
    subject.model.trunk.embeddings.token = Int8Embedding.of(subject.model.trunk.embeddings.token)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("grid", [None, Grid.over(-4.0, 4.0)], ids=["token", "static"])
def test_int8_layers_multiply_bytes(grid: Grid | None, smooth: bool, tmp_path: Path) -> None:
    import onnx

    subject = classifier(bert())
    in_int8(subject, grid, smooth=smooth)
    parity(subject, tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == 2 * 4  # of two layers, queries, keys and values in one
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert all(stored[node.input[1]] == onnx.TensorProto.INT8 for node in products)


def test_low_rank_layers_stay_two_products(tmp_path: Path) -> None:
    subject = classifier(bert())
    block = subject.model.trunk.layers[0]
    thin = LowRankLinear(32, 64, 8)
    torch.nn.init.normal_(thin.down.weight)
    block.mlp.up = thin
    whole = parity(classifier(bert()), tmp_path)
    size = (tmp_path / "model.onnx").stat().st_size
    assert max(whole, parity(subject, tmp_path)) <= 1e-5
    assert (tmp_path / "model.onnx").stat().st_size < size - 4 * (32 * 64 - 8 * 96) + 400


def test_what_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    from lexmill.models.exits import Exits
    from lexmill.nn.front import Prompt

    form = find("onnx")
    early = classifier(bert())
    shape = early.model.heads["label"].shape
    early.model.trunk.exits = Exits(32, "label", [1], shape, threshold=0.9)
    prompted = classifier(bert())
    prompted.model.trunk.embeddings.prompt = Prompt(2, 32)
    half = classifier(bert())
    half.model.bfloat16()
    for subject, told in ((early, "early exits"), (prompted, "Prompt"), (half, "bfloat16")):
        with pytest.raises(UserError, match=told):
            form.write(subject, tmp_path, form.Options())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    base = tmp_path_factory.mktemp("onnx")
    write_artifact(small_classifier(), base / "small")
    return export(base / "small", base / "out").artifact


def test_an_export_carries_its_proof(exported: Artifact) -> None:
    manifest = exported.manifest
    assert {"onnx/model.onnx", "onnx/tokenizer.json", "onnx/answers.json", "model.safetensors"} <= set(manifest.files)
    entry = manifest.structure["export"]["onnx/model.onnx"]
    assert entry["max_error"] <= 1e-5
    assert entry["label_agreement"] == 1.0
    assert entry["probes"] == len(probes.probe_texts())
    step = manifest.history[-1]
    assert (step.name, step.parameters["format"]) == ("export", "onnx")
    assert step.effect["onnx/model.onnx/max_error"] == entry["max_error"]


def test_an_export_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_artifact(small_classifier(), tmp_path / "small")
    monkeypatch.setattr(Onnx, "tolerance", lambda self, subject, options: 0.0)
    with pytest.raises(Failure, match="does not answer as its source does"):
        export(tmp_path / "small", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_the_engine_answers_as_the_one_in_torch(exported: Artifact) -> None:
    texts = probes.probe_texts()
    requests = [Request({"question": text}) for text in texts]
    ours, theirs = open_engine(exported, "onnx", threads=1), TorchEngine(exported)
    assert isinstance(ours, OnnxEngine)
    for a, b in zip(ours.run(requests), theirs.run(requests), strict=True):
        np.testing.assert_allclose(a["label"], b["label"], rtol=1e-4, atol=1e-5)
    assert ours.work.tokens == theirs.work.tokens
    assert ours.work.tokens <= ours.work.positions <= MOST_POSITIONS * ours.work.tokens


def test_a_text_is_answered_the_same_alone_and_among_others(exported: Artifact) -> None:
    requests = [Request({"question": text}) for text in probes.probe_texts()[:32]]
    engine = open_engine(exported, "onnx", threads=1)
    together = engine.run(requests)
    for request, among in zip(requests, together, strict=True):
        [alone] = engine.run([request])
        np.testing.assert_allclose(alone["label"], among["label"], rtol=1e-5, atol=1e-5)


def test_groups_hold_every_sequence_once_and_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    groups = list(grouped(lengths))
    assert sorted(np.concatenate(groups).tolist()) == list(range(500))
    assert all(lengths[g].max() * len(g) <= MOST_POSITIONS * lengths[g].sum() for g in groups)
    assert list(grouped(np.array([], np.int64))) == []


def test_an_artefact_without_a_graph_names_the_verb_that_makes_one(tmp_path: Path) -> None:
    artifact = write_artifact(small_classifier(), tmp_path / "small")
    with pytest.raises(UserError, match="lexmill export") as fault:
        open_engine(artifact, "onnx")
    assert fault.value.where is not None
    assert fault.value.where.endswith("onnx/model.onnx")


def consumed(folder: Path, *texts: str) -> list[Any]:
    """The answers of the example, in a process that has neither lexmill nor torch."""
    without = "import sys; sys.modules['lexmill'] = sys.modules['torch'] = None"
    code = f"{without}\nexec(open({str(EXAMPLE)!r}).read())"
    command = [sys.executable, "-c", code, str(folder), *texts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in lines] == list(texts)
    return [line["answer"] for line in lines]


def test_a_program_without_lexmill_gets_the_same_probabilities(exported: Artifact) -> None:
    texts = ["My card has not arrived", "What is my PIN?", "refund " * 300]
    engine = TorchEngine(exported)
    found = engine.run([Request({"question": text}) for text in texts])
    for answer, expected in zip(consumed(exported.path / "onnx", *texts), found, strict=True):
        assert list(answer) == list(LABELS)
        wanted = engine.task.probabilities(expected["label"])
        np.testing.assert_allclose(list(answer.values()), wanted, rtol=1e-4, atol=1e-6)


def test_a_program_without_lexmill_gets_the_same_of_pairs_and_vectors(tmp_path: Path) -> None:
    form = find("onnx")
    for task in ("pairs", "embed"):
        (tmp_path / task).mkdir()
        form.write(TASKS[task](), tmp_path / task, form.Options())
    pairs, vectors = TASKS["pairs"](), TASKS["embed"]()
    columns = pairs.task.columns
    [expected] = TorchEngine(pairs).run([Request({columns["text"]: "My card", columns["text_pair"]: "What is a fee?"})])
    [answer] = consumed(tmp_path / "pairs", "My card ||| What is a fee?")
    np.testing.assert_allclose(list(answer.values()), pairs.task.probabilities(expected["label"]), rtol=1e-4, atol=1e-6)
    request = vectors.task.Request.model_validate({"texts": ["My card", "What is my PIN?"], "kind": "query"})
    answers = TorchEngine(vectors).run([Request(record) for record in vectors.task.items(request)])
    wanted = [list(vectors.task.evidence(one).values()) for one in answers]
    np.testing.assert_allclose(consumed(tmp_path / "embed", "My card", "What is my PIN?"), wanted, atol=1e-5)


def test_a_plain_huggingface_directory_is_exported(tmp_path: Path) -> None:
    loaded = small_classifier()
    (tmp_path / "plain").mkdir()
    models.save(loaded.model, tmp_path / "plain", labels=LABELS)
    loaded.tokenizer.save(str(tmp_path / "plain" / "tokenizer.json"))
    config = json.loads((tmp_path / "plain" / "config.json").read_text("utf-8"))
    config.pop("lexmill")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config), "utf-8")
    found = export(tmp_path / "plain", tmp_path / "out").artifact
    engine = open_engine(found, "onnx")
    [answer] = engine.run([Request({"text": "What is my PIN?"})])
    [wanted] = TorchEngine(loaded).run([Request({"question": "What is my PIN?"})])
    np.testing.assert_allclose(answer["label"], wanted["label"], rtol=1e-4, atol=1e-5)
    assert engine.task.labels() == {"label": LABELS}
