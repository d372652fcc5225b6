"""A vision-language model of transformers as a backend; questions show their pictures as `![](images/….png)`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation.backends import Generation
from evaluation.backends.hf import HfBackend
from evaluation.tasks import render
from grit_vlm.data import load_processor
from trainers.settings import BaseReference


class ShownPrompt(list[int]):
    """Token ids of a prompt, placeholders of its pictures among them, that keep the pictures.

    Attributes:
        row: What the model's processor made of the prompt (`grit_vlm.data.VisionProcessor.encode`).
    """

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row["input_ids"])
        self.row = row


class VisionBackend(HfBackend):
    """Greedy answers from a vision-language model, optionally with a PEFT adapter on top (not merged).

    Args:
        base: The model; its processor comes from there too.
        template: Text round every question, with one `{prompt}`.
        root: Folder that the pictures' paths start from.
        adapter: PEFT folder.
        parallel: Prompts in one batch in `generate_many`, ≥ 1.

    Raises:
        BackendError: cannot be loaded.
        VisionDataError: the base has no processor that can be used.
    """

    def __init__(
        self, base: BaseReference, template: str, root: Path, *, adapter: Path | None = None, parallel: int = 1
    ) -> None:
        self._processor = load_processor(base, root)
        super().__init__(
            base.location, template, adapter=adapter, load_kwargs=dict(base.load_kwargs), parallel=parallel
        )

    def _load_tokenizer(self, place: str, kwargs: dict[str, Any]) -> Any:
        return self._processor.tokenizer

    def _load_model(self, place: str, dtype: Any, kwargs: dict[str, Any]) -> Any:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(place, dtype=dtype, use_safetensors=True, **kwargs)

    def tokenize(self, text: str) -> ShownPrompt:
        """Ids of a rendered prompt, with its pictures.

        Raises:
            VisionDataError: it shows no picture, or one cannot be read.
        """
        return ShownPrompt(self._processor.encode(text, None))

    def prefill(self, ids: Sequence[int]) -> None:
        """Evaluate a prompt, as `tokenize` gave it, from an empty cache."""
        if not isinstance(ids, ShownPrompt):
            raise TypeError(f"expected ids from tokenize, which keep the pictures, got {type(ids).__name__}")
        with self._torch.inference_mode():
            out = self._model(**self._batch([ids]), use_cache=True)
        self.gaps = []
        self._keep(out)

    def generate_many(
        self, item_prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = ()
    ) -> Iterator[tuple[int, Generation]]:
        """See `evaluation.backends.Backend`; prompts of like length share a batch, pictures are read batch by batch."""
        places = sorted(range(len(item_prompts)), key=lambda place: len(item_prompts[place]))
        for start in range(0, len(places), self._parallel):
            batch = places[start : start + self._parallel]
            if len(batch) == 1:
                yield batch[0], self.generate(item_prompts[batch[0]], max_tokens, stop)
                continue
            prompts = [self.tokenize(render(self._template, item_prompts[place])) for place in batch]
            for place, prompt, ids in zip(batch, prompts, self.generate_ids(prompts, max_tokens), strict=True):
                answer, reason = self._cut(ids, max_tokens, stop)
                text = self._text(answer, stop)
                yield place, Generation(text, len(prompt), len(answer), self.load_ns, None, None, reason)

    def _inputs(self, prompts: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
        return self._batch([prompt for prompt in prompts if isinstance(prompt, ShownPrompt)])

    def _batch(self, prompts: Sequence[ShownPrompt]) -> dict[str, Any]:
        """What the model takes, padded on the left, on its device, pixels in its own precision."""
        batch = self._processor.collate([prompt.row for prompt in prompts], device=self._device)
        dtype = self._model.dtype
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
