"""Qwen-VL v1, its decoder's layers and its vision tower put together, under the published names.

Dimension letters: `B` batch, `L` tokens, `D` width, `N` pictures of the batch,
`Q` image tokens of a picture.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from vltrain.models.attention import boundary_mask
from vltrain.models.loss import learned_loss
from vltrain.models.qwen_vl.configuration import QwenVLConfig
from vltrain.models.qwen_vl.decoder import DecoderLayer, RMSNorm
from vltrain.models.qwen_vl.positions import log_n_scale, ntk_alpha, rotary_tables
from vltrain.models.qwen_vl.vision import Resampler, VisionTower, in_order, sincos_2d


def host_would_wait(device: torch.device) -> bool:
    """Whether a look at a tensor's values makes the host wait for the device."""
    return device.type == "cuda"


class QwenVLPreTrainedModel(PreTrainedModel):
    """What `transformers` asks of every model: initial weights and what is supported."""

    config_class = QwenVLConfig
    base_model_prefix = "transformer"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "VisionBlock"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DecoderLayer}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill weights that no checkpoint gave; `initialization` leaves loaded ones alone."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            initialization.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            initialization.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            initialization.normal_(module.in_proj_weight, std=std)
            initialization.zeros_(module.in_proj_bias)
        elif isinstance(module, Resampler):
            initialization.normal_(module.query, std=std)
            places, width = module.pos_embed.shape
            initialization.copy_(module.pos_embed, sincos_2d(width, math.isqrt(places)))
        elif isinstance(module, VisionTower):
            width = module.positional_embedding.size(1)
            initialization.normal_(module.positional_embedding, std=width**-0.5)
            initialization.normal_(module.proj, std=module.proj.size(0) ** -0.5)


class QwenVLModel(QwenVLPreTrainedModel):
    """Tokens and pictures to hidden states: everything but `lm_head`."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = VisionTower(config.vision)
        self.sees_always = False  # whether the tower runs where a batch has no picture
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        patch_embeds: Tensor | None = None,
        picture_order: Tensor | None = None,
        *,
        said: bool = False,
    ) -> Tensor:
        """Token embeddings with the image tokens of the pictures over `<imgpad>`.

        Args:
            input_ids: int64 [B, L]; each picture is `<img>`, Q `<imgpad>`, `</img>`.
            pixel_values: float [N, 3, S, S], all pictures of the batch in order, or None.
            image_embeds, patch_embeds, picture_order: as for `forward`.
            said: whether these are tokens that the model has just said: they have no pictures,
                and counting their places would make the host wait for the device at each of them.

        Returns:
            float [B, L, D].

        Raises:
            ValueError: the places for pictures are not those of N pictures.
        """
        embeddings = self.wte(input_ids)
        vision = self.config.vision
        seen = (pixel_values, image_embeds, patch_embeds)
        pictures = sum(part.size(0) for part in seen if part is not None)
        places = input_ids == vision.image_pad_id
        if pictures or not said:
            self._check_places(places, pictures)
        if pictures == 0:
            return embeddings + self._unseen(embeddings) if self.sees_always else embeddings
        image_tokens = None
        if pixel_values is not None or patch_embeds is not None:
            order = None if patch_embeds is None else picture_order
            image_tokens = self.visual(pixel_values, patch_embeds, order)
        image_tokens = in_order(image_embeds, image_tokens, picture_order)
        image_tokens = image_tokens.to(embeddings.dtype).flatten(0, 1)
        # Of the n-th image token the place is where n places have been counted.
        counted = places.flatten().cumsum(0)
        numbers = torch.arange(1, len(image_tokens) + 1, device=counted.device)
        where = torch.searchsorted(counted, numbers)
        return embeddings.flatten(0, 1).index_copy(0, where, image_tokens).view_as(embeddings)

    def _check_places(self, places: Tensor, pictures: int) -> None:
        """Raise ValueError unless bool [B, L] has as many places as the pictures have image tokens.

        In training on a GPU the device looks, and ends the run: the host would wait for it in
        each batch, and what the processor has encoded fits.
        """
        queries = self.config.vision.n_queries
        needed = pictures * queries
        if self.training and host_would_wait(places.device):
            torch._assert_async(places.sum() == needed, "pictures and <imgpad> differ in number")
            return
        wanted = int(places.sum())
        if wanted != needed:
            raise ValueError(
                f"input_ids have {wanted} <imgpad>, but {pictures} pictures of {queries} "
                f"image tokens each need {needed}"
            )

    def _unseen(self, embeddings: Tensor) -> Tensor:
        """Zero, as a function of the tower: a blank picture of which no token is used.

        Its weights get a gradient of zeros, and processes that hold shares of them meet.
        """
        side = self.config.vision.image_size
        blank = embeddings.new_zeros(1, 3, side, side)
        return self.visual(blank)[:0].sum().to(embeddings.dtype)

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        image_embeds: Tensor | None = None,
        patch_embeds: Tensor | None = None,
        picture_order: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the last layer, normalised.

        In eval mode, a sequence longer than `config.seq_length` gets rotary positions and
        queries rescaled; while tokens are added through the cache, the rotary scale stays that
        of the prompt.

        Args:
            input_ids: int64 [B, L], or `inputs_embeds`: float [B, L, D].
            pixel_values: float [N, 3, S, S], all pictures of the batch in order.
            attention_mask: int64 [B, L + cached], 0 where padded; or what the attention takes.
            position_ids: int64 [B, L], counted from 0; default: the place in the row.
            image_embeds: float [K, Q, D], image tokens of pictures whose pixels are not given.
            patch_embeds: float [K, P, V], in their place what the ViT made of these pictures.
            picture_order: int64 [N], where only some pictures have pixels: each one's place
                among the K and the others behind them.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`, pictures beside the
                latter, or pictures and their places differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        pictures = (pixel_values, image_embeds, patch_embeds)
        if inputs_embeds is not None and any(part is not None for part in pictures):
            raise ValueError("pictures have their places in input_ids, not in inputs_embeds")
        if inputs_embeds is None:
            said = past_key_values is not None and input_ids.size(1) == 1
            inputs_embeds = self.embed(input_ids, *pictures, picture_order, said=said)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        boundaries = kwargs.get("cu_seq_lens_q")
        mask = boundary_mask(self.config, inputs_embeds, attention_mask, boundaries)
        if mask is None:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        alpha = self._rotary_scale(inputs_embeds, position_ids, past_key_values, cached)
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.size(1), device=inputs_embeds.device)[None]
            position_ids = position_ids + cached
        rotary = rotary_tables(position_ids, alpha, self.config)
        query_scale = None
        if self.config.use_logn_attn and not self.training:
            query_scale = log_n_scale(position_ids, self.config.seq_length)
        hidden_states = inputs_embeds
        for layer in self.h:
            hidden_states = layer(
                hidden_states, mask, rotary, query_scale, past_key_values=past_key_values, **kwargs
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )

    def _rotary_scale(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor | None,
        cache: Cache | None,
        cached: int | Tensor,
    ) -> Tensor:
        """float32 [B or 1]: NTK alpha of each row. It outlives a step of decoding on the cache.

        Args:
            cached: tokens that the cache holds; of a static one a tensor, whose value is not
                asked for in a step of decoding.
        """
        if self.training or not self.config.use_dynamic_ntk:
            return inputs_embeds.new_ones(1, dtype=torch.float32)
        kept = getattr(cache, "ntk_alpha", None)
        if kept is not None and (inputs_embeds.size(1) == 1 or cached > 0):
            return kept
        if position_ids is None:
            lengths = torch.tensor([inputs_embeds.size(1)], device=inputs_embeds.device)
        else:
            lengths = position_ids.amax(-1) + 1
        alpha = ntk_alpha(lengths, self.config.seq_length)
        if cache is not None:
            cache.ntk_alpha = alpha
        return alpha


class QwenVLForConditionalGeneration(QwenVLPreTrainedModel, GenerationMixin):
    """Qwen-VL v1 with its language-model head."""

    accepts_loss_kwargs = True

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.transformer = QwenVLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def see_always(self) -> None:
        """Run the vision tower in every batch, on a blank picture where there is none.

        Where several processes train, each waits for the others at every module whose weights
        are shared out or learn: one with text alone would leave them waiting.
        """
        self.transformer.sees_always = True

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        learned_places: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits and, with labels, the loss; in training mode with labels the loss alone.

        Args:
            input_ids: int64 [B, L]; each picture is `<img>`, Q `<imgpad>`, `</img>`.
            pixel_values: float [N, 3, S, S], all pictures of the batch in order; what is known of
                pictures from before stands in its place as `image_embeds` or `patch_embeds`, see
                `QwenVLModel.forward`.
            attention_mask: int64 [B, L + cached], 0 where padded.
            labels: int64 [B, L], unshifted, -100 where nothing is learned.
            logits_to_keep: the last so many positions only; 0 for all.
            num_items_in_batch: learned tokens of the whole accumulated batch: the loss is then
                the sum over this batch divided by it, else the mean.
            learned_places: int64 [T], where in B x L a token stands whose next one is learned;
                None: looked for in `labels`.

        Returns:
            `.logits` float [B, L, vocab_size], None where only a loss is to be learned from;
            `.loss` float32 scalar.

        Raises:
            ValueError: pictures and their places differ in number.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            loss = learned_loss(hidden, self.lm_head, labels, num_items_in_batch, learned_places)
        if labels is None or not self.training:
            count = isinstance(logits_to_keep, int)
            kept = slice(-logits_to_keep, None) if count else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
