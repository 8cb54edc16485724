"""Bytes that one micro-batch takes on its way through a model, and until it is back.

Each formula counts the tensors that autograd keeps for the way back, or that live at the same
moment, of the operations as the models do them. Letters: `D` width of the hidden states, `A` of
all heads together, `M` of the MLP, `V` vocabulary, `T` tokens of the batch, `c` bytes of what is
computed (2 under autocast, else 4), `e` bytes of the hidden states between layers: those of the
embedding matrix, which autocast leaves alone.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from vltrain.models.sizes import AdapterSizes, Census, ModelSizes, Place, TowerSizes

FLOAT = 4  # bytes of a float32
SEEING: tuple[Place, ...] = ("vision", "projector")  # what a picture passes

Attention = Literal["sdpa", "packed", "eager"]


@dataclass(frozen=True)
class BatchSizes:
    """What one process takes through the model at a time."""

    rows: int
    row_tokens: int  # with padding, image tokens included
    learned_tokens: int  # of the whole batch
    pictures: int  # of the whole batch

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens


@dataclass(frozen=True)
class Compute:
    """How a model is computed with."""

    bytes: int  # of a computed value: 2 under autocast in half precision, else 4
    attention: Attention = "sdpa"
    checkpointing: bool = True
    recompute_every: int = 1  # with checkpointing, each so-many-th layer is recomputed

    kept_share: float = 1.0  # of a layer that is not recomputed whole; the rest is, within it
    compiled: bool = False  # the decoder's layers
    keeps_read: bool = False  # linear layers keep what they read, though they rest
    loss_kernels: bool = False  # of a GPU, in which the loss widens no logits in memory

    @property
    def recomputes_layers(self) -> bool:
        """Whether there are layers that keep nothing but their input."""
        return self.checkpointing or self.kept_share == 0

    def recomputed(self, layers: int) -> int:
        """How many of so many layers are recomputed whole, from outside."""
        return -(-layers // self.recompute_every) if self.checkpointing else 0

    def all_recomputed(self) -> "Compute":
        """The same where every layer keeps nothing but its input."""
        share = 0.0 if self.compiled else 1.0
        outside = not self.compiled
        return replace(self, checkpointing=outside, recompute_every=1, kept_share=share)

    def kept_of(self, whole: int, given: int) -> int:
        """Bytes that a layer keeps which is not recomputed from outside.

        The compiler fills a share of what it would keep beside the layer's input, as far as whole
        tensors fit into it: this is the most that it keeps.

        Args:
            whole: what it would keep, its input included.
            given: its input.
        """
        return given + round((whole - given) * self.kept_share)


@dataclass(frozen=True)
class LayerBytes:
    """One layer of the decoder, on the way back."""

    kept: int  # by a forward whose way back is to come
    working: int  # gradients and temporaries at the layer's worst moment


def residual_bytes(census: Census) -> int:
    """Bytes of one number of the hidden states: embeddings that learn are float32."""
    reading = census.at("embeddings")
    if reading.learned:
        return reading.learned_bytes // reading.learned
    return reading.total_bytes // max(1, reading.total)


def decoder_layer(
    sizes: ModelSizes, census: Census, batch: BatchSizes, compute: Compute
) -> LayerBytes:
    """A layer's activations where it is not recomputed, or while it is.

    On the way back, while the MLP's halves get theirs, there are three gradients as wide as the
    MLP, and around the residual connection the input's and the norm's in float32. A compiled layer
    is taken to hold as much of them.
    """
    d, c = sizes.decoder, compute.bytes
    keep = _compiled_keeps if compute.compiled else _plain_keeps
    token = keep(sizes, census, compute) + _adapters_keep(census.adapters, c) // d.layers
    if compute.compiled and census.adapters.dropout:
        token -= min(d.width, census.adapters.inputs // d.layers)
    pairs = batch.rows * batch.row_tokens**2
    if compute.attention == "eager":
        square = pairs * d.heads * (FLOAT + c)
    else:
        square = pairs * c if _needs_mask(batch, compute.attention) else 0
    working = 3 * c * d.mlp_width + 2 * FLOAT * d.width + residual_bytes(census) * d.width
    if census.adapters.inputs:  # peft widens what an adapter reads
        working += 2 * FLOAT * d.width
    return LayerBytes(batch.tokens * token + square, batch.tokens * working)


def _plain_keeps(sizes: ModelSizes, census: Census, compute: Compute) -> int:
    """Bytes that a layer keeps for a token, its adapters' left out, operation by operation.

    - two norms: the hidden states in float32 (4D each) and the root's inverse; where the norm
      learns, what it scales too;
    - attention: rotated queries and keys (2cA), the projection whose view the values are (3cA),
      the output (cA), a float32 for each head; packed rows copy the values alone (cA);
    - the MLP: both halves and the gated one (3cM);
    - where linear layers learn, or keep it all the same: what each reads (2cD and cM; the
      attention's output is there, and autocast narrows what both halves of the MLP read once for
      each).
    """
    d, c = sizes.decoder, compute.bytes
    token = 2 * FLOAT * (d.width + 1) + _attention_keeps(sizes, compute) + 3 * c * d.mlp_width
    if census.at("layers").learned:
        reads = 3 if c < FLOAT else 2
        token += 2 * FLOAT * d.width + reads * c * d.width + c * d.mlp_width
    elif compute.keeps_read:
        token += 2 * c * d.width + c * d.mlp_width
    return token


def _compiled_keeps(sizes: ModelSizes, census: Census, compute: Compute) -> int:
    """The same of a layer that is compiled: what matrix products read, and what they have made.

    All between two of them is one kernel, which its way back does again from what it has read.
    So of the above is left:

    - the layer's input as it comes (eD) and what attention adds to it (cD), the inverse of both
      norms' roots; not the hidden states in float32, nor what norms scale;
    - attention as it is;
    - both halves of the MLP (2cM), not the gated one;
    - where linear layers learn: what they read, once where two read the same (2cD and cM).
    """
    d, c = sizes.decoder, compute.bytes
    token = (residual_bytes(census) + c) * d.width + 2 * FLOAT
    token += _attention_keeps(sizes, compute) + 2 * c * d.mlp_width
    if census.at("layers").learned:
        token += 2 * c * d.width + c * d.mlp_width
    return token


def _attention_keeps(sizes: ModelSizes, compute: Compute) -> int:
    d = sizes.decoder
    values = 1 if compute.attention == "packed" else 3
    return (3 + values) * compute.bytes * d.attention_width + FLOAT * d.heads


def _adapters_keep(adapters: AdapterSizes, c: int) -> int:
    """Bytes that all adapters keep for a token: what is dropped out of, and the bottleneck (c)."""
    return _dropped_out(adapters, c) + c * adapters.ranks


def _dropped_out(adapters: AdapterSizes, c: int) -> int:
    """What each adapter reads after dropout (c), and dropout's mask (1).

    Of a compiled layer's masks as wide as the hidden states one is computed again, which
    `decoder_layer` takes off. An adapter that reads the MLP's hidden layer, and adapters without
    dropout that read the same, may keep less than this.
    """
    return (c + (1 if adapters.dropout else 0)) * adapters.inputs


def _needs_mask(batch: BatchSizes, attention: Attention) -> bool:
    """Whether rows of different lengths stand side by side, so that padding is masked."""
    return attention == "sdpa" and batch.rows > 1


def decoder_kept(sizes: ModelSizes, census: Census, batch: BatchSizes, compute: Compute) -> int:
    """What the decoder keeps from its forward: a layer's input each, or all of each layer.

    Beside the layers: the last norm's input in float32, and what the head reads.
    """
    d = sizes.decoder
    recomputed = compute.recomputed(d.layers)
    given = residual_bytes(census) * d.width * batch.tokens
    whole = decoder_layer(sizes, census, batch, compute).kept
    layers = recomputed * given + (d.layers - recomputed) * compute.kept_of(whole, given)
    mask = batch.rows * batch.row_tokens**2 if _needs_mask(batch, compute.attention) else 0
    end = FLOAT * d.width * batch.tokens + compute.bytes * d.width * batch.learned_tokens
    return layers + mask + end


def decoder_output(sizes: ModelSizes, census: Census, batch: BatchSizes) -> int:
    """The last norm's output, which is there until the loss is: the head reads rows of it."""
    return batch.tokens * residual_bytes(census) * sizes.decoder.width


def logits_forward(sizes: ModelSizes, batch: BatchSizes, compute: Compute) -> int:
    """The loss at its widest on the way there.

    A loss in blocks holds the logits of learned tokens (c) and, of one block, the float32 logits
    and the two steps of a log-sum-exp; a GPU's kernels hold no block in float32. A loss of one
    piece holds the logits of all tokens (c), them in float32, and their log-softmax.
    """
    d, c = sizes.decoder, compute.bytes
    if sizes.loss_rows is None:
        wide = FLOAT if c < FLOAT else 0
        return batch.tokens * d.vocabulary * (c + wide + FLOAT)
    return _logits_in_blocks(sizes, batch, compute)


def logits_backward(sizes: ModelSizes, batch: BatchSizes, compute: Compute) -> int:
    """The loss at its widest on the way back.

    In blocks the gradient takes the logits' place (c) and, but for a GPU's kernels, one block is
    widened, subtracted from and, until it is replaced, there from the block before. In one piece
    there are the log-softmax, its gradient and that of the logits, in float32.
    """
    d = sizes.decoder
    if sizes.loss_rows is None:
        return batch.tokens * d.vocabulary * 3 * FLOAT
    return _logits_in_blocks(sizes, batch, compute)


def _logits_in_blocks(sizes: ModelSizes, batch: BatchSizes, compute: Compute) -> int:
    rows = 0 if compute.loss_kernels else min(sizes.loss_rows or 0, batch.learned_tokens)
    return sizes.decoder.vocabulary * (batch.learned_tokens * compute.bytes + rows * 3 * FLOAT)


def logits_gradient(sizes: ModelSizes, batch: BatchSizes, compute: Compute) -> int:
    """The gradient that the head's backward reads, and the one of what the head has read."""
    places = batch.tokens if sizes.loss_rows is None else batch.learned_tokens
    return places * compute.bytes * (sizes.decoder.vocabulary + sizes.decoder.width)


def vision_layer(tower: TowerSizes, compute: Compute) -> int:
    """What one layer of the tower keeps of a picture where the tower learns.

    For each patch: two layer norms' inputs in float32 (autocast widens them) with mean and
    deviation, what the four linear layers read, queries, keys and values, a float32 for each head,
    and the input and output of the GELU.
    """
    c = compute.bytes
    patch = 2 * FLOAT * (tower.width + 2) + 6 * c * tower.width + FLOAT * tower.heads
    patch += 2 * c * tower.mlp_width
    return tower.patches * patch


def vision_kept(sizes: ModelSizes, census: Census, batch: BatchSizes, compute: Compute) -> int:
    """What tower and projector keep until the way back reaches them; nothing where both rest.

    A projector that learns keeps, for each patch, the patch itself, the layer norm's input in
    float32, what keys and values are made of, and keys and values; for each image token the query
    before and after its projection, and what the output's projection and norm read.
    """
    tower, width, c = sizes.tower, sizes.decoder.width, compute.bytes
    kept = 0
    if census.at("vision").learned:
        recomputed = compute.recomputed(tower.layers)
        given = FLOAT * tower.width * tower.patches
        whole = compute.kept_of(vision_layer(tower, compute), given)
        kept += recomputed * given + (tower.layers - recomputed) * whole
    if kept or census.at("projector").learned:
        kept += tower.patches * (c * tower.width + (FLOAT + 4 * c) * width)
        kept += tower.image_tokens * (FLOAT + 3 * c) * width
    return batch.pictures * kept


def vision_passing(
    sizes: ModelSizes, pictures: int, compute: Compute, parts: Collection[Place] = SEEING
) -> int:
    """The widest moment of tower or projector in a forward that keeps nothing.

    A layer's MLP holds the patches, their norm in float32 and as computed with, and the hidden
    layer before and after its GELU; the projector holds the patches in the decoder's width: as
    they come, two norms of them in float32, what keys and values are made of, and both.

    Args:
        pictures: that pass at a time.
        parts: which of the two they pass.
    """
    tower, c = sizes.tower, compute.bytes
    widest = {
        "vision": (2 * c + FLOAT) * tower.width + 2 * c * tower.mlp_width,
        "projector": c * tower.width + (5 * c + 2 * FLOAT) * sizes.decoder.width,
    }
    return pictures * tower.patches * max((widest[part] for part in parts), default=0)


def image_tokens_given(sizes: ModelSizes, batch: BatchSizes, compute: Compute) -> int:
    """The image tokens of a batch that has them in the place of pixels."""
    return batch.pictures * sizes.tower.image_tokens * compute.bytes * sizes.decoder.width
