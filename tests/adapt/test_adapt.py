"""Adapting: what is trained moves, what is not does not, and adapters go to `peft` and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.oracle import Texts, gap, reference, stored
from torch.nn import functional as F

from lexmill.adapt import AdaptConfig, adapt, load_adapter, save_adapter
from lexmill.errors import UserError
from lexmill.models import Model, load
from lexmill.nn.lora import LoraLinear

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return stored(reference("Bert", "ForSequenceClassification", num_labels=3), tmp_path / "base")


def classifier(base: Path) -> Model:
    model = load(base)
    model.add_stored_classifier("topic")
    return model


def logits(model: Model, texts: Texts) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(*texts.packed, types=texts.types)["topic"]


def train_a_little(model: Model, texts: Texts) -> None:
    """A few steps of plain gradient descent on whatever is trained."""
    model.train()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(3):
        loss = F.cross_entropy(model(*texts.packed, types=texts.types)["topic"], labels)
        for p, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            p.data -= 0.1 * grad.to_dense()


@pytest.mark.parametrize(
    ("config", "moving"),
    [
        (AdaptConfig("frozen"), ()),
        (AdaptConfig("bitfit"), ("bias",)),
        (AdaptConfig("bitfit", layers=1), ("layers.1.*bias",)),
        (AdaptConfig("lora"), ("adapters",)),
        (AdaptConfig("lora", layers=1, targets=("query", "up"), rank=3), ("layers.1.*adapters",)),
        (AdaptConfig("full", layers=1), ("layers.1.",)),
    ],
    ids=["frozen", "bitfit", "bitfit upper", "lora", "lora upper", "full upper"],
)
def test_what_is_trained_moves_and_nothing_else(base, config, moving):
    model, texts = classifier(base), Texts()
    adapted = adapt(model, config)
    before = {name: tensor.clone() for name, tensor in model.trunk.state_dict().items()}
    train_a_little(model, texts)
    moved = {name for name, tensor in model.trunk.state_dict().items() if not torch.equal(tensor, before[name])}
    wanted = {
        name
        for name in before
        for pattern in moving
        if all(part in name for part in pattern.split("*")) and ("layers." in name)
    }
    # The weights that attention gives do not depend on the keys' bias.
    assert moved ^ wanted <= {name for name in wanted if name.endswith("attention.key.bias")}
    assert adapted.moved() >= 0.8
    assert adapted.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapted.trained < adapted.total


def test_a_new_adapter_changes_nothing_and_a_merged_one_says_the_same(base):
    model, texts = classifier(base), Texts()
    plain = logits(model, texts)
    adapted = adapt(model, AdaptConfig("lora", targets=("query", "key", "value", "output", "up", "down"), dropout=0.2))
    assert torch.equal(logits(model, texts), plain)
    train_a_little(model, texts)
    trained = logits(model, texts)
    assert gap(trained, plain) > 1e-2
    adapted.merge()
    assert gap(logits(model, texts), trained) <= 1e-5
    assert not [m for m in model.modules() if isinstance(m, LoraLinear)]
    assert all(p.requires_grad for p in model.parameters())


def test_peft_says_the_same_with_the_adapter_that_was_written(base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model, texts = classifier(base), Texts()
    adapt(model, AdaptConfig("lora", layers=1, rank=4, alpha=6.0))
    train_a_little(model, texts)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", str(base))
    theirs = AutoModelForSequenceClassification.from_pretrained(base)
    theirs = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = theirs(texts.dense_ids, attention_mask=texts.mask, token_type_ids=texts.dense_types).logits
    assert gap(logits(model, texts), expected) <= 1e-5


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_an_adapter_of_peft_is_loaded(base, tmp_path, rank_stabilised):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    theirs = AutoModelForSequenceClassification.from_pretrained(base)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["query", "dense"], task_type="SEQ_CLS", use_rslora=rank_stabilised,
        init_lora_weights=False, exclude_modules=["pooler.dense", "bert.pooler.dense"],
    )  # fmt: skip
    theirs = get_peft_model(theirs, config).eval()
    theirs.save_pretrained(str(tmp_path / "adapter"))
    model, texts = classifier(base), Texts()
    plain = logits(model, texts)
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(texts.dense_ids, attention_mask=texts.mask, token_type_ids=texts.dense_types).logits
    assert gap(logits(model, texts), expected) <= 1e-5
    assert gap(plain, expected) > 1e-2


def test_less_work_is_done_for_what_is_not_trained(base):
    full = classifier(base).training_work()
    work = {}
    for config in (AdaptConfig("lora"), AdaptConfig("lora", layers=1), AdaptConfig("frozen")):
        model = classifier(base)
        adapt(model, config)
        work[config] = model.training_work()
    lora, upper, frozen = work.values()
    assert full > lora > upper > frozen
    assert frozen * 3 == full


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (AdaptConfig("lora", targets=("queries",)), "adapt.targets"),
        (AdaptConfig("lora", layers=3), "adapt.layers"),
    ],
)
def test_what_cannot_be_adapted_is_an_error_at_its_key(base, config, where):
    with pytest.raises(UserError) as error:
        adapt(classifier(base), config)
    assert error.value.where == where


def test_a_task_without_a_head_of_its_own_cannot_leave_everything_as_it_is(tmp_path):
    model = load(stored(reference("Llama", tie_word_embeddings=True), tmp_path))
    model.add_language_head("lm")
    with pytest.raises(UserError, match="nothing would be trained"):
        adapt(model, AdaptConfig("frozen"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"use_dora": True}, "cannot be represented"),
        ({"init_lora_weights": "pissa_niter_4"}, "out of the model's own matrices"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "cannot be represented"),
        ({"bias": "all"}, "only LoRA"),
    ],
)
def test_an_adapter_that_cannot_be_represented_is_refused(base, tmp_path, change, message):
    model = classifier(base)
    adapt(model, AdaptConfig("lora"))
    save_adapter(model, tmp_path, str(base))
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_adapter(classifier(base), tmp_path)


@pytest.mark.parametrize(
    "name", ["bert.embeddings.word_embeddings.lora_embedding_A", "bert.encoder.layer.0.x.lora_B.bias"]
)
def test_a_tensor_that_has_no_place_is_an_error_and_not_left_out(base, tmp_path, name):
    model = classifier(base)
    adapt(model, AdaptConfig("lora"))
    save_adapter(model, tmp_path, str(base))
    file = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.{name}": torch.ones(3)}, file)
    with pytest.raises(UserError, match=f"'base_model.model.{name}' has no place"):
        load_adapter(classifier(base), tmp_path)


def test_chosen_layers_alone_leave_a_table_that_a_head_shares_as_it_is(tmp_path):
    model = load(stored(reference("Llama", tie_word_embeddings=True), tmp_path))
    model.add_language_head("lm")
    adapt(model, AdaptConfig("full", layers=1))
    assert not model.trunk.embeddings.token.weight.requires_grad
    assert model.untrained_layers() == len(model.trunk.layers) - 1


def test_a_run_without_trained_weights_in_the_trunk_does_not_say_that_it_moved(base):
    assert "trunk_moved" not in adapt(classifier(base), AdaptConfig("frozen")).effect()
    assert adapt(classifier(base), AdaptConfig("lora")).effect()["trunk_moved"] == 0


def test_an_adapter_of_another_model_or_none_at_all_is_refused(base, tmp_path):
    model = classifier(base)
    adapt(model, AdaptConfig("lora"))
    save_adapter(model, tmp_path, str(base))
    other = load(stored(reference("Bert", hidden_size=16), tmp_path / "other"))
    with pytest.raises(UserError, match="do not fit"):
        load_adapter(other, tmp_path)
    with pytest.raises(UserError, match="no readable adapter"):
        load_adapter(model, base)


def test_a_family_whose_files_peft_cannot_adapt_says_so_and_writes_nothing(tmp_path):
    model = load(stored(reference("GPT2"), tmp_path / "base"))
    model.add_classifier("topic", 3)
    adapt(model, AdaptConfig("lora"))
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match="cannot say"):
        save_adapter(model, tmp_path / "adapter", "base")
    assert not list((tmp_path / "adapter").iterdir())
