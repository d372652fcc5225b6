"""Hugging Face transformers as a backend: the reference that exports are held against."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.backends import BackendError
from evaluation.backends.stepwise import StepwiseBackend


class HfBackend(StepwiseBackend):
    """Greedy answers from a transformers model, optionally with a PEFT adapter on top (not merged).

    Args:
        model: Folder or hub id of the base.
        template: Text round every question, with one `{prompt}`.
        adapter: PEFT folder.
        load_kwargs: Passed to `from_pretrained` (revision, trust_remote_code).
        tokenizer: Folder of another tokenizer than the model's own (what training used).

    Raises:
        BackendError: cannot be loaded.
    """

    name = "hf"

    def __init__(
        self,
        model: str,
        template: str,
        *,
        adapter: Path | None = None,
        load_kwargs: dict[str, Any] | None = None,
        tokenizer: str | None = None,
    ) -> None:
        import torch
        import transformers

        self._torch = torch
        self.version: str = transformers.__version__
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device_class = "gpu" if self._device == "cuda" else "cpu"
        super().__init__(template)
        started = time.perf_counter_ns()
        kwargs = load_kwargs or {}
        try:
            self._tokenizer = (
                transformers.AutoTokenizer.from_pretrained(tokenizer)
                if tokenizer
                else transformers.AutoTokenizer.from_pretrained(model, **kwargs)
            )
            # fp32 holds fp16 weights exactly, so only the arithmetic is finer. bf16 where the weights are bf16 and a
            # GPU's memory may be short.
            stored = transformers.AutoConfig.from_pretrained(model, **kwargs).dtype
            dtype = torch.bfloat16 if self._device == "cuda" and stored == torch.bfloat16 else torch.float32
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                model, dtype=dtype, use_safetensors=True, **kwargs
            )
            if adapter is not None:
                from peft import PeftModel

                self._model = PeftModel.from_pretrained(self._model, str(adapter))
        except (OSError, ValueError) as error:
            raise BackendError(f"{adapter or model}: transformers cannot load it: {error}") from error
        self._model.to(self._device).eval()
        self.load_ns = time.perf_counter_ns() - started
        eos = self._model.generation_config.eos_token_id
        self._end = set(eos if isinstance(eos, list) else [eos]) | {self._tokenizer.eos_token_id}

    def tokenize(self, text: str) -> list[int]:
        """Ids of a rendered prompt; BOS as the tokenizer's configuration says."""
        return list(self._tokenizer(text)["input_ids"])

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def prefill(self, ids: Sequence[int]) -> None:
        """Evaluate a prompt from an empty cache."""
        with self._torch.inference_mode():
            out = self._model(input_ids=self._torch.tensor([list(ids)], device=self._device), use_cache=True)
        self.gaps = []
        self._keep(out)

    def _keep(self, out: Any) -> None:
        """Cache, best next token and its lead, from one forward pass."""
        best = out.logits[0, -1].float().topk(2)
        self._cache, self._next = out.past_key_values, int(best.indices[0])
        self.gaps.append(float(best.values[0] - best.values[1]))

    def decode(self, max_tokens: int, *, ignore_end: bool = False, stop: Sequence[str] = ()) -> tuple[list[int], str]:
        """See `StepwiseBackend`."""
        ids: list[int] = []
        with self._torch.inference_mode():
            while len(ids) < max_tokens:
                if not ignore_end and self._next in self._end:
                    return ids, "stop"
                ids.append(self._next)
                if stop and any(word in self.detokenize(ids) for word in stop):
                    return ids, "stop"
                out = self._model(
                    input_ids=self._torch.tensor([[self._next]], device=self._device),
                    past_key_values=self._cache,
                    use_cache=True,
                )
                self._keep(out)
        return ids, "length"

    def close(self) -> None:
        """Free the model."""
        self._model = None
        self._cache = None
        if self._device == "cuda":
            self._torch.cuda.empty_cache()
