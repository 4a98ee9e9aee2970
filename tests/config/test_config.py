"""Configs: precedence, strictness, the words and places of errors, and the way to TOML and back."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Lt
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lexmill.config import load, to_dict, to_toml
from lexmill.errors import UserError


@dataclass(frozen=True)
class Lora:
    rank: Annotated[int, Ge(1)] = 8
    targets: tuple[str, ...] = ("query", "value")


@dataclass(frozen=True)
class Train:
    epochs: Annotated[int, Ge(1)] = 3
    learning_rate: Annotated[float, Ge(0)] = 3e-4
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    schedule: Literal["linear", "cosine"] = "linear"
    max_length: Annotated[int, Ge(1)] | None = 128
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if self.schedule == "cosine" and self.epochs == 1:
            raise ValueError("a cosine needs two epochs or more")


@dataclass(frozen=True)
class Recipe:
    train: Train = field(default_factory=Train)
    out: Path | None = None
    note: str = ""
    weights: dict[str, float] = field(default_factory=lambda: {"spam": 2.0})
    stages: tuple[Lora, ...] = ()
    shuffle: bool = True


@dataclass(frozen=True)
class Required:
    data: Path
    train: Train


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.toml"
    file.write_text(text, encoding="utf-8")
    return file


def refusal(cls: type[Any] = Recipe, **sources: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        load(cls, **sources)
    return caught.value


def test_defaults_load_and_say_so() -> None:
    loaded = load(Recipe)
    assert loaded.value == Recipe()
    assert set(loaded.origins.values()) == {"default"}
    assert "train.epochs" in loaded.origins


def test_later_sources_win_and_are_named(tmp_path: Path) -> None:
    file = write(tmp_path, "note = 'file'\n\n[train]\n# two of them\nepochs = 5\nlearning_rate = 1\n")
    loaded = load(
        Recipe,
        stored={"note": "stored", "train": {"epochs": 4, "dropout": 0.0}},
        file=file,
        sets=["train.lora.rank=4"],
        flags={"train.learning_rate": 0.5, "shuffle": None},
    )
    assert loaded.value == Recipe(Train(5, 0.5, 0.0, lora=Lora(4)), note="file")
    origins = loaded.origins
    assert origins["note"] == f"{file}:1"
    assert origins["train.epochs"] == f"{file}:5"
    assert origins["train.dropout"] == "stored"
    assert origins["train.learning_rate"] == "--learning-rate"
    assert origins["train.lora.rank"] == "--set"
    assert origins["train.lora.targets"] == origins["shuffle"] == "default"
    assert "train.lora" not in origins


def test_an_int_stands_for_a_float_but_not_the_reverse(tmp_path: Path) -> None:
    value = load(Recipe, file=write(tmp_path, "train.learning_rate = 1")).value.train.learning_rate
    assert isinstance(value, float)
    error = refusal(sets=["train.epochs=3.0"])
    assert error.message == "'train.epochs' is 3.0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("note=some words", "some words"),
        ("note=/data/a.csv", "/data/a.csv"),
        ('note="3"', "3"),
        ("note=a=b", "a=b"),
        ("note=", ""),
        ("note=1\nshuffle=false", "1\nshuffle=false"),
    ],
)
def test_set_takes_toml_values_and_bare_words(text: str, expected: str) -> None:
    assert load(Recipe, sets=[text]).value == Recipe(note=expected)


def test_a_dict_is_replaced_by_a_table_and_changed_by_a_dotted_set(tmp_path: Path) -> None:
    file = write(tmp_path, "[weights]\n'a.b' = 1\n")
    assert load(Recipe, file=file).value.weights == {"a.b": 1.0}
    assert load(Recipe, file=file, sets=["weights.c=3"]).value.weights == {"a.b": 1.0, "c": 3.0}
    assert load(Recipe, sets=['weights."x.y"=3']).value.weights == {"spam": 2.0, "x.y": 3.0}


def test_none_is_a_word_where_no_text_is_allowed(tmp_path: Path) -> None:
    assert load(Recipe, sets=["train.max_length=none"]).value.train.max_length is None
    assert load(Recipe, sets=["note=none"]).value.note == "none"
    stored = to_dict(Recipe(Train(lora=Lora(2))))
    assert load(Recipe, stored=stored, sets=["train.lora=none"]).value == Recipe()


def test_required_settings_must_be_set(tmp_path: Path) -> None:
    assert load(Required, sets=["data=x.csv"]).value == Required(Path("x.csv"), Train())
    error = refusal(Required)
    assert "'data' is not set" in error.message
    assert "--set data=" in str(error)


WRONG_FILES = [
    ("[train]\n\nepoch = 3", 3, "unknown key 'train.epoch'", "'train.epochs'"),
    ("epochs = 3", 1, "unknown key 'epochs'", "'train.epochs'"),
    ("zzz = 3", 1, "unknown key 'zzz'", "it holds: train, out, note"),
    ("note = ''\n[trian]\nepochs = 3", 2, "unknown key 'trian'", "'train'"),
    ("note = ''\ntrain.epochs.more = 3", 2, "'train.epochs' is {'more': 3}", "valid integer"),
    ("[train]\nepochs = '3'", 2, "'train.epochs' is '3'", "valid integer"),
    ("[train]\nepochs = true", 2, "'train.epochs' is True", "valid integer"),
    ("[train]\nepochs = 0", 2, "'train.epochs' is 0", "greater than or equal to 1"),
    ("[train]\n dropout = 1.0", 2, "'train.dropout' is 1.0", "less than 1"),
    ("[train]\nschedule = 'cos'", 2, "'train.schedule' is 'cos'", "'linear' or 'cosine'"),
    ("[train]\nschedule = 'cosine'\nepochs = 1", 2, "a cosine needs two epochs or more (in 'train')", ""),
    ("train = 3", 1, "'train' is a table of settings, not 3", "train.epochs"),
    ("[weights]\nspam = 'much'", 1, "'weights', in it 'spam', is 'much'", "valid number"),
    ("[[stages]]\nrank = 1\n[[stages]]\nrank = 0", 1, "'stages', in it '1.rank', is 0", "greater than or equal to 1"),
    ("stages = [{rnk = 1}]", 1, "'stages', in it '0.rnk'", "no such key"),
    ("note = '''\n\n'''\nout = 3", 4, "'out' is 3", "string"),
    ("note = 'a'\nnote = 'b'", 2, "not valid TOML", ""),
    ("note = 'a\n", 1, "not valid TOML", ""),
    ("stages = [\n\n", 3, "not valid TOML", ""),
]


@pytest.mark.parametrize(("text", "line", "message", "hint"), WRONG_FILES)
def test_a_wrong_file_is_refused_at_its_line(tmp_path: Path, text: str, line: int, message: str, hint: str) -> None:
    file = write(tmp_path, text)
    error = refusal(file=file)
    assert message in error.message
    assert hint in (error.hint or "")
    assert error.where is not None
    if "TOML" in message:
        assert error.where.startswith(f"{file}:")
    else:
        assert error.where == f"{file}:{line}"


@pytest.mark.parametrize(
    ("sources", "where", "message"),
    [
        ({"sets": ["train.epochs"]}, "--set train.epochs", "no '='"),
        ({"sets": ["=3"]}, "--set =3", "not a key"),
        ({"sets": ["a b=3"]}, "--set a b=3", "not a key"),
        ({"sets": ["weights=[1"]}, "--set weights=[1", "not a TOML value"),
        ({"sets": ["train.epochs=three"]}, "--set train.epochs=…", "is 'three'"),
        ({"sets": ["train.epochs=1", "train.epochs=2"]}, "command line", "given twice"),
        ({"sets": ["train={epochs=1}", "train.epochs=2"]}, "command line", "given twice"),
        ({"sets": ["train.epochs=1"], "flags": {"train.epochs": 2}}, "command line", "by --epochs and by --set"),
        ({"flags": {"train.epochs": 0}}, "--epochs", "'train.epochs' is 0"),
        ({"stored": {"train": {"epochz": 0}}}, "stored config", "unknown key 'train.epochz'"),
        ({"stored": {"train": None}}, "stored config", "a table of settings, not None"),
    ],
)
def test_a_wrong_command_line_or_stored_config_is_refused(sources: dict[str, Any], where: str, message: str) -> None:
    error = refusal(**sources)
    assert error.where == where
    assert message in error.message


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert refusal(file=missing).where == str(missing)
    assert "cannot read" in refusal(file=tmp_path).message
    latin = tmp_path / "latin.toml"
    latin.write_bytes("shuffle = true\nnote = 'é'\n".encode("latin-1"))
    assert refusal(file=latin).where == f"{latin}:2"


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(b"\xef\xbb\xbfshuffle = false\r\n[train]\r\nepochs = 2\r\n")
    loaded = load(Recipe, file=file)
    assert loaded.value == Recipe(Train(2), shuffle=False)
    assert loaded.origins["train.epochs"] == f"{file}:3"


text = st.text(st.characters(codec="utf-8"), max_size=8)
floats = st.floats(min_value=0, allow_nan=False)
loras = st.builds(Lora, rank=st.integers(1, 10**12), targets=st.lists(text, max_size=3).map(tuple))
trains = st.builds(
    Train,
    epochs=st.integers(2, 99),
    learning_rate=floats,
    dropout=st.floats(0, 1, exclude_max=True),
    schedule=st.sampled_from(["linear", "cosine"]),
    max_length=st.none() | st.integers(1, 512),
    lora=st.none() | loras,
)
recipes = st.builds(
    Recipe,
    train=trains,
    out=st.none() | st.text("ab/.", min_size=1, max_size=5).map(Path),
    note=text,
    weights=st.dictionaries(text, floats, max_size=3),
    stages=st.lists(loras, max_size=2).map(tuple),
    shuffle=st.booleans(),
)


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=recipes)
def test_a_config_survives_toml_and_json(tmp_path: Path, recipe: Recipe) -> None:
    file = write(tmp_path, to_toml(recipe))
    loaded = load(Recipe, file=file)
    assert loaded.value == recipe
    assert load(Recipe, stored=to_dict(recipe)).value == recipe


def test_none_that_toml_cannot_say_is_refused_in_writing() -> None:
    @dataclass(frozen=True)
    class Named:
        name: str | None = "x"

    with pytest.raises(TypeError, match="make None its default"):
        to_toml(Named(None))


def test_the_room_imports_neither_torch_nor_pydantic() -> None:
    code = "import sys, lexmill.config; assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
