"""Hugging Face transformers, the reference that exports are compared with: text models and vision-language models."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from export.engines.engine import Asked, EngineError, Generation, LocalEngine, cut
from trainers.encode import encode_prompt


class ShownPrompt(list[int]):
    """Ids of a prompt with placeholders of its pictures; `row` is what the processor made of it, pictures included."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row["input_ids"])
        self.row = row


class HfEngine(LocalEngine):
    """A transformers model, optionally with a PEFT adapter on top (not merged).

    `tokenizer` is another folder than the model's own (what training used), `pictures` the folder that the paths of
    `![](images/….png)` start from, for a vision-language model. Raises EngineError: cannot be loaded. TrainingError:
    with `pictures`: the base has no processor that can be used.
    """

    name = "hf"

    def __init__(
        self,
        model: str,
        template: str | Callable[[Asked], str],
        *,
        adapter: Path | None = None,
        load_kwargs: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        parallel: int = 1,
        pictures: Path | None = None,
    ) -> None:
        import torch
        import transformers

        super().__init__(template)
        self._torch, self._parallel = torch, parallel
        self.version: str = transformers.__version__
        self.mode = "merged" if adapter is None else "adapter"
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        kwargs = load_kwargs or {}
        self._processor: Any = None
        if pictures:
            from trainers.pictures import load_processor
            from trainers.settings import BaseReference

            self._processor = load_processor(BaseReference(location=model, **kwargs), pictures)
        kind = transformers.AutoModelForImageTextToText if pictures else transformers.AutoModelForCausalLM
        started = time.perf_counter_ns()
        try:
            self._tokenizer: Any = (
                self._processor.tokenizer
                if self._processor
                else transformers.AutoTokenizer.from_pretrained(tokenizer or model, **({} if tokenizer else kwargs))
            )
            # fp32 holds fp16 weights exactly, so only the arithmetic is finer. bf16 where the weights are bf16 and a
            # GPU's memory may be short.
            stored = transformers.AutoConfig.from_pretrained(model, **kwargs).dtype
            dtype = torch.bfloat16 if self._device == "cuda" and stored == torch.bfloat16 else torch.float32
            self._model: Any = kind.from_pretrained(model, dtype=dtype, use_safetensors=True, **kwargs)
            if adapter is not None:
                from peft import PeftModel

                self._model = PeftModel.from_pretrained(self._model, str(adapter))
        except (OSError, ValueError) as error:
            raise EngineError(f"{adapter or model}: transformers cannot load it: {error}") from error
        self._model.to(self._device).eval()
        self.load_ns = time.perf_counter_ns() - started
        eos = self._model.generation_config.eos_token_id
        self._end = {*(eos if isinstance(eos, list) else [eos]), self._tokenizer.eos_token_id} - {None}

    @property
    def device_class(self) -> str:
        return "gpu" if self._device == "cuda" else "cpu"

    def tokenize(self, text: str) -> list[int]:
        """Ids of a rendered prompt; BOS as the tokenizer's configuration says. With pictures they keep these.

        Raises TrainingError: it shows no picture, or one cannot be read.
        """
        if self._processor:
            return ShownPrompt(self._processor.encode(text, None))
        return encode_prompt(self._tokenizer, text)

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def prefill(self, ids: Sequence[int]) -> None:
        """Evaluate a prompt from an empty cache; with pictures it must come from `tokenize`."""
        inputs = self._inputs([ids])
        if not self._processor:
            del inputs["attention_mask"]
        self._pass(**inputs)

    def _pass(self, **inputs: Any) -> None:
        with self._torch.inference_mode():
            out = self._model(**inputs, use_cache=True)
        self._cache, self._logits = out.past_key_values, out.logits[0, -1].float()
        self._next = int(self._logits.argmax())

    def next_token(self) -> int:
        return self._next

    def feed(self, token: int) -> None:
        self._pass(input_ids=self._torch.tensor([[token]], device=self._device), past_key_values=self._cache)

    def is_end(self, token: int) -> bool:
        return token in self._end

    def generate_many(
        self, prompts: Sequence[Asked], max_tokens: int, stop: Sequence[str] | None = None
    ) -> Iterator[tuple[int, Generation]]:
        """Prompts of similar length share a batch, so that little is padded, and pictures are read late."""
        if self._parallel == 1:
            yield from super().generate_many(prompts, max_tokens, stop)
            return
        lengths = [len(p if self._processor else self.tokenize(self.render(p))) for p in prompts]
        places = sorted(range(len(prompts)), key=lambda place: lengths[place])
        stop = self.stop if stop is None else stop
        for start in range(0, len(places), self._parallel):
            batch = places[start : start + self._parallel]
            if len(batch) == 1:
                yield batch[0], self.generate(prompts[batch[0]], max_tokens, stop)
                continue
            asked = [self.tokenize(self.render(prompts[place])) for place in batch]
            for place, ids, row in zip(batch, asked, self.generate_ids(asked, max_tokens), strict=True):
                answer, count, reason = self._cut(row, max_tokens, stop)
                text = cut(self.detokenize(answer), stop)
                times = self.load_ns, None, None
                yield place, Generation(text, len(ids), count, *times, reason, prompt_ids=ids, ids=answer)

    def generate_ids(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        """Greedy continuations by transformers' own `generate`; ids after an end token mean nothing."""
        from transformers import GenerationConfig

        # Named, since the model's own generation_config fills in what is not.
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=max_tokens,
            eos_token_id=sorted(self._end) or None,
            pad_token_id=self._pad,
        )
        with self._torch.inference_mode():
            rows = self._model.generate(**self._inputs(prompts), generation_config=config)
        return [[int(i) for i in row] for row in rows[:, max(map(len, prompts)) :].tolist()]

    @property
    def _pad(self) -> int:
        """Masked on the left, cut off on the right: any id will do."""
        pad = self._tokenizer.pad_token_id
        return min(self._end, default=0) if pad is None else int(pad)

    def _inputs(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What the model takes, padded on the left: ids and mask [prompts, longest], pixels in the model's dtype."""
        if self._processor:
            rows = [prompt.row for prompt in prompts]  # type: ignore[attr-defined]  # of a ShownPrompt
            batch = self._processor.collate(rows, device=self._device)
            dtype = self._model.dtype
            return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
        width = max(map(len, prompts))
        ids = [[self._pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return {
            "input_ids": self._torch.tensor(ids, device=self._device),
            "attention_mask": self._torch.tensor(mask, device=self._device),
        }

    def _cut(self, ids: Sequence[int], max_tokens: int, stop: Sequence[str]) -> tuple[list[int], int, str]:
        """What `decode` would have made of these ids."""
        end = next((n for n, token in enumerate(ids) if token in self._end), None)
        answer = list(ids if end is None else ids[:end])
        if any(word in self.detokenize(answer) for word in stop):
            for n in range(1, len(answer) + 1):
                if any(word in self.detokenize(answer[:n]) for word in stop):
                    return answer[:n], n, "stop"
        return answer, len(answer) + (end is not None), "stop" if end is not None else "length"

    def close(self) -> None:
        self._model = self._cache = self._logits = None
        if self._device == "cuda":
            self._torch.cuda.empty_cache()
