"""A prefix, a prompt and AdaLoRA go to `peft` and come back from it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapt.test_methods import ALL, Base
from tests.models.oracle import Texts, gap, reference, stored

from lexmill.adapt import AdaptConfig, adapt, load_adapter, save_adapted
from lexmill.errors import UserError
from lexmill.models import load
from lexmill.models.generate import greedy
from lexmill.nn import Packed

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # peft says so of every AdaLoRA adapter, its own too: it takes the pattern for that of LoRA, and then uses it.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]

FORMATS = {
    "prefix": AdaptConfig("prefix", tokens=5),
    "prompt": AdaptConfig("prompt", tokens=5),
    "adalora": AdaptConfig("adalora", rank=2, alpha=6.0, targets=ALL),
}


@pytest.fixture(params=["Bert", "Llama"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    torch.manual_seed(0)
    kind: str = request.param
    grouped = {"num_key_value_heads": 2} if kind == "Llama" else {}
    model = reference(kind, "ForSequenceClassification", num_labels=3, **grouped)
    return Base(stored(model, tmp_path / "base"), Texts())


def theirs(base: Base, adapter: Path | None = None, config: Any = None) -> Any:
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base.path)
    if adapter is not None:
        return PeftModel.from_pretrained(model, str(adapter)).eval()
    return get_peft_model(model, config).eval()


def answers(model: Any, texts: Texts) -> torch.Tensor:
    """Each text alone: with a prompt a LLaMA classifier of `transformers` would read the padding."""
    rows: list[torch.Tensor] = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for ids, types in zip(
            texts.ids.split(texts.layout.lengths.tolist()),
            texts.types.split(texts.layout.lengths.tolist()),
            strict=True,
        ):
            asked = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
            if model.base_model.config.model_type == "bert":
                asked["token_type_ids"] = types[None]
            rows.append(model(**asked).logits[0])
    return torch.stack(rows)


@pytest.mark.parametrize("name", FORMATS)
def test_peft_says_the_same_with_what_was_written(base: Base, name: str, tmp_path: Path) -> None:
    model = base.model()
    adapted = adapt(model, FORMATS[name])
    base.train(adapted)
    if adapted.companion is not None:
        with torch.no_grad():
            next(iter(adapted.companion.adapters.values())).values.zero_()  # A layer that is left no rank at all.
    (tmp_path / "adapter").mkdir()
    save_adapted(adapted, tmp_path / "adapter", str(base.path))
    assert gap(base.logits(model), answers(theirs(base, tmp_path / "adapter"), base.texts)) <= 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_what_peft_wrote_is_loaded(base: Base, name: str, tmp_path: Path) -> None:
    from peft import AdaLoraConfig, PrefixTuningConfig, PromptTuningConfig

    torch.manual_seed(1)
    configs = {
        "prefix": lambda: PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
        "prompt": lambda: PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
        "adalora": lambda: AdaLoraConfig(
            task_type="SEQ_CLS", init_r=3, target_r=2, total_step=10, target_modules=["query", "q_proj", "v_proj"],
            init_lora_weights=False,
        ),
    }  # fmt: skip
    written = theirs(base, config=configs[name]())
    written.save_pretrained(str(tmp_path / "adapter"))
    model = base.model()
    plain = base.logits(model)
    load_adapter(model, tmp_path / "adapter")
    assert gap(base.logits(model), answers(written, base.texts)) <= 1e-5
    assert gap(plain, base.logits(model)) > 1e-2


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_decoding_over_a_cache_goes_on_behind_what_is_in_front(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load(stored(reference("Llama", "ForCausalLM", num_key_value_heads=2), tmp_path / "base"))
    model.add_language_head("lm")
    adapt(model, FORMATS[name]).merge()
    model.eval()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    decoded = greedy(model, prompts, 6)
    for prompt, found in zip(prompts, decoded, strict=True):
        ids = list(prompt)
        for _ in range(6):
            row = torch.tensor(ids)
            with torch.no_grad():
                hidden = model.hidden(row, torch.arange(len(ids)), Packed.of([len(ids)]), only="last")
                ids.append(int(model.heads["lm"](hidden).argmax()))
        assert found.ids == ids[len(prompt) :]


def test_what_fits_no_model_or_format_is_an_error(base: Base, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    adapted = adapt(base.model(), FORMATS["prefix"])
    save_adapted(adapted, tmp_path / "adapter", str(base.path))
    other = load(stored(reference("Bert", hidden_size=24), tmp_path / "other"))
    with pytest.raises(UserError, match="do not fit"):
        load_adapter(other, tmp_path / "adapter")
    half = adapt(base.model(), AdaptConfig("prefix", layers=(1,)))
    with pytest.raises(UserError, match="equal prefix in each layer"):
        save_adapted(half, tmp_path / "adapter", str(base.path))
    with pytest.raises(UserError, match="no format"):
        save_adapted(adapt(base.model(), AdaptConfig("bottleneck")), tmp_path / "adapter", str(base.path))
