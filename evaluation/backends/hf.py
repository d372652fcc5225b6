"""Hugging Face transformers as a backend: the reference that exports are held against."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation.backends import BackendError, Generation
from evaluation.backends.stepwise import StepwiseBackend
from evaluation.tasks import render


class HfBackend(StepwiseBackend):
    """Greedy answers from a transformers model, optionally with a PEFT adapter on top (not merged).

    Args:
        model: Folder or hub id of the base.
        template: Text round every question, with one `{prompt}`.
        adapter: PEFT folder.
        load_kwargs: Passed to `from_pretrained` (revision, trust_remote_code).
        tokenizer: Folder of another tokenizer than the model's own (what training used).
        parallel: Prompts in one batch in `generate_many`, ≥ 1.

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
        parallel: int = 1,
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
            self._tokenizer = self._load_tokenizer(tokenizer or model, {} if tokenizer else kwargs)
            # fp32 holds fp16 weights exactly, so only the arithmetic is finer. bf16 where the weights are bf16 and a
            # GPU's memory may be short.
            stored = transformers.AutoConfig.from_pretrained(model, **kwargs).dtype
            dtype = torch.bfloat16 if self._device == "cuda" and stored == torch.bfloat16 else torch.float32
            self._model = self._load_model(model, dtype, kwargs)
            if adapter is not None:
                from peft import PeftModel

                self._model = PeftModel.from_pretrained(self._model, str(adapter))
        except (OSError, ValueError) as error:
            raise BackendError(f"{adapter or model}: transformers cannot load it: {error}") from error
        self._model.to(self._device).eval()
        self.load_ns = time.perf_counter_ns() - started
        eos = self._model.generation_config.eos_token_id
        self._end = set(eos if isinstance(eos, list) else [eos]) | {self._tokenizer.eos_token_id}
        self._parallel = parallel
        self.mode = "merged" if adapter is None else "adapter"

    def _load_tokenizer(self, place: str, kwargs: dict[str, Any]) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(place, **kwargs)

    def _load_model(self, place: str, dtype: Any, kwargs: dict[str, Any]) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(place, dtype=dtype, use_safetensors=True, **kwargs)

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

    def next_token(self) -> int:
        """See `StepwiseBackend`."""
        return self._next

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

    def generate_many(
        self, item_prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()
    ) -> Iterator[tuple[int, Generation]]:
        """See `evaluation.backends.Backend`; prompts of like length share a batch, so that little is padded."""
        if self._parallel == 1:
            yield from super().generate_many(item_prompts, max_tokens, stop)
            return
        prompts = [self.tokenize(render(self._template, prompt)) for prompt in item_prompts]
        places = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        for start in range(0, len(places), self._parallel):
            batch = places[start : start + self._parallel]
            made = self.generate_ids([prompts[place] for place in batch], max_tokens)
            for place, ids in zip(batch, made, strict=True):
                answer, reason = self._cut(ids, max_tokens, stop)
                text = self._text(answer, stop)
                yield place, Generation(text, len(prompts[place]), len(answer), self.load_ns, None, None, reason)

    def generate_ids(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Greedy continuations of several prompts by transformers' own `generate`, padded on the left.

        Args:
            prompts: Token ids.
            max_tokens: Limit, tokens.

        Returns:
            Ids for each; after an end token they mean nothing.
        """
        from transformers import GenerationConfig

        width = max(map(len, prompts))
        end = sorted(i for i in self._end if i is not None)
        pad = self._tokenizer.pad_token_id
        pad = (end or [0])[0] if pad is None else pad  # masked on the left, cut off on the right: any id will do
        # Named, since the model's own generation_config fills in what is not.
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=max_tokens,
            eos_token_id=end or None,
            pad_token_id=pad,
        )
        with self._torch.inference_mode():
            made = self._model.generate(**self._inputs(prompts, pad), generation_config=config)
        return [[int(i) for i in row] for row in made[:, width:].tolist()]

    def _inputs(self, prompts: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
        """Token ids and attention mask, padded on the left."""
        width = max(map(len, prompts))
        ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return {
            "input_ids": self._torch.tensor(ids, device=self._device),
            "attention_mask": self._torch.tensor(mask, device=self._device),
        }

    def _cut(self, ids: Sequence[int], max_tokens: int, stop: Sequence[str]) -> tuple[list[int], str]:
        """What `decode` would have made of these ids, and why it would have ended."""
        end = next((n for n, token in enumerate(ids) if token in self._end), None)
        answer = list(ids if end is None else ids[:end])
        if any(word in self.detokenize(answer) for word in stop):
            for n in range(1, len(answer) + 1):
                if any(word in self.detokenize(answer[:n]) for word in stop):
                    return answer[:n], "stop"
        return answer, "length" if end is None and len(answer) >= max_tokens else "stop"

    def close(self) -> None:
        """Free the model."""
        self._model = None
        self._cache = None
        if self._device == "cuda":
            self._torch.cuda.empty_cache()
