"""One answer after another over a cache of a fixed size, with the step of decoding compiled.

Where `generate` gets such a cache on a GPU it compiles the step that says a token, CUDA graphs
included: then the GPU waits no longer for Python between hundreds of small kernels. Compiling costs
time at the first answer, and again when a conversation outgrows the cache, so the cache is kept
from answer to answer and grows by doubling.
"""

import logging
import os
import shutil
import subprocess
from importlib.util import find_spec

import torch
from transformers import CompileConfig, GenerationConfig, PreTrainedModel, StaticCache

logger = logging.getLogger(__name__)

SMALLEST = 2048  # tokens of a prompt that the first cache has room for
TRIED_TOKENS = 4  # said when a cache is new: CUDA graphs are recorded in the third step
FAILURES = (RuntimeError, OSError, subprocess.SubprocessError)  # of compilers and their kernels


def reason_against(model: PreTrainedModel) -> str | None:
    """Why the step of a model cannot be compiled here; None where it can be tried."""
    if model.device.type != "cuda":
        return "the model is not on an NVIDIA GPU"
    if torch.cuda.get_device_capability(model.device) < (7, 0):
        return "this GPU is too old for compiled kernels"
    if find_spec("triton") is None:
        return "triton is not installed"
    if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return "there is no C compiler, which triton needs"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return "its quantized layers cannot be compiled"
    return None


class CompiledSteps:
    """The cache that a model answers over, and how its step is compiled. For one prompt a time."""

    def __init__(self, model: PreTrainedModel, how: CompileConfig | None = None) -> None:
        """Nothing is compiled before the first answer.

        Args:
            model: in eval mode, where it will answer.
            how: passed to `torch.compile`; default its own settings for short steps.
        """
        self._model = model
        self._how = how or CompileConfig(dynamic=False)
        self._cache: StaticCache | None = None
        self._failed = False

    def prepared(self, settings: GenerationConfig, prompt_tokens: int) -> dict[str, StaticCache]:
        """What `generate` is to get beside its settings, which are told how to compile.

        Nothing where the step cannot be compiled after all; a warning has said why.

        Args:
            settings: of the answer; `max_new_tokens` is read.
            prompt_tokens: with the image tokens.
        """
        size = cache_size(prompt_tokens, settings.max_new_tokens)
        if self._cache is None or self._cache.get_max_length() < size:
            self._make(size)
        if self._failed or self._cache is None:
            return {}
        self._cache.reset()
        settings.compile_config = self._how
        return {"past_key_values": self._cache}

    def _make(self, size: int) -> None:
        """A larger cache, and the step compiled for it."""
        self._cache = None  # before memory for the next one is asked for
        if self._failed:
            return
        cache = StaticCache(config=self._model.config, max_cache_len=size)
        ids = torch.zeros((1, TRIED_TOKENS), dtype=torch.long, device=self._model.device)
        settings = GenerationConfig(
            do_sample=False,
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            max_new_tokens=TRIED_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            compile_config=self._how,
        )
        try:
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                past_key_values=cache,
            )
        except FAILURES as error:
            self._failed = True
            first = str(error).strip().partition("\n")[0]
            logger.warning("answers come from a step that is not compiled: %s", first)
            return
        self._cache = cache


def cache_size(prompt_tokens: int, new_tokens: int) -> int:
    """Tokens that a cache has room for: the prompt's, to the next power of two, and the answer's.

    So a conversation outgrows it seldom, and answers of the same length share it.
    """
    return max(SMALLEST, 1 << (prompt_tokens - 1).bit_length()) + new_tokens
