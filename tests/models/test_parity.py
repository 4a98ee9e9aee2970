from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
import torch
from tests.models.oracle import BERTS, LLAMAS, Texts, gap, reference, stored
from tokenizers import Tokenizer

from lexmill.data.batch import Tokens, pack
from lexmill.models import greedy, init, load, save
from lexmill.nn import Packed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")


@pytest.mark.parametrize("name", BERTS)
def test_bert_hidden_states_equal_those_of_transformers(name, tmp_path):
    torch.manual_seed(1)
    theirs = reference("Bert", **BERTS[name])
    ours = load(stored(theirs, tmp_path)).eval()
    texts = Texts(types=theirs.config.type_vocab_size)
    with torch.no_grad():
        expected = theirs(texts.dense_ids, texts.mask, texts.dense_types).last_hidden_state
        assert gap(ours.hidden(*texts.packed, types=texts.types), texts.rows(expected)) <= 1e-5
        assert gap(texts.rows(ours.hidden(*texts.dense, types=texts.dense_types)), texts.rows(expected)) <= 1e-5


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_logits_equal_those_of_transformers(name, tmp_path):
    torch.manual_seed(2)
    theirs = reference("Llama", "ForCausalLM", **LLAMAS[name])
    ours = load(stored(theirs, tmp_path)).eval()
    head = ours.add_language_head("lm")
    assert head.tied == theirs.config.tie_word_embeddings
    texts = Texts()
    with torch.no_grad():
        expected = texts.rows(theirs(texts.dense_ids, texts.mask).logits)
        assert gap(ours(*texts.packed)["lm"], expected) <= 1e-5
        assert gap(texts.rows(ours(*texts.dense)["lm"]), expected) <= 1e-5


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_a_stored_classifier_gives_the_logits_of_transformers(kind, tmp_path):
    torch.manual_seed(3)
    theirs = reference(kind, "ForSequenceClassification", num_labels=5)
    ours = load(stored(theirs, tmp_path)).eval()
    ours.add_stored_classifier("topic")
    texts = Texts()
    types = texts.types if kind == "Bert" else None
    with torch.no_grad():
        more = {"token_type_ids": texts.dense_types} if kind == "Bert" else {}
        expected = theirs(texts.dense_ids, texts.mask, **more).logits
        assert gap(ours(*texts.packed, types=types)["topic"], expected) <= 1e-5


@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_a_classifier_we_saved_loads_in_transformers_with_the_same_logits(kind, tmp_path):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(4)
    source = tmp_path / "source"
    ours = load(stored(reference(kind), source)).eval()
    ours.add_classifier("topic", 3)
    save(ours, tmp_path, labels=["a", "b", "c"])
    theirs, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    texts = Texts(types=1)
    with torch.no_grad():
        expected = theirs.eval()(texts.dense_ids, texts.mask).logits
        assert gap(ours(*texts.packed)["topic"], expected) <= 1e-5
        again = load(tmp_path).eval()
        assert torch.equal(again(*texts.packed)["topic"], ours(*texts.packed)["topic"])


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_language_model_loads_in_transformers_with_the_same_logits(tied, tmp_path):
    from transformers import AutoModelForCausalLM

    config = load(stored(reference("Llama", tie_word_embeddings=tied), tmp_path / "source")).config
    ours = init(config, "llama", seed=5).eval()
    ours.add_language_head("lm")
    save(ours, tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    texts = Texts()
    with torch.no_grad():
        expected = texts.rows(theirs.eval()(texts.dense_ids, texts.mask).logits)
        assert gap(ours(*texts.packed)["lm"], expected) <= 1e-5


def test_greedy_decoding_equals_full_recomputation_and_transformers(tmp_path):
    torch.manual_seed(6)
    theirs = reference("Llama", "ForCausalLM", **LLAMAS["llama3_rope"], initializer_range=0.1)
    ours = load(stored(theirs, tmp_path)).eval()
    ours.add_language_head("lm")
    prompts = [torch.randint(1, 97, (length,)).tolist() for length in (5, 1, 9, 5)]
    found = greedy(ours, prompts, 12)
    end = found[2].ids[4]
    stopped = greedy(ours, prompts, [12, 3, 12, 0], end_ids={end})
    for index, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(12):
            layout = Packed.of([len(ids)])
            with torch.no_grad():
                logits = ours(torch.tensor(ids), torch.arange(len(ids)), layout)["lm"][-1]
            ids.append(int(logits.argmax()))
        assert found[index].ids == ids[len(prompt) :]
        asked = torch.tensor([prompt])
        mask = torch.ones_like(asked)
        with torch.no_grad():
            generated = theirs.generate(
                asked, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert generated[0].tolist() == ids
    for full, cut, limit in zip(found, stopped, [12, 3, 12, 0], strict=True):
        stop = full.ids.index(end) + 1 if end in full.ids else 12
        assert cut.ids == full.ids[: min(stop, limit)]
        assert cut.logprobs == pytest.approx(full.logprobs[: len(cut.ids)], abs=1e-5)


def real_texts(shared_data: Path, count: int) -> list[str]:
    with lzma.open(shared_data / "banking77" / "test.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for _, line in zip(range(count), file, strict=False)]


def test_real_minilm_equals_transformers_on_real_texts(minilm, shared_data, tmp_path):
    from transformers import AutoModel, AutoModelForSequenceClassification

    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    encoded = [torch.tensor(e.ids).numpy() for e in tokenizer.encode_batch(real_texts(shared_data, 48))]
    stream = pack([Tokens(ids) for ids in encoded], range(len(encoded)))
    layout = Packed(torch.from_numpy(stream.offsets))
    packed = (torch.from_numpy(stream.ids), torch.from_numpy(stream.positions), layout)
    side = packed[0][layout.padded.rows] * layout.padded.mask
    ours = load(minilm).eval()
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(minilm).eval()
        expected = theirs(side, layout.padded.mask).last_hidden_state.flatten(0, 1)[layout.padded.cells]
        assert gap(ours.hidden(*packed), expected) <= 1e-5
        torch.manual_seed(7)
        ours.add_classifier("intent", 77)
        save(ours, tmp_path)
        judge = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(judge.bert.pooler.dense.weight, theirs.pooler.dense.weight)
        assert gap(ours(*packed)["intent"], judge(side, layout.padded.mask).logits) <= 1e-5
