"""Greedy and beam search against `transformers`, token for token, and against the slow way."""

from __future__ import annotations

import pytest
import torch
from tests.models.oracle import Texts, stored
from tests.models.test_encoder_decoder import SOURCES, reference

from lexmill.errors import UserError
from lexmill.models import Beams, load, search
from lexmill.nn import Packed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers")

WAYS = [
    Beams(),
    Beams(2),
    Beams(4, length_penalty=2.0),
    Beams(5, length_penalty=0.0),
    Beams(3, length_penalty=-0.5, early_stopping="never"),
    Beams(3, length_penalty=1.5, early_stopping="never"),
    Beams(4, early_stopping=True),
]


def pair(name: str, tmp_path, ends: float):
    """`ends` is how much likelier than others the end token is."""
    theirs = reference(name)
    with torch.no_grad():
        theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.clone())
        theirs.lm_head.weight[1] *= ends
    ours = load(stored(theirs, tmp_path))
    ours.add_language_head("lm")
    return theirs, ours.eval()


@pytest.mark.parametrize("beams", WAYS, ids=str)
def test_what_is_said_is_what_transformers_says(beams, tmp_path):
    texts, ended, compared = Texts(SOURCES), 0, 0
    for seed, name in enumerate(("t5", "mt5", "t5_v1_1")):
        torch.manual_seed(10 + seed)
        theirs, ours = pair(name, tmp_path / name, 3.0)
        expected = theirs.generate(
            texts.dense_ids, attention_mask=texts.mask.long(), max_new_tokens=9, do_sample=False,
            num_beams=beams.num_beams, length_penalty=beams.length_penalty, early_stopping=beams.early_stopping,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        with torch.no_grad():
            found = search(ours, ours.memory(*texts.packed), 9, {1}, beams)
        for row, said in zip(expected.sequences.tolist(), found, strict=True):
            wanted = row[1:]
            wanted = wanted[: wanted.index(1) + 1] if 1 in wanted else wanted[: len(said.ids)]
            assert list(said.ids) == wanted
            ended += said.ids[-1] == 1
            compared += 1
        if beams.num_beams > 1:
            scores = torch.tensor([said.score for said in found])
            torch.testing.assert_close(scores, expected.sequences_scores, rtol=1e-5, atol=1e-5)
    assert 0 < ended < compared


def test_log_probabilities_are_those_of_the_whole_target_read_at_once(tmp_path):
    torch.manual_seed(3)
    _, ours = pair("t5", tmp_path, 3.0)
    texts = Texts(SOURCES)
    with torch.no_grad():
        memory = ours.memory(*texts.packed)
        for beams in (Beams(), Beams(3)):
            for said, limit in zip(
                search(ours, memory, [5, 1, 9, 3, 7, 2], {1}, beams), [5, 1, 9, 3, 7, 2], strict=True
            ):
                assert len(said.ids) == limit or said.ids[-1] == 1
            found = search(ours, memory, 6, {1}, beams)
            targets = Packed.of([len(said.ids) for said in found])
            ids = torch.tensor([token for said in found for token in said.ids])
            positions = torch.cat([torch.arange(len(said.ids)) for said in found])
            whole = ours.heads["lm"](ours.decoded(ids, positions, targets, memory)).log_softmax(-1)
            ours_said = torch.tensor([value for said in found for value in said.logprobs])
            torch.testing.assert_close(ours_said, whole.gather(1, ids[:, None])[:, 0], rtol=1e-5, atol=1e-5)
            sums = torch.stack([part.mean() for part in ours_said.split(targets.lengths.tolist())])
            torch.testing.assert_close(torch.tensor([said.score for said in found]), sums, rtol=1e-5, atol=1e-5)


def test_a_source_is_answered_as_when_it_is_alone(tmp_path):
    torch.manual_seed(4)
    _, ours = pair("t5_v1_1", tmp_path, 3.0)
    texts = Texts(SOURCES)
    with torch.no_grad():
        together = search(ours, ours.memory(*texts.packed), 8, {1}, Beams(3))
        for ids, said in zip(texts.ids.split(SOURCES), together, strict=True):
            memory = ours.memory(ids, torch.arange(len(ids)), Packed.of([len(ids)]))
            [alone] = search(ours, memory, 8, {1}, Beams(3))
            assert alone.ids == said.ids
            assert alone.score == pytest.approx(said.score, rel=1e-5)


def test_more_beams_than_the_vocabulary_allows_are_refused(tmp_path):
    _, ours = pair("t5", tmp_path, 1.0)
    texts = Texts(SOURCES)
    with pytest.raises(UserError, match="49 beams"), torch.no_grad():
        search(ours, ours.memory(*texts.packed), 8, {1}, Beams(49))
    assert search(ours, ours.memory(*texts.packed), 0, {1})[0].ids == ()
