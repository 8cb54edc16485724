"""The moments of a training step at which memory can be at its highest. Bytes of one process."""

from dataclasses import dataclass, field
from functools import cached_property

from vltrain.models.sizes import HEAD_PIECE, Census, ModelSizes, Place
from vltrain.training.activations import (
    FLOAT,
    SEEING,
    BatchSizes,
    Compute,
    decoder_kept,
    decoder_layer,
    decoder_output,
    image_tokens_given,
    logits_backward,
    logits_forward,
    logits_gradient,
    residual_bytes,
    vision_kept,
    vision_layer,
    vision_passing,
)
from vltrain.training.optimizer_bytes import Optimizer
from vltrain.training.sharing import Sharing


@dataclass(frozen=True)
class Features:
    """What a run computes of its pictures before its first step, and reads from the disk in each.

    The weights are on the GPU all the same: they compute the features.
    """

    parts: tuple[Place, ...]  # that no picture passes in a step
    at_once: int  # pictures whose features are computed together


@dataclass(frozen=True)
class Work:
    """All about a run that its memory depends on, beside model and batch."""

    compute: Compute
    optimizer: Optimizer
    accumulates: bool = True  # several micro-batches make a step: gradients are there from before
    sharing: Sharing = field(default_factory=Sharing)
    features: Features | None = None  # None: pictures come as pixels


@dataclass(frozen=True)
class Moment:
    """What comes and goes, at one moment of a step. Bytes."""

    name: str
    gradients: int
    activations: int = 0
    logits: int = 0
    vision: int = 0
    copies: int = 0  # of weights in half precision or gathered, of gradients before they are added

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.logits + self.vision + self.copies


@dataclass(frozen=True)
class Step:
    """A step of training, taken apart."""

    held: Census  # weights and gradients as they lie in memory
    computed: Census  # weights as they are computed with
    sizes: ModelSizes
    batch: BatchSizes
    work: Work

    def moments(self) -> tuple[Moment, ...]:
        """The moments in their order."""
        return (
            *self._features(),
            self._seeing(),
            self._loss(),
            self._loss_backward(),
            self._head_backward(),
            *self._layers_backward(),
            self._embeddings_backward(),
            self._vision_backward(),
            self._optimizer(),
        )

    @cached_property
    def _gradients(self) -> int:
        """Of all that learns."""
        return self._gradients_at(*self.held.places)

    @cached_property
    def _gradients_before(self) -> int:
        """What earlier micro-batches of the step have left."""
        return self._gradients if self.work.accumulates else 0

    def _gradients_at(self, *places: Place) -> int:
        whole = sum(self.held.at(place).learned_bytes for place in places)
        return whole if self.work.sharing.sums_late else whole // self.work.sharing.share(2)

    @cached_property
    def _kept(self) -> int:
        """Activations of the decoder, from the end of the forward on."""
        return decoder_kept(self.sizes, self.computed, self.batch, self.work.compute)

    @cached_property
    def _seen(self) -> int:
        """Activations of tower and projector, until the way back reaches them.

        Image tokens that are given are there all the while; patches that are given are what the
        projector keeps.
        """
        features, compute = self.work.features, self.work.compute
        if features is not None and "projector" in features.parts:
            return image_tokens_given(self.sizes, self.batch, compute)
        return vision_kept(self.sizes, self.computed, self.batch, compute)

    @cached_property
    def _gathered(self) -> int:
        """Shared-out weights that a process holds whole: those of a layer, and the next or head.

        ZeRO-3 goes ahead in whole matrices, the last of which may be the head's.
        """
        sharing = self.work.sharing
        if sharing.share(3) == 1:
            return 0
        layer = self.computed.at("layers").total // self.sizes.decoder.layers
        head = self.sizes.decoder.vocabulary * self.sizes.decoder.width
        there = max(layer, min(layer + sharing.ahead, sharing.most_ahead))
        gathered = min(there + max(layer, head), self.computed.all.total)
        return gathered * self.work.compute.bytes

    @property
    def _alone(self) -> bool:
        """Whether the process has the model to itself: then embeddings and head that learn add up
        their own gradients (`vltrain.models.learned_vocabulary`)."""
        return self.work.sharing.engine == "none"

    def _copies(self, *places: Place) -> int:
        """What autocast makes of the learned float32 matrices in places, once a forward."""
        whole = (place for place in places if not (place == "head" and self._alone))
        return sum(
            self.computed.at(place).learned_matrices * self.work.compute.bytes
            for place in whole
            if self._is_copied(place)
        )

    def _is_copied(self, place: Place) -> bool:
        """Whether what learns there is wider than what is computed with."""
        there = self.computed.at(place)
        return there.learned_bytes > there.learned * self.work.compute.bytes

    @property
    def _head_piece(self) -> int:
        """A piece of a head that adds up its own gradient, as it is computed with."""
        if not (self._alone and self.computed.at("head").learned):
            return 0
        d = self.sizes.decoder
        return min(HEAD_PIECE, d.vocabulary) * d.width * self.work.compute.bytes

    @cached_property
    def _made_in_layers(self) -> int:
        """What all layers of the decoder make of their weights, where none is recomputed.

        Compiled ones scale the second matrix of an adapter; where autocast copies it, it is that
        copy. All adapters are taken to have one rank.
        """
        adapter, copied = self.computed.at("adapter"), self._copies("adapter")
        if self.work.compute.compiled and adapter.learned and not copied:
            there = self.computed.adapters
            share = there.outputs / max(1, there.inputs + there.outputs)
            copied = round(adapter.learned_matrices * share) * self.work.compute.bytes
        return self._copies("layers") + copied

    def _left(self, copies: int, layers: int) -> int:
        """Of the copies in as many layers those that are there until the way back has used them:
        what is recomputed makes its own anew, layers that keep a share keep a share of theirs."""
        kept = layers - self.work.compute.recomputed(layers)
        return round(copies * kept // layers * self.work.compute.kept_share)

    @cached_property
    def _decoder_copies(self) -> int:
        return self._left(self._made_in_layers, self.sizes.decoder.layers)

    @cached_property
    def _kept_copies(self) -> int:
        """All copies that are there until the way back has used them."""
        vision = self._left(self._copies("vision"), self.sizes.tower.layers)
        return self._copies("head") + self._decoder_copies + vision

    def _features(self) -> tuple[Moment, ...]:
        """Before the first step nothing has a gradient. The optimizer's states, which are not there
        either, are counted all the same."""
        features = self.work.features
        if features is None:
            return ()
        passing = vision_passing(self.sizes, features.at_once, self.work.compute, features.parts)
        return (Moment("the features, before the first step", 0, vision=passing),)

    def _seeing(self) -> Moment:
        width = self.sizes.decoder.width * residual_bytes(self.computed)
        given = () if self.work.features is None else self.work.features.parts
        parts = [part for part in SEEING if part not in given]
        passing = vision_passing(self.sizes, self.batch.pictures, self.work.compute, parts)
        return Moment(
            "the vision tower's forward",
            self._gradients_before,
            activations=self.batch.tokens * width,
            vision=self._seen + passing,
            copies=self._copies("vision") + self._gathered,
        )

    def _loss(self) -> Moment:
        """The end of the forward, up to which autocast holds on to all copies.

        Embeddings are looked up as they are, without a copy. What is compiled makes its own and
        keeps those alone that its way back uses.
        """
        places = [place for place in self.computed.places if place != "embeddings"]
        compiled = self.work.compute.compiled
        return Moment(
            "the loss",
            self._gradients_before,
            activations=self._kept + decoder_output(self.sizes, self.computed, self.batch),
            logits=logits_forward(self.sizes, self.batch, self.work.compute),
            vision=self._seen,
            copies=(self._kept_copies if compiled else self._copies(*places))
            + (self._head_piece if self._is_copied("head") else 0)
            + self._gathered,
        )

    def _loss_backward(self) -> Moment:
        return Moment(
            "the loss, backward",
            self._gradients_before,
            activations=self._kept,
            logits=logits_backward(self.sizes, self.batch, self.work.compute),
            vision=self._seen,
            copies=self._kept_copies + self._gathered,
        )

    def _fresh_gradient(self, place: Place, count: int) -> int:
        """A matrix' gradient before it is added: as it is computed, and in the weight's dtype."""
        there, width = self.computed.at(place), self.work.compute.bytes
        if not there.learned:
            return 0
        own = there.learned_bytes // there.learned
        return count * (width + own if own > width else width)

    def _head_backward(self) -> Moment:
        """One that adds up its own gradient has a piece of its weights and of their gradient at a
        time, and in float32 the gradient of what it has read, beside a piece's share of that."""
        gradients = self._gradients_before
        if piece := self._head_piece:
            gradients = max(gradients, self._gradients_at("head"))
            read = self.batch.learned_tokens * self.sizes.decoder.width
            own = piece * (2 if self._is_copied("head") else 1)
            own += read * (FLOAT + self.work.compute.bytes)
        else:
            own = self._fresh_gradient("head", self.computed.at("head").learned)
        return Moment(
            "the head, backward",
            gradients,
            activations=self._kept,
            logits=logits_gradient(self.sizes, self.batch, self.work.compute),
            vision=self._seen,
            copies=own + self._kept_copies + self._gathered,
        )

    @property
    def _anew(self) -> float:
        """The share of what a layer keeps that its way back computes anew."""
        compute = self.work.compute
        return 1.0 if compute.checkpointing else 1.0 - compute.kept_share

    def _layers_backward(self) -> tuple[Moment, Moment]:
        """The decoder's last layer, when all activations are there; its first, with all gradients.

        Beside a layer's copies there is the gradient of its largest matrix, as it is computed and,
        where that is narrower, in the weight's dtype; under ZeRO-3, which takes those of a layer
        together, of all.
        """
        d, compute = self.sizes.decoder, self.work.compute
        layer = decoder_layer(self.sizes, self.computed, self.batch, compute)
        here = layer.working + round(layer.kept * self._anew)
        largest = d.width * max(3 * d.attention_width, d.mlp_width)
        if self.work.sharing.zero_stage == 3:
            largest = self.computed.at("layers").learned // d.layers
        rest = self._fresh_gradient("layers", largest) + self._gathered
        one_layer = self._made_in_layers // d.layers
        last = rest + max(one_layer, self._decoder_copies)
        to_come = self._gradients_at("embeddings", "vision", "projector")
        to_come += self._gradients_at("layers", "adapter") // d.layers
        return (
            Moment(
                "the last layer, backward",
                max(self._gradients_before, self._gradients_at("head")),
                activations=self._kept + here,
                vision=self._seen,
                copies=last,
            ),
            Moment(
                "the first layer, backward",
                max(self._gradients_before, self._gradients - to_come),
                activations=self._kept // d.layers + here,
                vision=self._seen,
                copies=rest + one_layer,
            ),
        )

    def _embeddings_backward(self) -> Moment:
        """The embedding matrix' gradient is dense, and there beside the one it is added to. Where
        it is added up in place there are the tokens' alone: as they come, in order, and summed."""
        there, batch = self.computed.at("embeddings"), self.batch
        own = there.learned_bytes
        if self._alone and there.learned:
            own = 3 * batch.tokens * self.sizes.decoder.width * own // there.learned
        copies = own + self._gathered
        return Moment("the embeddings, backward", self._gradients, vision=self._seen, copies=copies)

    def _vision_backward(self) -> Moment:
        """Tower and projector, where they learn; a layer of the tower is recomputed, then left."""
        vision, copies = self._seen, self._copies("projector")
        if self.computed.at("vision").learned:
            layer = vision_layer(self.sizes.tower, self.work.compute)
            vision += self.batch.pictures * round(layer * (1 + self._anew))
            copies += self._copies("vision") // self.sizes.tower.layers
        return Moment("the vision tower, backward", self._gradients, vision=vision, copies=copies)

    def _optimizer(self) -> Moment:
        temporaries = self.work.optimizer.temporaries(self.held) // self.work.sharing.share(1)
        return Moment("the optimizer's step", self._gradients, copies=temporaries)
