"""A trunk with its heads, and what must be remembered of where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lexmill.errors import UserError
from lexmill.models import families
from lexmill.models.backbone import initialise
from lexmill.models.config import LayerOverride
from lexmill.models.encoder_decoder import EncoderDecoder, Memory
from lexmill.models.exits import Exits
from lexmill.models.heads import ClassifierHead, ClassifierShape, Head, LMHead, SpanHead, SpanShape
from lexmill.models.trunk import Only, Structure, Trunk
from lexmill.nn.addition import describe_additions
from lexmill.nn.attention import Attention
from lexmill.nn.dropout import Dropout
from lexmill.nn.layout import Layout, Packed
from lexmill.nn.pooling import Pooling, pool


@dataclass
class Origin:
    """What a model's files say beyond what the model uses, kept so that saving loses nothing.

    Args:
        config: the Hugging Face config, all keys.
        prefix: of trunk tensors.
        names: of trunk tensors that are not named as the family's table has it, by the names there.
    """

    config: dict[str, Any] = field(default_factory=dict[str, Any])
    prefix: str = ""
    names: dict[str, str] = field(default_factory=dict[str, str])


class Model(nn.Module):
    """A trunk with named heads.

    Args:
        family: a name for reading and writing files; nothing here depends on which it is.
        extras: tensors of the source that the trunk does not use, by their names there; saved bit for bit.
    """

    def __init__(
        self,
        trunk: Trunk,
        family: str,
        *,
        extras: dict[str, Tensor] | None = None,
        origin: Origin | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict()
        self.family = family
        self.extras = extras or {}
        self.origin = origin or Origin()

    @property
    def config(self) -> Structure:
        return self.trunk.config

    @property
    def device(self) -> torch.device:
        return self.trunk.embeddings.token.like.device

    @property
    def dtype(self) -> torch.dtype:
        return self.trunk.embeddings.token.like.dtype

    @property
    def head_defaults(self) -> ClassifierShape:
        """The classification head of this family; its `num_labels` is a placeholder, its dropout the trunk's."""
        shape = families.find(self.family).classifier_shape(self.config, self.origin.config)
        return replace(shape, dropout=self.config.dropout)

    @property
    def pooling(self) -> Pooling:
        """The vector of a sequence that this family classifies by."""
        return self.head_defaults.pooling or "first"

    @property
    def has_tied_output(self) -> bool:
        """Whether a head shares the token embedding, whose gradient then has every row."""
        return any(isinstance(head, LMHead) and head.tied for head in self.heads.values())

    def matmul_shapes(self) -> list[tuple[int, int]]:
        """(in, out) of every matrix that each token of the trunk is multiplied by."""
        return self.trunk.matmul_shapes()

    def trunk_parameters(self) -> int:
        """Weights that each token of the trunk is multiplied by; useful work is 2 × this a token, 6 × in training.

        Of an encoder-decoder it is the mean of both sides, as for texts that are as long as their answers."""
        return sum(width * height for width, height in self.matmul_shapes()) // self.trunk.sides

    def untrained_layers(self) -> int:
        """How many layers from below give the same for a text however long one trains, dropout aside: those under the
        lowest trained weight. 0 where the embeddings, or anything beside the layers, are trained."""
        parts = {name.partition(".")[0] for name, p in self.trunk.named_parameters() if p.requires_grad}
        if self.trunk.has_prompt or parts - {"layers", "norm"}:
            return 0
        # Layers may share weights, so that the lowest trained one is asked for in the order in which they run.
        trained = (any(p.requires_grad for p in layer.parameters()) for layer in self.trunk.layers)
        return next((index for index, moves in enumerate(trained) if moves), len(self.trunk.layers))

    def training_work(self, known_layers: int = 0) -> int:
        """Operations a token that training must do: 2 a weight forward, 2 for the gradient of its input from the lowest
        layer up that is trained, 2 for its own where it is trained. The lowest `known_layers` do nothing."""
        parts = [*([] if known_layers else [self.trunk.embeddings]), *self.trunk.blocks[known_layers:]]
        work, reached = 0, any(p.requires_grad for p in self.trunk.embeddings.parameters())
        for part in parts:
            reached = reached or any(p.requires_grad for p in part.parameters())
            for weight in self.trunk.matrices(part):
                work += weight.numel() * (2 + 2 * reached + 2 * weight.requires_grad)
        return work // self.trunk.sides

    def depths(self) -> dict[str, int]:
        """How high each parameter stands, by its name: 0 for embeddings, from 1 on for layers, then all above them.

        One that several layers share stands with the highest."""
        found = {id(p): 0 for p in self.trunk.embeddings.parameters()}
        for index, block in enumerate(self.trunk.blocks):
            found |= {id(p): 1 + index for p in block.parameters()}
        return {name: found.get(id(p), 1 + len(self.trunk.blocks)) for name, p in self.named_parameters()}

    def hidden(
        self,
        ids: Int[Tensor, "*rows"],
        positions: Int[Tensor, "*rows"],
        layout: Layout,
        *,
        types: Int[Tensor, "*rows"] | None = None,
        only: Only = "all",
    ) -> Float[Tensor, "*some_rows dim"]:
        """The trunk's last hidden state; see `Trunk.forward`."""
        return self.trunk(ids, positions, layout, types=types, only=only)

    def pooled(
        self,
        ids: Int[Tensor, "*rows"],
        positions: Int[Tensor, "*rows"],
        layout: Layout,
        *,
        types: Int[Tensor, "*rows"] | None = None,
        how: Pooling | None = None,
    ) -> Float[Tensor, "seq dim"]:
        """One vector a sequence, by this family's pooling where `how` is None. Computes no more than it needs."""
        how = how or self.pooling
        if how == "mean":
            return pool(self.hidden(ids, positions, layout, types=types), layout, how)
        return self.hidden(ids, positions, layout, types=types, only=how)

    def memory(self, ids: Int[Tensor, "*rows"], positions: Int[Tensor, "*rows"], layout: Layout) -> Memory:
        """What the encoder makes of sources, for a decoder to read."""
        return Memory(self.hidden(ids, positions, layout), layout)

    def decoded(
        self,
        ids: Int[Tensor, "*rows"],
        positions: Int[Tensor, "*rows"],
        layout: Layout,
        memory: Memory,
    ) -> Float[Tensor, "*rows dim"]:
        """The decoder's last hidden state where it is to say each of these target tokens: it has been given its start
        token and the target before. Sequence `i` reads source `i` of the memory."""
        trunk = self.decoding_trunk
        return trunk.decode(trunk.shifted(ids, layout), positions, layout, memory)

    @property
    def decoding_trunk(self) -> EncoderDecoder:
        """The trunk, where it has a decoder that reads a source; otherwise a `UserError`."""
        if not isinstance(self.trunk, EncoderDecoder):
            hint = "take an encoder-decoder, such as a T5"
            raise UserError(f"a model of the family '{self.family}' has no decoder that reads a source", hint=hint)
        return self.trunk

    def forward(
        self,
        ids: Int[Tensor, "*rows"],
        positions: Int[Tensor, "*rows"],
        layout: Layout,
        *,
        types: Int[Tensor, "*rows"] | None = None,
        heads: Sequence[str] | None = None,
    ) -> dict[str, Float[Tensor, "*some_rows out"]]:
        """What heads say, by name; all of them where `heads` is None. The trunk runs once.

        Outside training, packed texts may leave at the trunk's exits, where these are for the one head that is asked.
        """
        names = list(self.heads) if heads is None else list(heads)
        exits = self.trunk.exits
        if isinstance(exits, Exits) and exits.acts_on(names) and isinstance(layout, Packed) and not self.training:
            last = cast("ClassifierHead", self.heads[names[0]])
            return {names[0]: exits.run(self.trunk, last, ids, positions, layout, types)}
        wants: dict[str, Pooling | None] = {}
        for name in names:
            wants[name] = cast("Head", self.heads[name]).pooling
        if len(set(wants.values())) == 1 and (how := wants[names[0]]) is not None:
            vector = self.pooled(ids, positions, layout, types=types, how=how)
            return {name: self.heads[name](vector) for name in names}
        hidden = self.hidden(ids, positions, layout, types=types)
        views = {how: hidden if how is None else pool(hidden, layout, how) for how in set(wants.values())}
        if "first" in views and self.trunk.has_prompt:
            # The first row is then not among those of the tokens; a rare wish, that costs a second pass.
            views["first"] = self.pooled(ids, positions, layout, types=types, how="first")
        return {name: self.heads[name](views[how]) for name, how in wants.items()}

    def add_head(self, name: str, head: Head) -> None:
        """Attach a head, on the trunk's device, in its precision and mode. A taken name is a `UserError`."""
        if name in self.heads:
            raise UserError(f"the model has a head '{name}' already", hint=f"its heads: {', '.join(self.heads)}")
        if not name or "." in name:
            raise UserError(f"'{name}' cannot name a head", hint="use a name without dots")
        if isinstance(head, LMHead) and head.tied:
            self.trunk.embeddings.token.sparse = False
        self.heads[name] = head.to(self.device, self.dtype).train(self.training)

    def remove_head(self, name: str) -> None:
        """Take a head off; its weights are gone."""
        head = self.heads.pop(name)
        if isinstance(head, LMHead) and head.tied:
            self.trunk.embeddings.token.sparse = not self.has_tied_output

    def add_classifier(self, name: str, num_labels: int, **changes: Any) -> ClassifierHead:
        """Attach a classification head as this family has it, with `changes` to its `ClassifierShape`.

        A transform and its norm start from the source's pretrained ones where there are such of their shape; other
        weights are drawn from torch's generator.
        """
        shape = replace(self.head_defaults, num_labels=num_labels, **changes)
        head = ClassifierHead(self.config.hidden_size, shape)
        initialise(head, self.config.initializer_range, fan_in=self.trunk.fan_in)
        if head.transform is not None:
            self._start(head, "classifier", ("transform.", "norm."))
        self.add_head(name, head)
        return head

    def add_token_classifier(self, name: str, num_labels: int) -> ClassifierHead:
        """Attach a head that classifies every token, as this family has it; weights are drawn."""
        shape = families.find(self.family).token_shape(self.config, self.origin.config)
        head = ClassifierHead(
            self.config.hidden_size, replace(shape, num_labels=num_labels, dropout=self.config.dropout)
        )
        initialise(head, self.config.initializer_range, fan_in=self.trunk.fan_in)
        self.add_head(name, head)
        return head

    def add_stored_classifier(
        self, name: str, use: Literal["classifier", "token_classifier"] = "classifier"
    ) -> ClassifierHead:
        """Attach the head that classifies texts, or tokens, of the source files. A `UserError` where they hold none, or
        only some of it."""
        stored = self.spare(use)
        output = stored.get("output.weight")
        if output is None:
            raise UserError("the model's files hold no classification head", hint="train one, or name another model")
        family = families.find(self.family)
        form = family.classifier_shape if use == "classifier" else family.token_shape
        shape = replace(form(self.config, self.origin.config), num_labels=len(output), dropout=self.config.dropout)
        head = ClassifierHead(self.config.hidden_size, shape)
        for ours, parameter in head.named_parameters():
            if ours not in stored or stored[ours].shape != parameter.shape:
                theirs = families.find(self.family).heads[use][ours].format(prefix=self.origin.prefix)
                hint = "it was left out, or belongs to another model: what it would do cannot be known"
                raise UserError(f"the tensor '{theirs}' of the head is missing, or does not fit", hint=hint)
        self._start(head, use)
        self.add_head(name, head)
        return head

    def add_language_head(self, name: str) -> LMHead:
        """Attach the head that predicts tokens, of this family's form: its output is the shared embedding where the
        config ties it; the rest is the source's own, or drawn from torch's generator where there is none."""
        tied = self.trunk.embeddings.token if self.config.tied_output else None
        shape = families.find(self.family).language_shape(self.config, self.origin.config)
        head = LMHead(self.config.hidden_size, self.config.vocab_size, shape, tied=tied)
        for part in head.children():
            if part is not head.output or tied is None:
                initialise(part, self.config.initializer_range, fan_in=self.trunk.fan_in)
        self._start(head, "lm")
        self.add_head(name, head)
        return head

    def add_span_head(self, name: str) -> SpanHead:
        """Attach a head that says of each token how likely a span starts and ends there; its weights are drawn."""
        head = SpanHead(self.config.hidden_size, SpanShape(self.config.dropout))
        initialise(head, self.config.initializer_range, fan_in=self.trunk.fan_in)
        self.add_head(name, head)
        return head

    def set_dropout(self, p: float) -> None:
        """Drop this share of hidden states, attention weights and head inputs in training, in place of the config's."""
        for module in self.modules():
            if isinstance(module, Dropout):
                module.p = p
            elif isinstance(module, Attention):
                module.dropout = p

    def drops(self) -> bool:
        """Whether anything is dropped in training."""
        shares = (
            m.p if isinstance(m, Dropout) else m.dropout if isinstance(m, Attention) else 0 for m in self.modules()
        )
        return any(share > 0 for share in shares)

    def structure(self) -> dict[str, Any]:
        """What a Hugging Face config cannot say: per-layer overrides, additions to the trunk, heads. Empty where there
        is none of them."""
        found: dict[str, Any] = {}
        if self.config.layers and self.config.layers != self._own_layers():
            found["layers"] = [asdict(layer) for layer in self.config.layers]
        if additions := describe_additions(self.trunk):
            found["additions"] = additions
        if self.heads:
            heads = {name: cast("Head", head) for name, head in self.heads.items()}
            found["heads"] = {name: {"kind": head.kind, **head.describe()} for name, head in heads.items()}
        return found

    def _own_layers(self) -> tuple[LayerOverride, ...]:
        """The overrides that the family's own config keys say."""
        family = families.find(self.family)
        return family.read_config(family.write_config(self.config, self.origin.config)).layers

    def spare(self, use: families.Use) -> dict[str, Tensor]:
        """Unused tensors of the source that are this kind of head's, by our names within a head."""
        family = families.find(self.family)
        named = {ours: theirs.format(prefix=self.origin.prefix) for ours, theirs in family.heads.get(use, {}).items()}
        found = {family.canonical(name): tensor for name, tensor in self.extras.items()}
        return {ours: found[theirs] for ours, theirs in named.items() if theirs in found}

    def _start(self, head: Head, use: families.Use, parts: tuple[str, ...] = ("",)) -> None:
        shared = {id(one) for one in self.trunk.embeddings.token.parameters()}
        own = {name: parameter for name, parameter in head.named_parameters() if id(parameter) not in shared}
        with torch.no_grad():
            for name, tensor in self.spare(use).items():
                if name.startswith(parts) and name in own and own[name].shape == tensor.shape:
                    own[name].copy_(tensor)
