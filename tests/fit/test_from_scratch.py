"""Models without pretrained weights, recurrent ones and language models, from running text to what is served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.train.parts import rows, write_rows

from lexmill.data.tokenizer import load_tokenizer
from lexmill.data.tokenizer_training import TokenizerConfig, write_tokenizer
from lexmill.engine import Request, TorchEngine
from lexmill.errors import UserError
from lexmill.fit import DataConfig, FitConfig, FitResult, Watch, fit
from lexmill.train import TrainConfig
from lexmill.verify import verify

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 64, "max_position_embeddings": 64}
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 64, "max_position_embeddings": 512, "tie_word_embeddings": False}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
LSTM = {"model_type": "lstm", "embedding_size": 16, "hidden_size": 32, "bidirectional": False, "dropout": 0.1}


def directory(folder: Path, config: dict, special: str | None = None) -> Path:
    kind = "unigram" if special == "t5" else "bpe"
    data = write_rows(folder.parent / f"{folder.name}.jsonl", rows(300))
    write_tokenizer(data, folder, TokenizerConfig(kind, 400, special))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    folder = tmp_path_factory.mktemp("lstm")
    train, test = (
        write_rows(folder / "train.jsonl", rows(300)[:240]),
        write_rows(folder / "test.jsonl", rows(300)[240:]),
    )
    config = FitConfig(
        DataConfig(train, test=test),
        model="lstm",
        tokenizer=TokenizerConfig(special="roberta", vocab_size=600),
        train=TrainConfig(epochs=8, batch_size=16, learning_rate=3e-3),
    )
    return fit(config, folder / "out")


def test_an_lstm_learns_banking77_from_nothing_and_its_record_says_so(recurrent: FitResult) -> None:
    assert recurrent.test is not None
    assert recurrent.test["accuracy"] >= 0.7  # four intents
    effect = recurrent.training
    config = json.loads((recurrent.artifact.path / "config.json").read_text())
    assert effect["trained_tokens"] == config["vocab_size"] == load_tokenizer(recurrent.artifact.path).get_vocab_size()
    stored = load_file(recurrent.artifact.path / "model.safetensors")
    trunk = sum(t.numel() for name, t in stored.items() if name.startswith(("rnn.", "embeddings.")))
    assert effect["new_weights"] == trunk
    assert effect["positions_per_token"] == 1.0
    assert effect["ceiling_share"] > 0


def test_a_recurrent_artefact_verifies_and_answers_as_others_do(recurrent: FitResult) -> None:
    found = verify(recurrent.artifact.path)
    assert found.ok, found.lines()
    engine = TorchEngine(recurrent.artifact)
    [answer] = engine.run([Request({"text": "where is my new card?"})])
    assert set(answer) == {"label"}


def test_a_run_from_nothing_gives_the_same_bits_again(recurrent: FitResult, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", rows(48))
    config = FitConfig(DataConfig(data), model="gru", train=TrainConfig(epochs=1, batch_size=16))
    one, two = (fit(config, tmp_path / name).artifact for name in ("one", "two"))
    assert one.manifest.weights == two.manifest.weights


@pytest.mark.parametrize(
    ("config", "special", "objective"),
    [(GPT2, None, "causal"), (BERT, "roberta", "masked"), (LSTM, None, "causal")],
    ids=["gpt2", "bert", "lstm"],
)
def test_a_language_model_learns_from_nothing(
    config: dict, special: str | None, objective: str, tmp_path: Path
) -> None:
    model = directory(tmp_path / "model", config, special=special)
    data, test = write_rows(tmp_path / "a.jsonl", rows(300)[:240]), write_rows(tmp_path / "b.jsonl", rows(300)[240:])
    asked = FitConfig(
        DataConfig(data, test=test, validation_fraction=0.1),
        model=str(model),
        init="random",
        task="pretrain",
        options={"max_length": 32, "objective": objective},
        train=TrainConfig(epochs=3, batch_size=8, learning_rate=5e-3),
    )
    result = fit(asked, tmp_path / "out")
    assert result.test is not None
    assert result.test["perplexity"] < 200  # of 400 tokens
    assert ("bits_per_byte" in result.test) == (objective == "causal")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 400
    if objective == "masked":
        return
    later = replace(asked, model=str(tmp_path / "out"), init=None, task="classify", options={"max_length": 32})
    classifier = fit(replace(later, train=TrainConfig(epochs=1)), tmp_path / "later").artifact
    assert [step.name for step in classifier.manifest.history] == ["fit", "fit"]
    assert "new_weights" not in classifier.manifest.history[-1].effect


def test_what_predicts_tokens_goes_on_from_pretraining_to_answering(tmp_path: Path) -> None:
    model = directory(tmp_path / "model", LLAMA)
    data = write_rows(tmp_path / "a.jsonl", [{**row, "response": row["label"]} for row in rows(40)])
    options, train = {"max_length": 64}, TrainConfig(epochs=1, batch_size=8, learning_rate=5e-3)
    asked = FitConfig(DataConfig(data), str(model), "random", task="pretrain", options=options, train=train)
    fit(asked, tmp_path / "first")
    columns = DataConfig(data, columns={"text": "text", "text_pair": "response"})
    later = replace(asked, data=columns, model=str(tmp_path / "first"), init=None, task="generate")
    notes: list[str] = []
    fit(replace(later, train=TrainConfig(epochs=1, learning_rate=1e-12)), tmp_path / "then", watch=Watch(notes.append))
    assert "going on with the head 'lm' of first" in notes
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "then"))
    torch.testing.assert_close(after["lm_head.weight"], before["lm_head.weight"], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "special", "objective"),
    [(GPT2, None, "causal"), (BERT, "roberta", "masked"), (LSTM, None, "causal"), (T5, "t5", "span")],
)
def test_a_language_model_from_nothing_verifies(config: dict, special: str | None, objective: str, tmp_path) -> None:
    model = directory(tmp_path / "model", config, special=special)
    data = write_rows(tmp_path / "a.jsonl", rows(100))
    options = {"max_length": 32, "objective": objective}
    asked = FitConfig(DataConfig(data), model=str(model), init="random", task="pretrain", options=options)
    fit(asked, tmp_path / "out")
    found = verify(tmp_path / "out")
    assert found.ok, found.lines()


def test_texts_held_out_are_not_trained_on(tmp_path: Path) -> None:
    from lexmill.fit.prepare import examples, held_out, prepare

    model = directory(tmp_path / "model", GPT2)
    data = write_rows(tmp_path / "a.jsonl", rows(40))
    asked = FitConfig(
        DataConfig(data, validation_fraction=0.25), model=str(model), init="random", task="pretrain",
        options={"max_length": 16},
    )  # fmt: skip
    prepared = prepare(asked)
    cache, held = examples(prepared)
    validation = [row["text"] for row in held_out(prepared, held)()]
    assert len(validation) == 10
    seen = prepared.tokenizer.decode([t for i in range(len(cache)) for t in cache.data[i].streams["source"][0].ids])
    shown = {text: text in seen for text in {row["text"] for row in rows(40)}}
    assert {text for text, there in shown.items() if not there} == set(validation)


def test_what_cannot_start_is_said(tmp_path: Path) -> None:
    model = directory(tmp_path / "model", GPT2)
    data = write_rows(tmp_path / "a.jsonl", rows(20))
    asked = FitConfig(DataConfig(data), model=str(model), task="pretrain")
    with pytest.raises(UserError, match="no weights") as error:
        fit(asked, tmp_path / "out")
    assert 'init = "random"' in str(error.value.hint)
    with pytest.raises(UserError, match="no weights"):
        fit(replace(asked, model="lstm", init="pretrained"), tmp_path / "out")
    with pytest.raises(UserError, match="has a tokenizer already"):
        fit(replace(asked, init="random", tokenizer=TokenizerConfig("bpe", 300)), tmp_path / "out")
    with pytest.raises(UserError, match="holds out 0 of 20"):
        fit(
            replace(
                asked, init="random", options={"max_length": 16}, data=replace(asked.data, validation_fraction=0.01)
            ),
            tmp_path / "out",
        )
    assert not list(tmp_path.glob("out*"))


def test_a_decoder_with_little_room_is_asked_shorter_probes(tmp_path: Path) -> None:
    model = directory(tmp_path / "gpt2", GPT2)
    config = FitConfig(
        DataConfig(write_rows(tmp_path / "train.jsonl", rows(24))), model=str(model), init="random", task="generate",
        options={"max_length": 48}, train=TrainConfig(epochs=1, batch_size=8),
    )  # fmt: skip
    made = fit(config, tmp_path / "out").artifact
    probes = json.loads(made.file("probes.json").read_text("utf-8"))["probes"]
    assert max(len(one["record"]["text"]) for one in probes) < 400
    assert len({one["record"]["text"] for one in probes}) > 40
